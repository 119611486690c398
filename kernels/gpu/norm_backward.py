"""Triton kernels of batch norm's backward pass: one pass that sums, one that writes dx.

With xhat = (x - mean_v) rstd_v, m = (y > 0), g = m (dy + dy2), n = all ranks' rows of view v:

    dbias = sum g    dweight = sum g xhat    dresidual = g
    dx = rstd_v weight (g - sum_v g / n - xhat sum_v (g xhat) / n)

With a shortcut the first pass sums the two incoming gradients, masks them with the bits of the
forward pass and writes g once: it is the residual's gradient, and what the second pass reads.
Without one nothing is written and m is recomputed from x. A second batch norm has the same g.

Bytes, without shortcut: dy, x | dy, x, dx. With: dy, dy2, x, bits, g | g, x, dx. Second batch norm:
also x2 | x2, dx2.

V views, R rows of a view (images x pixels), C channels; (rows, C) is the memory of x.
K sums: g, g xhat, and with a second batch norm g xhat2.
"""

# Triton compiles these functions: its types are not those that pyright sees.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import (
    POOL_TILE,
    REDUCE_PROGRAMS,
    SECOND_TILE,
    TILE,
    merge,
    operator,
    reduction,
    tiles,
    wrap_triton,
)
from kernels.gpu.norm_forward import STAGES, affine, place, standardise


