"""Seconds in which the device had nothing to do because the loader had no batch.

On a CPU that is the time in the loader. On a GPU the host runs ahead, and DALI, which shares the
device, may wait for the step: only the device itself can say how long it stood idle. So an event is
recorded behind each step, and where the stream has reached it when a batch arrives, another one;
the time between the two is read at the next log step, where the host waits for the device anyway.
It includes the copy of the batch, which the query keeps out of the steps that did not wait.
A newcomer's mistake: the host's clock around next(loader). It counts the step that DALI waits for.
"""

import time

import torch


class WaitClock:
    """Sums the waiting between work_queued and data_arrived."""

    def __init__(self, device: torch.device):
        self.device = device
        self._host_s = 0.0
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.work_queued()

    def work_queued(self) -> None:
        """All work of a step is queued: from where it ends on, the device waits."""
        self._mark = time.perf_counter()
        self._end = self._record()

    def data_arrived(self) -> None:
        """The loader has given a batch."""
        if self._end is None:
            self._host_s += time.perf_counter() - self._mark
        elif self._end.query():
            arrived = self._record()
            assert arrived is not None
            self._idle.append((self._end, arrived))

    def take(self) -> float:
        """Seconds waited since the last call. The device must have been waited for."""
        seconds = self._host_s + sum(end.elapsed_time(at) for end, at in self._idle) / 1e3
        self._host_s = 0.0
        self._idle.clear()
        return seconds

    def _record(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
