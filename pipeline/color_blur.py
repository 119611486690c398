"""Colour, blur and solarize of views on the CPU, by OpenCV: on a GPU kernels/normalize.py does it.

DALI's CPU operators take 1.5 ms (coord_transform) and 4.2 ms (gaussian_blur) of a core for a view
of 224 pixels; OpenCV's 0.03 and 0.1 to 0.4 (profiling/LOG.md, 2026-11-24), without Python's lock.
tests/test_colors.py holds the two implementations together, bit for bit.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from pipeline.augment import ViewDraws, blur_radius

TASKS = 16  # of a batch, for the threads of the pool
SOLARIZE = np.array([x if x < 128 else 255 - x for x in range(256)], dtype=np.uint8)  # as PIL's

cv2.setNumThreads(0)  # the views are shared out among our threads


def finish_views(
    crops: Sequence[np.ndarray],
    draws: Sequence[ViewDraws],
    out: Sequence[np.ndarray],
    *,
    pool: ThreadPoolExecutor,
) -> None:
    """Write each view with its colours mapped, blurred and solarized into its part of `out`.

    Shapes: crops and out (N, S, S, 3) uint8 for each view, where S may differ; out is written.
    """
    rows = [(view, row) for view in range(len(crops)) for row in range(len(crops[view]))]

    def finish(places: list[tuple[int, int]]) -> None:
        for view, row in places:
            finish_view(crops[view][row], draws[view], row, out=out[view][row])

    size = -(-len(rows) // TASKS)  # a task for each view costs as much as a view of 32 pixels
    for _ in pool.map(finish, [rows[i : i + size] for i in range(0, len(rows), size)]):
        pass


def finish_view(crop: np.ndarray, draws: ViewDraws, row: int, *, out: np.ndarray) -> None:
    """out = solarize(blur(clamp(A crop + B mean(crop)))), rounded to uint8 after each step.

    Shapes: crop, out (S, S, 3) uint8.
    """
    mean = np.array(cv2.mean(crop)[:3], dtype=np.float32)
    shift = draws.color_mean[row] @ mean
    cv2.transform(crop, np.concatenate([draws.color[row], shift[:, None]], axis=1), dst=out)
    if (sigma := float(draws.sigma[row])) > 0:
        side = 2 * blur_radius(sigma) + 1
        cv2.GaussianBlur(out, (side, side), sigma, dst=out, borderType=cv2.BORDER_REFLECT_101)
    if draws.solarize[row]:
        cv2.LUT(out, SOLARIZE, dst=out)
