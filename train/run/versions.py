"""Checks that driver, torch and DALI fit one another, for the doctor and train/main.py."""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.required import is_old, least
from train.run.program import first_line

MIN_DRIVER = {12: "525", 13: "580"}
"""First driver release for a CUDA major. Source: docs.nvidia.com/deploy/cuda-compatibility, and
DALI's installation page for its wheels."""


class Finding(NamedTuple):
    """The result of a check. ok None: it does not apply, for the reason in `found`."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def driver_cuda() -> int | None:
    """The newest CUDA that the driver supports, as 1000 * major + 10 * minor; None without one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    return version.value


def has_nvidia_gpu(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether the PCI bus shows one; a container without GPUs still sees the host's bus."""
    return any(
        (device / "vendor").read_text().strip() == "0x10de"
        and (device / "class").read_text().startswith("0x03")  # display controllers
        for device in devices.glob("*")
    )


def driver() -> Finding:
    """A driver no older than torch's CUDA."""
    supported, built = driver_cuda(), torch.version.cuda
    if supported is None:
        if not has_nvidia_gpu():
            return Finding("driver", None, "no NVIDIA GPU")
        remedy = "install NVIDIA's driver; in a container: docker run --gpus all"
        return Finding("driver", False, "an NVIDIA GPU, but libcuda.so.1 is not found", remedy)
    found = f"supports CUDA {supported // 1000}.{supported % 1000 // 10}"
    if built is None or int(built.split(".")[0]) <= supported // 1000:
        return Finding("driver", True, found)
    major = int(built.split(".")[0])
    found = f"{found}, but torch {torch.__version__} needs CUDA {major}"
    remedy = f"{newer_driver(major)}, or install a torch built for CUDA {supported // 1000}"
    return Finding("driver", False, found, remedy)


def newer_driver(major: int) -> str:
    """The remedy for a driver older than a CUDA major."""
    return f"update the driver to release {MIN_DRIVER.get(major, 'for that CUDA')} or newer"


def torch_build() -> Finding:
    """A torch that is new enough."""
    version, needed = torch.__version__, least("torch")
    if not is_old("torch", version):
        return Finding("torch", True, version)
    remedy = f"pip install 'torch>={needed}', or a newer base image"
    return Finding("torch", False, f"{version} is older than {needed}", remedy)


def refuse_misfits(device: str) -> None:
    """Raise ValueError for a torch or a DALI that is too old, or a driver too old for torch."""
    if (found := torch_build()).ok is False:
        raise ValueError(f"torch {found.found}: {found.remedy}")
    from pipeline.dali_wheel import refuse_old_dali

    refuse_old_dali()
    if device != "cpu" and driver_cuda() is not None and not (found := driver()).ok:
        raise ValueError(f"the driver {found.found}: {found.remedy}, or use --device cpu")


def dali() -> Finding:
    """DALI's wheel, cuda120 or cuda130, of torch's CUDA and no newer than the driver's."""
    try:
        from pipeline import dali_wheel
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return Finding("DALI", False, first_line(error), "pip install nvidia-dali-cuda130, or 120")
    version, major = dali_wheel.dali_version()
    wheel, built = f"nvidia-dali-cuda{major}0 {version}", torch.version.cuda
    if is_old("DALI", version):
        found = f"{wheel} is older than {least('DALI')}"
        return Finding("DALI", False, found, dali_wheel.upgrade())
    supported = driver_cuda()
    if supported is None or built is None:
        return Finding("DALI", True, wheel)
    needed = int(built.split(".")[0])
    if major > supported // 1000:
        found = f"{wheel} needs a driver of CUDA {major}, this one has {supported // 1000}"
        return Finding("DALI", False, found, newer_driver(major))
    if major != needed:
        new = f"then pip install nvidia-dali-cuda{needed}0"
        remedy = f"pip uninstall nvidia-dali-cuda{major}0, {new}"
        return Finding("DALI", False, f"{wheel} beside a torch of CUDA {built}", remedy)
    return Finding("DALI", True, wheel)


def jpeg_decoders(device: torch.device) -> Finding:
    """The GPU's hardware JPEG decoders, without which DALI decodes on the SMs and does not warn.

    nvidia-smi may work in a container that was started without the capability "video".
    """
    name = "JPEG decoders"
    if device.type == "cpu":
        return Finding(name, None, "no CUDA device: libjpeg-turbo decodes")
    try:
        from pipeline.hardware_decoder import hardware_decoders

        found = hardware_decoders()
    except (ImportError, OSError) as error:
        capabilities = "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        remedy = f"start the container with {capabilities}; on a host install all of the driver"
        return Finding(name, False, f"none are found: {first_line(error)}", remedy)
    if found.status or not found.engines:
        reason = f"nvJPEG's status {found.status}"
        return Finding(name, True, f"none in hardware ({reason}): CUDA decodes, on the SMs")
    return Finding(name, True, f"{found.engines} engines in hardware, cores each: {found.cores}")
