"""Triton kernels of batch norm's forward pass: statistics of each view, then one pass that applies.

    y = relu((x - mean_v) rstd_v weight + bias + shortcut)
    shortcut: nothing, a residual r, or a second batch norm (x2 - mean2_v) rstd2_v weight2 + bias2

Bytes: statistics read x once; applying reads x and the shortcut and writes y. With a shortcut it
also writes one bit an element, ReLU's mask; without one backward recomputes the mask from x.
The stem applies, and max-pools 3x3 with stride 2, in one pass. It writes the pooled map and a byte
an output, the tap of its window (3 * row + column), the first one where several are equal, as
PyTorch chooses. Ties are those of x's dtype, as PyTorch pools the rounded map.
A newcomer's mistake: sums of x and x^2. With mean 1000 and std 1 no digit of the variance is left:
each program sums around the mean of its first rows, and parts are merged by mean and M2.

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

from kernels.gpu.launch import (
    POOL_TILE,
    PROGRAMS,
    cdiv,
    merge,
    operator,
    reduction,
    tiles,
    wrap_triton,
)

STAGES = tl.constexpr(3)
"""Of a loop over rows: it copies two tiles ahead into shared memory (profiling/kernels.py)."""


@triton.jit
def place(folds, REVERSED: tl.constexpr):
    """(tile or part, block of channels, view) of this program; folds as of launch.tiles."""
    block, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1) * folds
    view, views = tl.program_id(2) // folds, tl.num_programs(2) // folds
    tile += tl.program_id(2) % folds * tl.num_programs(1)
    if REVERSED:
        return tiles - 1 - tile, block, views - 1 - view
    return tile, block, view


@triton.jit
def rows_of_part(part, num_parts, num_rows, tile_rows):
    """Rows of the tiles part, part + num_parts, ...; the view's last tile may be short."""
    num_tiles = tl.cdiv(num_rows, tile_rows)
    rows = tl.cdiv(num_tiles - part, num_parts) * tile_rows
    has_last = (num_tiles - 1) % num_parts == part
    return tl.where(has_last, rows - (num_tiles * tile_rows - num_rows), rows)


@triton.jit
def _statistics(
    x_ptr,  # (V, R, C)
    part_ptr,  # (V, parts, 2, C) fp32
    num_rows,  # R
    num_channels,  # C
    num_parts,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """part[view, part] = (mean, M2 = sum (x - mean)^2) of the part's rows. Reads x once."""
    part, block, view = place(1, REVERSED=False)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_R)
    in_channels = channel < num_channels
    offset = row[:, None] * num_channels + channel[None, :]
    first = part * BLOCK_R
    inside = (first + row < num_rows)[:, None] & in_channels[None, :]
    at = (view * num_rows + first).to(tl.int64) * num_channels + offset
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    pivot = tl.sum(x, 0) / tl.minimum(num_rows - first, BLOCK_R)
    delta = tl.where(inside, x - pivot[None, :], 0.0)
    total, square = delta, delta * delta
    for tile in tl.range(
        part + num_parts, tl.cdiv(num_rows, BLOCK_R), num_parts, num_stages=STAGES
    ):
        inside = (tile * BLOCK_R + row < num_rows)[:, None] & in_channels[None, :]
        at = (view * num_rows + tile * BLOCK_R).to(tl.int64) * num_channels + offset
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        delta = tl.where(inside, x - pivot[None, :], 0.0)
        total += delta
        square += delta * delta
    count = rows_of_part(part, num_parts, num_rows, BLOCK_R)
    shift = tl.sum(total, 0) / count
    out = ((view * num_parts + part) * 2) * num_channels + channel
    tl.store(part_ptr + out, pivot + shift, mask=in_channels)
    m2 = tl.sum(square, 0) - shift * shift * count
    tl.store(part_ptr + out + num_channels, tl.where(m2 < 0, 0.0, m2), mask=in_channels)


