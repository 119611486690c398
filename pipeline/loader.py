"""The two loaders: view_loader gives random views for training, eval_loader centre crops.

pipeline/work.py says what a step of training feeds into DALI, and pipeline/runner.py runs it.
A newcomer's mistake: dropping a bad image. The ranks would no longer take the same steps: it is
replaced by another sample, the same one on every run.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions
from pipeline.machine import usable_cores
from pipeline.order import SampleOrder
from pipeline.reading_process import reading_process
from pipeline.runner import DaliLoader
from pipeline.sources.reader import ImageReader
from pipeline.work import Prepare, ViewPlan, Work

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

GPU_THREADS = 8  # MLPerf's runs on H200 took 6; each holds buffers, see graph.RESERVED


def num_threads(options: DecodeOptions, *, local_world: int, device: torch.device) -> int:
    """DALI's threads: what was asked for, else this process's share of the cores."""
    share = max(1, usable_cores() // local_world)
    return options.threads or (share if device.type == "cpu" else min(share, GPU_THREADS))


def view_loader(
    reader: ImageReader,
    order: SampleOrder,
    steps: Sequence[int],
    *,
    views: Sequence[AugmentConfig],
    options: DecodeOptions,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    local_world: int = 1,
    in_process: bool | None = None,
) -> DaliLoader:
    """This rank's part of the global batches of `steps`: a view of each image for each of `views`.

    Views of another size than the first are a batch's `small` ones, all of one size.
    in_process: read and draw in a process of its own; None does so beside a GPU.

    Raises: ValueError if the ranks do not divide the global batch.
    """
    from pipeline import graph  # DALI is imported with it

    if order.batch_size % world:
        raise ValueError(
            f"{world} processes do not divide the global batch of {order.batch_size}: "
            "change --data.batch_size or the number of processes"
        )
    per_rank = order.batch_size // world
    rows = slice(rank * per_rank, (rank + 1) * per_rank)
    colors = device.type == "cuda"
    threads = num_threads(options, local_world=local_world, device=device)

    plan = ViewPlan(order, tuple(views), rows, colors)

    def preparing() -> AbstractContextManager[Prepare]:
        if device.type == "cuda" if in_process is None else in_process:
            return reading_process(reader, plan)
        return nullcontext(partial(plan.prepare, reader))

    def build(prefetch: int) -> "Pipeline":
        return graph.build_view_pipeline(
            options,
            views,
            batch_size=per_rank,
            prefetch=prefetch,
            num_threads=threads,
            device_id=None if device.type == "cpu" else device.index,
            colors=colors,
        )

    return DaliLoader(
        steps, preparing=preparing, build=build, reader=reader, options=options, device=device,
        threads=threads,
    )  # fmt: skip


def eval_loader(
    reader: ImageReader,
    ids: np.ndarray,
    *,
    resize: int,
    size: int,
    batch_size: int,
    options: DecodeOptions,
    device: torch.device,
    local_world: int = 1,
) -> DaliLoader:
    """Deterministic centre crops of the samples `ids`, in order; a bad image has the id -1.

    Shapes: batches of (batch_size, size, size, 3), the last one shorter.
    """
    from pipeline import graph  # DALI is imported with it

    blank = np.frombuffer(BLANK_PNG, dtype=np.uint8)

    def prepare(step: int) -> Work:
        chosen = ids[step * batch_size : (step + 1) * batch_size].astype(np.int64)
        placed = reader.read_all(chosen)
        good = np.array([image is not None for image in placed])
        encoded = [blank if image is None else image[0] for image in placed]
        sizes = np.array([(1, 1) if image is None else image[1] for image in placed])
        start, end = center_windows(sizes, resize=resize, size=size)
        inputs = {"encoded": encoded, "roi_start": start, "roi_end": end}
        return Work(step, np.where(good, chosen, -1), inputs)

    def build(prefetch: int) -> "Pipeline":
        return graph.build_eval_pipeline(
            options,
            size=size,
            batch_size=batch_size,
            prefetch=prefetch,
            num_threads=num_threads(options, local_world=local_world, device=device),
            device_id=None if device.type == "cpu" else device.index,
        )

    steps = range(-(-len(ids) // batch_size))
    return DaliLoader(
        steps,
        preparing=lambda: nullcontext(prepare),
        build=build,
        reader=reader,
        options=options,
        device=device,
    )


def center_windows(sizes: np.ndarray, *, resize: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where torchvision's Resize(resize) and CenterCrop(size) look: (N, 2) relative start and end.

    Shapes: sizes (N, 2) heights and widths in pixels.
    """
    shorter = sizes.min(1, keepdims=True)
    resized = np.where(sizes == shorter, resize, resize * sizes // shorter)
    start = np.round((resized - size) / 2)
    return (start / resized).astype(np.float32), ((start + size) / resized).astype(np.float32)


# a gray PNG of one pixel: stands in for a bad image in evaluation, where its row is left out
BLANK_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)
