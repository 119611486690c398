"""What this machine has: usable CPU cores, versions of torch and DALI, hardware JPEG decoders.

torch and DALI are imported by the functions: deploy/install.py runs before they are installed.
"""

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LEAST = {"torch": (2, 11), "DALI": (2, 3)}
"""torch: the oldest that the tests have passed with (profiling/LOG.md). DALI: before 2.2
decoders.image has no adjust_orientation, and 2.2.0 crashes on a damaged TFRecord (SIGSEGV)."""

BACKEND_HARDWARE = 3
"""nvjpegBackend_t. Source: docs.nvidia.com/cuda/nvjpeg, nvJPEG type declarations."""
NVCUVID = "libnvcuvid.so.1"
"""The part of the driver that nvJPEG needs: a container gets it with the capability video."""


def usable_cores(root: Path = Path("/")) -> int:
    """Cores of the affinity mask, or whole cores of the CPU quota where that is less; at least 1.

    Not os.cpu_count(): with a quota of 4 of a host's 224 cores, 224 threads use the quota up at
    once and all are stopped until the next period.
    Source: Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst of Linux.
    """
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Cores of each quota on this process: its groups and those above them, of cgroup v2 and v1."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no cgroups
        return
    for line in groups:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            yield from _group_quotas(root / "sys/fs/cgroup", group, "cpu.max")
        elif "cpu" in controllers.split(","):
            for name in (controllers, "cpu"):  # often a link to the other
                mount = root / "sys/fs/cgroup" / name
                yield from _group_quotas(mount, group, "cpu.cfs_quota_us", "cpu.cfs_period_us")


def _group_quotas(mount: Path, group: str, *names: str) -> Iterator[float]:
    # a container may see its own group as the mount, under a path of the host: all are tried
    path = Path(group.lstrip("/"))
    for folder in {mount / path, *(mount / above for above in path.parents), mount}:
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
        except OSError:
            continue
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)


def least(package: str) -> str:
    """The least version of torch or DALI, as text; requirements.txt pins newer ones."""
    return ".".join(map(str, LEAST[package]))


def is_old(package: str, version: str) -> bool:
    """Whether this version of torch or DALI is older than the least one.

    The first two numbers count: NVIDIA's builds are named like pre-releases
    (2.13.0a0+9186a08b2c.nv26.07), which sort below 2.13.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    assert numbers is not None, version
    return tuple(map(int, numbers.groups())) < LEAST[package]


def dali_version() -> tuple[str, int]:
    """DALI's version, and the CUDA major it was built for: 13 for the wheel nvidia-dali-cuda130.

    Raises: ImportError or OSError where DALI, or a library that it needs, is missing.
    """
    import nvidia.dali

    dali: Any = nvidia.dali  # sets the two at import
    return dali.__version__, int(str(dali.__cuda_version__)[:2])


def dali_upgrade() -> str:
    """The command that installs a newer DALI, of torch's CUDA."""
    import torch

    built = torch.version.cuda
    major = dali_version()[1] if built is None else int(built.split(".")[0])
    return f"pip install 'nvidia-dali-cuda{major}0>={least('DALI')}'"


def refuse_old_dali() -> None:
    """Raise ValueError where DALI lacks what pipeline/graph.py uses."""
    version, _ = dali_version()
    if is_old("DALI", version):
        raise ValueError(f"DALI {version} is older than {least('DALI')}: {dali_upgrade()}")


class Decoders(NamedTuple):
    """nvJPEG's answer. status: its nvjpegStatus_t, 0 for success, 7 for a GPU without decoders."""

    status: int
    engines: int = 0
    cores: int = 0


def nvjpeg_path() -> str:
    """The libnvjpeg that nvImageCodec loads: its RUNPATH's order, then the system's."""
    import nvidia

    soname = f"libnvjpeg.so.{dali_version()[1]}"
    folders = [f"{root}/{part}/lib" for root in nvidia.__path__ for part in ("nvjpeg", "cu13")]
    paths = [Path(folder, soname) for folder in (*folders, "/usr/local/cuda/lib64")]
    return next((str(path) for path in paths if path.exists()), soname)


def hardware_decoders() -> Decoders:
    """The JPEG decoders of the current CUDA device; without any DALI decodes with CUDA, silently.

    Source: nvImageCodec's extensions/nvjpeg/hw_decoder.cpp, NvJpegHwDecoderPlugin::Decoder.
    Raises: OSError where nvJPEG or the driver's library is not found.
    """
    ctypes.CDLL(NVCUVID)
    nvjpeg = ctypes.CDLL(nvjpeg_path())
    handle, engines, cores = ctypes.c_void_p(), ctypes.c_uint(), ctypes.c_uint()
    status = nvjpeg.nvjpegCreateEx(BACKEND_HARDWARE, None, None, 0, ctypes.byref(handle))
    if status == 0:
        numbers = ctypes.byref(engines), ctypes.byref(cores)
        status = nvjpeg.nvjpegGetHardwareDecoderInfo(handle, *numbers)
        nvjpeg.nvjpegDestroy(handle)
    return Decoders(status, engines.value, cores.value)