@triton.jit
def pooled_gradient(dy_ptr, tap_ptr, out_row, in_rows, channel, num_channels, height, width):
    """The gradient of rows of the unpooled map, fp32: what the up to four windows give back."""
    out_width, out_height = (width + 1) // 2, (height + 1) // 2
    column = out_row % width
    line = (out_row // width) % height
    image = out_row // (width * height)
    total = (channel[None, :] + out_row[:, None]).to(tl.float32) * 0.0
    for down in tl.static_range(2):
        for across in tl.static_range(2):
            window_line, window_column = (line + 1) // 2 - down, (column + 1) // 2 - across
            tap_line = line + 1 - 2 * window_line
            tap_column = column + 1 - 2 * window_column
            in_map = in_rows & (window_line >= 0) & (window_line < out_height) & (tap_line < 3)
            in_map &= (window_column >= 0) & (window_column < out_width) & (tap_column < 3)
            inside = in_map[:, None] & (channel < num_channels)[None, :]
            at = ((image * out_height + window_line) * out_width + window_column).to(tl.int64)
            at = at[:, None] * num_channels + channel[None, :]
            tap = tl.load(tap_ptr + at, mask=inside, other=255).to(tl.int32)
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(tap == (3 * tap_line + tap_column)[:, None], dy, 0.0)
    return total


@triton.jit
def load_bits(bits_ptr, start, row, in_rows, octet, num_octets):
    """The mask's bytes of the rows `start` + `row`."""
    inside = in_rows[:, None] & (octet < num_octets)[None, :]
    return tl.load(
        bits_ptr + start * num_octets + row[:, None] * num_octets + octet[None, :],
        mask=inside,
        other=0,
    )


@triton.jit
def _reduce(
    dy_ptr,  # (V, R, C), or of the pooled map
    dy2_ptr,  # (V, R, C)
    x_ptr,  # (V, R, C)
    mean_ptr,  # (V, C) fp32
    rstd_ptr,  # (V, C) fp32
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    x2_ptr,  # (V, R, C)
    mean2_ptr,  # (V, C) fp32
    rstd2_ptr,  # (V, C) fp32
    bits_ptr,  # (V, R, C / 8 rounded up) uint8, or the taps of the pooled map
    g_ptr,  # (V, R, C)
    part_ptr,  # (V, parts, K, C) fp32
    num_rows,  # R
    num_channels,  # C
    num_parts,
    height,  # of the map before it was pooled, as width
    width,
    AFFINE: tl.constexpr,
    FORKED: tl.constexpr,  # with dy2
    MASK: tl.constexpr,  # 0 none, 1 bits, 2 from x
    SECOND: tl.constexpr,  # with x2
    POOLED: tl.constexpr,
    WRITE_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """part[view, part] = sums of g, g xhat (and g xhat2)."""
    part, block, view = place(1, REVERSED=False)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    octet = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    num_octets = tl.cdiv(num_channels, 8)
    row = tl.arange(0, BLOCK_R)
    in_channels = channel < num_channels
    offset = row[:, None] * num_channels + channel[None, :]
    at_channel = view * num_channels + channel
    mean = tl.load(mean_ptr + at_channel, mask=in_channels, other=0.0)
    rstd = tl.load(rstd_ptr + at_channel, mask=in_channels, other=0.0)
    if SECOND:
        mean2 = tl.load(mean2_ptr + at_channel, mask=in_channels, other=0.0)
        rstd2 = tl.load(rstd2_ptr + at_channel, mask=in_channels, other=0.0)
    sum_g = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_gx2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if MASK == 1:
        start = (view * num_rows + part * BLOCK_R).to(tl.int64)
        in_rows = part * BLOCK_R + row < num_rows
        next_bits = load_bits(bits_ptr, start, row, in_rows, octet, num_octets)
    # of max-pool's gradient a tile's loads are enough: with STAGES 89 registers, not 57
    for tile in tl.range(
        part, tl.cdiv(num_rows, BLOCK_R), num_parts, num_stages=1 if POOLED else STAGES
    ):
        in_rows = tile * BLOCK_R + row < num_rows
        inside = in_rows[:, None] & in_channels[None, :]
        start = (view * num_rows + tile * BLOCK_R).to(tl.int64)
        at = start * num_channels + offset
        if POOLED:
            out_row = view * num_rows + tile * BLOCK_R + row
            g = pooled_gradient(
                dy_ptr, bits_ptr, out_row, in_rows, channel, num_channels, height, width
            )
        else:
            g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if FORKED:
            g += tl.load(dy2_ptr + at, mask=inside, other=0.0).to(tl.float32)
        centred = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        if MASK == 1:
            bits = next_bits.to(tl.int32)  # single bytes are not copied ahead: loaded a tile early
            in_rows = (tile + num_parts) * BLOCK_R + row < num_rows
            start += num_parts * BLOCK_R
            next_bits = load_bits(bits_ptr, start, row, in_rows, octet, num_octets)
            passed = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
            g = tl.where(tl.reshape(passed, [BLOCK_R, BLOCK_C]) != 0, g, 0.0)
        if MASK == 2:
            xhat = centred * rstd[None, :]
            y = affine(xhat, weight_ptr, bias_ptr, channel, num_channels, AFFINE)
            g = tl.where(y > 0, g, 0.0)
        if WRITE_G:
            stored = g.to(g_ptr.dtype.element_ty)
            tl.store(g_ptr + at, stored, mask=inside)
            g = stored.to(tl.float32)
        sum_g += g
        sum_gx += g * centred
        if SECOND:
            x2 = tl.load(x2_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sum_gx2 += g * (x2 - mean2[None, :])
    num_sums: tl.constexpr = 3 if SECOND else 2
    out = part_ptr + (view * num_parts + part) * num_sums * num_channels + channel
    tl.store(out, tl.sum(sum_g, 0), mask=in_channels)
    tl.store(out + num_channels, tl.sum(sum_gx, 0) * rstd, mask=in_channels)
    if SECOND:
        tl.store(out + 2 * num_channels, tl.sum(sum_gx2, 0) * rstd2, mask=in_channels)


@triton.jit
def _merge_sums(
    part_ptr,  # (V, parts, K, C) fp32
    sums_ptr,  # (V, K, C) fp32
    dparam_ptr,  # (K, C) fp32, with SECOND (K + 1, C)
    num_parts,
    width,  # K C
    num_channels,  # C
    VIEWS: tl.constexpr,  # V
    SECOND: tl.constexpr,
    BLOCK_S: tl.constexpr,  # all parts of a view: nothing waits for an earlier load
    BLOCK_C: tl.constexpr,
):
    """sums[view] = sum over parts; dparam = sum over views."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.arange(0, BLOCK_S)
    inside = (part < num_parts)[:, None] & (column < width)[None, :]
    both = tl.zeros([BLOCK_C], tl.float32)
    for view in tl.static_range(VIEWS):
        at = (view * num_parts + part)[:, None] * width + column[None, :]
        of_view = tl.sum(tl.load(part_ptr + at, mask=inside, other=0.0), 0)
        tl.store(sums_ptr + view * width + column, of_view, mask=column < width)
        both += of_view
    tl.store(dparam_ptr + column, both, mask=column < width)
    if SECOND:  # the second bias: in shared memory fp16's unscaling would divide both twice
        tl.store(dparam_ptr + width + column, both, mask=column < num_channels)


@triton.jit
def gradient_scale(rstd_ptr, weight_ptr, channel, num_channels, AFFINE: tl.constexpr):
    """rstd weight, (BLOCK_C,) fp32."""
    scale = tl.load(rstd_ptr + channel, mask=channel < num_channels, other=0.0)
    if AFFINE:
        weight = tl.load(weight_ptr + channel, mask=channel < num_channels, other=0.0)
        scale *= weight.to(tl.float32)
    return scale


@triton.jit
def _backward(
    g_ptr,  # (V, R, C), or of the pooled map
    x_ptr,  # (V, R, C)
    mean_ptr,  # (V, C) fp32
    rstd_ptr,  # (V, C) fp32
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    x2_ptr,  # (V, R, C)
    mean2_ptr,  # (V, C) fp32
    rstd2_ptr,  # (V, C) fp32
    weight2_ptr,  # (C,)
    sums_ptr,  # (V, K, C) fp32
    tap_ptr,  # as g, uint8
    dx_ptr,  # (V, R, C)
    dx2_ptr,  # (V, R, C)
    num_rows,  # R
    num_channels,  # C
    height,  # of the map before it was pooled, as width
    width,
    folds,  # of the grid
    inv_count,  # 1 / n, or 1 where sums are means already
    AFFINE: tl.constexpr,
    MASK: tl.constexpr,  # 2: g is dy, to be masked from x
    SECOND: tl.constexpr,  # with x2
    POOLED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx (and dx2) of one tile from g."""
    tile, block, view = place(folds, REVERSED=True)  # the sums' end first
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tile * BLOCK_R
    row = tl.arange(0, BLOCK_R)
    in_rows = first + row < num_rows
    in_channels = channel < num_channels
    inside = in_rows[:, None] & in_channels[None, :]
    at = (view * num_rows + first).to(tl.int64) * num_channels
    at = at + row[:, None] * num_channels + channel[None, :]
    mean_ptr += view * num_channels
    rstd_ptr += view * num_channels
    if POOLED:
        out_row = view * num_rows + first + row
        g = pooled_gradient(g_ptr, tap_ptr, out_row, in_rows, channel, num_channels, height, width)
    else:
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    xhat = standardise(x, mean_ptr, rstd_ptr, channel, num_channels)
    if MASK == 2:
        y = affine(xhat, weight_ptr, bias_ptr, channel, num_channels, AFFINE)
        g = tl.where(y > 0, g, 0.0)
    sums_ptr += view * (3 if SECOND else 2) * num_channels
    mean_g = tl.load(sums_ptr + channel, mask=in_channels, other=0.0) * inv_count
    centred = g - mean_g[None, :]
    sums_ptr += num_channels
    mean_gx = tl.load(sums_ptr + channel, mask=in_channels, other=0.0) * inv_count
    dx = centred - xhat * mean_gx[None, :]
    dx *= gradient_scale(rstd_ptr, weight_ptr, channel, num_channels, AFFINE)[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if SECOND:
        mean2_ptr += view * num_channels
        rstd2_ptr += view * num_channels
        x2 = tl.load(x2_ptr + at, mask=inside, other=0.0).to(tl.float32)
        xhat2 = standardise(x2, mean2_ptr, rstd2_ptr, channel, num_channels)
        sums_ptr += num_channels
        mean_gx2 = tl.load(sums_ptr + channel, mask=in_channels, other=0.0) * inv_count
        dx2 = centred - xhat2 * mean_gx2[None, :]
        dx2 *= gradient_scale(rstd2_ptr, weight2_ptr, channel, num_channels, AFFINE)[None, :]
        tl.store(dx2_ptr + at, dx2.to(dx2_ptr.dtype.element_ty), mask=inside)


@operator("batch_norm_reduce")
def reduce(
    dys: list[Tensor],
    inputs: list[Tensor],
    params: list[Tensor],
    bits: Tensor,
    relu: bool,
    write_g: bool,
    size: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """g like x (empty unless write_g), sums (V, K, C) and their sum over views (K, C), fp32.

    With a second batch norm the sum over views has a fourth row, sum g once more.
    dys: one or two gradients of y. inputs and params: as of norm_forward.apply. bits: ReLU's mask,
    or empty; with the size (height, width) of a max-pooled map its taps.
    """
    x, mean, rstd = inputs[:3]
    num_views, num_channels = mean.shape
    num_rows, has_second = x.shape[0] // num_views, len(inputs) > 3
    num_sums = 3 if has_second else 2
    tile = POOL_TILE if size else SECOND_TILE if has_second else TILE
    grid, options = reduction(
        num_rows, num_channels, num_views, programs=REDUCE_PROGRAMS, tile=tile
    )
    part = mean.new_empty(num_views, grid[1], num_sums, num_channels)
    g = torch.empty_like(x) if write_g else torch.empty(0, device=x.device, dtype=x.dtype)
    mask = 0 if not relu else 2 if size or not bits.shape[1] else 1
    weight, bias = params[:2] or (mean, mean)
    tensors = (dys[0], dys[-1], x, mean, rstd, weight, bias, *(inputs[3:] or inputs))
    tensors += (bits if mask == 1 or size else x, g if write_g else x, part)
    sizes = (num_rows, num_channels, grid[1], *(size or (0, 0)))
    switches = {"AFFINE": bool(params), "FORKED": len(dys) == 2, "MASK": mask}
    switches |= {"SECOND": has_second, "POOLED": bool(size), "WRITE_G": write_g}
    wrap_triton(_reduce)[grid](*tensors, *sizes, **switches, **options)
    return g, *merged_sums(part)


def merged_sums(part: Tensor) -> tuple[Tensor, Tensor]:
    """Within an operator: sums and their sum over views of `reduce`, from (V, parts, K, C)."""
    num_views, parts, num_sums, num_channels = part.shape
    has_second = num_sums == 3
    sums = part.new_empty(num_views, num_sums, num_channels)
    dparam = part.new_empty(num_sums + has_second, num_channels)
    sizes = (parts, num_sums * num_channels, num_channels)
    switches = {"VIEWS": num_views, "SECOND": has_second}
    grid, options = merge(parts, num_sums * num_channels)
    wrap_triton(_merge_sums)[grid](part, sums, dparam, *sizes, **switches, **options)
    return sums, dparam


@operator("batch_norm_backward")
def backward(
    g: Tensor,
    inputs: list[Tensor],
    params: list[Tensor],
    sums: Tensor,
    tap: Tensor | None,
    inv_count: float,
    mask_from_x: bool,
    size: list[int],
) -> tuple[Tensor, Tensor]:
    """dx like x and dx2 like x2 (empty without one); sums times inv_count are means over rows.

    With tap, g is the gradient of a max-pool of maps of this size.
    """
    x, mean, rstd = inputs[:3]
    num_views, num_channels = mean.shape
    num_rows, has_second = x.shape[0] // num_views, len(inputs) > 3
    dx = torch.empty_like(x)
    dx2 = torch.empty(x.shape if has_second else 0, device=x.device, dtype=x.dtype)
    weight, bias, weight2, _ = (*params, *[mean] * 4)[:4]
    tensors = (g, x, mean, rstd, weight, bias, *(inputs[3:] or inputs), weight2, sums)
    tensors += (x if tap is None else tap, dx, dx2 if has_second else x)
    switches = {"AFFINE": bool(params), "MASK": 2 if mask_from_x else 0, "SECOND": has_second}
    tile = TILE if tap is None else POOL_TILE
    folds, grid, options = tiles(num_rows, num_channels, num_views, tile=tile)
    sizes = (num_rows, num_channels, *(size or (0, 0)), folds, inv_count)
    wrap_triton(_backward)[grid](*tensors, *sizes, **switches, POOLED=tap is not None, **options)
    return dx, dx2
