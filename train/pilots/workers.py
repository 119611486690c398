"""Processes for the trials of a pilot, each with its cores and a GPU, if there are any."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from pipeline.streams import protect_output
from train.distributed.startup import follow_launcher
from train.distributed.world import stop_signals
from train.pilots.trial import Trial
from train.studies.runs import Place

Result = TypeVar("Result")
stopping: Any = None  # in a worker: an event, set when the pilot stops
terminated = False  # whether this worker got SIGTERM or SIGHUP


def start_worker(places: Any, event: Any) -> None:
    """Give a worker process its cores and GPU, and have it end with its parent."""
    global stopping
    place: Place = places.get()
    os.sched_setaffinity(0, place.cores)  # DALI follows it
    torch.set_num_threads(len(place.cores))  # OpenMP has counted the cores before
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    parent = os.getppid()

    def note(*_: object) -> None:
        global terminated
        if os.getppid() != parent:  # killed, and the kernel sent the signal
            os._exit(1)
        terminated = True

    for number in stop_signals():
        if number != signal.SIGINT:  # which the pilot alone takes
            signal.signal(number, note)
    follow_launcher()
    protect_output()
    stopping = event


def is_stopping() -> bool:
    """In a worker: whether to save and return."""
    return stopping.is_set() or terminated


def call(work: Callable[..., Result], *arguments: Any) -> Result:
    """In a worker: work(*arguments). Raises: OSError after SIGTERM or SIGHUP."""
    result = work(*arguments)
    if terminated:
        raise OSError("a trial's process was told to stop; the same command continues")
    return result


@contextmanager
def terminal_ignored() -> Iterator[None]:
    """Have processes that start now ignore what a terminal sends to all: we stop the trials."""
    of_terminal = signal.SIGINT, signal.SIGHUP
    before = {number: signal.signal(number, signal.SIG_IGN) for number in of_terminal}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Workers:
    """Processes that train trials, one in each place; `with` ends them."""

    def __init__(self, places: Sequence[Place]):
        context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
        with terminal_ignored():  # by the process that keeps track of the event's semaphores
            self.count, self.event, queue = len(places), context.Event(), context.Queue()
        for place in places:
            queue.put(place)
        options: dict = {"initializer": start_worker, "initargs": (queue, self.event)}
        self.pool = ProcessPoolExecutor(self.count, mp_context=context, **options)

    def map(
        self, work: Callable[..., Result], trials: Sequence[Trial], *arguments: Any
    ) -> Iterator[tuple[Trial, Result]]:
        """Call work(trial, *arguments) for each; yields trial and result as each is done.

        Raises: what `work` raises; OSError where a process was killed.
        """
        with terminal_ignored():
            jobs = {self.pool.submit(call, work, trial, *arguments): trial for trial in trials}
        for job in as_completed(jobs):
            try:
                yield jobs[job], job.result()
            except BrokenProcessPool as error:
                raise OSError(
                    "a trial's process was killed: if memory ran out, lower --jobs or "
                    "--data.batch_size; the same command continues"
                ) from error

    def stop(self) -> None:
        """End the processes; trials that are running save first."""
        self.event.set()
        self.pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Workers":
        """The processes start with the first work."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self.stop()
