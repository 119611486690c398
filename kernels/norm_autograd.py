"""Batch norm as autograd sees it: statistics over ranks, the operators, and their gradient.

Stands between kernels/batch_norm.py (what networks call) and the operators: norm_forward and
norm_backward (Triton), or norm_reference, which is what the CPU runs over several ranks.
A newcomer's mistake: looking for the gradient of the statistics. They are made outside of autograd;
the formula of `backward` holds it already, which is why it needs the sums over all ranks.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import norm_reference


class Norm(NamedTuple):
    """Parameters and running statistics of one batch norm, (C,) fp32 each or None."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


# Triton's operators are imported where they are used: Inductor comes with them, which is a quarter
# of the start of a program that has no CUDA device.


def forward_operators(with_triton: bool) -> ModuleType:
    """norm_forward or its plain twin."""
    if with_triton:
        from kernels.gpu import norm_forward

        return norm_forward
    return norm_reference


def backward_operators(with_triton: bool) -> ModuleType:
    """norm_backward or its plain twin."""
    if with_triton:
        from kernels.gpu import norm_backward

        return norm_backward
    return norm_reference


def batch_statistics(
    pairs: list[tuple[Tensor, Norm]], num_views: int, momentum: float, eps: float, group_name: str,
    with_triton: bool,
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:  # fmt: skip
    """(mean, rstd) of each tensor, (V, C) fp32, with the running statistics updated.

    Over ranks also the rows of each view on all of them, (V, 1). The sums on the wire are in fp64:
    with mean 1000 and std 1 an fp32 sum of squares would keep no digit of the variance.
    """
    operators = forward_operators(with_triton)
    if not group_name:
        return [
            operators.statistics(
                rows_of(x), norm.running_mean, norm.running_var, num_views, momentum, eps, False
            )
            for x, norm in pairs
        ], None
    local = [
        operators.statistics(rows_of(x), None, None, num_views, momentum, eps, True)
        for x, _ in pairs
    ]
    mean, var = (torch.cat(parts, dim=1).double() for parts in zip(*local, strict=True))
    count = torch.full_like(mean[:, :1], rows_of(pairs[0][0]).shape[0] // num_views)
    sums = torch.cat([mean * count, (var + mean * mean) * count, count], dim=1)
    sums = _all_reduce(sums, group_name)
    total = sums[:, -1:]
    mean, square = (sums[:, :-1] / total).chunk(2, dim=1)
    var = (square - mean * mean).clamp_min(0)
    rstd, unbiased = (var + eps).rsqrt().float(), var * (total / (total - 1).clamp_min(1))
    mean, unbiased, found, start = mean.float(), unbiased.float(), [], 0
    for x, norm in pairs:
        part = slice(start, start := start + x.shape[1])
        if norm.running_mean is not None and norm.running_var is not None:
            new_mean, new_var = norm.running_mean, norm.running_var
            for view in range(num_views):
                new_mean = new_mean.lerp(mean[view, part], momentum)
                new_var = new_var.lerp(unbiased[view, part], momentum)
            keep_finite(norm.running_mean, norm.running_var, new_mean, new_var)
        found.append((mean[:, part].contiguous(), rstd[:, part].contiguous()))
    return found, total.float()


def keep_finite(mean: Tensor, var: Tensor, new_mean: Tensor, new_var: Tensor) -> None:
    """Update running statistics, but not those of channels with NaN or infinity: they would stay.

    The optimizer skips such a step; its statistics are left out with it. Shapes: (C,) each.
    """
    is_finite = new_var.isfinite()  # the mean is, where the variance is
    mean.copy_(torch.where(is_finite, new_mean, mean))
    var.copy_(torch.where(is_finite, new_var, var))


Second = tuple[Tensor | None, Tensor | None, Tensor | None]  # x2, mean2, rstd2


class NormAct(torch.autograd.Function):
    """Normalise, add the shortcut, ReLU; the gradient goes through the statistics too."""

    @staticmethod
    def forward(  # noqa: D102 - torch's contract
        ctx, x, shortcut, weight, bias, weight2, bias2, mean, rstd, mean2, rstd2, total,
        relu, fork, pool, group_name, with_triton,
    ):  # fmt: skip
        operators = forward_operators(with_triton)
        if pool:
            from kernels.gpu import norm_pool

            y, bits = norm_pool.apply_pool(rows_of(x), mean, rstd, weight, bias, *x.shape[2:])
            y = shaped_like(y, x, norm_pool.pooled)
        else:
            rows2 = rows_of(shortcut) if shortcut is not None else None
            y, bits = operators.apply(
                rows_of(x), mean, rstd, weight, bias, rows2, mean2, rstd2, weight2, bias2, relu
            )
            y = shaped_like(y, x)
        kept = shortcut if mean2 is not None else None
        ctx.save_for_backward(x, kept, weight, bias, weight2, mean, rstd, mean2, rstd2, total, bits)
        ctx.has_shortcut, ctx.relu, ctx.with_triton = shortcut is not None, relu, with_triton
        ctx.group_name, ctx.pool = group_name, pool
        ctx.set_materialize_grads(False)
        return (y, y.view_as(y)) if fork else y

    @staticmethod
    def backward(ctx, *grads):  # noqa: D102 - torch's contract
        x, shortcut, weight, bias, weight2, mean, rstd, mean2, rstd2, total, bits = (
            ctx.saved_tensors
        )
        given = [rows_of(_channels_last(grad)) for grad in grads if grad is not None]
        if not given:  # a later function gave no gradient; on all ranks alike
            return (None,) * 16
        dy, dy2 = given if len(given) == 2 else (given[0], None)
        second: Second = (None, None, None)
        if shortcut is not None:
            second = (rows_of(shortcut), mean2, rstd2)
        write_g = ctx.has_shortcut and (ctx.relu or dy2 is not None)
        size = (x.shape[2], x.shape[3]) if ctx.pool else (0, 0)
        g, dx, dx2, dparam = _gradients(
            dy, dy2, rows_of(x), mean, rstd, weight, bias, second, weight2, total, bits, ctx.relu,
            write_g, size, ctx.group_name, ctx.with_triton,
        )  # fmt: skip
        dshortcut = None
        if ctx.has_shortcut:
            dshortcut = shaped_like(dx2 if shortcut is not None else g, x)
            if g is dy:  # autograd may add to what it is given: not to the caller's gradient
                dshortcut = dshortcut.clone()
        dweight, dbias, dweight2, dbias2 = None, None, None, None
        if weight is not None:
            dbias, dweight = dparam[0].to(weight.dtype), dparam[1].to(weight.dtype)
        if weight2 is not None:
            dbias2, dweight2 = dparam[3].to(weight2.dtype), dparam[2].to(weight2.dtype)
        return shaped_like(dx, x), dshortcut, dweight, dbias, dweight2, dbias2, *(None,) * 10


class NormActConv(torch.autograd.Function):
    """conv(relu(norm(x))) that keeps x alone: backward normalises again, then goes on as usual.

    Costs one more pass that reads x and writes the normalised map; saves the map.
    """

    @staticmethod
    def forward(  # noqa: D102 - torch's contract
        ctx, x, weight, bias, conv_weight, mean, rstd, total, stride, padding, group_name,
    ):  # fmt: skip
        ctx.save_for_backward(x, weight, bias, conv_weight, mean, rstd, total)
        ctx.stride, ctx.padding, ctx.group_name = stride, padding, group_name
        y = _normalised(x, mean, rstd, weight, bias)
        with torch.autocast(x.device.type, enabled=False):  # in x's dtype, forward and backward
            return F.conv2d(y, conv_weight.to(x.dtype), None, stride, padding)

    @staticmethod
    def backward(ctx, *grads):  # noqa: D102 - torch's contract
        x, weight, bias, conv_weight, mean, rstd, total = ctx.saved_tensors
        y = _normalised(x, mean, rstd, weight, bias)
        dy, dconv, _ = torch.ops.aten.convolution_backward(
            _channels_last(grads[0]), y, conv_weight.to(x.dtype), None, ctx.stride, ctx.padding,
            (1, 1), False, (0, 0), 1, (True, True, False),
        )  # fmt: skip
        bits = torch.empty(0, 0, dtype=torch.uint8, device=x.device)
        _, dx, _, dparam = _gradients(
            rows_of(_channels_last(dy)), None, rows_of(x), mean, rstd, weight, bias,
            (None, None, None), None, total, bits, True, False, (0, 0), ctx.group_name, True,
        )  # fmt: skip
        dweight, dbias = dparam[1].to(weight.dtype), dparam[0].to(bias.dtype)
        dconv = dconv.to(conv_weight.dtype)
        return shaped_like(dx, x), dweight, dbias, dconv, None, None, None, None, None, None


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y, _ = forward_operators(True).apply(
        rows_of(x), mean, rstd, weight, bias, None, None, None, None, None, True
    )
    return shaped_like(y, x)


def _gradients(
    dy: Tensor, dy2: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, second: Second, weight2: Tensor | None, total: Tensor | None, bits: Tensor,
    relu: bool, write_g: bool, size: tuple[int, int], group_name: str, with_triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(g, dx, dx2, dparam) of (rows, C) tensors, with the sums over all ranks."""
    operators = backward_operators(with_triton)
    g, sums, dparam = operators.reduce(
        dy, dy2, x, mean, rstd, weight, bias, *second, bits, relu, write_g, *size
    )
    inv_count = len(mean) / x.shape[0]
    if group_name and total is not None:
        sums, inv_count = _all_reduce(sums, group_name) / total[..., None], 1.0
    g = g if write_g else dy
    dx, dx2 = operators.backward(
        g, x, mean, rstd, weight, bias, *second, weight2, sums, bits if size[0] else None,
        inv_count, relu and not write_g, *size,
    )  # fmt: skip
    return g, dx, dx2, dparam


def _all_reduce(x: Tensor, group_name: str) -> Tensor:
    """The sum over ranks by a functional collective, which torch.compile keeps in its graph."""
    reduced = torch.ops._c10d_functional.all_reduce(x, "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(reduced)


def _channels_last(grad: Tensor) -> Tensor:
    """A gradient in the layout of its tensor: autograd's own functions may give another."""
    if grad.dim() == 4:
        return grad.contiguous(memory_format=torch.channels_last)
    return grad.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, C): a view of the memory, never a copy, for channels_last and (N, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) if x.dim() == 4 else x


def shaped_like(rows: Tensor, x: Tensor, size: Callable[[int], int] = int) -> Tensor:
    """(rows, C) as x's shape, channels_last; `size` says what became of height and width."""
    if x.dim() == 2:
        return rows.view(x.shape)
    n, c, h, w = x.shape
    return rows.view(n, size(h), size(w), c).permute(0, 3, 1, 2)
