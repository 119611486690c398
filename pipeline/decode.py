"""How DALI decodes: the --dali flags, the decoder's arguments on each device, what it reserves.

DALI is imported by the functions: the configuration needs the flags also where it is missing.
"""

# DALI makes its types at import, where pyright cannot see them:
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass

import torch

from pipeline.machine import refuse_old_dali

RESERVED = 2 << 30
"""Bytes of device memory, and of pinned memory, that a decoder reserves by default."""
HW_DECODER_LOADS = {(8, 0): 0.75, (9, 0): 0.99}
"""The fastest share for the hardware decoder by compute capability. A100: 0.75 of 5,000 to 7,000
images/s (developer.nvidia.com/blog/loading-data-fast-with-dali-and-new-jpeg-decoder-in-a100).
H200: 0.99, at 6 threads, in NVIDIA's MLPerf runs (training_results_v4.0, h200_ngc24.04_mxnet)."""
DEFAULT_LOAD = 0.65
"""DALI's default, for other GPUs (NVIDIA/DALI pull request 6366)."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How DALI runs; flags marked GPU have no effect on the CPU."""

    threads: int = 0
    """CPU threads of the graph; 0 takes this machine's cores, or the container's quota of them,
    divided by its ranks, and at most 8 on a GPU."""
    prefetch: int = 0
    """Batches that DALI prepares ahead; 0 takes 5 on a GPU (MLPerf's value) and 2 on the CPU."""
    hw_decoder_load: float | None = None
    """GPU: share of the JPEGs given to the hardware decoder; null takes the fastest one that was
    published for the GPU's architecture (HW_DECODER_LOADS)."""
    device_memory_padding: int = 0
    """GPU: bytes of device memory that each decoder thread reserves; 0 takes 256 MiB (MLPerf's
    value, at 6 threads), less where the threads are so many that they would hold over 2 GiB.
    Of the training pipeline; evaluation reserves nothing."""
    host_memory_padding: int = 0
    """GPU: bytes of each of the two pinned buffers that a decoder thread reserves; 0 takes 128 MiB,
    less where all would hold over 2 GiB. Of the training pipeline."""
    preallocate_width: int = 0
    """GPU: width of the largest image for the hardware decoder; 5980 for ImageNet, 0 to grow. Of
    the training pipeline."""
    preallocate_height: int = 0
    """GPU: height of the largest image for the hardware decoder; 6430 for ImageNet, 0 to grow."""

    def __post_init__(self) -> None:
        """Refuse what DALI would refuse later, without the flag's name."""
        if self.hw_decoder_load is not None and not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"dali.hw_decoder_load is a share 0 .. 1, got {self.hw_decoder_load}")
        for name, value in (("threads", self.threads), ("prefetch", self.prefetch)):
            if not 0 <= value <= 1024:  # DALI ends the process if it cannot start a thread
                raise ValueError(f"dali.{name} must be in 0 .. 1024, got {value}")
        for name in ("device_memory_padding", "host_memory_padding"):
            if getattr(self, name) < 0:
                raise ValueError(f"dali.{name} is in bytes, got {getattr(self, name)}")

    def depth(self, device_type: str) -> int:
        """Batches in flight at once."""
        return self.prefetch or (5 if device_type == "cuda" else 2)


def capability_of(device_id: int | None) -> tuple[int, int] | None:
    """Compute capability of a GPU; None for the CPU."""
    return None if device_id is None else torch.cuda.get_device_capability(device_id)


def decode_arguments(
    options: DecodeOptions,
    *,
    capability: tuple[int, int] | None,
    threads: int,
    has_reserve: bool = True,
) -> dict:
    """The decoder's keyword arguments; capability as capability_of gives it.

    EXIF orientation is not applied, as in torchvision.
    """
    from nvidia.dali import types

    refuse_old_dali()
    common = {"output_type": types.RGB, "adjust_orientation": False}
    if capability is None:
        return {"device": "cpu", **common}
    load = options.hw_decoder_load
    if load is None:
        load = HW_DECODER_LOADS.get(capability, DEFAULT_LOAD)
    names = ("device_memory_padding", "host_memory_padding", "preallocate_width_hint",
             "preallocate_height_hint")  # fmt: skip
    largest = options.preallocate_width, options.preallocate_height
    sizes = (*paddings(options, threads=threads), *largest) if has_reserve else (0, 0, 0, 0)
    common |= {"device": "mixed", "hw_decoder_load": load, **dict(zip(names, sizes, strict=True))}
    return common | {"jpeg_fancy_upsampling": True}  # chroma upsampled as libjpeg does on the CPU


def paddings(options: DecodeOptions, *, threads: int) -> tuple[int, int]:
    """Bytes that a decoder thread of the training pipeline reserves: device, each pinned buffer."""
    share = RESERVED // (threads + 1)  # the thread that calls holds buffers too (nvImageCodec)
    return (
        options.device_memory_padding or min(256 << 20, share),
        options.host_memory_padding or min(128 << 20, share // 2),
    )


def reserve(options: DecodeOptions, *, threads: int) -> str:
    """What DALI reserves beside the images, to print: the training and the evaluation pipeline."""
    device, pinned = ((threads + 1) * size / 2**30 for size in paddings(options, threads=threads))
    hints = options.preallocate_width, options.preallocate_height
    largest = "" if 0 in hints else " and the hardware decoder's for {} x {} pixels".format(*hints)
    return (
        f"training {device:.2f} GiB of device memory{largest}, {2 * pinned:.2f} GiB pinned "
        f"({threads} threads); evaluation none"
    )
