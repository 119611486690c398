"""Which sample stands where: a permutation per (seed, epoch), cut into global batches.

We own the order, DALI owns the bytes. The position of a run is one integer, the global step; the
global batches do not depend on the number of ranks.
A newcomer's mistake: keeping state here. There is none but a cache of the last permutation.
"""

import numpy as np

from pipeline.keyed import Purpose, keyed_rng


class SampleOrder:
    """Global batches of sample ids; the last, incomplete batch of an epoch is left out.

    What is left out (fewer than batch_size samples) is another random part in every epoch.
    """

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
        """A stand-in for a bad image: the same on every run, rank count and resume."""
        rng = keyed_rng(self.seed, Purpose.REPLACEMENT, step, row)
        return int(rng.integers(self.num_samples, size=attempt + 1)[attempt])
