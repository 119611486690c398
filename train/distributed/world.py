"""This process among those of a run: the host's collectives, stop signals, stacks of a hang.

Every function here is called by all ranks. A process without torchrun is a world of one rank.
"""

import faulthandler
import inspect
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from train.distributed.watch import Watch, report

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ALLOWED_S = 600.0
"""For what may take minutes: the first step, which compiles, kNN, a checkpoint."""
LAST_S = 10.0  # to write stacks and NCCL's trace at the end; then the process exits in any case
TRACE = "nccl-trace-rank-"
"""torch's flight recorder in the run folder: `torchfrtrace FOLDER -p nccl-trace-rank-` reads it."""


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
    watch: Watch | None = None
    """Detects failed ranks; None in a world of one."""
    sums: Any = None
    """The group of synchronised batch norm, with its own communicator; None in a world of one."""
    store: Any = None
    """Keys and values of all ranks; None in a world of one."""

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and messages."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None in a world of one."""
        return dist.group.WORLD if self.size > 1 else None

    def alone(self) -> "World":
        """This process as a world of one on the same device, which waits for no other rank."""
        return World(0, 1, 0, 1, self.device, None)


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


def failure_of_any(world: World, key: str, reason: str | None) -> str | None:
    """Why a rank could not do what `key` names, on every rank; None if all did. reason: this one's.

    Not over the process group: the others may wait inside it for this rank.

    Raises: RuntimeError on a rank that failed where others have not ended after --timeout_s.
    """
    if world.size == 1:
        return reason
    assert world.watch is not None
    keys = [f"{key}/{rank}" for rank in range(world.size)]
    world.store.set(keys[world.rank], reason or "")
    try:
        if reason is None:
            world.store.wait(keys)
        else:
            world.store.wait(keys, timedelta(seconds=world.watch.timeout_s))
    except dist.DistStoreError:
        if reason is None:
            raise
        raise RuntimeError(
            f"{reason}; {world.watch.timeout_s:.0f} s (--timeout_s) later other ranks had not "
            "ended this step: they may wait for this one"
        ) from None
    return next((text.decode() for text in world.store.multi_get(keys) if text), None)


def mean(world: World, value: Tensor) -> Tensor:
    """The mean over ranks; `value` is changed in place."""
    if world.size > 1:
        dist.all_reduce(value, group=world.group)
        value /= world.size
    return value


def own_buffers() -> dict[str, Any]:
    """DistributedDataParallel's flag to broadcast no buffers, which torch 2.13 renamed."""
    names = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"
    return {new if new in names else old: False}


def stop_signals() -> list[signal.Signals]:
    """STOP_SIGNALS, without a SIGHUP that is ignored: nohup keeps a program from its terminal's.

    Under torchrun it comes from torchrun, which kills a rank that ignores it.
    """
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and "WORLD_SIZE" not in os.environ
    return [number for number in STOP_SIGNALS if not (is_nohup and number == signal.SIGHUP)]


def stop_at_once(world: World | None = None) -> None:
    """Outside of training a signal is a KeyboardInterrupt on rank 0, which owns the run folder.

    world: None: on every rank.
    """
    for number in stop_signals():
        is_ours = world is None or world.is_main or number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_ours else signal.SIG_DFL)


