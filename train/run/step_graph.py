"""A training step as one CUDA graph: recorded once, then launched as a whole.

A step of ResNet-50 is some 600 launches by the host; as a graph it is one. That helps where the
host is slower than the GPU, in steps of a few milliseconds. Not yet run on a GPU: tests replace
`Captured` by calls of the same function.

A graph runs the same kernels on the same memory, so in a step that is recorded
    inputs are copied to tensors that stay, results from tensors that the next replay overwrites
    learning rates are tensors
    no tensor that outlives the step is replaced, and nothing reads the device.
Source: "Whole-network capture" in https://docs.pytorch.org/docs/stable/notes/cuda.html.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

WARM_UP, TIMED = (
    3,
    5,
)  # steps before the recording, the first of which compile; then of auto's clock
AUTO_MS = 20.0  # auto records a step that takes less


class Results(NamedTuple):
    """Of a step, on the device."""

    loss: Tensor
    scalars: dict[str, Tensor]
    norm: Tensor


Inputs = tuple[Tensor, Tensor, Tensor | None]
"""images, ids and the draws of colours, as of a Batch."""
Update = Callable[[Tensor, Tensor, Tensor | None], Results]
"""Forward and backward pass and the optimizer's step."""


class Captured:
    """What `update` launches on `inputs`, to be replayed; nothing is computed before that."""

    def __init__(self, update: Update, inputs: Inputs):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = update(*inputs)

    def replay(self) -> Results:
        """Launch it; the results are overwritten by the next replay."""
        self.graph.replay()
        return self.results


class StepGraph:
    """Calls a step as it is at first, then records it, and from then on replays the recording.

    only_short: record only a step that takes less than AUTO_MS.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, *, only_short: bool = False
    ):
        self.optimizer, self.device = optimizer, device
        self.timed = TIMED if only_short else 0
        self.steps = 0
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.is_short = not only_short
        self.captured: Captured | None = None
        self.rates = torch.zeros(len(optimizer.param_groups), device=device)

    def __call__(self, update: Update, *inputs: *Inputs) -> Results:
        """One step. Shapes: the inputs have those of the first call."""
        self.steps += 1
        if self.steps <= WARM_UP:
            return self._beside(update, inputs)
        if self.steps <= WARM_UP + self.timed:
            return self._clocked(update, inputs)
        if self.marks:
            self.is_short = self._median_ms() < AUTO_MS
            self.marks.clear()
        if not self.is_short:
            return update(*inputs)
        if self.captured is None:
            images, ids, draws = inputs
            self.inputs = images.clone(), ids.clone(), None if draws is None else draws.clone()
            with tensor_rates(self.optimizer, self.rates):
                self.captured = Captured(update, self.inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            if kept is not None and given is not None:
                kept.copy_(given, non_blocking=True)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        loss, scalars, norm = self.captured.replay()
        copied = {name: value.clone() for name, value in scalars.items()}
        return Results(loss.clone(), copied, norm.clone())

    def _beside(self, update: Update, inputs: Inputs) -> Results:
        """On a stream of its own, as a recording wants what it allocates once and keeps."""
        if self.device.type != "cuda":
            return update(*inputs)
        main, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            results = update(*inputs)
        main.wait_stream(stream)
        return results

    def _clocked(self, update: Update, inputs: Inputs) -> Results:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        results = update(*inputs)
        end.record()
        self.marks.append((begin, end))
        return results

    def _median_ms(self) -> float:
        """Of the steps between the marks; waits for the device, once."""
        self.marks[-1][1].synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in self.marks)


@contextmanager
def tensor_rates(optimizer: torch.optim.Optimizer, rates: Tensor) -> Iterator[None]:
    """Within it the learning rates of the groups are these tensors. Shapes: rates (groups,)."""
    numbers = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    try:
        yield
    finally:
        for group, number in zip(optimizer.param_groups, numbers, strict=True):
            group["lr"] = number
