"""Batch norm over two gloo ranks equals one rank with the whole batch: values and gradients."""

import dataclasses
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm

from kernels.batch_norm import Norm, NormOptions, batch_norm_act
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.network.resnet import LAYERS

VIEWS, ROWS, CHANNELS = 2, 6, 5


def inputs(dims: int, offset: float):
    generator = torch.Generator().manual_seed(0)
    shape = (VIEWS, ROWS, CHANNELS, 3, 3) if dims == 4 else (VIEWS, ROWS, CHANNELS)
    x, residual, weighting = (torch.randn(shape, generator=generator) for _ in range(3))
    return x + offset, residual, weighting


def forward_backward(x, residual, weighting, *, group, kernels="plain"):
    """One call and its gradients. All (V, rows, C, ...); y in the same shape."""

    def flat(t):
        t = t.flatten(0, 1)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    x, residual = (flat(t).requires_grad_() for t in (x, residual))
    weight = torch.linspace(0.5, 1.5, CHANNELS).requires_grad_()
    bias = torch.linspace(-0.1, 0.1, CHANNELS).requires_grad_()
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    options = NormOptions(VIEWS, group=group, kernels=kernels)
    y = batch_norm_act(x, Norm(weight, bias, mean, var), options, residual=residual)
    (y * flat(weighting)).sum().backward()
    shape = (VIEWS, -1, *y.shape[1:])
    return {
        "y": y.detach().reshape(shape), "dx": x.grad.reshape(shape),
        "dresidual": residual.grad.reshape(shape), "dweight": weight.grad, "dbias": bias.grad,
        "mean": mean, "var": var,
    }  # fmt: skip


def torch_sync_batch_norm(x, residual, weighting) -> dict:
    """forward_backward by nn.SyncBatchNorm's own function, one pass for each view.

    Its five primitives exist for CUDA alone: their formulas stand in for them here.
    """

    def rows(t):
        return t.transpose(0, 1).flatten(1)

    def of_channels(t, x):
        return t.view(1, -1, *[1] * (x.dim() - 2))

    def stats(x, eps):
        return rows(x).mean(1), (rows(x).var(1, correction=0) + eps).rsqrt()

    def gather_stats(x, means, invstds, mean, var, momentum, eps, counts):
        total, counts = counts.sum(), counts[:, None]
        all_mean = (means * counts).sum(0) / total
        square = ((invstds**-2 - eps + means**2) * counts).sum(0) / total - all_mean**2
        mean.lerp_(all_mean, momentum)
        var.lerp_(square * total / (total - 1), momentum)
        return all_mean, (square + eps).rsqrt()

    def elemt(x, weight, bias, mean, invstd, eps):
        scale = of_channels(weight * invstd, x)
        return (x - of_channels(mean, x)) * scale + of_channels(bias, x)

    def backward_reduce(dy, x, mean, invstd, weight, *_):
        sum_dy, centred = rows(dy).sum(1), rows(x) - mean[:, None]
        sum_dy_x = (rows(dy) * centred).sum(1)
        return sum_dy, sum_dy_x, sum_dy_x * invstd, sum_dy

    def backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_x, counts):
        total = counts.sum()
        centred = (x - of_channels(mean, x)) * of_channels(invstd**2 * sum_dy_x / total, x)
        return (dy - of_channels(sum_dy / total, x) - centred) * of_channels(weight * invstd, x)

    torch.batch_norm_stats, torch.batch_norm_elemt = stats, elemt
    torch.batch_norm_gather_stats_with_counts = gather_stats
    torch.batch_norm_backward_reduce = backward_reduce
    torch.batch_norm_backward_elemt = backward_elemt
    x, residual = (t.clone().requires_grad_() for t in (x, residual))
    weight = torch.linspace(0.5, 1.5, CHANNELS).requires_grad_()
    bias = torch.linspace(-0.1, 0.1, CHANNELS).requires_grad_()
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    views = [
        SyncBatchNorm.apply(
            view.contiguous(), weight, bias, mean, var, 1e-5, 0.1, dist.group.WORLD, 2
        )
        for view in x
    ]
    y = torch.relu(torch.stack(views) + residual)
    (y * weighting).sum().backward()
    return {
        "y": y.detach(), "dx": x.grad, "dresidual": residual.grad, "dweight": weight.grad,
        "dbias": bias.grad, "mean": mean, "var": var,
    }  # fmt: skip


