"""What a step of training feeds into DALI: which images, their bytes, and the draws of their views.

Between pipeline/sources/reader.py and pipeline/runner.py. A bad image is replaced by another
sample, the same one on every run.
A newcomer's mistake: state here. A plan is sent to another process (reading_process.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.augment import AugmentConfig, ViewDraws, draw_views, draws_in_graph
from pipeline.keyed import Purpose, keyed_rng
from pipeline.order import SampleOrder
from pipeline.sources.folder import Allocate
from pipeline.sources.reader import ImageReader, Placed

MAX_ATTEMPTS = 100


@dataclass(frozen=True)
class Work:
    """What one step feeds into DALI: inputs by name, one entry a row."""

    step: int
    ids: np.ndarray
    inputs: dict[str, list | np.ndarray]
    finish: list[ViewDraws] | None = None
    """Draws of the views whose colours and blur are done after DALI."""


Prepare = Callable[[int], Work]


@dataclass(frozen=True)
class ViewPlan:
    """How the Work of any step is made, for one rank's rows of the global batch."""

    order: SampleOrder
    views: Sequence[AugmentConfig]
    rows: slice
    colors: bool
    """Whether colours and blur are DALI's, not done after it."""

    def prepare(self, reader: ImageReader, step: int, allocate: Allocate | None = None) -> Work:
        """Read the images of a step into memory that `allocate` gives, and draw their views."""
        order, rows = self.order, self.rows
        ids = order.global_batch(step)[rows].copy()
        placed = reader.read_all(ids, allocate)
        for row, image in enumerate(placed):
            if image is None:
                ids[row], placed[row] = _replace(reader, order, step, rows.start + row, allocate)
        encoded, sizes = zip(*(image for image in placed if image is not None), strict=True)
        rng = keyed_rng(order.seed, Purpose.VIEWS, step)
        drawn = draw_views(self.views, rng, np.array(sizes), rows, order.batch_size)
        draws = {
            f"{name}_{number}": getattr(draw, name)
            for number, (config, draw) in enumerate(zip(self.views, drawn, strict=True))
            for name in draws_in_graph(config, colors=self.colors)
        }
        inputs = {"encoded": list(encoded), **draws}
        return Work(step, ids, inputs, None if self.colors else drawn)


def _replace(
    reader: ImageReader, order: SampleOrder, step: int, row: int, allocate: Allocate | None
) -> tuple[int, Placed]:
    for attempt in range(MAX_ATTEMPTS):
        index = order.replacement(step, row, attempt)
        if (image := reader.read(index, allocate)) is not None:
            return index, image
    name, reason = next((reader.source.name(i), why) for i, why in reader.bad.items())
    raise ValueError(
        f"{MAX_ATTEMPTS} images drawn as replacements were bad too, for example {name}: {reason}"
    )
