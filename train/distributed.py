"""Which process this is, on which device, and the few collectives outside the model.

One process without torchrun is a world of one rank and has no process group.
A newcomer's mistake: a collective on one rank only. Every function here is called by all ranks.
"""

import ctypes
import datetime
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_S = 600
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    host_group: Any
    """A gloo group of all ranks, for what the host decides; None in a world of one."""

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and talks to the user."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of synchronised batch norm: all ranks, or None where there is one."""
        return dist.group.WORLD if self.size > 1 else None


@contextmanager
def start(device: str) -> Iterator[World]:
    """Join the other processes that torchrun started, if any; leave them at the end.

    Raises: ValueError when --device cuda is asked for where there is none.
    """
    kind = resolve_device(device)
    rank, size, local_rank, local_size = (
        int(os.environ.get(name, default))
        for name, default in (
            ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1),
        )
    )  # fmt: skip
    where = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{local_size} processes on this machine but {torch.cuda.device_count()} GPUs: "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(where)
        torch.backends.cudnn.benchmark = True  # shapes never change: the search is paid once
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if "WORLD_SIZE" in os.environ:
        # what was started by torchrun or a study must not outlive it and hold its GPU
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if size == 1:
        yield World(rank, size, local_rank, local_size, where, None)
        return
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    if kind == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=where)
        host_group = dist.new_group(backend="gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
        host_group = dist.group.WORLD
    yield World(rank, size, local_rank, local_size, where, host_group)
    dist.destroy_process_group()  # not after an error: it could wait for a rank that is gone


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda" for --device. Raises: ValueError for cuda where there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda, but torch {torch.__version__} finds no CUDA device: "
            "python train/doctor.py says why; or use --device cpu"
        )
    return device


def from_main(world: World, value: Any) -> Any:
    """rank 0's value on every rank (pickled: only between processes of one run)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.host_group)
    return box[0]


def gather(world: World, value: Any) -> list:
    """The values of all ranks, in order, on every rank."""
    if world.size == 1:
        return [value]
    values: list = [None] * world.size
    dist.all_gather_object(values, value, group=world.host_group)
    return values


def mean(world: World, value: Tensor) -> Tensor:
    """The mean over ranks; `value` is changed in place."""
    if world.size > 1:
        dist.all_reduce(value, group=world.group)
        value /= world.size
    return value


class StopSignal:
    """SIGTERM or Ctrl-C on any rank stops all ranks at the same step.

    The ranks' flags are summed without waiting: what was asked for in one step is known to all in
    the next. A second Ctrl-C ends the program at once.
    """

    def __init__(self, world: World):
        self.world = world
        self.received: signal.Signals | None = None
        self._pending: tuple[Any, Tensor] | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self.world.is_main:  # not print: a signal may come within one
            text = f"{self.received.name}: stopping and saving; a second Ctrl-C ends it unsaved\n"
            os.write(sys.stderr.fileno(), text.encode())

    def agreed(self) -> bool:
        """Whether to stop after this step; called once a step by every rank."""
        if self.world.size == 1:
            return self.received is not None
        stop = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            stop = flag.item() > 0
        flag = torch.tensor(float(self.received is not None))
        work = dist.all_reduce(flag, group=self.world.host_group, async_op=True)
        self._pending = work, flag
        return stop

    def close(self) -> None:
        """Give the signals back and finish the last exchange."""
        if self._pending is not None:
            self._pending[0].wait()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
