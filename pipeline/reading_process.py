"""Reads, checks and draws in a separate process: training does not wait for Python's lock.

Beside a GPU the trainer's thread launches kernels, each some microseconds of Python; a thread that
reads beside it holds the lock in between. The process gets the reader and the plan once, then a
step at a time; the images' bytes come back in shared memory, and DALI reads them there. It imports
neither torch nor DALI and ends when the trainer does. multiprocessing's fork would fork a process
with threads, and its spawn would import train/main.py and with it torch.
"""

import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path

import numpy as np

from pipeline.order import Prepare, ViewPlan, Work
from pipeline.sources.reader import ImageReader

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT}
"""Blocked, as they may be sent to all processes of a job: the trainer may still need batches."""
PROGRAM = "from pipeline.reading_process import main; main()"
ALIGNMENT = 64
LEAST = 1 << 24


@contextmanager
def reading_process(reader: ImageReader, plan: ViewPlan) -> Iterator[Prepare]:
    """Start the process; gives the function that requests the Work of a step."""
    child = _Child(reader, plan)
    try:
        yield child.prepare
    finally:
        child.close()


class SharedBytes:
    """Memory shared by two processes, for the images of a batch; grows, and is used again."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self._memory, self._address, self._end = np.empty(0, np.uint8), 0, 0
        self._starts: dict[int, int] = {}
        self._lock = threading.Lock()

    def allocate(self, num_bytes: int) -> np.ndarray:
        """The next (num_bytes,) uint8."""
        with self._lock:
            start, self._end = self._end, self._end + -(-num_bytes // ALIGNMENT) * ALIGNMENT
            if self._end > self._memory.size:
                size = max(LEAST, 1 << (self._end - 1).bit_length())
                os.ftruncate(self.descriptor, size)
                self.mapped(size)
            self._starts[self._address + start] = start
            return self._memory[start : start + num_bytes]

    def place_of(self, array: np.ndarray) -> tuple[int, int]:
        """(start, end) of an array, which is copied if it was not allocated here."""
        start = self._starts.get(array.__array_interface__["data"][0])
        if start is None:
            inside = self.allocate(array.size)
            inside[:] = array
            return self.place_of(inside)
        return start, start + array.size

    def clear(self) -> None:
        """Free all arrays: they will be overwritten."""
        self._end = 0
        self._starts.clear()

    def mapped(self, size: int) -> np.ndarray:
        """All of it, at least `size` bytes, which the descriptor has."""
        if size > self._memory.size:  # arrays keep the mapping before, of the same memory
            self._memory = np.frombuffer(mmap.mmap(self.descriptor, size), np.uint8)
            self._address = self._memory.__array_interface__["data"][0]
        return self._memory

    def __del__(self) -> None:
        """Close the descriptor; mappings stay."""
        os.close(self.descriptor)


class _Child:
    """The trainer's side."""

    def __init__(self, reader: ImageReader, plan: ViewPlan):
        self._reader, self._lock = reader, threading.Lock()
        self._known = set(reader.bad)
        self._buffers: list[SharedBytes] = []
        self._free: list[int] = []
        ours, theirs = socket.socketpair()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a new process inherits it
        try:
            command = [sys.executable, "-c", PROGRAM, str(theirs.fileno())]
            self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._connection = Connection(ours.detach())
        self._connection.send((reader, plan))

    def prepare(self, step: int) -> Work:
        """The Work of a step. Its bytes are overwritten once it is no longer referenced."""
        with self._lock:
            bad = {i: why for i, why in list(self._reader.bad.items()) if i not in self._known}
            try:
                slot = self._send(step, bad)
                reply = self._connection.recv()
            except (EOFError, OSError) as error:
                raise RuntimeError(
                    f"the process that reads images ended with {self._process.wait()}; -9 is "
                    "probably the OOM killer: lower --data.batch_size or --dali.prefetch"
                ) from error
            if isinstance(reply, Exception):
                self._free.append(slot)
                raise reply
            ids, places, size, inputs, draws, new_bad, several = reply
            self._reader.bad.update(new_bad)
            self._reader.several = max(self._reader.several, several)
            self._known.update(bad, new_bad)
            memory = self._buffers[slot].mapped(size)
        inputs = {"encoded": [memory[start:end] for start, end in places], **inputs}
        work = Work(step, ids, inputs, draws)
        weakref.finalize(work, self._free.append, slot)
        return work

    def _send(self, step: int, bad: dict[int, str]) -> int:
        slot = self._free.pop() if self._free else len(self._buffers)
        self._connection.send((step, slot, bad))
        if slot == len(self._buffers):
            buffer = SharedBytes(os.memfd_create("images"))
            self._buffers.append(buffer)
            send_handle(self._connection, buffer.descriptor, self._process.pid)
        return slot

    def close(self) -> None:
        """End the process, by closing its connection."""
        self._connection.close()
        self._process.wait()


def serve(connection: Connection) -> None:
    """The process's side: answer until the trainer has closed the connection or is gone."""
    reader, plan = connection.recv()
    buffers: list[SharedBytes] = []
    while True:
        step, slot, bad = connection.recv()
        if slot == len(buffers):
            buffers.append(SharedBytes(recv_handle(connection)))
        reader.bad.update(bad)
        known = len(reader.bad)
        try:
            buffers[slot].clear()
            work = plan.prepare(reader, step, buffers[slot].allocate)
            places = [buffers[slot].place_of(image) for image in work.inputs.pop("encoded")]
            size, new_bad = buffers[slot].mapped(0).size, dict([*reader.bad.items()][known:])
            found = new_bad, reader.several
            reply: tuple | Exception = work.ids, places, size, work.inputs, work.draws, *found
        except Exception as error:  # raised again in the trainer
            error.add_note(traceback.format_exc())
            reply = error
        connection.send(reply)


def main() -> None:
    """The process: its argument is the connection's descriptor."""
    with suppress(EOFError, ConnectionError):  # closed by the trainer, or by its end
        serve(Connection(int(sys.argv[1])))
