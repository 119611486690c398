"""Triton kernels of 1x1 convolutions beside a batch norm: a matrix product that also sums.

    forward    z = y weight^T, and (mean, M2) of z: the statistics of the batch norm that follows
    backward   g = m (dz weight + dy2), and the sums of g and g xhat of the batch norm before

as norm_forward's statistics and norm_backward's reduce, which read z, and dy and dy2, once more.
Statistics and sums are those of what is stored: of the values rounded to z's dtype.

Bytes: forward y, z | backward dz, x, g, and with a shortcut dy2 and bits, with a second batch norm
x2. The weight is small. Each block of channels reads y or dz again, which the L2 cache holds: the
blocks are launched first.
A tile of the product is (channels, rows), not (rows, channels): a thread of the tensor cores holds
values of few rows of it and many columns, so that sums over rows take few registers and shuffles.

V views, R rows of a view (images x pixels), C channels of the tile and the sums, K those that the
product adds up over.
"""

# Triton compiles these functions: its types are not those that pyright sees.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import operator, product, wrap_triton
from kernels.gpu.norm_backward import merged_sums
from kernels.gpu.norm_forward import merged_statistics, place

WIDEST = 128  # channels of a tile of the statistics: 8 warps, 97 to 128 registers on sm_90
WIDEST_REDUCE = 64  # 4 warps with more to hold: 2 programs a multiprocessor, 128 leaves one


