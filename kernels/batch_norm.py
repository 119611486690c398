"""Batch norm + shortcut + ReLU, with statistics per view and over all ranks.

    y = relu((x - mean_v) * rstd_v * weight + bias + shortcut),  v = the view that a row belongs to

Both views of a SimSiam step go through the network in one batch of num_views equal slices. The
official code makes two passes, so its statistics are per view: so are these. Running statistics
are updated once per view, in order, as two passes would.
The CPU runs F.batch_norm for each view; the Triton kernels of kernels/gpu, and ranks that share
their statistics, go through norm_autograd.

N rows of all views together, V views, C channels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.choose import use_triton
from kernels.norm_autograd import (
    ConvOptions,
    ConvStatistics,
    NormAct,
    NormActConv,
    NormOptions,
    all_reduce,
    by_view,
    rows_of,
)


class Norm(NamedTuple):
    """Parameters and running statistics of one batch norm, (C,) fp32 each or None."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


Part = Tensor | None
"""What a convolution's kernel summed for the batch norm that follows (conv_statistics)."""

DEFAULTS = NormOptions()


def batch_norm_act(
    x: Tensor,
    norm: Norm,
    options: NormOptions = DEFAULTS,
    *,
    residual: Tensor | None = None,
    part: Part = None,
) -> Tensor:
    """Batch norm of channels-last x, residual add and ReLU; the result has x's dtype.

    Shapes: x, residual (N, C, H, W) channels_last or (N, C).
    Raises: ValueError for a layout, dtype or shape that this is not meant for.
    """
    return _norm_act(x, norm, options, residual, parts=(part, None))


def block_end(
    x: Tensor,
    norm: Norm,
    shortcut: Tensor,
    shortcut_norm: Norm | None = None,
    options: NormOptions = DEFAULTS,
    *,
    parts: tuple[Part, Part] = (None, None),
) -> tuple[Tensor, Tensor]:
    """The end of a residual block: relu(norm(x) + shortcut), twice: main branch and next shortcut.

    With shortcut_norm (the downsample branch) the shortcut is normalised in the same pass. The two
    results are one tensor; as two, backward gets their two gradients apart, sums and masks them and
    writes the result once.
    parts are those of x and of the normalised shortcut.
    Shapes: x, shortcut (N, C, H, W) channels_last of one dtype. Raises: as batch_norm_act.
    """
    options = options._replace(relu=True, fork=True)
    return _norm_act(x, norm, options, shortcut, shortcut_norm, parts)


def batch_norm_act_pool(x: Tensor, norm: Norm, options: NormOptions = DEFAULTS) -> Tensor:
    """The stem's end: batch_norm_act with ReLU, then max-pool 3x3 of stride 2 and padding 1.

    The kernels write the pooled map alone and keep one byte an output.
    Shapes: (N, C, H, W) channels_last -> (N, C, (H + 1) // 2, (W + 1) // 2).
    Raises: as batch_norm_act.
    """
    if x.dim() != 4:
        raise ValueError(f"batch_norm_act_pool takes (N, C, H, W), got {tuple(x.shape)}")
    pool = options.training and use_triton(options.kernels, x)
    y = _norm_act(x, norm, options._replace(relu=True, pool=pool))
    return y if pool else F.max_pool2d(y, 3, stride=2, padding=1)


def conv_statistics(
    y: Tensor, conv_weight: Tensor, options: NormOptions = DEFAULTS
) -> tuple[Tensor, Part]:
    """A 1x1 convolution of stride 1 that also sums for the batch norm that follows.

    Triton kernels only; the plain twin is conv2d, after which batch_norm_act reads the result.
    Shapes: y (N, C, H, W) channels_last, conv_weight (D, C, 1, 1) -> (N, D, H, W) channels_last.
    """
    if y.dim() != 4 or not _is_channels_last(y) or conv_weight.shape[1:] != (y.shape[1], 1, 1):
        raise ValueError(
            f"conv_statistics takes (N, C, H, W) channels_last and (D, C, 1, 1), got "
            f"{tuple(y.shape)} with strides {y.stride()} and {tuple(conv_weight.shape)}"
        )
    return ConvStatistics.apply(options, y, conv_weight)


