"""Batch norm as autograd sees it: the operators with their gradient, on given statistics.

Between kernels/batch_norm.py and the operators: those of kernels/gpu (Triton), or their plain twins
below, which several ranks on the CPU run. The twins are the specification that the kernels are held
to: same arguments and results, but ReLU's mask is a byte an element, and there is no max-pool.
The statistics are computed outside of autograd: `backward`'s formula holds their gradient, which is
why it needs the sums over all ranks.

V views, R rows of a view, C channels; rows are (V R, C).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from kernels.choose import Kernels

# Triton's operators are imported where they are used: Inductor comes with them, which is a quarter
# of the start of a program that has no CUDA device.


class NormOptions(NamedTuple):
    """How a batch norm is computed; all but the last three are those of the whole network."""

    num_views: int = 1
    """Equal slices of the batch, each with its own statistics."""
    training: bool = True
    """False: the running statistics normalise, and nothing is updated."""
    group: dist.ProcessGroup | None = None
    """The statistics are over all its ranks: one all_reduce per direction."""
    kernels: Kernels = "auto"
    momentum: float = 0.1
    eps: float = 1e-5
    relu: bool = True
    fork: bool = False
    """The result twice (batch_norm.block_end)."""
    pool: bool = False
    """Max-pool follows in the same kernel (Triton only)."""


class NormAct(torch.autograd.Function):
    """Normalise, add the shortcut, ReLU; the gradient goes through the statistics too."""

    @staticmethod
    def forward(  # noqa: D102 - torch's contract
        ctx,
        options,  # NormOptions, its kernels "triton" or "plain"
        total,  # (V, 1): rows of each view on all ranks; None: on this rank alone
        statistics,  # mean and rstd (V, C), with a second batch norm its two too
        x,  # (N, C, H, W) channels_last or (N, C)
        shortcut,  # as x, or None; what a second batch norm normalises
        weight,  # (C,), as the other three; None without affine part
        bias,
        weight2,  # of a second batch norm
        bias2,
    ):  # no *params: without gradients Dynamo then miscounts, and leaves ctx out
        params = [t for t in (weight, bias, weight2, bias2) if t is not None]
        inputs = _inputs(x, shortcut, statistics)
        residual = rows_of(shortcut) if shortcut is not None and len(inputs) == 3 else None
        if options.pool:
            from kernels.gpu.norm_forward import apply_pool, pooled

            y, bits = apply_pool(inputs, params, list(x.shape[2:]))
            y = shaped_like(y, x, pooled)
        else:
            apply = plain_apply
            if options.kernels == "triton":
                from kernels.gpu.norm_forward import apply
            y, bits = apply(inputs, residual, params, options.relu)
            y = shaped_like(y, x)
        kept = shortcut if len(inputs) > 3 else None
        ctx.save_for_backward(total, bits, x, kept, *statistics, *params)
        ctx.options, ctx.has_shortcut, ctx.num_params = options, shortcut is not None, len(params)
        ctx.set_materialize_grads(False)
        return (y, y.view_as(y)) if options.fork else y

    @staticmethod
    def backward(ctx, *grads):  # noqa: D102 - torch's contract
        total, bits, x, kept, *rest = ctx.saved_tensors
        statistics = rest[: len(rest) - ctx.num_params]
        params = rest[len(statistics) :]
        dys = [rows_of(_channels_last(grad)) for grad in grads if grad is not None]
        if not dys:  # a later function gave no gradient; on all ranks alike
            return (None,) * 9
        size = list(x.shape[2:]) if ctx.options.pool else []
        write_g = ctx.has_shortcut and (ctx.options.relu or len(dys) == 2)
        reduce = plain_reduce
        if ctx.options.kernels == "triton":
            from kernels.gpu.norm_backward import reduce
        inputs = _inputs(x, kept, statistics)
        g, sums, dparam = reduce(dys, inputs, params, bits, ctx.options.relu, write_g, size)
        g = g if write_g else dys[0]
        tap = bits if size else None
        mask_from_x = ctx.options.relu and not write_g
        dx, dx2 = _gradients(g, inputs, params, sums, (tap, size, mask_from_x), total, ctx.options)
        dshortcut = None
        if ctx.has_shortcut:
            dshortcut = shaped_like(g if kept is None else dx2, x)
            if g is dys[0]:  # autograd may add to what it is given: not to the caller's gradient
                dshortcut = dshortcut.clone()
        dparams = _of_params(dparam, params)
        return None, None, None, shaped_like(dx, x), dshortcut, *dparams


class ConvOptions(NamedTuple):
    """A convolution between two batch norms, and what of it is fused with them."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    groups: int = 1
    recompute: bool = False
    """The normalised map is not kept: backward runs the normalising kernel once more, 4 bytes an
    element of x in bf16 against the 2 that are not kept."""
    statistics: bool = False
    """Its kernel also sums for the batch norm that follows; 1x1 of stride 1 alone."""
    reduce: bool = False
    """The gradient's kernel also sums for the batch norm before; 1x1 of stride 1 alone."""