class StopSignal:
    """SIGTERM, Ctrl-C or the terminal's end on any rank stops all ranks at the same step.

    The ranks' flags are all-reduced asynchronously: a signal in one step is known to all ranks in
    the next. A second Ctrl-C exits at once.
    """

    def __init__(self, world: World):
        self.world = world
        self.received: signal.Signals | None = None
        self._parent = os.getppid()
        self._pending: tuple[Any, Tensor] | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in stop_signals()}

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self.world.is_main:  # not print: a signal may arrive within one
            text = f"{self.received.name}: stopping and saving; a second Ctrl-C exits unsaved\n"
            with suppress(OSError):  # the terminal, or tee, may be gone before us
                os.write(sys.stderr.fileno(), text.encode())

    def agreed(self) -> bool:
        """Whether to stop after this step; called once a step by every rank."""
        if self.world.size == 1:
            return self.received is not None
        assert self.world.watch is not None
        self.world.watch.progress += 1
        stop = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            stop = flag.item() > 0
        flag = torch.tensor(float(self.received is not None))
        work = dist.all_reduce(flag, group=self.world.host_group, async_op=True)
        self._pending = work, flag
        return stop

    def check_torchrun(self) -> None:
        """Raise ConnectionError on all ranks if the signal was the death of one's torchrun.

        Exiting with success would end the run: the other torchruns are to restart their ranks, and
        so wait for the missing one.
        """
        if self.world.size == 1:
            return
        lost = socket.gethostname() if os.getppid() != self._parent else None
        for rank, host in enumerate(gather(self.world, lost)):
            if host is not None:
                raise ConnectionError(
                    f"torchrun was killed on host {host} (rank {rank}); saved at this step. Start "
                    "the same command on that host again"
                )

    def close(self) -> None:
        """Restore the signal handlers and finish the pending all-reduce."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None:
            self._pending[0].wait()


class Stacks:
    """Writes all Python stacks of a rank whose step is late to a file of the run folder.

    faulthandler's thread in C writes them, so also while the main thread holds Python's lock in
    C++. A recompilation during a run (SwAV's queue) may be late too: the file alone is no error. On
    a host that cannot write the run folder the file is in a temporary one. C++ frames are not in
    it: `gdb -p` or py-spy --native show them.
    """

    def __init__(self, folder: Path, *, rank: int, timeout_s: float, is_alone: bool = False):
        """is_alone: no Watch reports a late step, so a thread of this object does."""
        self._temporary: Path | None = None
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            folder = self._temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        self.path, self.timeout_s = folder / f"stacks-rank-{rank}.txt", timeout_s
        self.trace = folder / f"{TRACE}{rank}"
        self._file = self.path.open("a")
        self._header = self._file.tell()
        host, now = socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"rank {rank} on host {host}, process {os.getpid()}, from {now}\n")
        self._file.flush()
        self._header_end = os.fstat(self._file.fileno()).st_size
        self._limit_s, self._begun = 0.0, 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._warn, name="stacks", daemon=True)
        self.allow(ALLOWED_S)
        if is_alone:
            self._thread.start()

    def allow(self, seconds: float | None = None) -> None:
        """Restart the clock, with timeout_s or `seconds` until the next call."""
        seconds, now = self.timeout_s if seconds is None else seconds, time.monotonic()
        if seconds == self._limit_s and now - self._begun < 1:
            return  # faulthandler starts a thread: 70 us
        self._limit_s, self._begun = seconds, now
        faulthandler.dump_traceback_later(seconds, file=self._file)

    @property
    def late_s(self) -> float:
        """Seconds beyond what was allowed; 0 while in time."""
        return max(0.0, time.monotonic() - self._begun - self._limit_s)

    def dump(self) -> None:
        """Write the stacks and NCCL's flight recorder, before this process exits.

        The recorder calls CUDA, which may hang too: faulthandler then ends the process.
        """
        faulthandler.dump_traceback_later(LAST_S, exit=True, file=self._file)
        self._file.write("At the end:\n")
        self._file.flush()
        faulthandler.dump_traceback(file=self._file)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            self.trace.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]

    def close(self) -> None:
        """Stop the clock; remove a file without stacks."""
        faulthandler.cancel_dump_traceback_later()
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()
        if os.fstat(self._file.fileno()).st_size == self._header_end:
            self._file.truncate(self._header)
            if self._header == 0:
                self.path.unlink()
            if self._temporary is not None and not any(self._temporary.iterdir()):
                self._temporary.rmdir()
        self._file.close()

    def _warn(self) -> None:
        was_late = False
        while not self._closing.wait(1.0):
            is_late = self.late_s > 0
            if is_late and not was_late:
                late = f"a step takes longer than {self._limit_s:.0f} s (--timeout_s)"
                report(f"warning: {late}: its stacks are in {self.path}")
            was_late = is_late


@contextmanager
def watched(folder: Path, world: World, timeout_s: float) -> Iterator[Stacks]:
    """Stacks of this rank, which its Watch reads where there are several ranks."""
    stacks = Stacks(folder, rank=world.rank, timeout_s=timeout_s, is_alone=world.watch is None)
    try:
        if world.watch is not None:
            world.watch.stacks = stacks
        yield stacks
    finally:
        if world.watch is not None:
            world.watch.stacks = None
        stacks.close()
