"""The two loaders: view_loader gives random views for training, eval_loader centre crops.

A thread prepares the coming steps, or has a process do so beside a GPU; DALI decodes and augments;
the caller gets torch tensors. A bad image is kept from DALI by its header. If DALI fails for one
that was not, it is found and marked, and its step is prepared and run again: DALI's own iterator
ends early after an error, and every later epoch is empty (DALI 2.4). A bad image is replaced by
another sample, the same in every run, and never left out: all ranks take the same steps.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions
from pipeline.machine import usable_cores
from pipeline.order import Prepare, SampleOrder, ViewPlan, Work
from pipeline.reading_process import reading_process
from pipeline.sources.reader import ImageReader

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline

GPU_THREADS = 8  # MLPerf's runs on H200 took 6; each holds buffers, see decode.RESERVED
# a gray PNG of one pixel, in place of a bad image in evaluation, where its row is left out
BLANK_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)


@dataclass(frozen=True)
class Batch:
    """One step's images.

    Shapes: images (V, N, S, S, 3) for training, view first; (N, S, S, 3) for evaluation; uint8 on
    the training device. ids (N,) int64 on the CPU: the sample of each row, -1 for one left out.
    small (W, N, s, s, 3) are the views of another size (multi-crop), if there are any.
    draws and small_draws (V or W, N, 20 + R) fp32, of augment.pack_draws: on a GPU the images are
    crops, which kernels/normalize.py makes views of by the draws. None where there is nothing left
    to do. Of a single view, images (N, S, S, 3) and draws (N, 20 + R).
    """

    step: int
    images: Tensor
    ids: Tensor
    small: Tensor | None = None
    draws: Tensor | None = None
    small_draws: Tensor | None = None


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the global batch, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_size: int = 1


ALONE = Ranks()


def num_threads(options: DecodeOptions, *, local_world: int, device: torch.device) -> int:
    """DALI's threads: --dali.threads, or this process's share of the cores."""
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
    ranks: Ranks = ALONE,
    in_process: bool | None = None,
) -> "DaliLoader":
    """This rank's part of the global batches of `steps`: a view of each image for each of `views`.

    Views of another size than the first are a batch's `small` ones, all of one size.
    in_process: read and draw in a separate process; None does so beside a GPU.

    Raises: ValueError if the ranks do not divide the global batch.
    """
    from pipeline import graph  # imports DALI

    if order.batch_size % ranks.size:
        raise ValueError(
            f"{ranks.size} processes do not divide the global batch of {order.batch_size}: "
            "change --data.batch_size or the number of processes"
        )
    per_rank = order.batch_size // ranks.size
    rows = slice(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)
    threads = num_threads(options, local_world=ranks.local_size, device=device)
    plan = ViewPlan(order, tuple(views), rows, packed=device.type == "cuda")

    def preparing() -> AbstractContextManager[Prepare]:
        if device.type == "cuda" if in_process is None else in_process:
            return reading_process(reader, plan)
        return nullcontext(partial(plan.prepare, reader))

    settings = _settings(device, batch_size=per_rank, num_threads=threads)
    build = partial(graph.build_view_pipeline, options, views, **settings)
    return DaliLoader(steps, preparing, build, reader, options, device, threads)


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
) -> "DaliLoader":
    """Deterministic centre crops of the samples `ids`, in order; a bad image has the id -1.

    Shapes: batches of (batch_size, size, size, 3), the last one shorter.
    """
    from pipeline import graph  # imports DALI

    blank = np.frombuffer(BLANK_PNG, dtype=np.uint8), (1, 1)

    def prepare(step: int) -> Work:
        chosen = ids[step * batch_size : (step + 1) * batch_size].astype(np.int64)
        placed = reader.read_all(chosen)
        good = [image is not None for image in placed]
        encoded, sizes = zip(*(image or blank for image in placed), strict=True)
        start, end = center_windows(np.array(sizes), resize=resize, size=size)
        inputs = {"encoded": list(encoded), "roi_start": start, "roi_end": end}
        return Work(step, np.where(good, chosen, -1), inputs)

    threads = num_threads(options, local_world=local_world, device=device)
    settings = _settings(device, batch_size=batch_size, num_threads=threads)
    build = partial(graph.build_eval_pipeline, options, size=size, **settings)
    steps, preparing = range(-(-len(ids) // batch_size)), partial(nullcontext, prepare)
    return DaliLoader(steps, preparing, build, reader, options, device)


def _settings(device: torch.device, **sizes: int) -> dict[str, Any]:
    return {"device_id": None if device.type == "cpu" else device.index, **sizes}


def center_windows(sizes: np.ndarray, *, resize: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The window of torchvision's Resize(resize) and CenterCrop(size): (N, 2) relative start, end.

    Shapes: sizes (N, 2) heights and widths in pixels.
    """
    shorter = sizes.min(1, keepdims=True)
    resized = np.where(sizes == shorter, resize, resize * sizes // shorter)
    start = np.round((resized - size) / 2)
    return (start / resized).astype(np.float32), ((start + size) / resized).astype(np.float32)


@dataclass(eq=False)
class DaliLoader:
    """Runs a DALI pipeline over the work of `steps`, in order."""

    steps: Sequence[int]
    preparing: Callable[[], AbstractContextManager[Prepare]]
    """Entered for each iteration; gives the function that makes the Work of a step, which may be
    called from two threads."""
    build: "Callable[..., Pipeline]"
    """Makes a pipeline for `prefetch` batches in flight."""
    reader: ImageReader
    """Images that DALI could not decode are added to its `bad`."""
    options: DecodeOptions
    device: torch.device
    threads: int = 1

    def __len__(self) -> int:
        """Batches that an iteration yields."""
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        """Yield a Batch for each step. Leaving the loop early ends the reading thread."""
        with (
            self.preparing() as prepare,
            ThreadPoolExecutor(self.threads, thread_name_prefix="colour, blur") as pool,
            ThreadPoolExecutor(1, thread_name_prefix="prepare") as preparer,
        ):
            ahead = (preparer.submit(prepare, step) for step in self.steps)
            try:
                yield from self._run(prepare, ahead, pool)
            finally:
                preparer.shutdown(cancel_futures=True)

    def _run(
        self, prepare: Prepare, ahead: "Iterator[Future[Work]]", pool: ThreadPoolExecutor
    ) -> Iterator[Batch]:
        # DALI reads the images' bytes in place: a Work is kept until its batch is released
        depth = self.options.depth(self.device.type)
        pipeline, in_flight, waiting = None, deque(), deque(islice(ahead, depth + 1))

        def take() -> None:
            in_flight.append(waiting.popleft().result())
            waiting.extend(islice(ahead, 1))

        try:
            while in_flight or waiting:
                if pipeline is None:  # at the start, and after an error: DALI's is not trusted
                    while len(in_flight) < depth and waiting:
                        take()
                    pipeline = self.build(prefetch=len(in_flight))
                    for work in in_flight:
                        self._feed(pipeline, work)
                    pipeline.schedule_run()  # the first call runs all that were fed
                try:
                    outputs, failure = pipeline.share_outputs(), None
                except (RuntimeError, UnicodeDecodeError) as error:
                    # without the traceback, whose frames would keep the pipeline and its memory
                    outputs, failure = (), error.with_traceback(None)
                if failure is not None:
                    pipeline = None
                    if not self._mark_bad(in_flight[0]):
                        raise failure
                    in_flight[0] = prepare(in_flight[0].step)
                    continue
                work = in_flight.popleft()
                batch = self._to_torch(work, outputs, pool)
                pipeline.release_outputs()
                if waiting:
                    take()
                    self._feed(pipeline, in_flight[-1])
                    pipeline.schedule_run()
                yield batch
        finally:
            del pipeline  # it ends before the bytes that it reads are freed

    def _mark_bad(self, work: Work) -> bool:
        """Find the images of a failed batch that DALI cannot decode; False if there is none."""
        from pipeline import graph

        rows = np.flatnonzero(work.ids >= 0)
        images = [work.inputs["encoded"][row] for row in rows]
        reasons = graph.undecodable(images, self.options, **_settings(self.device))
        for position, reason in reasons.items():
            self.reader.bad[int(work.ids[rows[position]])] = reason
        return bool(reasons)

    @staticmethod
    def _feed(pipeline: "Pipeline", work: Work) -> None:
        from nvidia.dali.tensors import TensorCPU, TensorListCPU

        for name, value in work.inputs.items():
            if isinstance(value, list):  # as feed_input does, in 0.3 instead of 0.8 ms for 256
                tensors = [TensorCPU(image, "") for image in value]
                value = TensorListCPU(tensors, layout="", contiguous=False)  # type: ignore[call-overload] - missing in its stub
            pipeline.feed_input(name, value)

    def _to_torch(self, work: Work, outputs: tuple, pool: ThreadPoolExecutor) -> Batch:
        tensors = [output.as_tensor() for output in outputs]
        first, last = (tuple(tensors[i].shape()) for i in (0, -1))
        large = sum(tuple(tensor.shape()) == first for tensor in tensors)
        images = torch.empty((large, *first), dtype=torch.uint8, device=self.device)
        small = torch.empty((len(tensors) - large, *last), dtype=torch.uint8, device=self.device)
        places = [*images, *small]
        if isinstance(work.draws, list):
            from pipeline.color_blur import finish_views  # a GPU machine need not have OpenCV

            crops, out = [np.asarray(t) for t in tensors], [p.numpy() for p in places]
            finish_views(crops, work.draws, out, pool=pool)
        else:
            from nvidia.dali.plugin.pytorch import feed_ndarray

            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            for tensor, place in zip(tensors, places, strict=True):
                feed_ndarray(tensor, place, cuda_stream=stream)
        ids, draws, small_draws = torch.from_numpy(work.ids), None, None
        if isinstance(work.draws, np.ndarray):
            packed = torch.from_numpy(work.draws)
            if self.device.type == "cuda":  # pageable memory would make the host wait for the copy
                packed = packed.pin_memory().to(self.device, non_blocking=True)
            draws, small_draws = packed[:large], packed[large:]
        if len(tensors) == 1:
            return Batch(work.step, images[0], ids, draws=None if draws is None else draws[0])
        if len(small) == 0:
            return Batch(work.step, images, ids, draws=draws)
        return Batch(work.step, images, ids, small, draws, small_draws)
