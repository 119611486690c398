"""How much memory is left to this process: of a GPU, or of the machine and its control groups.

A newcomer's mistake: the machine's figure inside a container or a Slurm job. What ends a process
there is the limit of its group, and the kernel does that without a word.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

MACHINE = Path("/proc/meminfo")
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_left(device: torch.device) -> int:
    """Bytes that can still be taken; what only caches files counts as left.

    Images that were read stay in memory until it is needed: without them little would be left.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    rows = dict(line.split(":") for line in MACHINE.read_text().splitlines())
    return min([int(rows["MemAvailable"].split()[0]) << 10, *left_in_groups()])


def left_in_groups() -> Iterator[int]:
    """Bytes left in each control group with a limit that this process is in, versions 1 and 2."""
    if not OWN_GROUPS.exists():
        return
    for line in OWN_GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, limit, usage, prefix = GROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, prefix = GROUPS / "memory", "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container `group` may be the host's name
            if folder.is_relative_to(top) and (folder / limit).exists():
                most = (folder / limit).read_text().strip()
                if most != "max":
                    stat = (
                        row.split() for row in (folder / "memory.stat").read_text().splitlines()
                    )
                    known = {name: int(value) for name, value in stat}
                    cached = sum(
                        known.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive")
                    )
                    yield int(most) - int((folder / usage).read_text()) + cached