@triton.jit
def _merge_statistics(
    part_ptr,  # (V, parts, 2, C) fp32
    mean_ptr,  # (V, C) fp32
    scale_ptr,  # (V, C) fp32: rstd or the variance
    running_mean_ptr,  # (C,)
    running_var_ptr,  # (C,)
    num_rows,  # R
    num_channels,  # C
    num_parts,
    tile_rows,  # BLOCK_R of the statistics
    momentum,
    eps,
    VIEWS: tl.constexpr,  # V
    HAS_RUNNING: tl.constexpr,
    WANT_VAR: tl.constexpr,
    BLOCK_S: tl.constexpr,  # all parts of a view: nothing waits for an earlier load
    BLOCK_C: tl.constexpr,
):
    """mean and rstd (WANT_VAR: the biased variance) of each view; running statistics in order."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < num_channels
    part = tl.arange(0, BLOCK_S)
    inside = (part < num_parts)[:, None] & in_channels[None, :]
    offset = part[:, None] * 2 * num_channels + channel[None, :]
    count = rows_of_part(part, num_parts, num_rows, tile_rows)
    if HAS_RUNNING:
        running_mean = tl.load(running_mean_ptr + channel, mask=in_channels).to(tl.float32)
        running_var = tl.load(running_var_ptr + channel, mask=in_channels).to(tl.float32)
    for view in tl.static_range(VIEWS):
        view_ptr = part_ptr + view * num_parts * 2 * num_channels
        pivot = tl.load(view_ptr + channel, mask=in_channels, other=0.0)
        mean = tl.load(view_ptr + offset, mask=inside, other=0.0)
        m2 = tl.load(view_ptr + offset + num_channels, mask=inside, other=0.0)
        shift = tl.where(inside, (mean - pivot[None, :]) * count[:, None], 0.0)
        view_mean = pivot + tl.sum(shift, 0) / num_rows
        delta = mean - view_mean[None, :]
        square = tl.where(inside, m2 + delta * delta * count[:, None], 0.0)
        var = tl.sum(square, 0) / num_rows  # squares: not below 0; NaN stays NaN
        scale = var if WANT_VAR else tl.rsqrt(var + eps)
        tl.store(mean_ptr + view * num_channels + channel, view_mean, mask=in_channels)
        tl.store(scale_ptr + view * num_channels + channel, scale, mask=in_channels)
        if HAS_RUNNING:
            unbiased = var * (num_rows / tl.maximum(num_rows - 1, 1))
            running_mean += momentum * (view_mean - running_mean)
            running_var += momentum * (unbiased - running_var)
    if HAS_RUNNING:
        # the optimizer skips such a step, so skip its statistics: NaN would stay in them
        is_finite = in_channels & (running_var < float("inf"))
        tl.store(running_mean_ptr + channel, running_mean, mask=is_finite)
        tl.store(running_var_ptr + channel, running_var, mask=is_finite)


@triton.jit
def standardise(x, mean_ptr, rstd_ptr, channel, num_channels):
    """xhat = (x - mean) rstd of a tile in fp32; the pointers are to the view's (C,)."""
    mean = tl.load(mean_ptr + channel, mask=channel < num_channels, other=0.0)
    rstd = tl.load(rstd_ptr + channel, mask=channel < num_channels, other=0.0)
    return (x - mean[None, :]) * rstd[None, :]


@triton.jit
def affine(xhat, weight_ptr, bias_ptr, channel, num_channels, AFFINE: tl.constexpr):
    """xhat weight + bias, or without affine part xhat."""
    if AFFINE:
        weight = tl.load(weight_ptr + channel, mask=channel < num_channels, other=0.0)
        bias = tl.load(bias_ptr + channel, mask=channel < num_channels, other=0.0)
        xhat = xhat * weight.to(tl.float32)[None, :] + bias.to(tl.float32)[None, :]
    return xhat


