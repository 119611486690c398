"""Do driver, torch and DALI fit one another and this program? For the doctor and train/main.py."""

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline import machine
from pipeline.machine import is_old, least
from train.run.program import first_line

MIN_DRIVER = {12: "525", 13: "580"}
"""First driver release for a CUDA major. Source: docs.nvidia.com/deploy/cuda-compatibility, and
DALI's installation page for its wheels."""


class Finding(NamedTuple):
    """The result of a check. ok None: it does not apply on this machine, for the reason `found`."""

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


def built_major() -> int | None:
    """CUDA's major version that torch was built for; None for a CPU build."""
    return None if torch.version.cuda is None else int(torch.version.cuda.split(".")[0])


def has_nvidia_gpu(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether the PCI bus shows one; a container without GPUs still sees the host's bus."""
    return any(
        (device / "vendor").read_text().strip() == "0x10de"
        and (device / "class").read_text().startswith("0x03")  # display controllers
        for device in devices.glob("*")
    )


def driver() -> Finding:
    """A driver no older than torch's CUDA."""
    supported, built = driver_cuda(), built_major()
    if supported is None:
        if not has_nvidia_gpu():
            return Finding("driver", None, "no NVIDIA GPU")
        remedy = "install NVIDIA's driver; in a container: docker run --gpus all"
        return Finding("driver", False, "an NVIDIA GPU, but no libcuda.so.1", remedy)
    found, major = f"supports CUDA {supported // 1000}.{supported % 1000 // 10}", supported // 1000
    if built is None or built <= major:
        return Finding("driver", True, found)
    found += f", but torch {torch.__version__} needs CUDA {built}"
    remedy = f"{newer_driver(built)}, or install a torch built for CUDA {major}"
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
    machine.refuse_old_dali()
    if device != "cpu" and driver_cuda() is not None and not (found := driver()).ok:
        raise ValueError(f"the driver {found.found}: {found.remedy}, or use --device cpu")


def dali() -> Finding:
    """DALI's wheel, cuda120 or cuda130, of torch's CUDA and no newer than the driver's."""
    try:
        version, major = machine.dali_version()
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        return Finding("DALI", False, first_line(error), "pip install nvidia-dali-cuda130, or 120")
    wheel, supported, built = f"nvidia-dali-cuda{major}0 {version}", driver_cuda(), built_major()
    found = remedy = ""
    if is_old("DALI", version):
        found, remedy = f"is older than {least('DALI')}", machine.dali_upgrade()
    elif supported is not None and built is not None and major > supported // 1000:
        found = f"needs a driver of CUDA {major}, this one supports {supported // 1000}"
        remedy = newer_driver(major)
    elif supported is not None and built not in (None, major):
        found, name = f"beside a torch of CUDA {torch.version.cuda}", "nvidia-dali-cuda"
        remedy = f"pip uninstall {name}{major}0, then pip install {name}{built}0"
    return Finding("DALI", not found, f"{wheel} {found}".strip(), remedy)


def jpeg_decoders(device: torch.device) -> Finding:
    """The GPU's hardware JPEG decoders; without them DALI decodes in CUDA and does not say so.

    A container needs the capability "video" for them, though nvidia-smi runs without it.
    """
    name = "JPEG decoders"
    if device.type == "cpu":
        return Finding(name, None, "no CUDA device: libjpeg-turbo decodes")
    try:
        found = machine.hardware_decoders()
    except (ImportError, OSError) as error:
        remedy = (
            "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; on a host "
            "install all of the driver"
        )
        return Finding(name, False, f"not available: {first_line(error)}", remedy)
    if found.status or not found.engines:
        reason = f"nvJPEG's status {found.status}"
        return Finding(name, True, f"none in hardware ({reason}): CUDA decodes, on the SMs")
    return Finding(name, True, f"{found.engines} engines in hardware, cores each: {found.cores}")
