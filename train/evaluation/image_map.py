"""A map of images: thumbnails laid out so that images with similar features are close."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from train.evaluation.pictures import shorten

LEAST = 3  # images of a map
FREE = 2  # cells of the grid for each image: a full grid would hide gaps between groups
EDGE = 2  # percent of the images at each side that are moved in to the rest
COLORED = 20  # classes up to which frames have their colours
FRAME = 3  # pixels
UMAP_NEIGHBOURS = 15  # its default


def lay_out(features: np.ndarray, kind: Literal["pca", "umap"]) -> np.ndarray:
    """Positions (M, 2) of features (M, D) scaled to length 1, M at least 3; the same each time."""
    x = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    if kind == "umap":
        from umap import UMAP

        near = min(UMAP_NEIGHBOURS, len(x) - 1)
        seeded = UMAP(n_neighbors=near, init="pca", random_state=0, n_jobs=1)
        return np.asarray(seeded.fit_transform(x))
    centred = x - x.mean(0)
    left, s, _ = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(left[np.abs(left).argmax(0), np.arange(left.shape[1])])
    return (left * s * signs)[:, :2]


def place_on_grid(positions: np.ndarray) -> tuple[np.ndarray, int]:
    """A cell (M, 2), column and row, of a square grid for each position, and the grid's side.

    Each image has a cell of its own; the sum of squared distances is the least possible.
    """
    from scipy.optimize import linear_sum_assignment

    side = math.ceil(math.sqrt(FREE * len(positions)))
    low, high = np.percentile(positions, (EDGE, 100 - EDGE), axis=0)
    scaled = ((positions - low) / (high - low).clip(1e-12)).clip(0, 1) * (side - 1)
    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    distances = ((scaled[:, None] - cells[None]) ** 2).sum(2)
    _, chosen = linear_sum_assignment(distances)
    return cells[chosen], side


def draw_map(
    images: np.ndarray,
    features: np.ndarray,
    labels: Sequence[str],
    picture: Path,
    *,
    kind: Literal["pca", "umap"],
) -> None:
    """Draw thumbnails at the places of their features, with frames in the colours of the classes.

    Shapes: images (M, S, S, 3) uint8, features (M, D). Labels are "" without classes; with more
    than 20 there are no frames.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    cells, side = place_on_grid(lay_out(features, kind))
    names = sorted(set(labels) - {""})
    colors = {}
    if 0 < len(names) <= COLORED:
        colors = dict(zip(names, colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    size = images.shape[1]
    canvas = np.full((side * size, side * size, 3), 255, np.uint8)
    for image, (column, row), label in zip(images, cells.tolist(), labels, strict=True):
        place = canvas[row * size : (row + 1) * size, column * size : (column + 1) * size]
        if label in colors:
            place[:] = np.round(255 * np.array(colors[label])).astype(np.uint8)
            image = image[FRAME:-FRAME, FRAME:-FRAME]
            place[FRAME:-FRAME, FRAME:-FRAME] = image
        else:
            place[:] = image
    figure = Figure(figsize=(12, 12.6 if colors else 12), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="antialiased")
    axes.axis("off")
    if colors:
        patches = [Patch(color=color, label=shorten(name)) for name, color in colors.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=10, fontsize=9)
    figure.savefig(picture, dpi=120)
