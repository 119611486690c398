"""What all processes of a run must have in common, compared before the first collective.

Over a store, not over the process group: what would break NCCL (another torch, no driver, a small
/dev/shm) is what is looked for. One process alone compares nothing.
A newcomer's mistake: comparing on every rank. Rank 0 compares; its verdict ends the others (watch).
"""

import hashlib
import importlib.metadata
import json
import os
import socket
from collections import Counter
from pathlib import Path

from torch.distributed import Store

from train.config import Config, flat

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("torch", "triton", "numpy", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
REMEDIES = {
    "package": "install the same version on all hosts",
    "file": "give all hosts the same revision of the source files",
    "device": "mend the driver on that host, or give all hosts --device cpu",
    "flag": "start all hosts with the same flags",
}
SHARED_MEMORY = 1 << 30
"""Bytes free in /dev/shm. Source: NCCL's troubleshooting page, which asks containers for
--shm-size=1g."""


def process_facts(
    config: Config | None, device: str, fault: str | None = None, mistake: str | None = None
) -> dict:
    """What this process runs. device: "cpu" or "cuda"; fault: why it cannot, if it cannot.

    config: None where there is none to compare. --out is left out: rank 0's is used on all.
    mistake: in its flags, if there is one.
    """
    settings = flat(config) if config is not None else {}
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "host": socket.gethostname(),
        "fault": fault,
        "mistake": mistake,
        "shm": shm.f_bavail * shm.f_frsize if shm is not None else 0,
        "device": {"the device": device},
        "package": versions(),
        "file": sources(),
        "flag": {f"--{name}": value for name, value in settings.items() if name != "out"},
    }


def versions() -> dict[str, str]:
    """Version of each package that computes, by name; those that are not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sources() -> dict[str, str]:
    """SHA-256 of each source file that training imports, shortened, by path."""
    return {
        str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for folder in ("pipeline", "kernels", "train")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def disagreement(everyone: list[dict]) -> str | None:
    """One line for the first host that cannot go on, or has a fact otherwise; None: all agree.

    A flag that one host does not know is told after its files: they may be of another revision.
    """
    return (
        said(everyone, "fault")
        or differing(everyone, "package")
        or differing(everyone, "file")
        or said(everyone, "mistake")
        or differing(everyone, "device")
        or differing(everyone, "flag")
    )


def said(everyone: list[dict], what: str) -> str | None:
    """What the first process that says something says, with its host unless all say the same."""
    words = [one[what] for one in everyone]
    number, first = next(((n, text) for n, text in enumerate(words) if text), (0, None))
    if first is None or set(words) == {first}:
        return first
    return f"host {everyone[number]['host']}: {first}"


def differing(everyone: list[dict], kind: str) -> str | None:
    """One line for the first fact of a kind that some host has otherwise."""
    for name in sorted({name for one in everyone for name in one[kind]}):
        values = [one[kind].get(name, "missing") for one in everyone]
        usual = Counter(values).most_common(1)[0][0]  # of two as frequent, rank 0's
        for one, value in zip(everyone, values, strict=True):
            if value != usual:
                other = everyone[values.index(usual)]["host"]
                return (
                    f"{name} is {value} on host {one['host']} and {usual} on host {other}: "
                    f"{REMEDIES[kind]}"
                )
    return None


def small_shm(everyone: list[dict]) -> str | None:
    """One line for the first host whose /dev/shm NCCL may find too small; None where all do."""
    for one in everyone:
        if one["shm"] < SHARED_MEMORY:
            return (
                f"/dev/shm on host {one['host']} has {one['shm'] >> 20} MiB free and NCCL, which "
                f"ranks on GPUs talk through, asks for {SHARED_MEMORY >> 20}: docker run "
                "--shm-size 8g, or mount -o remount,size=8g /dev/shm"
            )
    return None


def agree(store: Store, mine: dict, *, rank: int, size: int) -> str | None:
    """Return once all processes have come and agree; on rank 0 with a warning, if there is one.

    A small /dev/shm is a warning on the CPU: a rehearsal finds it before GPUs are held.
    Raises: ValueError on rank 0; the others wait until its verdict ends them.
    """
    store.set(f"facts/{rank}", json.dumps(mine))
    if rank != 0:
        store.get("agreed")
        return None
    everyone = [json.loads(text) for text in store.multi_get([f"facts/{r}" for r in range(size)])]
    shm = small_shm(everyone)
    problem = disagreement(everyone)
    if problem is None and mine["device"]["the device"] == "cuda":
        problem, shm = shm, None
    if problem is not None:
        raise ValueError(problem)
    store.set("agreed", "yes")
    return shm
