"""Batch norm + residual add + ReLU, with statistics per view and over all ranks.

    y = relu((x - mean_v) * rstd_v * weight + bias + residual),  v = the view that a row belongs to

Both views of a SimSiam step go through the network in one batch of num_views equal slices. The
official code makes two passes, so its statistics are per view: so are these. Running statistics
are updated once per view, in order, as two passes would.
A newcomer's mistake: taking statistics over the concatenated batch. That is another algorithm.

N rows of all views together, V views, C channels, S = H * W (1 for the heads).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


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
) -> Tensor:
    """Training batch norm of channels-last x, residual add and ReLU; the result has x's dtype.

    Shapes: x, residual (N, C, H, W) channels_last or (N, C); the other tensors (C,) fp32 or None.
    With training=False the running statistics normalise and nothing is updated.
    With `group` the statistics are over all its ranks: one all_reduce per direction.
    Raises: ValueError for a layout or shape that this is not meant for.
    """
    _check(x, residual, num_views if training else 1)
    if not training:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    elif group is None:
        slices = [
            F.batch_norm(part, running_mean, running_var, weight, bias, True, momentum, eps)
            for part in x.chunk(num_views)
        ]
        y = slices[0] if num_views == 1 else torch.cat(slices)
    else:
        y, mean, var = _SyncBatchNorm.apply(x, weight, bias, num_views, eps, group)
        if running_mean is not None and running_var is not None:
            _update_running(running_mean, running_var, mean, var, momentum)
    if residual is not None:
        y = y + residual
    # a custom function's output may be a view, which autograd does not let change in place
    return F.relu(y, inplace=group is None) if relu else y


def _check(x: Tensor, residual: Tensor | None, num_views: int) -> None:
    if x.dim() not in (2, 4):
        raise ValueError(f"batch_norm_act takes (N, C, H, W) or (N, C), got {tuple(x.shape)}")
    for name, value in (("x", x), ("residual", residual)):
        if value is not None and not _is_channels_last(value):
            raise ValueError(
                f"batch_norm_act takes channels_last, got {name} with strides {value.stride()} for "
                f"{tuple(value.shape)}: call .to(memory_format=torch.channels_last) at the input"
            )
    if x.shape[0] % num_views:
        raise ValueError(f"{x.shape[0]} rows do not divide into num_views={num_views} equal slices")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must match x {tuple(x.shape)}")


def _is_channels_last(x: Tensor) -> bool:
    """Whether rows of channels are dense in memory; sizes of 1 have no say."""
    return x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()


def _update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float
) -> None:
    """r <- (1 - momentum) r + momentum s, once per view, in order. mean, var: (V, C), unbiased."""
    for view_mean, view_var in zip(mean, var, strict=True):
        running_mean.lerp_(view_mean.to(running_mean.dtype), momentum)
        running_var.lerp_(view_var.to(running_var.dtype), momentum)


def _rows(x: Tensor, num_views: int) -> Tensor:
    """x as (V, rows, C): a view of the memory, never a copy, for channels_last and (N, C)."""
    flat = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    return flat.reshape(num_views, -1, x.shape[1])


class _SyncBatchNorm(torch.autograd.Function):
    """Plain twin of the synchronised batch norm; two small all_reduces, fp64 on the wire.

    The sums of one rank are formed around its own mean and shifted to zero in fp64: with mean 1000
    and std 1 an fp32 sum of squares would keep no digit of the variance.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, num_views, eps, group):  # noqa: D102 - torch's contract
        rows = _rows(x, num_views).float()
        local_var, local_mean = torch.var_mean(rows, dim=1, correction=0)
        count = torch.full_like(local_mean[:, :1], rows.shape[1], dtype=torch.float64)
        m, v = local_mean.double(), local_var.double()
        sums = torch.cat([m * count, (v + m * m) * count, count], dim=1)
        dist.all_reduce(sums, group=group)
        total = sums[:, -1:]
        mean, square = (sums[:, :-1] / total).chunk(2, dim=1)
        var = (square - mean * mean).clamp_min(0)
        rstd = (var + eps).rsqrt().float()
        normalised = (rows - mean.float()[:, None]) * rstd[:, None]
        y = normalised
        if weight is not None:
            y = y * weight.float() + bias.float()
        ctx.save_for_backward(x, mean.float(), rstd, weight, total)
        ctx.num_views, ctx.group = num_views, group
        unbiased = var * (total / (total - 1).clamp_min(1))
        ctx.mark_non_differentiable(out_mean := mean.float(), out_var := unbiased.float())
        return _like(y, x), out_mean, out_var

    @staticmethod
    def backward(ctx, *grads):  # noqa: D102 - torch's contract
        x, mean, rstd, weight, total = ctx.saved_tensors
        grad_y = grads[0]  # mean and variance carry no gradient
        if x.dim() == 4:
            grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        dy = _rows(grad_y, ctx.num_views).float()
        normalised = (_rows(x, ctx.num_views).float() - mean[:, None]) * rstd[:, None]
        sum_dy, sum_dy_x = dy.sum(1), (dy * normalised).sum(1)
        dweight = dbias = None
        if weight is not None:
            dweight, dbias = sum_dy_x.sum(0).to(weight.dtype), sum_dy.sum(0).to(weight.dtype)
            dy, sum_dy, sum_dy_x = (g * weight.float() for g in (dy, sum_dy, sum_dy_x))
        sums = torch.cat([sum_dy, sum_dy_x], dim=1)
        dist.all_reduce(sums, group=ctx.group)
        mean_dy, mean_dy_x = (sums / total.float()).chunk(2, dim=1)
        dx = (dy - mean_dy[:, None] - normalised * mean_dy_x[:, None]) * rstd[:, None]
        return _like(dx, x), dweight, dbias, None, None, None


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """(V, rows, C) back to x's shape, layout and dtype."""
    if x.dim() == 2:
        return rows.reshape(x.shape).to(x.dtype)
    n, c, h, w = x.shape
    return rows.reshape(n, h, w, c).permute(0, 3, 1, 2).to(x.dtype)