@triton.jit
def _apply(
    x_ptr,  # (V, R, C)
    mean_ptr,  # (V, C) fp32
    rstd_ptr,  # (V, C) fp32
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    shortcut_ptr,  # (V, R, C): the residual, or x2
    mean2_ptr,  # (V, C) fp32
    rstd2_ptr,  # (V, C) fp32
    weight2_ptr,  # (C,)
    bias2_ptr,  # (C,)
    y_ptr,  # (V, R, C)
    bits_ptr,  # (V, R, C / 8 rounded up) uint8
    num_rows,  # R
    num_channels,  # C
    folds,  # of the grid
    AFFINE: tl.constexpr,
    SHORTCUT: tl.constexpr,  # 0 none, 1 residual, 2 second batch norm
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y of one tile, and with SHORTCUT and RELU the bits of the mask."""
    tile, block, view = place(folds, REVERSED=True)  # the statistics' end first
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tile * BLOCK_R
    row = first + tl.arange(0, BLOCK_R)
    inside = (row < num_rows)[:, None] & (channel < num_channels)[None, :]
    start = (view * num_rows + first).to(tl.int64)  # beyond 2^31 elements at 2,674 views
    base = start * num_channels
    at = tl.arange(0, BLOCK_R)[:, None] * num_channels + channel[None, :]  # int32: fewer registers
    mean_ptr += view * num_channels
    rstd_ptr += view * num_channels
    x = tl.load(x_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
    y = standardise(x, mean_ptr, rstd_ptr, channel, num_channels)
    y = affine(y, weight_ptr, bias_ptr, channel, num_channels, AFFINE)
    if SHORTCUT > 0:
        skip = tl.load(shortcut_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
        if SHORTCUT == 2:
            mean2_ptr += view * num_channels
            rstd2_ptr += view * num_channels
            skip = standardise(skip, mean2_ptr, rstd2_ptr, channel, num_channels)
            skip = affine(skip, weight2_ptr, bias2_ptr, channel, num_channels, AFFINE)
        y += skip
    if RELU:
        if SHORTCUT > 0:
            octet = block * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
            num_octets = tl.cdiv(num_channels, 8)
            passed = tl.reshape((y > 0).to(tl.int32), [BLOCK_R, BLOCK_C // 8, 8])
            bits = tl.sum(passed << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
            bits_at = tl.arange(0, BLOCK_R)[:, None] * num_octets + octet[None, :]
            mask = (row < num_rows)[:, None] & (octet < num_octets)[None, :]
            tl.store(bits_ptr + start * num_octets + bits_at, bits, mask=mask)
        y = tl.where(y <= 0, 0.0, y)  # NaN stays NaN: tl.maximum would make it 0
    tl.store(y_ptr + base + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _apply_pool(
    x_ptr,  # (images, height, width, C)
    mean_ptr,  # (V, C) fp32
    rstd_ptr,  # (V, C) fp32
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    y_ptr,  # the pooled map
    tap_ptr,  # as y, uint8
    num_rows,  # of a view of the pooled map
    num_channels,  # C
    height,  # of x, as width
    width,
    folds,  # of the grid
    AFFINE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y and the taps of one tile of the pooled map."""
    tile, block, view = place(folds, REVERSED=True)  # the statistics' end first
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channel < num_channels
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = row < num_rows
    out_width, out_height = (width + 1) // 2, (height + 1) // 2
    out_row = view * num_rows + row
    column = out_row % out_width
    line = (out_row // out_width) % out_height
    image = out_row // (out_width * out_height)
    mean_ptr += view * num_channels
    rstd_ptr += view * num_channels
    best = tl.full([BLOCK_R, BLOCK_C], -1.0, tl.float32)  # below what ReLU gives
    best_tap = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for tap in tl.static_range(9):
        above, left = 2 * line - 1 + tap // 3, 2 * column - 1 + tap % 3
        in_map = in_rows & (above >= 0) & (above < height) & (left >= 0) & (left < width)
        inside = in_map[:, None] & in_channels[None, :]
        at = ((image * height + above) * width + left).to(tl.int64) * num_channels
        x = tl.load(x_ptr + at[:, None] + channel[None, :], mask=inside, other=0.0)
        y = standardise(x.to(tl.float32), mean_ptr, rstd_ptr, channel, num_channels)
        y = affine(y, weight_ptr, bias_ptr, channel, num_channels, AFFINE)
        y = tl.where(y <= 0, 0.0, y).to(y_ptr.dtype.element_ty).to(tl.float32)
        better = inside & ((y > best) | (y != y))  # NaN wins, as in PyTorch
        best = tl.where(better, y, best)
        best_tap = tl.where(better, tap, best_tap)
    inside = in_rows[:, None] & in_channels[None, :]
    to = out_row.to(tl.int64)[:, None] * num_channels + channel[None, :]
    tl.store(y_ptr + to, best.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(tap_ptr + to, best_tap.to(tl.uint8), mask=inside)


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
    grid, options = reduction(num_rows, num_channels, num_views, programs=PROGRAMS)
    part = torch.empty(num_views, grid[1], 2, num_channels, dtype=torch.float32, device=x.device)
    wrap_triton(_statistics)[grid](x, part, num_rows, num_channels, grid[1], **options)
    sizes = num_rows, options["BLOCK_R"]
    return merged_statistics(part, running_mean, running_var, sizes, momentum, eps, want_var)


def merged_statistics(
    part: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    sizes: tuple[int, int],
    momentum: float,
    eps: float,
    want_var: bool,
) -> tuple[Tensor, Tensor]:
    """Within an operator: mean and scale of `statistics` from its parts (V, parts, 2, C).

    sizes: rows of a view, and of the tiles that the parts are made of.
    """
    num_views, parts, _, num_channels = part.shape
    mean = part.new_empty(num_views, num_channels)
    scale = torch.empty_like(mean)
    has_running = running_mean is not None and running_var is not None
    running = (running_mean, running_var) if has_running else (part, part)
    switches = {"VIEWS": num_views, "HAS_RUNNING": has_running, "WANT_VAR": want_var}
    num_rows, tile_rows = sizes
    values = num_rows, num_channels, parts, tile_rows, momentum, eps
    grid, options = merge(parts, num_channels)
    wrap_triton(_merge_statistics)[grid](
        part, mean, scale, *running, *values, **switches, **options
    )
    return mean, scale


@operator("batch_norm_apply")
def apply(
    inputs: list[Tensor], residual: Tensor | None, params: list[Tensor], relu: bool
) -> tuple[Tensor, Tensor]:
    """y like x, and ReLU's mask: (rows, C / 8 rounded up) uint8, empty without shortcut or ReLU.

    inputs: x (rows, C), mean and rstd (V, C) fp32; for a second batch norm its three too, and no
    residual. params: weight and bias (C,) of each, or empty.
    """
    x, mean, rstd = inputs[:3]
    num_views, num_channels = mean.shape
    shortcut, *statistics2 = inputs[3:] or [x if residual is None else residual, mean, rstd]
    kind = 2 if len(inputs) > 3 else int(residual is not None)
    width = cdiv(num_channels, 8) if relu and kind else 0
    y = torch.empty_like(x)
    bits = torch.empty(x.shape[0], width, dtype=torch.uint8, device=x.device)
    weight, bias, weight2, bias2 = (*params, *[mean] * 4)[:4]
    num_rows = x.shape[0] // num_views
    tensors = (x, mean, rstd, weight, bias, shortcut, *statistics2, weight2, bias2)
    tensors += (y, bits if width else x)
    switches = {"AFFINE": bool(params), "SHORTCUT": kind, "RELU": relu}
    folds, grid, options = tiles(num_rows, num_channels, num_views)
    wrap_triton(_apply)[grid](*tensors, num_rows, num_channels, folds, **switches, **options)
    return y, bits


def pooled(size: int) -> int:
    """Rows or columns after pooling."""
    return (size + 1) // 2


@operator("batch_norm_apply_pool")
def apply_pool(
    inputs: list[Tensor], params: list[Tensor], size: list[int]
) -> tuple[Tensor, Tensor]:
    """y and taps (uint8), (pooled rows, C) each; inputs and params as of apply, size of x's map."""
    x, mean, rstd = inputs
    num_views, num_channels = mean.shape
    height, width = size
    shape = (x.shape[0] // (height * width) * pooled(height) * pooled(width), num_channels)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    tap = torch.empty(shape, dtype=torch.uint8, device=x.device)
    num_rows = shape[0] // num_views
    weight, bias = params or (mean, mean)
    folds, grid, options = tiles(num_rows, num_channels, num_views, tile=POOL_TILE)
    tensors, sizes = (x, mean, rstd, weight, bias, y, tap), (num_rows, num_channels, height, width)
    wrap_triton(_apply_pool)[grid](*tensors, *sizes, folds, AFFINE=bool(params), **options)
    return y, tap