def batch_norm_act_conv(
    x: Tensor,
    norm: Norm,
    conv_weight: Tensor,
    options: NormOptions = DEFAULTS,
    *,
    conv: ConvOptions,
    shortcut: Tensor | None = None,
    shortcut_norm: Norm | None = None,
    parts: tuple[Part, Part] = (None, None),
) -> tuple[Tensor, Part, Tensor | None]:
    """conv2d(y) with y = batch_norm_act(x), or with a shortcut block_end's, as one function.

    Returns: the convolution's output, its part, and with a shortcut y, for the next one.
    conv says what is fused (ConvOptions). Triton kernels only, in training.
    Shapes: x (N, C, H, W) channels_last, conv_weight (D, C / groups, h, w). Raises: as
    batch_norm_act.
    """
    _check(x, norm, options, shortcut, shortcut_norm)
    if x.dim() != 4 or norm.weight is None:
        raise ValueError("batch_norm_act_conv takes (N, C, H, W) and a weight and bias")
    options = options._replace(kernels="triton", relu=True)
    pairs, params = _pairs(x, norm, shortcut, shortcut_norm)
    statistics, total = _batch_statistics(pairs, parts, options)
    inputs = x, shortcut, conv_weight
    return NormActConv.apply(options, total, statistics, conv, *inputs, *params)


def _norm_act(
    x: Tensor,
    norm: Norm,
    options: NormOptions,
    shortcut: Tensor | None = None,
    norm2: Norm | None = None,
    parts: tuple[Part, Part] = (None, None),
) -> Any:
    _check(x, norm, options, shortcut, norm2)
    with_triton = options.training and use_triton(options.kernels, x)
    if not options.training or (options.group is None and not with_triton):
        y = _plain(x, norm, options)
        if shortcut is not None:
            y = y + (shortcut if norm2 is None else _plain(shortcut, norm2, options))
        y = F.relu(y, inplace=True) if options.relu else y
        return (y, y) if options.fork else y
    options = options._replace(kernels="triton" if with_triton else "plain")
    pairs, params = _pairs(x, norm, shortcut, norm2)
    statistics, total = _batch_statistics(pairs, parts, options)
    return NormAct.apply(options, total, statistics, x, shortcut, *params)


def _pairs(
    x: Tensor, norm: Norm, shortcut: Tensor | None, norm2: Norm | None
) -> tuple[list[tuple[Tensor, Norm]], tuple[Tensor | None, ...]]:
    """What is normalised, and weights and biases, as NormAct takes them."""
    if shortcut is None or norm2 is None:
        return [(x, norm)], (*norm[:2], None, None)
    return [(x, norm), (shortcut, norm2)], norm[:2] + norm2[:2]


def _plain(x: Tensor, norm: Norm, options: NormOptions) -> Tensor:
    """Batch norm of each view by PyTorch's own."""
    weight, bias, mean, var = norm
    momentum, eps = options.momentum, options.eps
    if not options.training:
        return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps)
    new_mean, new_var = (t.clone() if t is not None else None for t in (mean, var))
    views = [
        F.batch_norm(part, new_mean, new_var, weight, bias, True, momentum, eps)
        for part in x.chunk(options.num_views)
    ]
    if new_mean is not None and new_var is not None:
        keep_finite(norm, new_mean, new_var)
    return views[0] if options.num_views == 1 else torch.cat(views)


