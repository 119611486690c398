"""Triton kernels of the first op on the training device: colour, blur, solarize, normalisation.

kernels/normalize.py has the formula. With draws three launches: the shift B mean of each image; the
colour map, which writes the result, or of an image with a blur its sums along the lines; and those
along the columns, where programs of other images end at once. Without draws one.

Bytes of an image of 224 x 224 pixels, to bf16: the shift reads 150,528, the map reads 150,528 and
writes 301,056, in all 602,112. With a blur its sums, of 301,056, are written and read too, in all
1,204,224. Without draws 451,584. With 4 channels 100,352 more are written, with 8 501,760.

A pixel's three bytes are loaded one by one, a lane each: no vector has three elements.
"""

# Triton compiles these functions: its types are not those that pyright sees.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import cdiv, operator, wrap_triton

PIXELS = 512  # of a tile: 4 for each of 128 threads, 12 loads in flight, 9 programs resident
SUMMED = 2048  # of a tile of the mean, of which an image has one program
NUM_WARPS = 4
COLOR, SOLARIZE, BLUR = tl.constexpr(9), tl.constexpr(18), tl.constexpr(19)
"""Where B, solarize and the blur's weights begin in a row of draws (pipeline/augment.py)."""


@triton.jit
def load_colors(crop_ptr, pixel, inside):
    """Red, green and blue of pixels, uint8."""
    red = tl.load(crop_ptr + 3 * pixel, mask=inside, other=0)
    green = tl.load(crop_ptr + 3 * pixel + 1, mask=inside, other=0)
    blue = tl.load(crop_ptr + 3 * pixel + 2, mask=inside, other=0)
    return red, green, blue


@triton.jit
def load_matrix(ptr):
    """The nine elements of a 3x3 matrix, by rows."""
    one = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2)
    two = tl.load(ptr + 3), tl.load(ptr + 4), tl.load(ptr + 5)
    return one, two, (tl.load(ptr + 6), tl.load(ptr + 7), tl.load(ptr + 8))


@triton.jit
def matrix_times(rows, red, green, blue):
    """A 3x3 matrix times a colour."""
    one, two, three = rows
    return (
        one[0] * red + one[1] * green + one[2] * blue,
        two[0] * red + two[1] * green + two[2] * blue,
        three[0] * red + three[1] * green + three[2] * blue,
    )


@triton.jit
def _shift(
    crop_ptr,  # (N, H, W, 3) uint8
    draws_ptr,  # (N, num_draws) fp32
    shift_ptr,  # (N, 3) fp32
    num_pixels,  # H W
    num_draws,
    BLOCK: tl.constexpr,
):
    """shift = B mean(crop) of one image, in multiples of 1/1024; the sum of its bytes is exact."""
    image = tl.program_id(0)
    crop_ptr += image.to(tl.int64) * num_pixels * 3
    reds = tl.zeros([BLOCK], tl.int32)
    greens = tl.zeros([BLOCK], tl.int32)
    blues = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_pixels, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        red, green, blue = load_colors(crop_ptr, pixel, pixel < num_pixels)
        reds += red
        greens += green
        blues += blue
    means = (
        mean_color(reds, num_pixels),
        mean_color(greens, num_pixels),
        mean_color(blues, num_pixels),
    )
    shift = matrix_times(load_matrix(draws_ptr + image * num_draws + COLOR), *means)
    for channel in tl.static_range(3):
        tl.store(shift_ptr + 3 * image + channel, tl.floor(shift[channel] * 1024 + 0.5) / 1024)


@triton.jit
def mean_color(values, count):
    """The mean in fp32; the sum may have more digits."""
    return (tl.sum(values.to(tl.int64)).to(tl.float64) / count).to(tl.float32)


@triton.jit
def reflected(index, size):
    """BORDER_REFLECT_101: -1 is 1, and size is size - 2, as often as it takes."""
    period = tl.maximum(2 * (size - 1), 1)
    index = tl.abs(index) % period
    return tl.minimum(index, period - index)


@triton.jit
def to_bytes(x):
    """clamp(x), rounded to integers."""
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0) + 0.5)


@triton.jit
def colored(crop_ptr, pixel, inside, color, shift):
    """clamp(A crop + shift) of pixels, rounded to integers, by channel in fp32."""
    red, green, blue = load_colors(crop_ptr, pixel, inside)
    red, green, blue = matrix_times(
        color, red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)
    )
    return to_bytes(red + shift[0]), to_bytes(green + shift[1]), to_bytes(blue + shift[2])


