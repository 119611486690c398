"""Triton kernels of batch norm's backward pass: one pass that sums, one that writes dx.

With xhat = (x - mean_v) rstd_v, m = (y > 0), g = m (dy + dy2), n = all ranks' rows of view v:

    dbias = sum g    dweight = sum g xhat    dresidual = g
    dx = rstd_v weight (g - sum_v g / n - xhat sum_v (g xhat) / n)

Where there is a shortcut the first pass sums the two incoming gradients, masks them with the bits
of the forward pass and writes g once: it is the residual's gradient, and what the second pass
reads. Without one nothing is written and m is found again from x. The second batch norm of a block
end rides along: its g is the same.

Bytes, without shortcut: dy, x | dy, x, dx. With: dy, dy2, x, bits, g | g, x, dx. Second batch norm:
also x2 | x2, dx2.
A newcomer's mistake: masks from y. y is two bytes an element to read again, the mask is one bit.

V views, R rows of a view (images x pixels), C channels; (rows, C) is the memory of x.
"""

# Triton compiles these functions: its types are not those that pyright sees.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import (
    NUM_WARPS,
    POOL_TILE,
    SECOND_TILE,
    TILE,
    block_sizes,
    cdiv,
    operator,
    reduction_grid,
    wrap_triton,
)  # fmt: skip
from kernels.gpu.norm_forward import normalise
from kernels.gpu.norm_pool import pooled_gradient


