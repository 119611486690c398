"""What the loader takes of the host beside decoding: CPU time, and the trainer's launches.

The loader of a GPU's training with all its parts but the decoder: reading, headers, draws, handing
over, feeding, with as many batches in flight as on a GPU. Its graph takes every input that the
training graph takes and decodes nothing, so it runs without a GPU. Two variants take turns: reading
in a separate process, as beside a GPU, and in a thread of the trainer's process.
CPU time is that of a long run less that of a short one: starting processes and pipelines cancels.
"""

# DALI makes its operators at import, where pyright cannot see them:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false

import resource
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from measure.harness import with_batch
from measure.loader_times import endless_order
from pipeline.graph import ROI, encoded_input, roi_input
from pipeline.loader import DaliLoader
from pipeline.order import ViewPlan
from pipeline.reading_process import reading_process
from pipeline.sources.reader import ImageReader
from train.config import Config
from train.distributed import World

ROWS = 256  # images a batch: a GPU's
SHORT, LONG = 8, 72  # steps; after the short run every header of few images is known
WINDOW_S, SETTLE_S = 0.5, 0.1  # of launches; until a loader that is not asked has filled its queues
TENSOR = 64  # elements of the tensor of a small operation
RATE = 4000  # images/s of a step that is as fast as the mark for an H200; inf: as fast as it can
OpenLoader = Callable[[int], DaliLoader]


def measure_host(reader: ImageReader, config: Config, world: World, *, n: int) -> dict:
    """For both variants: images a second of CPU time, and by how much launches are slowed.

    CPU time is the least of n repetitions: it only grows with what else runs on the machine, whose
    caches, memory and cores are shared. The median is given too; the rest are medians.
    """
    rates = (RATE, float("inf"))
    result, rows = {}, ROWS
    measured: dict = {name: defaultdict(list) for name in ("process", "thread")}
    for _ in range(n):
        for name, values in measured.items():
            rows, open_loader = _opener(reader, config, world, in_process=name == "process")
            long, short = (_cpu_seconds(open_loader, steps) for steps in (LONG, SHORT))
            values["cpu_s"].append((long - short) / (LONG - SHORT) / rows)
            for rate in rates:
                ratio, batches_per_s = _slowed(open_loader, rows / rate)
                values["slowed", rate].append(ratio)
                values["beside", rate].append(batches_per_s * rows)
    for name, values in measured.items():
        cpu_s = values.pop("cpu_s")
        median = {key: statistics.median(each) for key, each in values.items()}
        result[name] = {
            "images_per_cpu_s": round(1 / min(cpu_s)),
            "images_per_cpu_s_median": round(1 / statistics.median(cpu_s)),
            "launches": [
                {
                    "images_per_s_beside": round(median["beside", rate]),
                    "slowed_times": round(median["slowed", rate], 3),
                }
                for rate in rates
            ],
            "n": n,
        }
    return result | {"images_a_batch": rows}


def _opener(
    reader: ImageReader, config: Config, world: World, *, in_process: bool
) -> tuple[int, OpenLoader]:
    """Images a batch, and a function that opens the loader for a number of steps."""
    order, rows = endless_order(reader, with_batch(config, ROWS * world.size), world)
    options = replace(config.dali, prefetch=config.dali.depth("cuda"))
    part = slice(world.rank * rows, (world.rank + 1) * rows)
    plan = ViewPlan(order, tuple(config.views), part, packed=True)

    def opened(steps: int) -> DaliLoader:
        # a new reader each time: a later loader must not know the sizes already
        own = ImageReader(reader.source, reader.max_pixels)
        prepared = partial(plan.prepare, own)
        return DaliLoader(
            range(steps),
            preparing=lambda: reading_process(own, plan) if in_process else nullcontext(prepared),
            build=lambda prefetch: feeding_pipeline(config, rows=rows, prefetch=prefetch),
            reader=own,
            options=options,
            device=torch.device("cpu"),
        )

    return rows, opened


def feeding_pipeline(config: Config, *, rows: int, prefetch: int) -> Pipeline:
    """The lengths of the images modulo 256; it takes the training graph's other inputs too.

    The draws are sinks: as outputs each would be copied sample by sample, 10 us an image in all,
    which the training graph does not do.
    """

    @pipeline_def(batch_size=rows, num_threads=1, device_id=None, prefetch_queue_depth=prefetch)
    def graph():
        for number in range(len(config.views)):
            for name in ROI:
                Pipeline.current().add_sink(roi_input(f"{name}_{number}", preserve=True))
        return fn.cast(encoded_input().shape(), dtype=types.UINT8)

    pipeline = graph()
    pipeline.build()
    return pipeline


def _cpu_seconds(open_loader: OpenLoader, steps: int) -> float:
    """CPU time of this process and of the reading process, from start to end of a loader."""

    def spent() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before = spent()
    for _ in open_loader(steps):
        pass
    return spent() - before


def _slowed(open_loader: OpenLoader, pause_s: float) -> tuple[float, float]:
    """Launches alone by those beside the loader, and the loader's batches a second.

    Alone before and after: a drift of the clock cancels.
    """
    with _running(open_loader(1 << 30), pause_s) as (go, taken):
        alone = [_launches_per_s()]
        go.set()
        begin, first = time.perf_counter(), len(taken)
        beside = _launches_per_s()
        batches_per_s = (len(taken) - first) / (time.perf_counter() - begin)
        go.clear()
        time.sleep(SETTLE_S)
        alone.append(_launches_per_s())
    return statistics.mean(alone) / beside, batches_per_s


@contextmanager
def _running(loader: DaliLoader, pause_s: float) -> Iterator[tuple[threading.Event, list]]:
    """A thread takes a batch each pause_s while the event is set; a list grows with each."""
    go, stop, ready, taken = threading.Event(), threading.Event(), threading.Event(), []

    def take() -> None:
        batches = iter(loader)
        try:
            while not stop.is_set():
                if len(taken) == SHORT:
                    ready.set()
                if len(taken) < SHORT or go.wait(0.1):
                    due = time.perf_counter() + pause_s
                    next(batches)
                    taken.append(None)
                    stop.wait(max(0.0, due - time.perf_counter()) if ready.is_set() else 0)
        finally:
            ready.set()
            batches.close()  # type: ignore[attr-defined] - a generator

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(take)
        ready.wait()
        time.sleep(SETTLE_S)
        try:
            yield go, taken
        finally:
            stop.set()
            future.result()  # raises what the loader has raised


def _launches_per_s() -> float:
    """Small torch operations a second, as a trainer launches kernels: each some microseconds.

    Of the time in which this thread had a core, or slept because another thread had Python's lock:
    waiting for a core shows how many there are, and what else runs on them.
    """
    values = torch.zeros(TENSOR)
    launches, waited, begin = 0, _waited_for_a_core(), time.perf_counter()
    while time.perf_counter() - begin < WINDOW_S:
        for _ in range(100):
            values.add_(1.0)
        launches += 100
    return launches / (time.perf_counter() - begin - _waited_for_a_core() + waited)


def _waited_for_a_core() -> float:
    """Seconds that this thread was ready to run and did not: Linux's schedstat."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
