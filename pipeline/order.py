"""Which samples a step trains on, and what of them is fed into DALI: bytes and windows of
the views, and what is done to them afterwards.

The order is a permutation per (seed, epoch), cut into global batches; the batches do not depend on
the number of ranks, and a run's position is one integer, the global step. There is no state: a plan
is sent to another process (reading_process.py), which imports neither torch nor DALI.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from pipeline.augment import AugmentConfig, ViewDraws, draw_views, pack_draws
from pipeline.sources.folder import Allocate
from pipeline.sources.reader import ImageReader, Placed

MAX_ATTEMPTS = 100


class Purpose(IntEnum):
    """Separate streams of random numbers."""

    ORDER = 1
    VIEWS = 2
    REPLACEMENT = 3
    KNN_SPLIT = 4
    RANK_IMAGES = 5


def keyed_rng(seed: int, purpose: Purpose, index: int = 0, row: int = 0) -> np.random.Generator:
    """The generator of one epoch's order, one step's views, one row's replacement; without state.

    Shapes: seed and index below 2**56, row below 2**64, all >= 0.
    """
    # uint64: NumPy makes floats of the list [seed, 1 << 63] and loses the low bits
    key = np.array([seed, (int(purpose) << 56) | index], dtype=np.uint64)
    counter = np.array([0, 0, 0, row], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class SampleOrder:
    """Global batches of sample ids; an epoch's last, incomplete batch is left out."""

    def __init__(self, num_samples: int, *, batch_size: int, seed: int):
        if num_samples < batch_size:
            remedy = f"set --data.batch_size to at most {num_samples}"
            raise ValueError(
                f"{num_samples} images are fewer than one global batch of {batch_size}: "
                + (remedy if num_samples > 1 else "give --data.root more")
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.steps_per_epoch = num_samples // batch_size
        self._cached: tuple[int, np.ndarray] | None = None

    def permutation(self, epoch: int) -> np.ndarray:
        """(num_samples,) int64: the epoch's order; every sample once."""
        if self._cached is None or self._cached[0] != epoch:
            rng = keyed_rng(self.seed, Purpose.ORDER, epoch)
            self._cached = epoch, rng.permutation(self.num_samples)
        return self._cached[1]

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of a global step, all counted from 0."""
        return divmod(step, self.steps_per_epoch)

    def global_batch(self, step: int) -> np.ndarray:
        """(batch_size,) sample ids of a global step."""
        epoch, index = self.position(step)
        start = index * self.batch_size
        return self.permutation(epoch)[start : start + self.batch_size]

    def replacement(self, step: int, row: int, attempt: int) -> int:
        """The sample in place of a bad image: the same on every run, rank count and resume."""
        rng = keyed_rng(self.seed, Purpose.REPLACEMENT, step, row)
        return int(rng.integers(self.num_samples, size=attempt + 1)[attempt])


class PartOrder(SampleOrder):
    """SampleOrder over the samples `ids` alone, a part of a folder or of shards."""

    def __init__(self, ids: np.ndarray, *, batch_size: int, seed: int):
        super().__init__(len(ids), batch_size=batch_size, seed=seed)
        self.ids = ids

    def permutation(self, epoch: int) -> np.ndarray:
        """(len(ids),) int64: the epoch's order; every sample of the part once."""
        return self.ids[super().permutation(epoch)]

    def replacement(self, step: int, row: int, attempt: int) -> int:
        """A replacement from the part."""
        return int(self.ids[super().replacement(step, row, attempt)])


@dataclass(frozen=True)
class Work:
    """What one step feeds into DALI: inputs by name, one entry a row."""

    step: int
    ids: np.ndarray
    inputs: dict[str, list | np.ndarray]
    draws: list[ViewDraws] | np.ndarray | None = None
    """Of colour, blur and solarize, which follow DALI; an array of augment.pack_draws for a GPU."""


Prepare = Callable[[int], Work]


@dataclass(frozen=True)
class ViewPlan:
    """How the Work of any step is made, for one rank's rows of the global batch."""

    order: SampleOrder
    views: Sequence[AugmentConfig]
    rows: slice
    packed: bool
    """Whether a Work's draws are an array: on a GPU."""

    def prepare(self, reader: ImageReader, step: int, allocate: Allocate | None = None) -> Work:
        """Read the images of a step into memory from `allocate`, and draw their views.

        Raises: ValueError where no good image is among the replacements of a bad one.
        """
        order, rows = self.order, self.rows
        ids = order.global_batch(step)[rows].copy()
        placed = reader.read_all(ids, allocate)
        for row, image in enumerate(placed):
            if image is None:
                ids[row], placed[row] = _replace(reader, order, step, rows.start + row, allocate)
        encoded, sizes = zip(*(image for image in placed if image is not None), strict=True)
        rng = keyed_rng(order.seed, Purpose.VIEWS, step)
        drawn = draw_views(self.views, rng, np.array(sizes), rows, order.batch_size)
        inputs: dict[str, list | np.ndarray] = {"encoded": list(encoded)}
        for number, draw in enumerate(drawn):
            inputs |= {f"roi_start_{number}": draw.roi_start, f"roi_end_{number}": draw.roi_end}
        return Work(step, ids, inputs, pack_draws(self.views, drawn) if self.packed else drawn)


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
