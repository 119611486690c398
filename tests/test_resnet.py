"""The backbone and heads: names, shapes and values are those of other tools and of the recipe."""

import pytest
import torch

from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.network.norm import BatchNorm
from train.network.resnet import LAYERS, ResNet


@pytest.mark.parametrize("arch", LAYERS)
def test_weights_exchange_with_torchvision_both_ways(torchvision, arch):
    torch.manual_seed(0)
    ours = ResNet(arch, stem="imagenet", zero_init_residual=False).eval()
    theirs = torchvision.models.get_model(arch).eval()
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
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_convolutions_start_as_torchvisions_with_groups_too(torchvision):
    torch.manual_seed(0)
    theirs = torchvision.models.resnext50_32x4d().state_dict()
    for name, ours in ResNet("resnext50_32x4d", stem="imagenet").state_dict().items():
        if ours.dim() == 4:
            assert abs(ours.std() / theirs[name].std() - 1) < 0.05, name


@pytest.mark.parametrize("arch", LAYERS)
def test_a_narrow_network_has_an_eighth_of_all_channels_and_groups_as_wide_as_before(arch):
    with torch.device("meta"):
        published, narrow = (ResNet(arch, stem="imagenet", width=width) for width in (64, 8))
    whole = dict(published.named_modules())
    for name, module in narrow.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            other = whole[name]
            assert 8 * module.out_channels == other.out_channels
            assert name == "conv1" or 8 * module.in_channels == other.in_channels
            assert module.groups == max(1, other.groups // 8), name
    assert narrow.layer1[0].conv2.groups == (4 if arch == "resnext50_32x4d" else 1)
    assert 8 * narrow.num_features == published.num_features


def test_a_width_that_needs_half_a_group_is_refused():
    with pytest.raises(
        ValueError, match=r"model.width must be a multiple of 2 for resnext50_32x4d"
    ):
        ModelConfig(arch="resnext50_32x4d", width=9)
    assert ModelConfig(arch="resnext50_32x4d", width=10).width == 10
    assert ModelConfig(arch="wide_resnet50_2", width=9).width == 9


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
            lambda _m, _i, out, stem=stem: sizes.update({stem: out.x.x.shape[2]})
        )
        model(x)
    assert sizes == {"cifar": 32, "imagenet": 8}


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_a_stem_of_pixels_with_further_channels_is_the_same_convolution(stem, channels):
    model = ResNet("resnet18", stem=stem, width=8).double()
    x = torch.randn(3, 3, 20, 18, dtype=torch.float64).to(memory_format=torch.channels_last)
    wide = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, channels - 3))
    found = []
    for pixels in (x, wide):
        model.zero_grad()
        out = model.conv1(pixels)
        out.sin().sum().backward()
        assert model.conv1.weight.grad is not None
        found.append((out.detach(), model.conv1.weight.grad.clone()))
    for three, more in zip(*found, strict=True):
        torch.testing.assert_close(more, three, rtol=1e-12, atol=1e-12)
    assert model.state_dict()["conv1.weight"].shape[1] == 3


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