def on_rank(rank: int, port: int, dims: int, offset: float, kernels: str, queue) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    mine = [t[:, half] for t in inputs(dims, offset)]
    if kernels == "torch":
        found = torch_sync_batch_norm(*mine)
    else:
        found = forward_backward(*mine, group=dist.group.WORLD, kernels=kernels)
    queue.put((rank, {name: value.numpy() for name, value in found.items()}))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("dims", "offset", "kernels"),
    [
        (4, 0.0, "plain"), (2, 0.0, "plain"), (4, 1000.0, "plain"),
        (4, 0.0, "triton"), (2, 0.0, "triton"), (4, 1000.0, "triton"),
        (4, 0.0, "torch"),
    ],
)  # fmt: skip
def test_two_ranks_with_half_the_batch_equal_one_rank(dims, offset, kernels):
    port = free_port()
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(on_rank, args=(port, dims, offset, kernels, queue), nprocs=2)  # raises what a rank did
    parts = dict(queue.get() for _ in range(2))
    whole = forward_backward(*(t.double().float() for t in inputs(dims, offset)), group=None)
    tolerance = 1e-5 if offset == 0 else 2e-3  # 1000 + randn keeps 1e-4 of its digits in fp32
    for name, expected in whole.items():
        a, b = (torch.from_numpy(parts[rank][name]) for rank in range(2))
        if name in ("y", "dx", "dresidual"):
            found = torch.cat([a, b], dim=1)
        elif name in ("dweight", "dbias"):
            found = a + b
        else:
            assert torch.equal(a, b)
            found = a
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_plain_twin_equals_torch_for_each_view():
    x, residual, _ = inputs(4, 0.0)
    norm = nn.BatchNorm2d(CHANNELS)
    expected = torch.stack([torch.relu(norm(v) + r) for v, r in zip(x, residual, strict=True)])
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    flat = [t.flatten(0, 1).contiguous(memory_format=torch.channels_last) for t in (x, residual)]
    ours = Norm(norm.weight, norm.bias, mean, var)
    y = batch_norm_act(flat[0], ours, NormOptions(VIEWS), residual=flat[1])
    torch.testing.assert_close(y.reshape(expected.shape), expected)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)


SMALL = ModelConfig(
    arch="resnet18", stem="imagenet", width=8, projector_layers=2, projector_dim=16,
    projector_hidden=16, predictor_hidden=8,
)  # fmt: skip
IMAGES = 8


def step(options: dict, images: slice, *, group, compiled: bool) -> dict:
    """A SimSiam step on some of the images: loss and gradients, averaged over the ranks."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **options)
    with pytest.MonkeyPatch.context() as patch:  # one block a stage takes half as long to compile
        patch.setitem(LAYERS, config.arch, LAYERS[config.arch]._replace(depths=(1, 1, 1, 1)))
        model = SimSiam(config, MethodConfig()).to(memory_format=torch.channels_last)
    model.sync_over(group)
    views = torch.randn(2, IMAGES, 3, 32, 32)[:, images].flatten(0, 1)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    loss, _ = call(views.contiguous(memory_format=torch.channels_last))
    loss.backward()
    found = {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}
    if group is not None:
        for value in found.values():
            dist.all_reduce(value)
            value /= 2
    return {name: value.numpy() for name, value in found.items()}


def compiled_on_rank(rank: int, port: int, options: dict, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    half = slice(rank * IMAGES // 2, (rank + 1) * IMAGES // 2)
    group = dist.new_group()  # of its own, as in training: not that of the gradients
    found = step(options, half, group=group, compiled=True)
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"kernels": "plain"}, marks=pytest.mark.slow),
        {"kernels": "triton"},
        pytest.param(
            {"kernels": "triton", "arch": "resnet50", "conv_stats": "true"}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_a_compiled_step_on_two_ranks_equals_an_eager_one_on_one(options):
    queue = mp.get_context("spawn").Queue()
    context = mp.spawn(compiled_on_rank, args=(free_port(), options, queue), nprocs=2, join=False)
    found = queue.get(timeout=240)
    while not context.join():
        pass
    plain = options | {"kernels": "plain"}
    whole = step(plain, slice(0, IMAGES), group=None, compiled=False)
    assert found.keys() == whole.keys()
    for name, expected in whole.items():
        scale = max(abs(expected).max(), 1e-2)
        assert abs(found[name] - expected).max() / scale < 1e-3, name
