"""How many CPU cores this process may use: its affinity, and the CPU quota of its container.

A newcomer's mistake: os.cpu_count(). Where a container may use 4 of a host's 224 cores by quota,
224 threads spend the quota at once and all stand still until the next period.
Source: Documentation/admin-guide/cgroup-v2.rst (cpu.max) and scheduler/sched-bwc.rst of Linux.
"""

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores of the affinity mask, or whole cores of the quota where that is less; at least 1."""
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
            yield from _of_groups(root / "sys/fs/cgroup", group, "cpu.max")
        elif "cpu" in controllers.split(","):
            for name in (controllers, "cpu"):  # one is often a link to the other
                mount = root / "sys/fs/cgroup" / name
                yield from _of_groups(mount, group, "cpu.cfs_quota_us", "cpu.cfs_period_us")


def _of_groups(mount: Path, group: str, *names: str) -> Iterator[float]:
    """A container may see its own group as the mount, under a path of the host: none is skipped."""
    path = Path(group.lstrip("/"))
    for folder in {mount / path, *(mount / above for above in path.parents), mount}:
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
        except OSError:
            continue
        if quota not in ("max", "-1"):
            yield int(quota) / int(period)