@triton.jit
def _reduce(
    dy_ptr, dy2_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, x2_ptr, mean2_ptr, rstd2_ptr,
    bits_ptr, g_ptr, part_ptr, num_rows, num_channels, rows_per_program, height, width,
    AFFINE: tl.constexpr, FORKED: tl.constexpr, MASK: tl.constexpr, SECOND: tl.constexpr,
    POOLED: tl.constexpr, WRITE_G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part[view, program] = sums of g, g xhat (and g xhat2). MASK: 0 none, 1 bits, 2 from x."""
    split, view = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    octet = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    num_octets = tl.cdiv(num_channels, 8)
    row = tl.arange(0, BLOCK_R)
    in_channels = channel < num_channels
    first = split * rows_per_program
    count = tl.minimum(rows_per_program, num_rows - first)
    offset = row[:, None] * num_channels + channel[None, :]
    sum_g = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_gx2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for done in range(0, count, BLOCK_R):
        inside = (done + row < count)[:, None] & in_channels[None, :]
        start = (view * num_rows + first + done).to(tl.int64)
        at = start * num_channels + offset
        if POOLED:
            g = pooled_gradient(dy_ptr, bits_ptr, view * num_rows + first + done + row,
                                done + row < count, channel, in_channels, num_channels, height,
                                width)  # fmt: skip
        else:
            g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if FORKED:
            g += tl.load(dy2_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if MASK == 1:
            bits_at = start * num_octets + row[:, None] * num_octets + octet[None, :]
            bits_in = (done + row < count)[:, None] & (octet < num_octets)[None, :]
            bits = tl.load(bits_ptr + bits_at, mask=bits_in, other=0).to(tl.int32)
            passed = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
            g = tl.where(tl.reshape(passed, [BLOCK_R, BLOCK_C]) != 0, g, 0.0)
        if MASK == 2:
            y = normalise(x, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, view, channel, in_channels,
                          num_channels, AFFINE)  # fmt: skip
            g = tl.where(y > 0, g, 0.0)
        if WRITE_G:
            stored = g.to(g_ptr.dtype.element_ty)
            tl.store(g_ptr + at, stored, mask=inside)
            g = stored.to(tl.float32)
        xhat = normalise(x, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, view, channel, in_channels,
                         num_channels, False)  # fmt: skip
        sum_g += g
        sum_gx += g * xhat
        if SECOND:
            x2 = tl.load(x2_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sum_gx2 += g * normalise(x2, mean2_ptr, rstd2_ptr, weight_ptr, bias_ptr, view, channel,
                                     in_channels, num_channels, False)  # fmt: skip
    num_sums: tl.constexpr = 3 if SECOND else 2
    out = part_ptr + (view * tl.num_programs(0) + split) * num_sums * num_channels + channel
    tl.store(out, tl.sum(sum_g, 0), mask=in_channels)
    tl.store(out + num_channels, tl.sum(sum_gx, 0), mask=in_channels)
    if SECOND:
        tl.store(out + 2 * num_channels, tl.sum(sum_gx2, 0), mask=in_channels)


@triton.jit
def _merge_sums(
    part_ptr, sums_ptr, dparam_ptr, num_parts, width, num_channels,
    VIEWS: tl.constexpr, SECOND: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums[view] = sum over programs; dparam = sum over views. width = sums times channels."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_S)
    both = tl.zeros([BLOCK_C], tl.float32)
    for view in tl.static_range(VIEWS):
        total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for done in range(0, num_parts, BLOCK_S):
            inside = (done + part < num_parts)[:, None] & (column < width)[None, :]
            at = (view * num_parts + done + part)[:, None] * width + column[None, :]
            total += tl.load(part_ptr + at, mask=inside, other=0.0)
        of_view = tl.sum(total, 0)
        tl.store(sums_ptr + view * width + column, of_view, mask=column < width)
        both += of_view
    tl.store(dparam_ptr + column, both, mask=column < width)
    if SECOND:  # the second bias: in shared memory fp16's unscaling would divide both twice
        tl.store(dparam_ptr + width + column, both, mask=column < num_channels)


@triton.jit
def _input_gradient(
    g, x, sums_ptr, mean_ptr, rstd_ptr, weight_ptr, view, channel, in_channels, num_channels,
    inv_count, which: tl.constexpr, NUM_SUMS: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """dx of a tile in fp32; `which` row of sums holds sum g xhat."""
    xhat = normalise(x, mean_ptr, rstd_ptr, weight_ptr, weight_ptr, view, channel, in_channels,
                     num_channels, False)  # fmt: skip
    row = sums_ptr + view * NUM_SUMS * num_channels + channel
    mean_g = tl.load(row, mask=in_channels, other=0.0) * inv_count
    mean_gx = tl.load(row + which * num_channels, mask=in_channels, other=0.0) * inv_count
    scale = tl.load(rstd_ptr + view * num_channels + channel, mask=in_channels, other=0.0)
    if AFFINE:
        scale *= tl.load(weight_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
    return (g - mean_g[None, :] - xhat * mean_gx[None, :]) * scale[None, :]


@triton.jit
def _backward(
    g_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, x2_ptr, mean2_ptr, rstd2_ptr,
    weight2_ptr, sums_ptr, place_ptr, dx_ptr, dx2_ptr, num_rows, num_channels, height, width,
    inv_count, AFFINE: tl.constexpr, MASK: tl.constexpr, SECOND: tl.constexpr, POOLED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx (and dx2) of one tile from g. MASK 2: g is dy, to be masked from x."""
    view = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # last rows first: the summing pass has left them in the L2 cache (assumption)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    in_channels = channel < num_channels
    inside = (first + row < num_rows)[:, None] & in_channels[None, :]
    base = (view * num_rows + first).to(tl.int64) * num_channels
    at = base + row[:, None] * num_channels + channel[None, :]
    if POOLED:
        g = pooled_gradient(g_ptr, place_ptr, view * num_rows + first + row, first + row < num_rows,
                            channel, in_channels, num_channels, height, width)  # fmt: skip
    else:
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    num_sums: tl.constexpr = 3 if SECOND else 2
    if MASK == 2:
        y = normalise(x, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, view, channel, in_channels,
                      num_channels, AFFINE)  # fmt: skip
        g = tl.where(y > 0, g, 0.0)
    dx = _input_gradient(g, x, sums_ptr, mean_ptr, rstd_ptr, weight_ptr, view, channel,
                         in_channels, num_channels, inv_count, 1, num_sums, AFFINE)  # fmt: skip
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if SECOND:
        x2 = tl.load(x2_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dx2 = _input_gradient(g, x2, sums_ptr, mean2_ptr, rstd2_ptr, weight2_ptr, view, channel,
                              in_channels, num_channels, inv_count, 2, num_sums,
                              AFFINE)  # fmt: skip
        tl.store(dx2_ptr + at, dx2.to(dx2_ptr.dtype.element_ty), mask=inside)


@operator("batch_norm_reduce")
def reduce(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x2: Tensor | None,
    mean2: Tensor | None,
    rstd2: Tensor | None,
    bits: Tensor,
    relu: bool,
    write_g: bool,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """g like x (empty unless write_g), sums (V, K, C) and their sum over views (K, C), fp32.

    K is 2: sum g, sum g xhat; with a second batch norm 3: sum g xhat2, and over views a fourth row,
    sum g once more. bits are ReLU's, or empty;
    or the places of a max-pool over maps of height x width, whose dy is then given.
    """
    num_views, num_channels = mean.shape
    num_rows, num_sums = x.shape[0] // num_views, 3 if x2 is not None else 2
    is_pooled = height > 0
    tile = POOL_TILE if is_pooled else TILE if x2 is None else SECOND_TILE
    block_r, block_c = block_sizes(num_channels, tile=tile)
    per_program, num_parts = reduction_grid(num_rows, num_channels, num_views, tile=tile)
    fp32 = {"dtype": torch.float32, "device": x.device}
    part = torch.empty(num_views, num_parts, num_sums, num_channels, **fp32)
    sums = torch.empty(num_views, num_sums, num_channels, **fp32)
    dparam = torch.empty(num_sums + (x2 is not None), num_channels, **fp32)
    g = torch.empty_like(x) if write_g else torch.empty(0, device=x.device, dtype=x.dtype)
    weight_bias = [mean if t is None else t for t in (weight, bias)]
    second = [t if t is not None else other
              for t, other in ((x2, x), (mean2, mean), (rstd2, rstd))]  # fmt: skip
    mask = 0 if not relu else 2 if is_pooled or not bits.shape[1] else 1
    wrap_triton(_reduce)[(num_parts, cdiv(num_channels, block_c), num_views)](
        dy, dy2 if dy2 is not None else dy, x, mean, rstd, *weight_bias, *second,
        bits if mask == 1 or is_pooled else x, g if write_g else x, part,
        num_rows, num_channels, per_program, height, width,
        AFFINE=weight is not None, FORKED=dy2 is not None, MASK=mask, SECOND=x2 is not None,
        POOLED=is_pooled, WRITE_G=write_g, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    width = num_sums * num_channels
    wrap_triton(_merge_sums)[(cdiv(width, 32),)](
        part, sums, dparam, num_parts, width, num_channels, VIEWS=num_views,
        SECOND=x2 is not None, BLOCK_S=32, BLOCK_C=32, num_warps=4,
    )  # fmt: skip
    return g, sums, dparam


@operator("batch_norm_backward")
def backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x2: Tensor | None,
    mean2: Tensor | None,
    rstd2: Tensor | None,
    weight2: Tensor | None,
    sums: Tensor,
    place: Tensor | None,
    inv_count: float,
    mask_from_x: bool,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """dx like x and dx2 like x2 (empty without one); sums times inv_count are means over rows.

    With place, g is the gradient of a max-pool over maps of height x width.
    """
    num_views, num_channels = mean.shape
    num_rows = x.shape[0] // num_views
    block_r, block_c = block_sizes(num_channels, tile=TILE if place is None else POOL_TILE)
    dx = torch.empty_like(x)
    dx2 = torch.empty_like(x2) if x2 is not None else torch.empty(0, device=x.device, dtype=x.dtype)
    weight_bias = [mean if t is None else t for t in (weight, bias)]
    second = [t if t is not None else other
              for t, other in ((x2, x), (mean2, mean), (rstd2, rstd), (weight2, mean))]  # fmt: skip
    wrap_triton(_backward)[(cdiv(num_rows, block_r), cdiv(num_channels, block_c), num_views)](
        g, x, mean, rstd, *weight_bias, *second, sums, place if place is not None else x,
        dx, dx2 if x2 is not None else x, num_rows, num_channels, height, width, inv_count,
        AFFINE=weight is not None, MASK=2 if mask_from_x else 0, SECOND=x2 is not None,
        POOLED=place is not None,
        BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx, dx2
