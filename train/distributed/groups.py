"""The process groups of a run: gradients, batch norm's sums, the host's; and NCCL's settings.

Batch norm's sums have a communicator of their own, of high priority: NCCL works one off in order,
and an all-reduce of 2 KB would wait for DistributedDataParallel's 25 MB buckets before it. Two may
run at a time: all ranks launch in one order (tests/test_order.py), which
NCCL_LAUNCH_ORDER_IMPLICIT has NCCL keep on the device, or they could deadlock.
A newcomer's mistake: leaving errors to NCCL. Its watchdog ends a process without a name;
train/distributed/watch.py names the rank and ends all, so NCCL's own end comes later.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.distributed.verdict import PATIENCE

TRACE = "nccl-trace-rank-"
"""torch's flight recorder in the run folder: `torchfrtrace FOLDER -p nccl-trace-rank-` reads it."""


def open_groups(
    store: dist.Store, *, rank: int, size: int, device: torch.device, timeout_s: float, out: str
) -> tuple[Any, Any]:
    """Start torch.distributed; the groups of batch norm's sums and of what the host decides.

    out: the run folder as far as it is known, for NCCL's own dump; empty: torch's default place.
    """
    patience = timedelta(seconds=PATIENCE * timeout_s)
    common: dict[str, Any] = {"store": store, "rank": rank, "world_size": size}
    if device.type != "cuda":
        dist.init_process_group("gloo", timeout=patience, **common)
        return dist.new_group(timeout=patience), dist.group.WORLD
    for name, value in nccl_settings(timeout_s, out).items():
        os.environ.setdefault(name, value)
    # gloo's time-out, which is caught, comes first
    later = patience + timedelta(seconds=60)
    dist.init_process_group("nccl", timeout=later, device_id=device, **common)
    options = dist.ProcessGroupNCCL.Options()  # type: ignore[attr-defined] - of CUDA builds
    options.is_high_priority_stream, options._timeout = True, later
    sums = dist.new_group(timeout=later, pg_options=options)
    return sums, dist.new_group(backend="gloo", timeout=patience)


def nccl_settings(timeout_s: float, out: str) -> dict[str, str]:
    """Environment variables that ProcessGroupNCCL reads when a group is made.

    Its watchdog waits 4 x WAIT_TIMEOUT_DUMP after an error or a time-out, then ends the process;
    its monitor ends one whose watchdog has shown no life for HEARTBEAT_TIMEOUT. Both stay, as the
    last resort, at twice what train/distributed/watch.py takes for its longest verdict.
    Sources: torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp, Watchdog::runLoop and
    HeartbeatMonitor::runLoop; FlightRecorder.hpp, FlightRecorder; NCCL 2.26's user guide, "Using
    multiple NCCL communicators concurrently".
    """
    last_s = 2 * PATIENCE * timeout_s
    settings = {
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": str(int(1000 * last_s / 4)),
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(int(last_s)),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "NCCL_LAUNCH_ORDER_IMPLICIT": "1",
    }
    if out:
        settings["TORCH_FR_DUMP_TEMP_FILE"] = str(Path(out).absolute() / TRACE)
    return settings
