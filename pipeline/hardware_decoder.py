"""Ask nvJPEG for the GPU's JPEG decoders, as nvImageCodec does for DALI.

DALI itself says nothing where there are none: CUDA decodes instead.
Source: nvImageCodec's extensions/nvjpeg/hw_decoder.cpp, NvJpegHwDecoderPlugin::Decoder.
"""

import ctypes
from pathlib import Path
from typing import NamedTuple

import nvidia

from pipeline.dali_wheel import dali_version

BACKEND_HARDWARE = 3
"""nvjpegBackend_t. Source: docs.nvidia.com/cuda/nvjpeg, nvJPEG type declarations."""

NVCUVID = "libnvcuvid.so.1"
"""The part of the driver that nvJPEG needs: a container gets it with the capability video."""


class Decoders(NamedTuple):
    """nvJPEG's answer. status: its nvjpegStatus_t, 0 for success, 7 for a GPU without decoders."""

    status: int
    engines: int = 0
    cores: int = 0


def nvjpeg_path() -> str:
    """The libnvjpeg that nvImageCodec loads: its RUNPATH's order, then the system's."""
    soname = f"libnvjpeg.so.{dali_version()[1]}"
    folders = [
        *(f"{root}/{part}/lib" for root in nvidia.__path__ for part in ("nvjpeg", "cu13")),
        "/usr/local/cuda/lib64",
    ]
    return next((str(p) for f in folders if (p := Path(f) / soname).exists()), soname)


def hardware_decoders() -> Decoders:
    """The JPEG decoders of the current CUDA device.

    Raises: OSError where nvJPEG or the driver's library is not found.
    """
    ctypes.CDLL(NVCUVID)
    nvjpeg = ctypes.CDLL(nvjpeg_path())
    handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    status = nvjpeg.nvjpegCreateEx(BACKEND_HARDWARE, None, None, 0, ctypes.byref(handle))
    if status == 0:
        status = nvjpeg.nvjpegGetHardwareDecoderInfo(
            handle, ctypes.byref(engines), ctypes.byref(cores)
        )
        nvjpeg.nvjpegDestroy(handle)
    return Decoders(status, engines.value, cores.value)
