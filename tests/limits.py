"""The time that a test may take: what happens to the processes that it started when it is over.

conftest.py ends a test's process at faulthandler_timeout (pyproject.toml) and prints the stacks of
its threads, also where one of them spins in a C++ library. Some seconds before, the processes
that the test started are ended by SIGABRT, on which Python prints their stacks
(PYTHONFAULTHANDLER=1, set in conftest.py): the test then fails with their output.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TO_REPORT_S = 15.0
"""Between the end of a test's processes and its own: time to fail with what they have printed."""


def descendants(pid: int) -> list[int]:
    """Ids of the processes that a process has started, and of those that these have."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            children = [int(child) for child in (task / "children").read_text().split()]
        except FileNotFoundError:  # a thread that ended in between
            continue
        for child in children:
            found += [child, *descendants(child)] if Path(f"/proc/{child}").exists() else []
    return found


def abort(pids: list[int]) -> None:
    """End processes by SIGABRT, which has Python print the stacks of all threads."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGABRT)
        except ProcessLookupError:
            continue


@contextmanager
def limited(limit_s: float) -> Iterator[None]:
    """Ends what this process has started within the block and that runs after limit_s seconds."""
    before = set(descendants(os.getpid()))

    def end() -> None:
        abort([pid for pid in descendants(os.getpid()) if pid not in before])

    timer = threading.Timer(max(0.1, limit_s - TO_REPORT_S), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
