"""The backbone and heads: names, shapes and values are those of other tools and of the recipe."""

import pytest
import torch

from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.network.norm import BatchNorm
from train.network.resnet import ResNet


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_weights_exchange_with_torchvision_both_ways(torchvision, arch):
    torch.manual_seed(0)
    ours = ResNet(arch, stem="imagenet", zero_init_residual=False).eval()
    theirs = getattr(torchvision.models, arch)(num_classes=3).eval()
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    ours.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for module in ours.modules():  # running statistics that are not 0 and 1
            if isinstance(module, BatchNorm):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.8, 1.2)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    ours.load_state_dict(
        getattr(torchvision.models, arch)(num_classes=1).state_dict(), strict=False
    )


def test_last_norm_of_each_block_starts_at_zero():
    model = ResNet("resnet50", stem="imagenet")
    blocks = [block for index in range(1, 5) for block in getattr(model, f"layer{index}")]
    assert len(blocks) == 16
    assert all(block.bn3.weight.abs().max() == 0 for block in blocks)
    assert all(block.bn2.weight.min() == 1 for block in blocks)


def test_cifar_stem_keeps_the_resolution():
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    sizes = {}
    for stem in ("cifar", "imagenet"):
        model = ResNet("resnet18", stem=stem).eval()
        model.layer1.register_forward_hook(
            lambda _m, _i, out, stem=stem: sizes.update({stem: out[0].shape[2]})
        )
        model(x)
    assert sizes == {"cifar": 32, "imagenet": 8}


def test_heads_are_the_recipes():
    model = SimSiam(ModelConfig(), MethodConfig())
    shapes = {
        name: tuple(p.shape) for name, p in model.named_parameters() if "backbone" not in name
    }
    assert shapes == {
        "projector.0.linear.weight": (2048, 2048),
        "projector.0.norm.weight": (2048,),
        "projector.0.norm.bias": (2048,),
        "projector.1.linear.weight": (2048, 2048),
        "projector.1.norm.weight": (2048,),
        "projector.1.norm.bias": (2048,),
        "projector.2.linear.weight": (2048, 2048),  # its batch norm has no affine part
        "predictor.0.linear.weight": (512, 2048),
        "predictor.0.norm.weight": (512,),
        "predictor.0.norm.bias": (512,),
        "predictor.1.weight": (2048, 512),
        "predictor.1.bias": (2048,),
    }
    cifar = SimSiam(ModelConfig(arch="resnet18", stem="cifar", projector_layers=2), MethodConfig())
    assert len(cifar.projector) == 2
    assert cifar.projector[0].linear.weight.shape == (512, 512)  # 0: the backbone's dimension


def test_projector_output_is_normalised_without_relu():
    torch.manual_seed(0)
    model = SimSiam(ModelConfig(arch="resnet18", projector_dim=16), MethodConfig())
    z = model.projector(torch.randn(64, 512))
    for view in z.chunk(2):
        torch.testing.assert_close(view.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    assert z.min() < 0
