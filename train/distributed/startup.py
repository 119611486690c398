"""Joins the processes of a run and their process groups, and leaves them at the end.

Batch norm's sums have their own communicator of high priority: NCCL runs one communicator's
collectives in order, and an all-reduce of 2 KB would wait for DistributedDataParallel's 25 MB
buckets before it. Two may run at a time: all ranks launch in one order (tests/test_order.py), which
NCCL_LAUNCH_ORDER_IMPLICIT has NCCL keep on the device, or they could deadlock.
"""

import ctypes
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.config import Config
from train.distributed.agreement import agree, process_facts
from train.distributed.devices import take_device
from train.distributed.watch import MAX_TIMEOUTS, WARN_S, Watch, may_restart, report
from train.distributed.world import TRACE, World
from train.network.model import Precision

PR_SET_PDEATHSIG = 1
FROM_TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


def start(
    device: str,
    config: Config | None = None,
    *,
    mistake: str | None = None,
    options: Any = None,
) -> AbstractContextManager[World]:
    """Join the other processes that torchrun started, if any; leave them at the end.

    device: as --device. config: of a run, the same on all ranks, as are `options`, a dataclass of a
    program's other flags. mistake: in this process's flags; if set, every rank exits.

    Raises: ValueError when --device cuda is asked for where there is none, for a part of torchrun's
    environment, or when processes differ (train/distributed/agreement.py); ConnectionError, in
    place of what a broken connection raised, with the rank that failed; SystemExit where rank 0 has
    reported the failure.
    """
    ranks = rank, size, local_rank, local_size = read_ranks()
    if "WORLD_SIZE" in os.environ:
        follow_launcher()
    if size > 1:
        return join(ranks, device, config, mistake, options)
    precision: Precision = "fp32" if config is None else config.precision
    taken = take_device(device, local_rank, local_size, precision)
    return nullcontext(World(*ranks, taken, None))


@contextmanager
def join(
    ranks: tuple[int, int, int, int],
    device: str,
    config: Config | None,
    mistake: str | None,
    options: Any,
) -> Iterator[World]:
    """start() for several ranks."""
    rank, size, local_rank, local_size = ranks
    timeout_s = Config.timeout_s if config is None else config.timeout_s
    store = open_store(rank, size, timedelta(seconds=MAX_TIMEOUTS * timeout_s))
    watch = Watch(store, rank=rank, local_rank=local_rank, size=size, timeout_s=timeout_s)
    try:
        taken, fault = torch.device("cpu"), None
        try:
            check_restarts()
            precision: Precision = "fp32" if config is None else config.precision
            taken = take_device(device, local_rank, local_size, precision)
        except ValueError as error:
            fault = str(error)
        mine = process_facts(config, taken.type, fault, mistake, options)
        if warning := agree(store, mine, rank=rank, size=size):
            report(f"warning: {warning}")
        common = {"store": dist.PrefixStore("groups", store), "rank": rank, "world_size": size}
        out = "" if config is None else config.out
        sums, host_group = open_groups(common, device=taken, timeout_s=timeout_s, out=out)
        yield World(*ranks, taken, host_group, watch, sums, store)
        watch.close()
        dist.barrier(group=host_group)  # rank 0 keeps the store until no watch needs it
        dist.destroy_process_group()  # not after an error: it could wait for a rank that exited
    except Exception as error:
        reason = watch.reason_for(error)
        if reason is error:
            raise
        raise reason from error


def read_ranks() -> tuple[int, int, int, int]:
    """rank, size, local rank and local size as torchrun gives them; 0, 1, 0, 1 without it.

    Raises: ValueError where only a part of them is set, or they contradict each other.
    """
    given = {name: os.environ[name] for name in FROM_TORCHRUN if name in os.environ}
    remedy = "start with torchrun or train/launch.py, or unset them"
    try:
        values = FROM_TORCHRUN | {name: int(value) for name, value in given.items()}
    except ValueError:
        raise ValueError(f"{given} in the environment are no whole numbers: {remedy}") from None
    rank, size, local_rank, local_size = values.values()
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ValueError(f"{given} in the environment contradict each other: {remedy}")
    if size > 1:
        if missing := [name for name in (*FROM_TORCHRUN, *ADDRESS) if name not in os.environ]:
            raise ValueError(f"WORLD_SIZE is {size}, but {', '.join(missing)} are unset: {remedy}")
        port = os.environ["MASTER_PORT"]
        if not (port.isdecimal() and int(port) < 1 << 16):
            raise ValueError(f"MASTER_PORT is {port!r}, no port: {remedy}")
    return rank, size, local_rank, local_size


