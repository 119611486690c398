"""Timed repetitions of several variants that take turns, and their percentiles.

Clocks and temperature drift: variants of one table are measured in one run, a repetition of each
per turn, and only ratios within one run are printed. A variant that fails is kept with its reason
and the others continue.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from train.distributed import World, failure_of_any, gather, is_lost_connection
from train.run.program import first_line

CALLS = itertools.count()  # of take_turns, the same on all ranks
Repetition = Callable[[], float]
"""Does a fixed amount of work once and returns its seconds."""


@dataclass
class Timing:
    """Seconds of each timed repetition of one variant, or why there are none."""

    images: int
    """Images (two views each) of a repetition on this rank."""
    seconds: list[float] = field(default_factory=list)
    not_measured: str | None = None
    gpu_was_idle: list[bool] = field(default_factory=list)
    """After each step, on CUDA: whether the GPU had done all that the host had queued."""

    def rate(self, share: float = 0.5) -> float:
        """Images a second; `share` of the repetitions were slower."""
        return self.images / float(np.quantile(self.seconds, 1 - share))

    def summary(self) -> dict:
        """images_per_s with p10 <= p50 <= p90, and n; or not_measured."""
        if self.not_measured is not None:
            return {"not_measured": self.not_measured}
        rates = {f"p{round(100 * share)}": round(self.rate(share), 3) for share in (0.1, 0.5, 0.9)}
        result = {"images_per_s": rates, "n": len(self.seconds), "images": self.images}
        if self.gpu_was_idle:
            share = sum(self.gpu_was_idle) / len(self.gpu_was_idle)
            result["share_of_steps_that_the_host_limits"] = round(share, 3)
        return result


def take_turns(
    variants: dict[str, Repetition],
    *,
    images: int,
    n: int,
    world: World,
    warmup: int = 1,
    budget_s: float = float("inf"),
) -> dict[str, Timing]:
    """Run each variant warmup + n times, taking turns; stop early once budget_s is spent, n >= 1.

    All ranks call it with the same variants and stop together. What a variant raises is kept in its
    Timing.

    Raises: RuntimeError where a variant fails on some ranks while others wait for them within it.
    """
    call = next(CALLS)
    timings = {name: Timing(images) for name in variants}
    begin = time.perf_counter()
    for turn in range(warmup + n):
        for name, repeat in variants.items():
            timing = timings[name]
            if timing.not_measured is not None:
                continue
            seconds, reason = 0.0, None
            try:
                seconds = repeat()
            except torch.OutOfMemoryError:
                reason = "out of GPU memory: lower --data.batch_size"
                torch.cuda.empty_cache()
            except (RuntimeError, ValueError, OSError, ImportError) as error:
                if is_lost_connection(error):
                    raise
                reason = f"{type(error).__name__}: {first_line(error)}"
            key = f"turns/{call}/{turn}/{name}"
            timing.not_measured = failure_of_any(world, key, reason)
            if timing.not_measured is None and turn >= warmup:
                timing.seconds.append(seconds)
        is_over = turn >= warmup and time.perf_counter() - begin > budget_s
        if any(gather(world, is_over)):
            break
    return timings


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call: CUDA events on a GPU, else the clock."""
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ratios(of: str, timings: dict[str, Timing]) -> dict[str, float]:
    """ "<of>/<peer>": our median rate by the peer's, for each peer measured in this run."""
    measured = {n: timing.rate() for n, timing in timings.items() if timing.not_measured is None}
    ours = measured.pop("ours", 0.0)
    return {f"{of}/{name}": round(ours / rate, 3) for name, rate in measured.items() if ours}
