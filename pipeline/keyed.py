"""Random numbers by key: the same (seed, purpose, index) gives the same generator, with no state.

So any step of any epoch can be entered at once, on any number of ranks.
A newcomer's mistake: Philox(key=[seed, 1 << 63]). NumPy makes floats of such a list and loses the
low bits; the key must be an array of uint64.
"""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What the numbers are for: streams that never meet."""

    ORDER = 1
    VIEWS = 2
    REPLACEMENT = 3
    KNN_SPLIT = 4


def keyed_rng(seed: int, purpose: Purpose, index: int = 0, row: int = 0) -> np.random.Generator:
    """A generator for one epoch's order, one step's views, one row's replacement ...

    Shapes: seed and index below 2**56, row below 2**64, all >= 0.
    """
    key = np.array([seed, (int(purpose) << 56) | index], dtype=np.uint64)
    counter = np.array([0, 0, 0, row], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
