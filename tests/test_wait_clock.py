"""Time without data: the loader's on a CPU, on a GPU what the device stood idle."""

import time

import pytest
import torch

from train.window import WaitClock

COPY = 0.125  # of the batch into torch's memory, which the loader queues


class Device:
    """A stream in a scripted time: work is queued behind work."""

    now = busy_until = 0.0

    def queue(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds

    def event(self, *, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    """As torch.cuda.Event, on the stream above."""

    def __init__(self, device: Device):
        self.device = device

    def record(self) -> None:
        self.at = max(self.device.now, self.device.busy_until)

    def query(self) -> bool:
        return self.device.now >= self.at

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


@pytest.fixture
def device(monkeypatch) -> Device:
    made = Device()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


@pytest.mark.parametrize(
    ("in_loader", "idle", "why"),
    [
        (4.0, 0.0, "the step runs: DALI waits for it"),
        (9.999, 0.0, "the batch comes as the step ends"),
        (13.0, 3.0, "the step ended 3 s before"),
    ],
)
def test_a_gpu_waits_for_data_only_while_it_has_no_work(device, in_loader, idle, why):
    clock = WaitClock(torch.device("cuda"))
    device.queue(10.0)
    clock.work_queued()
    device.now += in_loader
    device.queue(COPY)
    clock.data_arrived()
    assert clock.take() == pytest.approx(idle + COPY * (idle > 0)), why
    assert clock.take() == 0.0


def test_waits_of_several_steps_are_added_and_the_hosts_clock_is_not_asked(device):
    clock = WaitClock(torch.device("cuda"))
    for in_loader in (1.0, 7.0, 6.0, 2.0):  # for a step of 5 s each
        device.queue(5.0)
        clock.work_queued()
        device.now += in_loader
        clock.data_arrived()
    # steps end at 5, 10, 15, 20; batches come at 1, 8, 14, 16
    assert clock.take() == 0.0
    device.now = 21.0
    clock.data_arrived()
    assert clock.take() == pytest.approx(1.0)


def test_a_cpu_waits_while_the_loader_runs(device):
    clock = WaitClock(torch.device("cpu"))
    device.now += 2.0
    clock.data_arrived()
    clock.work_queued()
    device.now += 0.5
    clock.data_arrived()
    assert clock.take() == pytest.approx(2.5)
