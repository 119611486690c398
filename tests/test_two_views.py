"""One forward for both views equals the paper's two passes; ours against a plain torch model."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from kernels.batch_norm import Norm, NormOptions, batch_norm_act
from train.config import MethodConfig, ModelConfig, OptimConfig
from train.methods.simsiam import SimSiam
from train.network.norm import BatchNorm, Convolved, set_views
from train.network.resnet import LAYERS
from train.run.optim import build_optimizer, set_lr

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ModelConfig(
    arch="resnet18", stem="cifar", width=8, projector_layers=2, projector_dim=32,
    projector_hidden=32, predictor_hidden=8,
)  # fmt: skip


LR = 0.05 * 64 / 256  # the recipe's, at the test's batch of 64


class TwoPass(nn.Module):
    """The official algorithm, written out: nn.BatchNorm, one pass for each view."""

    def __init__(self, ours: SimSiam):
        super().__init__()
        self.net = copy.deepcopy(ours)
        set_views(self.net, 1)
        self.replace(self.net)

    def replace(self, module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, BatchNorm):
                setattr(module, name, TorchNorm(child))  # under our call's arguments
            else:
                self.replace(child)

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        z1 = self.net.projector(self.net.backbone(x1))
        z2 = self.net.projector(self.net.backbone(x2))
        p1, p2 = self.net.predictor(z1), self.net.predictor(z2)
        cosine = nn.CosineSimilarity(dim=1)
        return -(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) * 0.5


class TorchNorm(nn.Module):
    """nn.BatchNorm2d / 1d under our call's arguments."""

    def __init__(self, ours: BatchNorm):
        super().__init__()
        features, affine = len(ours.running_mean), ours.weight is not None
        self.norm2d = nn.BatchNorm2d(features, affine=affine)
        self.norm1d = nn.BatchNorm1d(features, affine=affine)
        self.norm2d.load_state_dict(ours.state_dict())
        for name in ("weight", "bias"):
            setattr(self.norm1d, name, getattr(self.norm2d, name))
        self.norm1d._buffers = self.norm2d._buffers

    def forward(self, x, *, residual=None, relu=False):
        y = self.norm2d(x) if x.dim() == 4 else self.norm1d(x)
        if residual is not None:
            y = y + residual
        return torch.relu(y) if relu else y

    def convolve(self, x, conv):
        return Convolved(conv(x))

    def then_conv(self, x, conv):
        return Convolved(conv(self(x.x, relu=True)))

    def end_block(self, x, shortcut, downsample=None):
        skip = shortcut.x if downsample is None else downsample(shortcut.x)
        y = self(x.x, residual=skip, relu=True)
        return y, y

    def end_block_then_conv(self, x, shortcut, downsample, conv):
        y, skip = self.end_block(x, shortcut, downsample)
        return Convolved(conv(y)), skip


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to b, or to 0.01 an element where b (a bias that starts at 0) is smaller."""
    return ((a - b).norm() / b.norm().clamp_min(0.01 * b.numel() ** 0.5)).item()


def test_twenty_steps_equal_two_passes_of_plain_batch_norm():
    torch.manual_seed(0)
    ours = SimSiam(SMALL, MethodConfig()).to(memory_format=torch.channels_last)
    plain = TwoPass(ours)
    config = OptimConfig(lr=LR, weight_decay=5e-4)
    mine = build_optimizer(ours, config, lr=LR, device=torch.device("cpu"))
    predictor = list(plain.net.predictor.parameters())
    rest = [p for p in plain.parameters() if all(p is not q for q in predictor)]
    theirs = torch.optim.SGD(
        [{"params": rest}, {"params": predictor}], lr=LR, momentum=0.9, weight_decay=5e-4
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        image = torch.randn(64, 3, 4, 4, generator=generator).repeat_interleave(4, 2)
        image = image.repeat_interleave(4, 3)
        noise = torch.randn(2, 64, 3, 16, 16, generator=generator)
        # the second view is brighter: shared statistics would show
        x = image + 0.1 * noise + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1, 1)
        both = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        lr = set_lr(mine, config, step, lr=LR, total=20, steps_per_epoch=5)
        theirs.param_groups[0]["lr"] = lr
        loss, _ = ours(both)
        reference = plain(x[0], x[1])
        assert loss.item() == pytest.approx(reference.item(), rel=1e-4, abs=1e-6), step
        for optimizer, value in ((mine, loss), (theirs, reference)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    reference_state = {
        name.replace(".norm2d", "").removeprefix("net."): value
        for name, value in plain.state_dict().items()
        if "norm1d" not in name
    }
    state = ours.state_dict()
    assert state.keys() == reference_state.keys()
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            assert value.item() == 40  # twice a step, as two passes
        elif name.endswith("running_mean"):  # in units of the spread: a mean may be 0
            spread = state[name.replace("mean", "var")].sqrt()
            assert ((value - reference_state[name]) / spread).abs().max() < 1e-4, name
        else:
            assert relative_error(value, reference_state[name]) < 1e-4, name


def test_statistics_are_per_view_not_over_the_concatenated_batch():
    x = torch.cat([torch.randn(8, 4), 100 + 3 * torch.randn(8, 4)])
    y = batch_norm_act(x, Norm(), NormOptions(2, relu=False))
    for view in y.chunk(2):
        torch.testing.assert_close(view.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(view.std(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.randn(4, 3, 5, 5), "channels_last"),
        (lambda: torch.randn(4, 3, 5), r"\(N, C, H, W\) or \(N, C\)"),
        (lambda: torch.randn(5, 3), "num_views=2"),
    ],
)
def test_wrong_layout_or_shape_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        batch_norm_act(make(), Norm(), NormOptions(2))


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet18", {"recompute": True}),
        ("resnext50_32x4d", {"recompute": True}),  # grouped convolutions
        ("resnet50", {"conv_stats": "true"}),
    ],
)
def test_the_triton_kernels_take_the_same_step_as_plain_torch(arch, options, monkeypatch):
    """A whole step of the network, every operator in its place: loss, gradients, buffers."""
    if arch != "resnet18":  # the interpreter takes as long for 5 blocks as for the 8 of resnet18
        depths = 2 if "conv_stats" in options else 1, 1, 1, 1
        monkeypatch.setitem(LAYERS, arch, LAYERS[arch]._replace(depths=depths))
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    x = x.to(memory_format=torch.channels_last)
    found = []
    for kernels in ({"kernels": "plain"}, {"kernels": "triton"} | options):
        torch.manual_seed(0)
        config = dataclasses.replace(SMALL, stem="imagenet", arch=arch, **kernels)
        model = SimSiam(config, MethodConfig()).to(DEVICE, memory_format=torch.channels_last)
        loss, scalars = model(x.to(DEVICE))
        loss.backward()
        grads = {f"d{n}": p.grad for n, p in model.named_parameters()}
        found.append(grads | dict(model.named_buffers()) | {"loss": loss, "std": scalars["z_std"]})
    for name, value in found[1].items():
        assert relative_error(value.float(), found[0][name].float()) < 1e-3, name


def test_torch_compile_sees_one_graph_and_computes_the_same():
    torch.manual_seed(0)
    model = SimSiam(SMALL, MethodConfig()).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 3, 16, 16).to(memory_format=torch.channels_last)
    for _ in range(2):
        loss, scalars = compiled(x)
        expected, _ = plain(x)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert scalars["z_std"] > 0
