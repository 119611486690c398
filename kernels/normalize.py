"""uint8 crops -> coloured, blurred, normalised channels-last activations: the step's first op.

The loader gives uint8 NHWC, a quarter of the bytes of fp32. permute(0, 3, 1, 2) of NHWC memory is a
channels-last NCHW tensor; no copy is made. On the CPU the loader's crops are finished views, and
there are no draws.

    view = solarize(blur(clamp(A crop + B mean(crop)))), rounded to uint8 after each step
    y    = (view / 255 - mean) / std

As OpenCV computes it on the CPU, bit for bit but where fp32 rounds B mean(crop) otherwise: A and
that shift are multiples of 1/1024, the blur's weights of 1/256, so fp32 adds without rounding.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.choose import Kernels, use_triton

COLOR, SOLARIZE, BLUR = 9, 18, 19  # of a row of draws: where B, solarize and weights begin


def normalize_views(
    views_NHWC: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    *,
    draws: Tensor | None = None,
    channels: int = 3,
    kernels: Kernels = "auto",
) -> Tensor:
    """Scale uint8 images to [0, 1], subtract mean, divide by std, per channel.

    Shapes: (N, H, W, 3) uint8 contiguous -> (N, channels, H, W) channels_last of `dtype`.
    draws: as of finish_views, which is applied first. channels: 3, 4 or 8; zero beyond the third.
    Units: mean and std are of images in [0, 1], as torchvision's.
    Raises: ValueError for another dtype, shape or layout.
    """
    if views_NHWC.dim() != 4:
        raise ValueError(f"normalize_views takes (N, H, W, 3), got {tuple(views_NHWC.shape)}")
    _check(views_NHWC, draws)
    if not dtype.is_floating_point:
        raise ValueError(f"normalize_views writes a floating dtype, got {dtype}")
    if channels not in (3, 4, 8):
        raise ValueError(f"normalize_views writes 3, 4 or 8 channels, got {channels}")
    if not len(mean) == len(std) == 3:
        raise ValueError(f"mean and std are three values each, got {len(mean)} and {len(std)}")
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), views_NHWC.device)
    if use_triton(kernels, views_NHWC):
        from kernels.gpu.normalize import normalize  # see norm_autograd

        return normalize(views_NHWC, draws, scale, shift, dtype, channels).permute(0, 3, 1, 2)
    views = finish_views(views_NHWC, draws, kernels="plain")
    out = torch.addcmul(shift, views.float(), scale).to(dtype)
    return F.pad(out, (0, channels - 3)).permute(0, 3, 1, 2)


def finish_views(crops: Tensor, draws: Tensor | None, *, kernels: Kernels = "auto") -> Tensor:
    """The views themselves, for those who look at them: pictures, another program's network.

    Shapes: crops (..., H, W, 3) uint8 contiguous -> the same; draws (..., 20 + R) fp32 of
    pipeline/augment.py's pack_draws, or None: the crops are finished.
    Raises: ValueError for another dtype, shape or layout.
    """
    _check(crops, draws)
    if draws is None:
        return crops
    if use_triton(kernels, crops):
        from kernels.gpu.normalize import normalize  # see norm_autograd

        unchanged = _scale_and_shift((0.0,) * 3, (1 / 255,) * 3, crops.device)
        images = crops.flatten(0, -4)
        return normalize(images, draws, *unchanged, torch.uint8, 3).view(crops.shape)
    draws = draws.view(*crops.shape[:-3], -1)
    by_image = draws[..., None, None, :]  # (..., 1, 1, 20 + R)
    colors, total = crops.sum((-3, -2)), crops.shape[-3] * crops.shape[-2]
    color_mean = draws[..., COLOR:SOLARIZE].unflatten(-1, (3, 3))
    shift = (color_mean * (colors.double() / total).float()[..., None, :]).sum(-1)
    x = ((shift * 1024).round() / 1024)[..., None, None, :]
    for channel in range(3):  # no matrix product: TF32 would round A
        x = x + crops[..., channel : channel + 1] * by_image[..., channel:COLOR:3]
    x = (x.clamp(0, 255) + 0.5).floor()
    for axis in (-2, -3):
        size, center = crops.shape[axis], x
        x = center * by_image[..., BLUR : BLUR + 1]
        for offset in range(1, draws.shape[-1] - BLUR):
            at = torch.arange(-offset, size + offset, device=crops.device)
            at = _reflected(at, size)
            pair = center.index_select(axis, at[2 * offset :])
            pair = pair + center.index_select(axis, at[:size])
            x = x + pair * by_image[..., BLUR + offset : BLUR + offset + 1]
    x = ((x + 32768) / 65536).floor()
    is_negative = (by_image[..., SOLARIZE : SOLARIZE + 1] > 0) & (x >= 128)
    return torch.where(is_negative, 255 - x, x).to(torch.uint8)


def _check(images: Tensor, draws: Tensor | None) -> None:
    """Raise ValueError for images and draws that are not as finish_views says."""
    if images.dtype != torch.uint8 or images.shape[-1] != 3:
        raise ValueError(
            f"views are uint8 (..., H, W, 3), got {images.dtype} {tuple(images.shape)}"
        )
    if not images.is_contiguous():
        raise ValueError(f"views are contiguous NHWC, got strides {images.stride()}")
    if draws is None:
        return
    num_images = images.shape[:-3].numel()
    is_packed = draws.dtype == torch.float32 and draws.is_contiguous() and draws.shape[-1] > BLUR
    if not is_packed or draws.shape[:-1].numel() != num_images or draws.device != images.device:
        raise ValueError(
            f"draws of {num_images} images are contiguous float32 (..., 20 + R) "
            f"on {images.device}, got {draws.dtype} {tuple(draws.shape)} on {draws.device}"
        )


def _reflected(index: Tensor, size: int) -> Tensor:
    """BORDER_REFLECT_101: -1 is 1, and size is size - 2, as often as it takes."""
    period = max(1, 2 * (size - 1))
    index = index.abs() % period
    return torch.minimum(index, period - index)


@lru_cache(maxsize=16)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """out = scale * uint8 + shift. Cached on the device: a new copy would wait for the GPU."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale, shift
