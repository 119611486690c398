"""Runs a DALI graph over prepared work, in order, and survives images that DALI cannot decode.

A thread prepares the coming steps, or has a process do so (pipeline/loader.py says which); DALI
decodes and augments; the caller gets torch tensors. A bad image is kept from DALI by its header; if
one gets through and DALI fails, it is found, marked, and its step is prepared and run again.
A newcomer's mistake: DALI's own iterator. After an error it ends early, and every later epoch has
no batch (DALI 2.4, seen by hand).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import Full, Queue
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.decode import DecodeOptions
from pipeline.sources.reader import ImageReader
from pipeline.work import Prepare, Work

if TYPE_CHECKING:
    from nvidia.dali.pipeline import Pipeline


@dataclass(frozen=True)
class Batch:
    """One step's images.

    Shapes: images (V, N, S, S, 3) for training, view first; (N, S, S, 3) for evaluation; uint8 on
    the training device. ids (N,) int64 on the CPU: the sample of each row, -1 for one left out.
    small (W, N, s, s, 3) are the views of another size (multi-crop), if there are any.
    """

    step: int
    images: Tensor
    ids: Tensor
    small: Tensor | None = None


class DaliLoader:
    """Runs a DALI pipeline over the work of `steps`, in order.

    `preparing` is entered for each iteration and gives the function that makes the Work of a step,
    which may be called from two threads; `build` makes a pipeline for a number of batches in
    flight; `reader` is told of images that DALI could not decode.
    """

    def __init__(
        self,
        steps: Sequence[int],
        *,
        preparing: Callable[[], AbstractContextManager[Prepare]],
        build: "Callable[[int], Pipeline]",
        reader: ImageReader,
        options: DecodeOptions,
        device: torch.device,
        threads: int = 1,
    ):
        self.steps, self.device, self.options, self.reader = steps, device, options, reader
        self._preparing, self._build, self._threads = preparing, build, threads

    def __len__(self) -> int:
        """Batches that an iteration yields."""
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        """Yield a Batch for each step. Leaving the loop early ends the reading thread."""
        queue: Queue = Queue(maxsize=self.options.depth(self.device.type))
        stop = threading.Event()
        with self._preparing() as prepare:
            arguments = (prepare, queue, stop)
            thread = threading.Thread(target=self._produce, args=arguments, daemon=True)
            thread.start()
            try:
                with ThreadPoolExecutor(self._threads, thread_name_prefix="colour, blur") as pool:
                    yield from self._run(prepare, queue, pool)
            finally:
                stop.set()
                thread.join()

    def _produce(self, prepare: Prepare, queue: Queue, stop: threading.Event) -> None:
        for step in self.steps:
            try:
                item: Work | Exception = prepare(step)
            except Exception as error:  # raised again in the caller's thread
                item = error
            while not stop.is_set():
                try:
                    queue.put(item, timeout=0.1)
                    break
                except Full:
                    continue
            if stop.is_set() or isinstance(item, Exception):
                return

    def _run(self, prepare: Prepare, queue: Queue, pool: ThreadPoolExecutor) -> Iterator[Batch]:
        # DALI reads the images' bytes where they lie: a Work is kept until its batch is released
        pipeline, in_flight, to_take = None, deque(), len(self.steps)
        depth = min(self.options.depth(self.device.type), len(self.steps))

        def take() -> None:
            nonlocal to_take
            item = queue.get()
            if isinstance(item, Exception):
                raise item
            in_flight.append(item)
            to_take -= 1

        try:
            while in_flight or to_take:
                if pipeline is None:  # at the start, and after an error: DALI's is not trusted
                    while len(in_flight) < depth and to_take:
                        take()
                    pipeline = self._build(len(in_flight))
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
                if to_take:
                    take()
                    self._feed(pipeline, in_flight[-1])
                    pipeline.schedule_run()
                yield batch
        finally:
            del pipeline  # it ends before the bytes that it reads are freed

    def _mark_bad(self, work: Work) -> bool:
        """Find the images of a failed batch that DALI cannot decode; False if there is none."""
        from pipeline import graph

        device_id = None if self.device.type == "cpu" else self.device.index
        rows = np.flatnonzero(work.ids >= 0)
        images = [work.inputs["encoded"][row] for row in rows]
        reasons = graph.undecodable(images, self.options, device_id=device_id)
        for position, reason in reasons.items():
            self.reader.bad[int(work.ids[rows[position]])] = reason
        return bool(reasons)

    @staticmethod
    def _feed(pipeline: "Pipeline", work: Work) -> None:
        from nvidia.dali.tensors import TensorCPU, TensorListCPU

        for name, value in work.inputs.items():
            if isinstance(value, list):  # what feed_input does of it, in 0.3 ms for 0.8 of 256
                tensors = [TensorCPU(one, "") for one in value]
                value = TensorListCPU(tensors, layout="", contiguous=False)  # type: ignore[call-overload] - missing in its stub
            pipeline.feed_input(name, value)

    def _to_torch(self, work: Work, outputs: tuple, pool: ThreadPoolExecutor) -> Batch:
        tensors = [output.as_tensor() for output in outputs]
        first, last = (tuple(tensors[i].shape()) for i in (0, -1))
        large = sum(tuple(tensor.shape()) == first for tensor in tensors)
        images = torch.empty((large, *first), dtype=torch.uint8, device=self.device)
        small = torch.empty((len(tensors) - large, *last), dtype=torch.uint8, device=self.device)
        places = [*images, *small]
        if work.finish is not None:
            from pipeline.color_blur import finish_views  # a GPU machine need not have OpenCV

            finish_views(
                [np.asarray(t) for t in tensors],
                work.finish,
                [p.numpy() for p in places],
                pool=pool,
            )
        else:
            from nvidia.dali.plugin.pytorch import feed_ndarray

            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            for tensor, place in zip(tensors, places, strict=True):
                feed_ndarray(tensor, place, cuda_stream=stream)
        ids = torch.from_numpy(work.ids)
        if len(tensors) == 1:
            return Batch(work.step, images[0], ids)
        return Batch(work.step, images, ids, small if len(small) else None)