def open_store(rank: int, size: int, timeout: timedelta) -> dist.TCPStore:
    """The store that rank 0 keeps, at the address that torchrun chose.

    Raises: ConnectionError when rank 0 does not answer in time.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    name = f"rank {rank} on host {socket.gethostname()}"
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank == 0 and not is_torchruns
    unreachable = f"{name} cannot reach rank 0 at {address}:{port}"
    line = f"warning: {unreachable}: start it, or correct MASTER_ADDR and MASTER_PORT; waiting"
    waiting = threading.Timer(WARN_S, report, args=(line,))
    waiting.start()
    options: dict[str, Any] = {"is_master": is_master, "timeout": timeout}
    options |= {"wait_for_workers": False, "multi_tenant": True}
    try:
        return dist.TCPStore(address, port, size, **options)
    except dist.DistError as error:
        if is_master:
            raise ConnectionError(
                f"{name} cannot open port {port}: stop the program that uses it, or choose another "
                "with torchrun's --master-port"
            ) from error
        raise ConnectionError(
            f"{unreachable}: it did not start (the output on its host says why), or a firewall is "
            "between the two"
        ) from error
    finally:
        waiting.cancel()


def check_restarts() -> None:
    """Raise ValueError where torchrun would restart and could not succeed."""
    if may_restart() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # with torch 2.13 1 of 8, 2 of 5, 2 of 5, 1 of 6 restarts worked (pytorch #135712)
        raise ValueError(
            "--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment, "
            "or a restart reads the keys of the previous attempt and fails; train/launch.py sets it"
        )


def follow_launcher() -> None:
    """Have the kernel send SIGTERM when torchrun or a study is killed, to release the GPU."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # killed in between
        raise SystemExit(1)


def open_groups(
    common: dict[str, Any], *, device: torch.device, timeout_s: float, out: str
) -> tuple[Any, Any]:
    """Start torch.distributed; the groups of batch norm's sums and of what the host decides.

    common: store, rank and world_size of init_process_group. out: the run folder as far as it is
    known, for NCCL's dump; empty: torch's default.
    """
    limit = timedelta(seconds=MAX_TIMEOUTS * timeout_s)
    if device.type != "cuda":
        dist.init_process_group("gloo", timeout=limit, **common)
        return dist.new_group(timeout=limit), dist.group.WORLD
    for name, value in nccl_settings(timeout_s, out).items():
        os.environ.setdefault(name, value)
    # gloo's time-out, which is caught, comes first
    later = limit + timedelta(seconds=60)
    dist.init_process_group("nccl", timeout=later, device_id=device, **common)
    options = dist.ProcessGroupNCCL.Options()  # type: ignore[attr-defined] - of CUDA builds
    options.is_high_priority_stream, options._timeout = True, later
    sums = dist.new_group(timeout=later, pg_options=options)
    return sums, dist.new_group(backend="gloo", timeout=limit)


def nccl_settings(timeout_s: float, out: str) -> dict[str, str]:
    """Environment variables that ProcessGroupNCCL reads when a group is made.

    Its watchdog waits 4 x WAIT_TIMEOUT_DUMP after an error or a time-out, then ends the process;
    its monitor ends one whose watchdog is stuck for HEARTBEAT_TIMEOUT. Neither names a rank: both
    stay as the last resort, at twice what Watch takes for its latest failure.
    Sources: torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp, Watchdog::runLoop and
    HeartbeatMonitor::runLoop; FlightRecorder.hpp, FlightRecorder; NCCL 2.26's user guide, "Using
    multiple NCCL communicators concurrently".
    """
    last_s = 2 * MAX_TIMEOUTS * timeout_s
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
