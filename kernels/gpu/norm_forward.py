"""Triton kernels of batch norm's forward pass: statistics of each view, then one pass that applies.

    y = relu((x - mean_v) rstd_v weight + bias + shortcut)
    shortcut: nothing, a residual r, or a second batch norm (x2 - mean2_v) rstd2_v weight2 + bias2

Bytes: statistics read x once; applying reads x and the shortcut and writes y, and where there is a
shortcut one bit an element that says where ReLU let through. Without one the backward pass finds
the mask from x, which it reads anyway.
A newcomer's mistake: sums of x and x^2. With mean 1000 and std 1 nothing is left of the variance:
here each program sums around the mean of its first rows, and parts are merged by mean and M2.

V views, R rows of a view (images x pixels), C channels; (rows, C) is the memory of x.
Source of the merge: Chan, Golub and LeVeque, The American Statistician 37, 1983.
"""

# Triton compiles these functions: its types are not those that pyright sees.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import NUM_WARPS, block_sizes, cdiv, operator, reduction_grid, wrap_triton


@triton.jit
def _statistics(
    x_ptr, part_ptr, num_rows, num_channels, rows_per_program,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part[view, program] = (mean, M2 = sum (x - mean)^2) of the program's rows. Reads x once."""
    split, view = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_R)
    first = split * rows_per_program
    count = tl.minimum(rows_per_program, num_rows - first)
    start_ptr = x_ptr + (view * num_rows + first).to(tl.int64) * num_channels
    in_channels = channel < num_channels
    offset = row[:, None] * num_channels + channel[None, :]
    inside = (row < count)[:, None] & in_channels[None, :]
    x = tl.load(start_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    pivot = tl.sum(x, 0) / tl.minimum(count, BLOCK_R)
    delta = tl.where(inside, x - pivot[None, :], 0.0)
    total, square = delta, delta * delta
    for done in range(BLOCK_R, count, BLOCK_R):
        inside = (done + row < count)[:, None] & in_channels[None, :]
        x = tl.load(start_ptr + done * num_channels + offset, mask=inside, other=0.0).to(tl.float32)
        delta = tl.where(inside, x - pivot[None, :], 0.0)
        total += delta
        square += delta * delta
    shift = tl.sum(total, 0) / count
    out = ((view * tl.num_programs(0) + split) * 2) * num_channels + channel
    tl.store(part_ptr + out, pivot + shift, mask=in_channels)
    m2 = tl.sum(square, 0) - shift * shift * count
    tl.store(part_ptr + out + num_channels, tl.where(m2 < 0, 0.0, m2), mask=in_channels)


@triton.jit
def _merge_statistics(
    part_ptr, mean_ptr, scale_ptr, running_mean_ptr, running_var_ptr,
    num_rows, num_channels, rows_per_program, num_parts, momentum, eps,
    VIEWS: tl.constexpr, HAS_RUNNING: tl.constexpr, WANT_VAR: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """mean and rstd (WANT_VAR: the biased variance) of each view; running statistics in order."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < num_channels
    part = tl.arange(0, BLOCK_S)
    if HAS_RUNNING:
        running_mean = tl.load(running_mean_ptr + channel, mask=in_channels).to(tl.float32)
        running_var = tl.load(running_var_ptr + channel, mask=in_channels).to(tl.float32)
    for view in tl.static_range(VIEWS):
        view_ptr = part_ptr + view * num_parts * 2 * num_channels
        pivot = tl.load(view_ptr + channel, mask=in_channels, other=0.0)
        shift = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for done in range(0, num_parts, BLOCK_S):
            inside = (done + part < num_parts)[:, None] & in_channels[None, :]
            offset = (done + part)[:, None] * 2 * num_channels + channel[None, :]
            mean = tl.load(view_ptr + offset, mask=inside, other=0.0)
            count = tl.minimum(num_rows - (done + part) * rows_per_program, rows_per_program)
            shift += tl.where(inside, (mean - pivot[None, :]) * count[:, None], 0.0)
        view_mean = pivot + tl.sum(shift, 0) / num_rows
        square = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for done in range(0, num_parts, BLOCK_S):
            inside = (done + part < num_parts)[:, None] & in_channels[None, :]
            offset = (done + part)[:, None] * 2 * num_channels + channel[None, :]
            mean = tl.load(view_ptr + offset, mask=inside, other=0.0)
            m2 = tl.load(view_ptr + offset + num_channels, mask=inside, other=0.0)
            count = tl.minimum(num_rows - (done + part) * rows_per_program, rows_per_program)
            delta = mean - view_mean[None, :]
            square += tl.where(inside, m2 + delta * delta * count[:, None], 0.0)
        var = tl.sum(square, 0) / num_rows  # squares: not below 0; a NaN goes on
        scale = var if WANT_VAR else tl.rsqrt(var + eps)
        tl.store(mean_ptr + view * num_channels + channel, view_mean, mask=in_channels)
        tl.store(scale_ptr + view * num_channels + channel, scale, mask=in_channels)
        if HAS_RUNNING:
            unbiased = var * (num_rows / tl.maximum(num_rows - 1, 1))
            running_mean += momentum * (view_mean - running_mean)
            running_var += momentum * (unbiased - running_var)
    if HAS_RUNNING:
        # a step with such values is skipped, and its statistics with it: NaN would stay for ever
        is_finite = in_channels & (running_var < float("inf"))
        tl.store(running_mean_ptr + channel, running_mean, mask=is_finite)
        tl.store(running_var_ptr + channel, running_var, mask=is_finite)


@triton.jit
def normalise(
    x, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, view, channel, in_channels, num_channels,
    AFFINE: tl.constexpr,
):  # fmt: skip
    """(x - mean_v) rstd_v [weight + bias] of a tile in fp32; also what backward recomputes."""
    mean = tl.load(mean_ptr + view * num_channels + channel, mask=in_channels, other=0.0)
    rstd = tl.load(rstd_ptr + view * num_channels + channel, mask=in_channels, other=0.0)
    y = (x - mean[None, :]) * rstd[None, :]
    if AFFINE:
        weight = tl.load(weight_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
        y = y * weight[None, :] + bias[None, :]
    return y


@triton.jit
def _apply(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    shortcut_ptr, mean2_ptr, rstd2_ptr, weight2_ptr, bias2_ptr, y_ptr, bits_ptr,
    num_rows, num_channels,
    AFFINE: tl.constexpr, SHORTCUT: tl.constexpr, RELU: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y for one tile. SHORTCUT: 0 none, 1 residual, 2 second batch norm (bits written for both)."""
    view = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # last rows first: the statistics pass has left them in the L2 cache (assumption)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_R
    row = first + tl.arange(0, BLOCK_R)
    in_channels = channel < num_channels
    inside = (row < num_rows)[:, None] & in_channels[None, :]
    start = (view * num_rows + first).to(tl.int64)  # beyond 2^31 elements at 2,674 views
    base = start * num_channels
    offset = tl.arange(0, BLOCK_R)[:, None] * num_channels + channel[None, :]
    x = tl.load(x_ptr + base + offset, mask=inside, other=0.0).to(tl.float32)
    y = normalise(x, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, view, channel, in_channels,
                  num_channels, AFFINE)  # fmt: skip
    if SHORTCUT > 0:
        shortcut = tl.load(shortcut_ptr + base + offset, mask=inside, other=0.0).to(tl.float32)
        if SHORTCUT == 2:
            shortcut = normalise(shortcut, mean2_ptr, rstd2_ptr, weight2_ptr, bias2_ptr, view,
                                 channel, in_channels, num_channels, AFFINE)  # fmt: skip
        y += shortcut
    if RELU:
        if SHORTCUT > 0:
            octet = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
            num_octets = tl.cdiv(num_channels, 8)
            passed = tl.reshape((y > 0).to(tl.int32), [BLOCK_R, BLOCK_C // 8, 8])
            bits = tl.sum(passed << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
            at = tl.arange(0, BLOCK_R)[:, None] * num_octets + octet[None, :]
            mask = (row < num_rows)[:, None] & (octet < num_octets)[None, :]
            tl.store(bits_ptr + start * num_octets + at, bits, mask=mask)
        y = tl.where(y <= 0, 0.0, y)  # a NaN goes on: tl.maximum would make it 0
    tl.store(y_ptr + base + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@operator("batch_norm_statistics", mutates=("running_mean", "running_var"))
def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_views: int,
    momentum: float,
    eps: float,
    want_var: bool,
) -> tuple[Tensor, Tensor]:
    """Mean and rstd (want_var: biased variance) of each view, (V, C) fp32 each; x (rows, C)."""
    num_rows, num_channels = x.shape[0] // num_views, x.shape[1]
    block_r, block_c = block_sizes(num_channels)
    per_program, num_parts = reduction_grid(num_rows, num_channels, num_views)
    fp32 = {"dtype": torch.float32, "device": x.device}
    part = torch.empty(num_views, num_parts, 2, num_channels, **fp32)
    mean = torch.empty(num_views, num_channels, **fp32)
    scale = torch.empty_like(mean)
    blocks = cdiv(num_channels, block_c)
    wrap_triton(_statistics)[(num_parts, blocks, num_views)](
        x, part, num_rows, num_channels, per_program,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    has_running = running_mean is not None and running_var is not None
    wrap_triton(_merge_statistics)[(cdiv(num_channels, 32),)](
        part, mean, scale, running_mean if has_running else part,
        running_var if has_running else part, num_rows, num_channels, per_program, num_parts,
        momentum, eps, VIEWS=num_views, HAS_RUNNING=has_running, WANT_VAR=want_var,
        BLOCK_S=32, BLOCK_C=32, num_warps=4,
    )  # fmt: skip
    return mean, scale


@operator("batch_norm_apply")
def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shortcut: Tensor | None,
    mean2: Tensor | None,
    rstd2: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """y like x, and the bits of ReLU: (rows, C / 8 rounded up) uint8, empty if there are none.

    Shapes: x, shortcut (rows, C) of one dtype; mean, rstd (V, C) fp32; weight, bias (C,).
    """
    num_views, num_channels = mean.shape
    num_rows = x.shape[0] // num_views
    block_r, block_c = block_sizes(num_channels)
    kind = 0 if shortcut is None else 1 if mean2 is None else 2
    y = torch.empty_like(x)
    width = cdiv(num_channels, 8) if relu and kind else 0
    bits = torch.empty(x.shape[0], width, dtype=torch.uint8, device=x.device)
    given = [value if value is not None else mean for value in (weight, bias)]
    second = [mean if t is None else t for t in (mean2, rstd2, weight2, bias2)]
    wrap_triton(_apply)[(cdiv(num_rows, block_r), cdiv(num_channels, block_c), num_views)](
        x, mean, rstd, *given, shortcut if shortcut is not None else x, *second,
        y, bits if width else x, num_rows, num_channels,
        AFFINE=weight is not None, SHORTCUT=kind, RELU=relu,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y, bits
