"""The confusion matrix, and images with their nearest neighbours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

NAMED = 60  # classes up to which each has its name on the axes
COUNTED = 20  # classes up to which each cell has its count
LISTED = 25  # most frequent confusions, listed beside a matrix without counts
LONGEST = 20  # characters of a class name
SAME, OTHER, UNKNOWN = "tab:green", "tab:red", "tab:gray"


def draw_confusion(counts: np.ndarray, names: Sequence[str], picture: Path, *, title: str) -> None:
    """The matrix as shares of each true class. counts (C, C): true class by row, guess by column.

    Up to 20 classes have their counts in the cells and up to 60 their names on the axes; beside a
    matrix without counts its most frequent confusions are listed.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    num = len(counts)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    side = float(np.clip(3 + 0.25 * num, 5, 14))
    widths = [side] if num <= COUNTED else [side, 5]
    figure = Figure(figsize=(sum(widths), side), layout="constrained")
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    axes = panels[0]
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # the square root shows a confusion of 2 % too
    image = axes.imshow(share, cmap="Blues", norm=norm, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if num <= NAMED:
        short = [shorten(name) for name in names]
        axes.set_xticks(range(num), short, rotation=90, fontsize=8)
        axes.set_yticks(range(num), short, fontsize=8)
    if num <= COUNTED:
        for row, column in np.argwhere(counts):
            color = "white" if share[row, column] > 0.4 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color)
    else:
        panels[1].axis("off")
        panels[1].text(0, 1, confusions(counts, names), va="top", fontsize=10)
    figure.savefig(picture, dpi=150)


def confusions(counts: np.ndarray, names: Sequence[str]) -> str:
    """The most frequent mistakes, a line each: true -> guess, how many, which share."""
    wrong = counts - np.diag(counts.diagonal())
    lines = ["most frequent confusions (true -> guess)"]
    for cell in np.argsort(wrong, axis=None)[::-1][:LISTED]:
        row, column = divmod(int(cell), len(wrong))
        if count := int(wrong[row, column]):
            pair = f"{shorten(names[row])} -> {shorten(names[column])}"
            lines.append(f"{pair}: {count} ({count / counts[row].sum():.0%})")
    return "\n".join(lines)


def draw_neighbours(
    queries: np.ndarray,
    neighbours: np.ndarray,
    query_names: Sequence[str],
    neighbour_names: Sequence[Sequence[str]],
    picture: Path,
    *,
    first: str = "test image",
) -> None:
    """A row for each query: itself, then its neighbours, framed green if of the same class.

    first: what a query is. Shapes: queries (Q, S, S, 3), neighbours (Q, K, S, S, 3), uint8. Names
    are "" without labels.
    """
    from matplotlib.figure import Figure

    rows, columns = len(queries), neighbours.shape[1] + 1
    figure = Figure(figsize=(1.2 * columns, 1.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for row, query_name in enumerate(query_names):
        names = [query_name, *neighbour_names[row]]
        for column, image in enumerate([queries[row], *neighbours[row]]):
            axes, name = grid[row, column], names[column]
            axes.imshow(image)
            axes.set(xticks=[], yticks=[])
            axes.set_title(shorten(name), fontsize=8)
            color = "black" if column == 0 else SAME if name == query_name else OTHER
            for spine in axes.spines.values():
                spine.set(color=color if name else UNKNOWN, linewidth=3)
    grid[0, 0].set_ylabel(first, fontsize=8)
    figure.savefig(picture, dpi=100)


def shorten(name: str) -> str:
    """A class name of at most LONGEST characters."""
    return name if len(name) <= LONGEST else name[: LONGEST - 3] + "..."