@torch.no_grad()
def _batch_statistics(
    pairs: list[tuple[Tensor, Norm]], parts: tuple[Part, ...], options: NormOptions
) -> tuple[list[Tensor], Tensor | None]:
    """mean and rstd of each tensor, (V, C) fp32, with the running statistics updated.

    Over ranks also the rows of each view on all of them, (V, 1). The sums on the wire are in fp64:
    with mean 1000 and std 1 an fp32 sum of squares would keep no digit of the variance.
    """
    local = [
        _local_statistics(*pair, part, options) for pair, part in zip(pairs, parts, strict=False)
    ]
    if options.group is None:
        return [value for pair in local for value in pair], None
    mean, var = (torch.cat(parts, dim=1).double() for parts in zip(*local, strict=True))
    count = torch.full_like(mean[:, :1], rows_of(pairs[0][0]).shape[0] // options.num_views)
    sums = torch.cat([mean * count, (var + mean * mean) * count, count], dim=1)
    sums = all_reduce(sums, options.group)
    total = sums[:, -1:]
    mean, square = (sums[:, :-1] / total).chunk(2, dim=1)
    var = (square - mean * mean).clamp_min(0)
    rstd, unbiased = (var + options.eps).rsqrt().float(), var * (total / (total - 1).clamp_min(1))
    mean, unbiased, results, start = mean.float(), unbiased.float(), [], 0
    for x, norm in pairs:
        part = slice(start, start := start + x.shape[1])
        if norm.running_mean is not None and norm.running_var is not None:
            new_mean, new_var = norm.running_mean, norm.running_var
            for view in range(options.num_views):
                new_mean = new_mean.lerp(mean[view, part], options.momentum)
                new_var = new_var.lerp(unbiased[view, part], options.momentum)
            keep_finite(norm, new_mean, new_var)
        results += [mean[:, part].contiguous(), rstd[:, part].contiguous()]
    return results, total.float()


def _local_statistics(
    x: Tensor, norm: Norm, part: Part, options: NormOptions
) -> tuple[Tensor, Tensor]:
    """This rank's mean and rstd of each view; with a group its mean and biased variance."""
    is_shared, rows = options.group is not None, rows_of(x)
    if options.kernels == "plain":
        var, mean = torch.var_mean(by_view(rows, options.num_views), dim=1, correction=0)
        return mean, var
    running = (None, None) if is_shared else norm[2:]
    how = options.momentum, options.eps, is_shared
    if part is not None:
        from kernels.gpu.norm_conv import merge_statistics  # see norm_autograd

        return merge_statistics(part, *running, rows.shape[0] // options.num_views, *how)
    from kernels.gpu.norm_forward import statistics

    return statistics(rows, *running, options.num_views, *how)


def keep_finite(norm: Norm, new_mean: Tensor, new_var: Tensor) -> None:
    """Update running statistics, except of channels with NaN or infinity, which would stay.

    The optimizer skips such a step, so its statistics are skipped too. Shapes: (C,) each.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    is_finite = new_var.isfinite()  # the mean is, where the variance is
    norm.running_mean.copy_(torch.where(is_finite, new_mean, norm.running_mean))
    norm.running_var.copy_(torch.where(is_finite, new_var, norm.running_var))


def _check(
    x: Tensor, norm: Norm, options: NormOptions, shortcut: Tensor | None, norm2: Norm | None
) -> None:
    num_views, shape = options.num_views if options.training else 1, tuple(x.shape)
    if x.dim() not in (2, 4):
        raise ValueError(f"batch_norm_act takes (N, C, H, W) or (N, C), got {shape}")
    for name, value in (("x", x), ("residual", shortcut)):
        if value is not None and not _is_channels_last(value):
            raise ValueError(
                f"batch_norm_act takes channels_last, got {name} with strides {value.stride()} for "
                f"{tuple(value.shape)}: call .to(memory_format=torch.channels_last) at the input"
            )
    if not x.is_floating_point():
        raise ValueError(f"batch_norm_act takes a floating dtype, got {x.dtype}")
    if num_views < 1 or len(x) % num_views:
        raise ValueError(f"{len(x)} rows do not divide into num_views={num_views} equal slices")
    is_synced = options.group is not None or not options.training
    if not is_synced and x.numel() < 2 * num_views * x.shape[1]:
        raise ValueError(f"a view of {shape} has one value a channel: its variance is 0")
    if shortcut is not None and (shortcut.shape, shortcut.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual {tuple(shortcut.shape)} {shortcut.dtype} must match x {shape} {x.dtype}"
        )
    for value in (*norm, *(norm2 or ())):
        if value is None:
            continue
        if value.shape != x.shape[1:2] or not value.is_contiguous():
            raise ValueError(
                f"weight, bias and running statistics must be ({x.shape[1]},) and contiguous, "
                f"got {tuple(value.shape)} with strides {value.stride()}"
            )
        if value.device != x.device:
            raise ValueError(f"x is on {x.device}, its parameters on {value.device}")
    if any((n.weight is None) != (n.bias is None) for n in (norm, norm2) if n is not None):
        raise ValueError("weight and bias go together: give both or neither")
    if norm2 is not None and (norm.weight is None) != (norm2.weight is None):
        raise ValueError("the two batch norms of a block end are affine both or neither")


def _is_channels_last(x: Tensor) -> bool:
    """Whether rows of channels are dense in memory; strides of dimensions of size 1 are ignored."""
    return x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()
