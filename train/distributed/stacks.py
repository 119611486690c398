"""Where a rank stands when it takes too long: all its Python stacks, in a file of the run folder.

Written by faulthandler's own thread in C, so also where the main thread holds Python's lock in C++.
A step has --timeout_s; what may take minutes (the first step, which compiles, kNN, a checkpoint)
has ALLOWED_S.
A recompilation in the middle of a run (SwAV's queue) may be written down too: the file alone is no
error, the run continues. On a host that does not see the run folder the file is in a temporary
folder; watch's line names host and file.
A newcomer's mistake: looking for C++ frames. `gdb -p` or py-spy --native has them.
"""

import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from train.distributed import World
from train.distributed.groups import TRACE

ALLOWED_S = 600.0
LAST_S = 10.0  # to write both files at the end; then the process ends in any case


class Stacks:
    """Owns the file and the timer, from creation to close."""

    def __init__(self, folder: Path, *, rank: int, timeout_s: float, is_alone: bool = False):
        """is_alone: no watch speaks for this process, so it says itself when it is late."""
        self._own_folder: Path | None = None
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            folder = self._own_folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        self.path, self.timeout_s = folder / f"stacks-rank-{rank}.txt", timeout_s
        self.trace = folder / f"{TRACE}{rank}"
        self._file = self.path.open("a")
        host, now = socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"rank {rank} on host {host}, process {os.getpid()}, from {now}\n")
        self._file.flush()
        self._empty = os.fstat(self._file.fileno()).st_size
        self._limit_s, self._begun = 0.0, 0.0
        self._closing = threading.Event()
        self._thread = None
        self.allow(ALLOWED_S)
        if is_alone:
            self._thread = threading.Thread(target=self._warn, name="stacks", daemon=True)
            self._thread.start()

    def allow(self, seconds: float | None = None) -> None:
        """Start the clock again, for a step or for so many seconds; to the second."""
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
        """Write the stacks and what NCCL's flight recorder holds, at the end of this process.

        The recorder asks CUDA, which may hang too: faulthandler ends the process then.
        """
        faulthandler.dump_traceback_later(LAST_S, exit=True, file=self._file)
        self._file.write("At the end:\n")
        self._file.flush()
        faulthandler.dump_traceback(file=self._file)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            self.trace.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]

    def close(self) -> None:
        """Stop the clock; a file without stacks goes."""
        faulthandler.cancel_dump_traceback_later()
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        is_empty = os.fstat(self._file.fileno()).st_size == self._empty
        self._file.close()
        if is_empty:
            lines = self.path.read_text().splitlines(keepends=True)[:-1]
            self.path.write_text("".join(lines))
            if not lines:
                self.path.unlink()
            if self._own_folder is not None and not any(self._own_folder.iterdir()):
                self._own_folder.rmdir()

    def _warn(self) -> None:
        has_spoken = False
        while not self._closing.wait(1.0):
            if not self.late_s:
                has_spoken = False
            elif not has_spoken:
                has_spoken = True
                line = (f"warning: a step takes longer than {self._limit_s:.0f} s (--timeout_s): "
                        f"where it stands is in {self.path}\n")  # fmt: skip
                print(line, end="", file=sys.stderr, flush=True)


@contextmanager
def watched(folder: Path, world: World, timeout_s: float) -> Iterator[Stacks]:
    """The stacks of this rank, known to the watch of several, until the end."""
    stacks = Stacks(folder, rank=world.rank, timeout_s=timeout_s, is_alone=world.watch is None)
    try:
        if world.watch is not None:
            world.watch.stacks = stacks
        yield stacks
    finally:
        if world.watch is not None:
            world.watch.stacks = None
        stacks.close()
