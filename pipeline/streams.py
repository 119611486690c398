"""stdout and stderr of a program: a write that fails is lost and remembered, and raises nothing.

A terminal is closed, `tee` or `head` ends, the disk behind a redirection is full: Python's own
streams then raise from any print, also from one in a signal handler, and at the interpreter's exit.
Every entry script calls `protect_output` before main(), and so does a pilot's worker.
"""

import errno
import io
import json
import locale
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

CLOSED = OSError(errno.EBADF, os.strerror(errno.EBADF))


class Output(io.FileIO):
    """A descriptor for writing, left open at the end; `error` is the first that a write met."""

    def __init__(self, descriptor: int, error: OSError | None = None):
        super().__init__(descriptor, "w", closefd=False)
        self.error = error

    def write(self, data, /) -> int:
        """Write some of the bytes, or lose all of them; returns how many."""
        try:
            while (written := super().write(data)) is None:  # O_NONBLOCK, set by another process
                select.select((), (self,), ())
            return written
        except OSError as error:
            self.error = self.error or error
            return memoryview(data).nbytes


def protect_output() -> None:
    """Replace sys.stdout and sys.stderr, and open /dev/null where descriptors 0 to 2 are closed.

    A file that is opened next would else have such a number, and receive what libraries print.
    Where the locale's encoding is not UTF-8 the program starts again in Python's UTF-8 mode.
    """
    _use_utf8()
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _protected(sys.stdout, 1), _protected(sys.stderr, 2)


def _use_utf8() -> None:
    """Start this program again where text files would be written in ASCII or Latin-1.

    Names of files in any alphabet go into log.txt, YAML, JSON lines and TensorBoard's files, and a
    run folder may be read under another locale.
    """
    if (
        sys.flags.utf8_mode
        or sys.getfilesystemencoding() == locale.getencoding().lower() == "utf-8"
    ):
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that it starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _protected(stream: Any, number: int) -> Any:
    """A stream on the same descriptor; on `number` where there is none: it was closed."""
    try:
        raw = Output(number, CLOSED) if stream is None else Output(stream.fileno())
    except io.UnsupportedOperation:  # in memory
        return stream
    with suppress(OSError):
        if stream is not None:
            stream.flush()  # what imports have printed
    options: dict = {"encoding": "utf-8", "line_buffering": True}
    if isinstance(stream, io.TextIOWrapper):
        # python -u, with which torchrun starts ranks, writes through: our buffer needs the lines
        lines = stream.line_buffering or stream.write_through
        options = {"encoding": stream.encoding, "line_buffering": lines}
    # not strict: a name that the encoding lacks would raise
    return io.TextIOWrapper(io.BufferedWriter(raw), errors="backslashreplace", **options)


def write_error(stream: TextIO) -> OSError | None:
    """The first error of writing to a protected stream; None if all was written."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, Output) else None


def print_result(result: object, *, kept: object = None) -> None:
    """One JSON line on stdout, the last one. kept: file or folder that has the result, if any.

    Where stdout cannot be written one line on stderr says so; without `kept` the program exits
    with 1.
    """
    print(json.dumps(result), flush=True)
    if (error := write_error(sys.stdout)) is not None:
        lost = f"stdout cannot be written ({error.strerror})"
        if kept is None:
            print(f"error: {lost}", file=sys.stderr, flush=True)
            raise SystemExit(1)
        print(f"warning: {lost}: the result is in {kept}", file=sys.stderr, flush=True)