@triton.jit
def normalized(x, solarize, channel, scale_ptr, shift_ptr):
    """scale x + shift of integers, where x is inverted if it is at least half bright."""
    x = tl.where(x >= 256 - 128 * solarize, 255 - x, x)
    return x * tl.load(scale_ptr + channel) + tl.load(shift_ptr + channel)


@triton.jit
def store_normalized(
    colors, solarize, out_ptr, tile, num_pixels, scale_ptr, shift_ptr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The normalised pixels of a tile; with 4 or 8 channels whole pixels, zero beyond the third."""
    red = normalized(colors[0], solarize, 0, scale_ptr, shift_ptr).to(out_ptr.dtype.element_ty)
    green = normalized(colors[1], solarize, 1, scale_ptr, shift_ptr).to(out_ptr.dtype.element_ty)
    blue = normalized(colors[2], solarize, 2, scale_ptr, shift_ptr).to(out_ptr.dtype.element_ty)
    if CHANNELS == 3:
        pixel = tile * BLOCK + tl.arange(0, BLOCK)
        at, inside = out_ptr + 3 * pixel, pixel < num_pixels
        tl.store(at, red, mask=inside)
        tl.store(at + 1, green, mask=inside)
        tl.store(at + 2, blue, mask=inside)
    else:
        zero = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
        whole = tl.reshape(tl.join(tl.join(red, blue), tl.join(green, zero)), (BLOCK, 4))
        if CHANNELS == 8:
            rest = tl.zeros([BLOCK, 4], out_ptr.dtype.element_ty)
            whole = tl.permute(tl.join(whole, rest), (0, 2, 1))
        values = tl.reshape(whole, (BLOCK * CHANNELS,))
        at = tile * BLOCK * CHANNELS + tl.arange(0, BLOCK * CHANNELS)
        tl.store(out_ptr + at, values, mask=at < num_pixels * CHANNELS)


@triton.jit
def _normalize(
    crop_ptr,  # (N, H, W, 3) uint8
    draws_ptr,  # (N, num_draws) fp32
    color_shift_ptr,  # (N, 3) fp32
    sums_ptr,  # (N, 3, H, W) uint16, in units of 1/256
    scale_ptr,  # (3,) fp32
    shift_ptr,  # (3,) fp32
    out_ptr,  # (N, H, W, CHANNELS)
    width,  # W
    num_pixels,  # H W
    num_draws,
    radius,  # R
    DRAWS: tl.constexpr,  # whether there are
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out of one tile, or where the image has a blur the sums along its lines."""
    tiles = tl.cdiv(num_pixels, BLOCK)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    first = image.to(tl.int64) * num_pixels
    crop_ptr += 3 * first
    out_ptr += CHANNELS * first
    if not DRAWS:
        red, green, blue = load_colors(crop_ptr, pixel, inside)
        colors = red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)
        store_normalized(
            colors, 0, out_ptr, tile, num_pixels, scale_ptr, shift_ptr, CHANNELS, BLOCK
        )
        return
    draws_ptr += image * num_draws
    color_shift_ptr += 3 * image
    color = load_matrix(draws_ptr)
    shift = tl.load(color_shift_ptr), tl.load(color_shift_ptr + 1), tl.load(color_shift_ptr + 2)
    red, green, blue = colored(crop_ptr, pixel, inside, color, shift)
    center = tl.load(draws_ptr + BLUR)
    if center < 256:
        column = pixel % width
        line = pixel - column
        reds, greens, blues = red * center, green * center, blue * center
        for offset in range(1, radius + 1):
            weight = tl.load(draws_ptr + BLUR + offset)
            for side in tl.static_range(-1, 2, 2):
                at = line + reflected(column + side * offset, width)
                red, green, blue = colored(crop_ptr, at, inside, color, shift)
                reds += red * weight
                greens += green * weight
                blues += blue * weight
        sums_ptr += 3 * first
        tl.store(sums_ptr + pixel, reds.to(tl.uint16), mask=inside)
        tl.store(sums_ptr + num_pixels + pixel, greens.to(tl.uint16), mask=inside)
        tl.store(sums_ptr + 2 * num_pixels + pixel, blues.to(tl.uint16), mask=inside)
    else:
        solarize = tl.load(draws_ptr + SOLARIZE)
        colors = red, green, blue
        store_normalized(
            colors, solarize, out_ptr, tile, num_pixels, scale_ptr, shift_ptr, CHANNELS, BLOCK
        )