class ConvStatistics(torch.autograd.Function):
    """A 1x1 convolution of stride 1, and part: batch norm's gradient goes through its output."""

    @staticmethod
    def forward(  # noqa: D102 - torch's contract
        ctx,
        options,  # NormOptions
        y,  # (N, C, H, W) channels_last
        conv_weight,  # (D, C, 1, 1)
    ):
        ctx.save_for_backward(y, conv_weight)
        z, part = _convolved(options, ConvOptions(statistics=True), y, conv_weight.to(y.dtype))
        ctx.mark_non_differentiable(part)
        return z, part

    @staticmethod
    def backward(ctx, *grads):  # noqa: D102 - torch's contract
        y, conv_weight = ctx.saved_tensors
        dy, dconv = _conv_gradients(ConvOptions(), grads[0], y, conv_weight, (True, True))
        return None, dy, dconv


class NormActConv(torch.autograd.Function):
    """conv(relu(norm(x) + shortcut)), fused as ConvOptions has it. Triton kernels only."""

    @staticmethod
    def forward(  # noqa: D102 - torch's contract
        ctx,
        options,  # NormOptions
        total,  # as NormAct's
        statistics,
        conv,  # ConvOptions
        x,  # (N, C, H, W) channels_last
        shortcut,  # as NormAct's
        conv_weight,  # (D, C / groups, h, w)
        weight,  # (C,), as the other three, which may be None
        bias,
        weight2,
        bias2,
    ):
        from kernels.gpu.norm_forward import apply

        params = [t for t in (weight, bias, weight2, bias2) if t is not None]
        inputs = _inputs(x, shortcut, statistics)
        residual = rows_of(shortcut) if shortcut is not None and len(inputs) == 3 else None
        y, bits = apply(inputs, residual, params, True)
        y = shaped_like(y, x)
        z, part = _convolved(options, conv, y, conv_weight.to(x.dtype))
        kept = shortcut if len(inputs) > 3 else None
        kept_y = None if conv.recompute else y
        ctx.save_for_backward(total, bits, x, kept, kept_y, conv_weight, *statistics, *params)
        ctx.options, ctx.conv = options, conv
        ctx.has_shortcut, ctx.num_params = shortcut is not None, len(params)
        if part is not None:
            ctx.mark_non_differentiable(part)
        ctx.set_materialize_grads(False)
        return z, part, y if shortcut is not None else None

    @staticmethod
    def backward(ctx, *grads):  # noqa: D102 - torch's contract
        from kernels.gpu.norm_backward import reduce
        from kernels.gpu.norm_conv import conv_reduce
        from kernels.gpu.norm_forward import apply

        total, bits, x, kept, y, conv_weight, *rest = ctx.saved_tensors
        statistics = rest[: len(rest) - ctx.num_params]
        params, inputs = rest[len(statistics) :], _inputs(x, kept, statistics)
        if y is None:
            y = shaped_like(apply(inputs, None, params, True)[0], x)
        dz, _, dy2 = (None if grad is None else _channels_last(grad) for grad in grads)
        assert dz is not None  # the next batch norm's
        dy2 = None if dy2 is None else rows_of(dy2)
        conv, fused = ctx.conv, ctx.conv.reduce
        dy, dconv = _conv_gradients(conv, dz, y, conv_weight, (not fused, True))
        write_g = fused or ctx.has_shortcut
        if fused:
            matrix = conv_weight.to(x.dtype).flatten(1)
            g, sums, dparam = conv_reduce(rows_of(dz), matrix, dy2, inputs, params, bits)
        else:
            dys = [rows_of(_channels_last(dy)), *([dy2] if dy2 is not None else [])]
            g, sums, dparam = reduce(dys, inputs, params, bits, True, write_g, [])
            g = g if write_g else dys[0]
        kind = None, [], not write_g
        dx, dx2 = _gradients(g, inputs, params, sums, kind, total, ctx.options)
        dshortcut = None
        if ctx.has_shortcut:
            dshortcut = shaped_like(g if kept is None else dx2, x)
        dparams = _of_params(dparam, params)
        return None, None, None, None, shaped_like(dx, x), dshortcut, dconv, *dparams


