"""Triton kernels of the stem's end: batch norm, ReLU and 3x3 max-pool of stride 2 in one pass.

    y[n, i, j] = max over the window of relu((x - mean_v) rstd_v weight + bias)

The normalised map, four times the size of the result, is never written; kept for backward is one
byte an output, the place in its window (3 * row + column), the first one where several are equal,
as PyTorch chooses. Bytes: x, y and the places; backward gathers where the plain one scatters.
A newcomer's mistake: comparing in fp32. PyTorch pools the rounded map, so ties are those of x's
dtype, and their choice decides where the gradient goes.

V views, R rows of a view (images x pixels of x), C channels; (rows, C) is the memory of x.
"""

# Triton compiles these functions: its types are not those that pyright sees.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import NUM_WARPS, POOL_TILE, block_sizes, cdiv, operator, wrap_triton


def pooled(size: int) -> int:
    """Rows or columns after pooling."""
    return (size + 1) // 2


@triton.jit
def _apply_pool(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, place_ptr,
    num_rows, num_channels, height, width,
    AFFINE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y and places for one tile of the pooled map; num_rows of a view, of the pooled map."""
    view = tl.program_id(2)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < num_channels
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < num_rows
    out_width, out_height = (width + 1) // 2, (height + 1) // 2
    out_row = view * num_rows + row
    column = out_row % out_width
    line = (out_row // out_width) % out_height
    image = out_row // (out_width * out_height)
    mean = tl.load(mean_ptr + view * num_channels + channel, mask=in_channels, other=0.0)
    scale = tl.load(rstd_ptr + view * num_channels + channel, mask=in_channels, other=0.0)
    if AFFINE:
        weight = tl.load(weight_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=in_channels, other=0.0).to(tl.float32)
    best = tl.full([BLOCK_R, BLOCK_C], -1.0, tl.float32)  # below what ReLU gives
    place = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for tap in tl.static_range(9):
        above, left = 2 * line - 1 + tap // 3, 2 * column - 1 + tap % 3
        there = in_rows & (above >= 0) & (above < height) & (left >= 0) & (left < width)
        inside = there[:, None] & in_channels[None, :]
        at = ((image * height + above) * width + left).to(tl.int64) * num_channels
        x = tl.load(x_ptr + at[:, None] + channel[None, :], mask=inside, other=0.0)
        y = (x.to(tl.float32) - mean[None, :]) * scale[None, :]
        if AFFINE:
            y = y * weight[None, :] + bias[None, :]
        y = tl.where(y <= 0, 0.0, y).to(y_ptr.dtype.element_ty).to(tl.float32)
        better = inside & ((y > best) | (y != y))  # a NaN wins, as in PyTorch
        best = tl.where(better, y, best)
        place = tl.where(better, tap, place)
    inside = in_rows[:, None] & in_channels[None, :]
    to = out_row.to(tl.int64)[:, None] * num_channels + channel[None, :]
    tl.store(y_ptr + to, best.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(place_ptr + to, place.to(tl.uint8), mask=inside)


@triton.jit
def pooled_gradient(
    dy_ptr, place_ptr, out_row, in_rows, channel, in_channels, num_channels, height, width,
):  # fmt: skip
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
            there = in_rows & (window_line >= 0) & (window_line < out_height) & (tap_line < 3)
            there &= (window_column >= 0) & (window_column < out_width) & (tap_column < 3)
            inside = there[:, None] & in_channels[None, :]
            at = ((image * out_height + window_line) * out_width + window_column).to(tl.int64)
            at = at[:, None] * num_channels + channel[None, :]
            place = tl.load(place_ptr + at, mask=inside, other=255).to(tl.int32)
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(place == (3 * tap_line + tap_column)[:, None], dy, 0.0)
    return total


@operator("batch_norm_apply_pool")
def apply_pool(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:
    """y and places (uint8), (pooled rows, C) each; x (images x height x width, C)."""
    num_views, num_channels = mean.shape
    shape = (x.shape[0] // (height * width) * pooled(height) * pooled(width), num_channels)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    place = torch.empty(shape, dtype=torch.uint8, device=x.device)
    num_rows = shape[0] // num_views
    block_r, block_c = block_sizes(num_channels, tile=POOL_TILE)
    weight_bias = [mean if t is None else t for t in (weight, bias)]
    wrap_triton(_apply_pool)[(cdiv(num_rows, block_r), cdiv(num_channels, block_c), num_views)](
        x, mean, rstd, *weight_bias, y, place, num_rows, num_channels, height, width,
        AFFINE=weight is not None, BLOCK_R=block_r, BLOCK_C=block_c, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y, place