@triton.jit
def _blur(
    sums_ptr,  # (N, 3, H, W) uint16, in units of 1/256
    draws_ptr,  # (N, num_draws) fp32
    scale_ptr,  # (3,) fp32
    shift_ptr,  # (3,) fp32
    out_ptr,  # (N, H, W, CHANNELS)
    height,  # H
    width,  # W
    num_draws,
    radius,  # R
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out of one tile, if its image has a blur: the sums along the columns. Below 2^24: exact."""
    num_pixels = height * width
    tiles = tl.cdiv(num_pixels, BLOCK)
    image, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    draws_ptr += image * num_draws
    center = tl.load(draws_ptr + BLUR)
    if center == 256:
        return
    pixel = tile * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < num_pixels
    column, line = pixel % width, pixel // width
    first = image.to(tl.int64) * num_pixels
    sums_ptr += 3 * first
    red, green, blue = load_sums(sums_ptr, pixel, inside, num_pixels)
    reds, greens, blues = red * center, green * center, blue * center
    for offset in range(1, radius + 1):
        weight = tl.load(draws_ptr + BLUR + offset)
        for side in tl.static_range(-1, 2, 2):
            at = reflected(line + side * offset, height) * width + column
            red, green, blue = load_sums(sums_ptr, at, inside, num_pixels)
            reds += red * weight
            greens += green * weight
            blues += blue * weight
    colors = sums_to_bytes(reds), sums_to_bytes(greens), sums_to_bytes(blues)
    solarize = tl.load(draws_ptr + SOLARIZE)
    out_ptr += CHANNELS * first
    store_normalized(
        colors, solarize, out_ptr, tile, num_pixels, scale_ptr, shift_ptr, CHANNELS, BLOCK
    )


@triton.jit
def load_sums(sums_ptr, pixel, inside, num_pixels):
    """The sums of pixels by channel, fp32."""
    red = tl.load(sums_ptr + pixel, mask=inside, other=0)
    green = tl.load(sums_ptr + num_pixels + pixel, mask=inside, other=0)
    blue = tl.load(sums_ptr + 2 * num_pixels + pixel, mask=inside, other=0)
    return red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)


@triton.jit
def sums_to_bytes(x):
    """Of units of 1/65536, rounded to integers."""
    return tl.floor((x + 32768) / 65536)


@operator("normalize_views")
def normalize(
    images: Tensor,
    draws: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    channels: int,
) -> Tensor:
    """(N, H, W, channels) of dtype, 3, 4 or 8 channels, of which those beyond 3 are zero.

    images (N, H, W, 3), draws N rows of 20 + R, scale and shift (3,).
    """
    num_images, height, width, _ = images.shape
    num_pixels = height * width
    out = torch.empty(num_images, height, width, channels, dtype=dtype, device=images.device)
    options = {"CHANNELS": channels, "BLOCK": PIXELS, "num_warps": NUM_WARPS}
    tiles = (num_images * cdiv(num_pixels, PIXELS),)
    if draws is None:
        unused = (scale,) * 3
        wrap_triton(_normalize)[tiles](
            images, *unused, scale, shift, out, width, num_pixels, 0, 0, DRAWS=False, **options
        )
        return out
    num_draws = draws.shape[-1]
    radius = num_draws - 1 - BLUR.value
    color_shift = torch.empty(num_images, 3, dtype=torch.float32, device=images.device)
    sums = images.shape if radius else (1,)
    sums = torch.empty(sums, dtype=torch.uint16, device=images.device)
    wrap_triton(_shift)[(num_images,)](
        images, draws, color_shift, num_pixels, num_draws, BLOCK=SUMMED, num_warps=NUM_WARPS
    )
    sizes = width, num_pixels, num_draws, radius
    wrap_triton(_normalize)[tiles](
        images, draws, color_shift, sums, scale, shift, out, *sizes, DRAWS=True, **options
    )
    if radius:
        sizes = height, width, num_draws, radius
        wrap_triton(_blur)[tiles](sums, draws, scale, shift, out, *sizes, **options)
    return out