def _convolved(
    options: NormOptions, conv: ConvOptions, y: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The convolution, and with conv.statistics part; weight in y's dtype, which it computes in."""
    if conv.statistics:
        from kernels.gpu.norm_conv import conv_statistics

        z, part = conv_statistics(rows_of(y), weight.flatten(1), options.num_views)
        return shaped_like(z, y), part
    with torch.autocast(y.device.type, enabled=False):
        return F.conv2d(y, weight, None, conv.stride, conv.padding, 1, conv.groups), None


def _conv_gradients(
    conv: ConvOptions, dz: Tensor, y: Tensor, conv_weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """dy and the weight's gradient; wanted says which of the two."""
    rest = ((1, 1), False, (0, 0), conv.groups, (*wanted, False))  # dilation ... output_mask
    dy, dconv, _ = torch.ops.aten.convolution_backward(
        _channels_last(dz), y, conv_weight.to(y.dtype), None, conv.stride, conv.padding, *rest
    )
    return dy, dconv.to(conv_weight.dtype)


def _of_params(dparam: Tensor, params: list[Tensor]) -> list[Tensor | None]:
    """The gradients of the two weights and biases, in their order."""
    dparams = [dparam[row].to(p.dtype) for row, p in zip((1, 0, 2, 3), params, strict=False)]
    return dparams + [None] * (4 - len(dparams))


def _inputs(x: Tensor, shortcut: Tensor | None, statistics: Sequence[Tensor]) -> list[Tensor]:
    """What the operators normalise: rows, mean and rstd of each batch norm."""
    inputs = [rows_of(x), *statistics[:2]]
    if shortcut is not None and len(statistics) > 2:
        inputs += [rows_of(shortcut), *statistics[2:]]
    return inputs


def _gradients(
    g: Tensor,
    inputs: list[Tensor],
    params: list[Tensor],
    sums: Tensor,
    kind: tuple[Tensor | None, list[int], bool],
    total: Tensor | None,
    options: NormOptions,
) -> tuple[Tensor, Tensor]:
    """dx and dx2 of (rows, C) tensors, with the sums over all ranks.

    kind: max-pool's taps and map size, and whether g is to be masked from x.
    """
    backward = plain_backward
    if options.kernels == "triton":
        from kernels.gpu.norm_backward import backward
    inv_count = options.num_views / inputs[0].shape[0]
    if options.group is not None and total is not None:
        sums, inv_count = all_reduce(sums, options.group) / total[..., None], 1.0
    tap, size, mask_from_x = kind
    return backward(g, inputs, params, sums, tap, inv_count, mask_from_x, size)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks by a functional collective, which torch.compile keeps in its graph."""
    reduced = torch.ops._c10d_functional.all_reduce(x, "sum", group.group_name)
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
    """(rows, C) as a map of x's size, channels_last; `size` maps x's height to the result's."""
    if x.dim() == 2:
        return rows.view(x.shape)
    n, _, h, w = x.shape
    return rows.view(n, size(h), size(w), rows.shape[1]).permute(0, 3, 1, 2)


def plain_apply(
    inputs: list[Tensor], residual: Tensor | None, params: list[Tensor], relu: bool
) -> tuple[Tensor, Tensor]:
    """norm_forward.apply: y like x, and the mask (rows, C); (rows, 0) without shortcut or ReLU."""
    x, has_shortcut = inputs[0], residual is not None or len(inputs) > 3
    y = affine(standardise(*inputs[:3]), *params[:2])
    if len(inputs) > 3:
        y = y + affine(standardise(*inputs[3:]), *params[2:])
    elif residual is not None:
        y = y + by_view(residual, len(inputs[1]))
    y = y.reshape(x.shape)
    mask = y > 0 if relu and has_shortcut else y.new_empty((len(x), 0), dtype=torch.bool)
    return (y.relu() if relu else y).to(x.dtype), mask


def plain_reduce(
    dys: list[Tensor],
    inputs: list[Tensor],
    params: list[Tensor],
    bits: Tensor,
    relu: bool,
    write_g: bool,
    size: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """norm_backward.reduce: g, the sums (V, K, C) of g, g xhat, g xhat2, and those over views."""
    assert not size  # max-pool is PyTorch's own on the CPU
    x, xhat = inputs[0], standardise(*inputs[:3])
    g = dys[0].float() if len(dys) == 1 else dys[0].float() + dys[1].float()
    if relu:
        mask = bits if bits.shape[1] else affine(xhat, *params[:2]) > 0
        g = g * mask.reshape(g.shape)
    if write_g:
        g = g.to(x.dtype)
    rows = by_view(g, len(inputs[1]))
    sums = [rows.sum(1), (rows * xhat).sum(1)]
    if len(inputs) > 3:
        sums.append((rows * standardise(*inputs[3:])).sum(1))
    stacked = torch.stack(sums, dim=1)
    over_views = stacked.sum(0)
    if len(inputs) > 3:  # sum g again: the second bias's gradient must not share its memory
        over_views = torch.cat([over_views, over_views[:1]])
    return g if write_g else g.new_empty(0), stacked, over_views


def plain_backward(
    g: Tensor,
    inputs: list[Tensor],
    params: list[Tensor],
    sums: Tensor,
    tap: Tensor | None,
    inv_count: float,
    mask_from_x: bool,
    size: list[int],
) -> tuple[Tensor, Tensor]:
    """norm_backward.backward: dx like x and dx2 like x2 (empty without one)."""
    rows, means = by_view(g, len(inputs[1])), sums * inv_count
    if mask_from_x:
        rows = rows * (affine(standardise(*inputs[:3]), *params[:2]) > 0)

    def gradient(norm: int) -> Tensor:
        x, mean, rstd = inputs[3 * norm : 3 * norm + 3]
        of_xhat = standardise(x, mean, rstd) * means[:, norm + 1 : norm + 2]
        scale = rstd * params[2 * norm] if params else rstd
        return ((rows - means[:, :1] - of_xhat) * scale[:, None]).reshape(x.shape).to(x.dtype)

    dx = gradient(0)
    return dx, gradient(1) if len(inputs) > 3 else dx.new_empty(0)


def by_view(x: Tensor, num_views: int) -> Tensor:
    """(V R, C) -> (V, R, C) fp32."""
    return x.reshape(num_views, -1, x.shape[1]).float()


def standardise(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """xhat as (V, R, C) fp32."""
    return (by_view(x, len(mean)) - mean[:, None]) * rstd[:, None]


def affine(xhat: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """xhat weight + bias."""
    return xhat if weight is None or bias is None else xhat * weight.float() + bias.float()