@triton.jit
def product_tile(
    rows_ptr,  # (R, K): the tile's first row
    weight_ptr,  # (C, K), or (K, C) with its strides
    rows,  # of the tile that are rows of the view
    channel,
    num_channels,  # C
    num_inputs,  # K
    stride_c,  # of the weight
    stride_k,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(C, R) fp32; 0 in rows and channels beyond the last."""
    row, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    row_at = row[None, :] * num_inputs + k[:, None]
    weight_at = channel[:, None] * stride_c + k[None, :] * stride_k
    in_rows, in_channels = (row < rows)[None, :], (channel < num_channels)[:, None]
    product = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for first in tl.range(0, num_inputs, BLOCK_K):
        in_inputs = first + k < num_inputs
        y = tl.load(rows_ptr + first + row_at, mask=in_rows & in_inputs[:, None], other=0.0)
        weight = tl.load(
            weight_ptr + first * stride_k + weight_at,
            mask=in_channels & in_inputs[None, :],
            other=0.0,
        )
        product = tl.dot(weight, y, product, input_precision="ieee")
    return product


@triton.jit
def _conv_statistics(
    y_ptr,  # (V, R, K)
    weight_ptr,  # (C, K)
    z_ptr,  # (V, R, C)
    part_ptr,  # (V, parts, 2, C) fp32
    num_rows,  # R
    num_channels,  # C
    num_inputs,  # K
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z, and part[view, part] = (mean, M2) of the part's rows; tiles are merged one after another.

    flatten: the next tile's loads are in flight while this one is summed and written.
    """
    part, block, view = place(1, REVERSED=False)
    num_parts = tl.num_programs(1)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < num_channels
    row = tl.arange(0, BLOCK_R)
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    count = 0.0
    for tile in tl.range(part, tl.cdiv(num_rows, BLOCK_R), num_parts, flatten=True):
        rows = tl.minimum(num_rows - tile * BLOCK_R, BLOCK_R)
        start = (view * num_rows + tile * BLOCK_R).to(tl.int64)
        z = product_tile(
            y_ptr + start * num_inputs, weight_ptr, rows, channel, num_channels, num_inputs,
            num_inputs, 1, BLOCK_R, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        z = z.to(z_ptr.dtype.element_ty)
        in_rows = (row < rows)[None, :]
        at = row[None, :] * num_channels + channel[:, None]
        tl.store(z_ptr + start * num_channels + at, z, mask=in_rows & in_channels[:, None])
        z = z.to(tl.float32)
        tile_mean = tl.sum(z, 1) / rows
        delta = tl.where(in_rows, z - tile_mean[:, None], 0.0)
        shift, both = tile_mean - mean, count + rows
        mean += shift * (rows / both)
        m2 += tl.sum(delta * delta, 1) + shift * shift * (count * rows / both)
        count = both
    out = ((view * num_parts + part) * 2) * num_channels + channel
    tl.store(part_ptr + out, mean, mask=in_channels)
    tl.store(part_ptr + out + num_channels, m2, mask=in_channels)


@operator("conv_statistics")
def conv_statistics(y: Tensor, weight: Tensor, num_views: int) -> tuple[Tensor, Tensor]:
    """z (rows, C) of y (rows, K) and weight (C, K); part (V, parts, 2, C) for merge_statistics."""
    num_rows, num_inputs = y.shape[0] // num_views, y.shape[1]
    num_channels = weight.shape[0]
    grid, options = product(num_rows, num_channels, num_inputs, num_views, widest=WIDEST)
    z = torch.empty(y.shape[0], num_channels, dtype=y.dtype, device=y.device)
    part = torch.empty(num_views, grid[1], 2, num_channels, dtype=torch.float32, device=y.device)
    sizes = num_rows, num_channels, num_inputs
    wrap_triton(_conv_statistics)[grid](y, weight, z, part, *sizes, **options)
    return z, part


@operator("conv_merge_statistics", mutates=("running_mean", "running_var"))
def merge_statistics(
    part: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_rows: int,
    momentum: float,
    eps: float,
    want_var: bool,
) -> tuple[Tensor, Tensor]:
    """norm_forward.statistics of z from conv_statistics' part; num_rows of a view."""
    tile_rows = product(num_rows, part.shape[-1], 1, 1, widest=WIDEST)[1]["BLOCK_R"]
    sizes = num_rows, tile_rows
    return merged_statistics(part, running_mean, running_var, sizes, momentum, eps, want_var)


@triton.jit
def load_centred(x_ptr, mean_ptr, at, inside, channel, num_channels):
    """x - mean of a tile of (channels, rows), fp32; the pointer mean is the view's."""
    mean = tl.load(mean_ptr + channel, mask=channel < num_channels, other=0.0)
    return tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean[:, None]


@triton.jit
def _conv_reduce(
    dz_ptr,  # (V, R, K)
    weight_ptr,  # (K, C)
    dy2_ptr,  # (V, R, C)
    x_ptr,  # (V, R, C)
    mean_ptr,  # (V, C) fp32
    rstd_ptr,  # (V, C) fp32
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    x2_ptr,  # (V, R, C)
    mean2_ptr,  # (V, C) fp32
    rstd2_ptr,  # (V, C) fp32
    bits_ptr,  # (V, R, C / 8 rounded up) uint8
    g_ptr,  # (V, R, C)
    part_ptr,  # (V, parts, N, C) fp32
    num_rows,  # R
    num_channels,  # C
    num_inputs,  # K
    FORKED: tl.constexpr,  # with dy2
    BITS: tl.constexpr,  # ReLU's mask is in bits; else it is computed from x
    SECOND: tl.constexpr,  # with x2
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """g, and part[view, part] = sums of g, g xhat (and g xhat2)."""
    part, block, view = place(1, REVERSED=False)
    num_parts = tl.num_programs(1)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < num_channels
    row = tl.arange(0, BLOCK_R)
    mean_ptr += view * num_channels
    mean2_ptr += view * num_channels
    rstd = tl.load(rstd_ptr + view * num_channels + channel, mask=in_channels, other=0.0)
    sum_g = tl.zeros([BLOCK_C], tl.float32)
    sum_gx = tl.zeros([BLOCK_C], tl.float32)
    sum_gx2 = tl.zeros([BLOCK_C], tl.float32)
    for tile in tl.range(part, tl.cdiv(num_rows, BLOCK_R), num_parts, flatten=True):
        rows = tl.minimum(num_rows - tile * BLOCK_R, BLOCK_R)
        start = (view * num_rows + tile * BLOCK_R).to(tl.int64)
        g = product_tile(
            dz_ptr + start * num_inputs, weight_ptr, rows, channel, num_channels, num_inputs,
            1, num_channels, BLOCK_R, BLOCK_C, BLOCK_K,
        )  # fmt: skip
        inside = (row < rows)[None, :] & in_channels[:, None]
        base = start * num_channels
        at = row[None, :] * num_channels + channel[:, None]
        if FORKED:
            g += tl.load(dy2_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
        gx = load_centred(x_ptr + base, mean_ptr, at, inside, channel, num_channels)
        if BITS:
            num_octets = tl.cdiv(num_channels, 8)
            octet = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
            bits = tl.load(
                bits_ptr + start * num_octets + row[None, :] * num_octets + octet[:, None],
                mask=(row < rows)[None, :] & (octet < num_octets)[:, None],
                other=0,
            ).to(tl.int32)
            passed = (bits[:, None, :] >> tl.arange(0, 8)[None, :, None]) & 1
            passed = tl.reshape(passed, [BLOCK_C, BLOCK_R]) != 0
        else:
            weight = tl.load(norm_weight_ptr + channel, mask=in_channels, other=0.0)
            bias = tl.load(norm_bias_ptr + channel, mask=in_channels, other=0.0)
            y = gx * rstd[:, None] * weight.to(tl.float32)[:, None]
            passed = y + bias.to(tl.float32)[:, None] > 0
        stored = tl.where(passed, g, 0.0).to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + base + at, stored, mask=inside)
        g = stored.to(tl.float32)
        sum_g += tl.sum(g, 1)
        sum_gx += tl.sum(g * gx, 1)
        if SECOND:
            gx2 = load_centred(x2_ptr + base, mean2_ptr, at, inside, channel, num_channels)
            sum_gx2 += tl.sum(g * gx2, 1)
    num_sums: tl.constexpr = 3 if SECOND else 2
    out = part_ptr + (view * num_parts + part) * num_sums * num_channels + channel
    tl.store(out, sum_g, mask=in_channels)
    tl.store(out + num_channels, sum_gx * rstd, mask=in_channels)
    if SECOND:
        rstd2 = tl.load(rstd2_ptr + view * num_channels + channel, mask=in_channels, other=0.0)
        tl.store(out + 2 * num_channels, sum_gx2 * rstd2, mask=in_channels)


@operator("conv_reduce")
def conv_reduce(
    dz: Tensor,
    weight: Tensor,
    dy2: Tensor | None,
    inputs: list[Tensor],
    params: list[Tensor],
    bits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """g, sums and their sum over views as of norm_backward.reduce with ReLU, for dy = dz weight.

    dz (rows, K), weight (K, C), dy2 like x: the gradient that comes to y from elsewhere.
    """
    x, mean, rstd = inputs[:3]
    num_views, num_channels = mean.shape
    num_rows, num_inputs = x.shape[0] // num_views, dz.shape[1]
    num_sums = 3 if len(inputs) > 3 else 2
    grid, options = product(num_rows, num_channels, num_inputs, num_views, widest=WIDEST_REDUCE)
    part = mean.new_empty(num_views, grid[1], num_sums, num_channels)
    g = torch.empty_like(x)
    has_bits = bits.shape[1] > 0
    tensors = (dz, weight, x if dy2 is None else dy2, x, mean, rstd, *params[:2])
    tensors += (*(inputs[3:] or inputs), bits if has_bits else x, g, part)
    sizes = num_rows, num_channels, num_inputs
    switches = {"FORKED": dy2 is not None, "BITS": has_bits, "SECOND": len(inputs) > 3}
    wrap_triton(_conv_reduce)[grid](*tensors, *sizes, **switches, **options)
    return g, *merged_sums(part)
