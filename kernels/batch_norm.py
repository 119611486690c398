"""Batch norm + shortcut + ReLU, with statistics per view and over all ranks.

    y = relu((x - mean_v) * rstd_v * weight + bias + shortcut),  v = the view that a row belongs to

Both views of a SimSiam step go through the network in one batch of num_views equal slices. The
official code makes two passes, so its statistics are per view: so are these. Running statistics
are updated once per view, in order, as two passes would.
On CUDA the operators of norm_forward and norm_backward run; on the CPU F.batch_norm for each view,
or norm_reference where statistics are synchronised.
A newcomer's mistake: taking statistics over the concatenated batch. That is another algorithm.

N rows of all views together, V views, C channels.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from kernels.choose import Kernels, use_triton
from kernels.norm_autograd import Norm, NormAct, NormActConv, batch_statistics, keep_finite

__all__ = ["Norm", "batch_norm_act", "batch_norm_act_conv", "batch_norm_act_pool", "block_end"]


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    num_views: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    kernels: Kernels = "auto",
) -> Tensor:
    """Training batch norm of channels-last x, residual add and ReLU; the result has x's dtype.

    Shapes: x, residual (N, C, H, W) channels_last or (N, C); the other tensors (C,) fp32 or None.
    With training=False the running statistics normalise and nothing is updated.
    With `group` the statistics are over all its ranks: one all_reduce per direction.
    Raises: ValueError for a layout, dtype or shape that this is not meant for.
    """
    norm = Norm(weight, bias, running_mean, running_var)
    return _norm_act(
        x, norm, residual, None, relu=relu, num_views=num_views, training=training,
        momentum=momentum, eps=eps, group=group, kernels=kernels, fork=False,
    )  # fmt: skip


def block_end(
    x: Tensor,
    norm: Norm,
    shortcut: Tensor,
    shortcut_norm: Norm | None = None,
    *,
    num_views: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of a residual block: relu(norm(x) + shortcut), twice: main branch and next shortcut.

    With shortcut_norm (the downsample branch) the shortcut is normalised in the same pass. The two
    results are one tensor; as two, backward gets their two gradients apart, sums and masks them and
    writes the result once.
    Shapes: x, shortcut (N, C, H, W) channels_last of one dtype. Raises: as batch_norm_act.
    """
    return _norm_act(
        x, norm, shortcut, shortcut_norm, relu=True, num_views=num_views, training=training,
        momentum=momentum, eps=eps, group=group, kernels=kernels, fork=True,
    )  # fmt: skip


def batch_norm_act_pool(
    x: Tensor,
    norm: Norm,
    *,
    num_views: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
    kernels: Kernels = "auto",
) -> Tensor:
    """The stem's end: batch_norm_act with ReLU, then max-pool 3x3 of stride 2 and padding 1.

    The kernels write the pooled map alone and keep one byte an output.
    Shapes: (N, C, H, W) channels_last -> (N, C, (H + 1) // 2, (W + 1) // 2).
    Raises: as batch_norm_act.
    """
    if x.dim() != 4:
        raise ValueError(f"batch_norm_act_pool takes (N, C, H, W), got {tuple(x.shape)}")
    pool = training and use_triton(kernels, x)
    y = _norm_act(
        x, norm, None, None, relu=True, num_views=num_views, training=training, momentum=momentum,
        eps=eps, group=group, kernels=kernels, fork=False, pool=pool,
    )  # fmt: skip
    return y if pool else F.max_pool2d(y, 3, stride=2, padding=1)


