"""uint8 views -> normalised channels-last activations: the first op on the training device.

The loader gives uint8 NHWC, a quarter of the bytes of fp32. permute(0, 3, 1, 2) of NHWC memory is a
channels-last NCHW tensor; no copy is made.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kernels.choose import Kernels, use_triton


def normalize_views(
    views_NHWC: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    *,
    kernels: Kernels = "auto",
) -> Tensor:
    """Scale uint8 images to [0, 1], subtract mean, divide by std, per channel.

    Shapes: (N, H, W, 3) uint8 contiguous -> (N, 3, H, W) channels_last of `dtype`.
    Units: mean and std are of images in [0, 1], as torchvision's.
    Raises: ValueError for another dtype, shape or layout.
    """
    if views_NHWC.dtype != torch.uint8 or views_NHWC.dim() != 4 or views_NHWC.shape[3] != 3:
        raise ValueError(
            "normalize_views takes uint8 (N, H, W, 3), "
            f"got {views_NHWC.dtype} {tuple(views_NHWC.shape)}"
        )
    if not views_NHWC.is_contiguous():
        raise ValueError(f"normalize_views takes contiguous NHWC, got {views_NHWC.stride()}")
    if not dtype.is_floating_point:
        raise ValueError(f"normalize_views writes a floating dtype, got {dtype}")
    if not len(mean) == len(std) == 3:
        raise ValueError(f"mean and std are three values each, got {len(mean)} and {len(std)}")
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), views_NHWC.device)
    if use_triton(kernels, views_NHWC):
        from kernels.gpu.normalize import normalize  # see norm_autograd

        return normalize(views_NHWC, scale, shift, dtype).permute(0, 3, 1, 2)
    return torch.addcmul(shift, views_NHWC.float(), scale).to(dtype).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """out = scale * uint8 + shift. Cached on the device: a new copy would wait for the GPU."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale, shift
