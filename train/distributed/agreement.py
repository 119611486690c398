"""What all processes of a run must have in common, compared before the first collective.

Over a store, not over the process group: what would break NCCL (another torch, no driver, a small
/dev/shm) is among it. Rank 0 compares and raises; its Watch has the other ranks exit.
"""

import hashlib
import importlib.metadata
import json
import os
import socket
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import Store

from train.config import Config, flat

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("torch", "triton", "numpy", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
"""Those that compute."""
REMEDIES = {
    "package": "install the same version on all hosts",
    "file": "give all hosts the same revision of the source files",
    "device": "fix the driver on that host, or give all hosts --device cpu",
    "flag": "start all hosts with the same flags",
}
OF_RANK_0 = ("out", "save")  # flags that the others do not use
SHARED_MEMORY = 1 << 30
"""Bytes free in /dev/shm. Source: NCCL's troubleshooting page, which asks containers for
--shm-size=1g."""


def process_facts(
    config: Config | None,
    device: str,
    fault: str | None = None,
    mistake: str | None = None,
    options: Any = None,
) -> dict:
    """What this process runs. device: "cpu" or "cuda"; fault: why it cannot run on its device.

    config: None where there is none to compare. --out and --save are left out: rank 0's are used.
    mistake: in its flags, if there is one. options: a dataclass of the program's other flags.
    """
    given = (flat(part) for part in (config, options) if part is not None)
    settings = {name: value for part in given for name, value in part.items()}
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "host": socket.gethostname(),
        "fault": fault,
        "mistake": mistake,
        "shm": shm.f_bavail * shm.f_frsize if shm is not None else 0,
        "device": {"the device": device},
        "package": versions(PACKAGES),
        "file": source_hashes(),
        "flag": {f"--{name}": value for name, value in settings.items() if name not in OF_RANK_0},
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Version of each installed package by name."""
    installed = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def source_hashes() -> dict[str, str]:
    """SHA-256, shortened, of each source file that training imports, by path."""
    return {
        str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for folder in ("pipeline", "kernels", "train")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def disagreement(ranks: list[dict]) -> str | None:
    """One line for the first host that cannot run or has a different fact; None: all agree.

    A flag that one host rejects comes after its files: they may be of another revision.
    """
    return (
        first_error(ranks, "fault")
        or first_difference(ranks, "package")
        or first_difference(ranks, "file")
        or first_error(ranks, "mistake")
        or first_difference(ranks, "device")
        or first_difference(ranks, "flag")
    )


def first_error(ranks: list[dict], kind: str) -> str | None:
    """The first rank's error of a kind, with its host unless all ranks have the same."""
    for rank in ranks:
        if rank[kind]:
            is_everywhere = all(other[kind] == rank[kind] for other in ranks)
            return rank[kind] if is_everywhere else f"host {rank['host']}: {rank[kind]}"
    return None


def first_difference(ranks: list[dict], kind: str) -> str | None:
    """One line for the first fact of a kind that differs between hosts."""
    for name in sorted({name for rank in ranks for name in rank[kind]}):
        values = [rank[kind].get(name, "missing") for rank in ranks]
        usual = Counter(values).most_common(1)[0][0]  # of two as frequent, rank 0's
        for rank, value in zip(ranks, values, strict=True):
            if value != usual:
                other = ranks[values.index(usual)]["host"]
                differs = f"{name} is {value} on host {rank['host']} and {usual} on host {other}"
                return f"{differs}: {REMEDIES[kind]}"
    return None


def small_shm(ranks: list[dict]) -> str | None:
    """One line for the first host whose /dev/shm may be too small for NCCL; None without one."""
    for rank in ranks:
        if rank["shm"] < SHARED_MEMORY:
            return (
                f"/dev/shm on host {rank['host']} has {rank['shm'] >> 20} MiB free and NCCL, which "
                f"ranks on GPUs communicate through, needs {SHARED_MEMORY >> 20}: docker run "
                "--shm-size 8g, or mount -o remount,size=8g /dev/shm"
            )
    return None


def agree(store: Store, mine: dict, *, rank: int, size: int) -> str | None:
    """Return once all processes have joined and agree; on rank 0 with a warning, if there is one.

    A small /dev/shm is a warning on the CPU: a rehearsal finds it before GPUs are held.
    Raises: ValueError on rank 0; the others wait until its failure ends them.
    """
    store.set(f"facts/{rank}", json.dumps(mine))
    if rank != 0:
        store.get("agreed")
        return None
    ranks = [json.loads(text) for text in store.multi_get([f"facts/{r}" for r in range(size)])]
    shm, problem = small_shm(ranks), disagreement(ranks)
    if problem is None and mine["device"]["the device"] == "cuda":
        problem, shm = shm, None
    if problem is not None:
        raise ValueError(problem)
    store.set("agreed", "yes")
    return shm