def batch_norm_act_conv(
    x: Tensor,
    norm: Norm,
    conv_weight: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    num_views: int = 1,
    momentum: float = 0.1,
    eps: float = 1e-5,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """conv2d(batch_norm_act(x)) in training that keeps x and not the normalised map.

    Backward runs the normalising kernel once more: 4 bytes an element of x in bf16 against the 2
    that are not kept. Triton kernels only.
    Shapes: x (N, C, H, W) channels_last, conv_weight (D, C, h, w). Raises: as batch_norm_act.
    """
    _check(x, None, norm, None, num_views, group is None)
    if x.dim() != 4 or norm.weight is None:
        raise ValueError("batch_norm_act_conv takes (N, C, H, W) and a weight and bias")
    name = group.group_name if group is not None else ""
    with torch.no_grad():
        ((mean, rstd),), total = batch_statistics([(x, norm)], num_views, momentum, eps, name, True)
    return NormActConv.apply(
        x, norm.weight, norm.bias, conv_weight, mean, rstd, total, stride, padding, name
    )


def _norm_act(
    x: Tensor, norm: Norm, shortcut: Tensor | None, norm2: Norm | None, *, relu: bool,
    num_views: int, training: bool, momentum: float, eps: float,
    group: dist.ProcessGroup | None, kernels: Kernels, fork: bool, pool: bool = False,
) -> Any:  # fmt: skip
    _check(x, shortcut, norm, norm2, num_views if training else 1, training and group is None)
    with_triton = training and use_triton(kernels, x)
    if not training or (group is None and not with_triton):
        y = _plain(x, norm, num_views, training, momentum, eps)
        if shortcut is not None:
            if norm2 is not None:
                shortcut = _plain(shortcut, norm2, num_views, training, momentum, eps)
            y = y + shortcut
        y = F.relu(y, inplace=True) if relu else y
        return (y, y) if fork else y
    name = group.group_name if group is not None else ""
    pairs = [(x, norm)] + (
        [(shortcut, norm2)] if shortcut is not None and norm2 is not None else []
    )
    with torch.no_grad():
        found, total = batch_statistics(pairs, num_views, momentum, eps, name, with_triton)
    (mean, rstd), (mean2, rstd2) = found[0], found[1] if len(found) == 2 else (None, None)
    weight2, bias2 = norm2[:2] if norm2 is not None else (None, None)
    return NormAct.apply(
        x, shortcut, norm.weight, norm.bias, weight2, bias2, mean, rstd, mean2, rstd2, total,
        relu, fork, pool, name, with_triton,
    )  # fmt: skip


def _plain(
    x: Tensor, norm: Norm, num_views: int, training: bool, momentum: float, eps: float
) -> Tensor:
    """Batch norm of each view by PyTorch's own."""
    weight, bias, mean, var = norm
    if not training:
        return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps)
    new_mean, new_var = (t.clone() if t is not None else None for t in (mean, var))
    views = [
        F.batch_norm(part, new_mean, new_var, weight, bias, True, momentum, eps)
        for part in x.chunk(num_views)
    ]
    if mean is not None and var is not None and new_mean is not None and new_var is not None:
        keep_finite(mean, var, new_mean, new_var)
    return views[0] if num_views == 1 else torch.cat(views)


def _check(
    x: Tensor, shortcut: Tensor | None, norm: Norm, norm2: Norm | None, num_views: int,
    needs_two_rows: bool,
) -> None:  # fmt: skip
    if x.dim() not in (2, 4):
        raise ValueError(f"batch_norm_act takes (N, C, H, W) or (N, C), got {tuple(x.shape)}")
    for name, value in (("x", x), ("residual", shortcut)):
        if value is not None and not _is_channels_last(value):
            raise ValueError(
                f"batch_norm_act takes channels_last, got {name} with strides {value.stride()} for "
                f"{tuple(value.shape)}: call .to(memory_format=torch.channels_last) at the input"
            )
    if not x.is_floating_point():
        raise ValueError(f"batch_norm_act takes a floating dtype, got {x.dtype}")
    if num_views < 1 or x.shape[0] % num_views:
        raise ValueError(f"{x.shape[0]} rows do not divide into num_views={num_views} equal slices")
    if needs_two_rows and x.numel() < 2 * num_views * x.shape[1]:
        raise ValueError(f"a view of {tuple(x.shape)} has one value a channel: its variance is 0")
    if shortcut is not None and (shortcut.shape, shortcut.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual {tuple(shortcut.shape)} {shortcut.dtype} must match x {tuple(x.shape)} "
            f"{x.dtype}"
        )
    for one in (norm, norm2):
        for value in one or ():
            if value is None:
                continue
            if value.shape != x.shape[1:2] or not value.is_contiguous():
                raise ValueError(
                    f"weight, bias and running statistics must be ({x.shape[1]},) and contiguous, "
                    f"got {tuple(value.shape)} with strides {value.stride()}"
                )
            if value.device != x.device:
                raise ValueError(f"x is on {x.device}, its parameters on {value.device}")
        if one is not None and (one.weight is None) != (one.bias is None):
            raise ValueError("weight and bias go together: give both or neither")
    if norm2 is not None and (norm.weight is None) != (norm2.weight is None):
        raise ValueError("the two batch norms of a block end are affine both or neither")


def _is_channels_last(x: Tensor) -> bool:
    """Whether rows of channels are dense in memory; sizes of 1 have no say."""
    return x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()
