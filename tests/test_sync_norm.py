"""Batch norm over two gloo ranks equals one rank with the whole batch: values and gradients."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from kernels.batch_norm import batch_norm_act

VIEWS, ROWS, CHANNELS = 2, 6, 5


def inputs(dims: int, offset: float):
    generator = torch.Generator().manual_seed(0)
    shape = (VIEWS, ROWS, CHANNELS, 3, 3) if dims == 4 else (VIEWS, ROWS, CHANNELS)
    x, residual, weighting = (torch.randn(shape, generator=generator) for _ in range(3))
    return x + offset, residual, weighting


def forward_backward(x, residual, weighting, *, group):
    """One call and its gradients. All (V, rows, C, ...); y in the same shape."""

    def flat(t):
        t = t.flatten(0, 1)
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    x, residual = (flat(t).requires_grad_() for t in (x, residual))
    weight = torch.linspace(0.5, 1.5, CHANNELS).requires_grad_()
    bias = torch.linspace(-0.1, 0.1, CHANNELS).requires_grad_()
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    y = batch_norm_act(x, weight, bias, mean, var, residual=residual, num_views=VIEWS, group=group)
    (y * flat(weighting)).sum().backward()
    shape = (VIEWS, -1, *y.shape[1:])
    return {
        "y": y.detach().reshape(shape), "dx": x.grad.reshape(shape),
        "dresidual": residual.grad.reshape(shape), "dweight": weight.grad, "dbias": bias.grad,
        "mean": mean, "var": var,
    }  # fmt: skip


def on_rank(rank: int, port: int, dims: int, offset: float, queue) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    mine = [t[:, half] for t in inputs(dims, offset)]
    found = forward_backward(*mine, group=dist.group.WORLD)
    queue.put((rank, {name: value.numpy() for name, value in found.items()}))
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize(("dims", "offset"), [(4, 0.0), (2, 0.0), (4, 1000.0)])
def test_two_ranks_with_half_the_batch_equal_one_rank(dims, offset):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    ranks = [
        context.Process(target=on_rank, args=(rank, port, dims, offset, queue)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    parts = dict(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
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
    y = batch_norm_act(
        flat[0], norm.weight, norm.bias, mean, var, residual=flat[1], num_views=VIEWS
    )
    torch.testing.assert_close(y.reshape(expected.shape), expected)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)
