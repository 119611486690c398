"""The pictures of an evaluation: the confusion matrix, and test images with their neighbours.

A newcomer's mistake: reading shares of a class with three test images. The counts are in the cells
where there is room for them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

NAMED = 60  # classes up to which each has its name on the axes
COUNTED = 20  # ... up to which each cell has its count
LISTED = 25  # most frequent confusions, listed beside a matrix without counts
LONGEST = 20  # letters of a class name
SAME, OTHER, UNKNOWN = "tab:green", "tab:red", "tab:gray"


def new_figure(width: float, height: float):
    """A figure of so many inches, drawn without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_confusion(counts: np.ndarray, names: Sequence[str], picture: Path, *, title: str) -> None:
    """The matrix as shares of each true class. counts (C, C): true class by row, guess by column.

    Few classes have their counts in the cells, more have names, many have numbers on the axes and
    the most frequent confusions beside it.
    """
    from matplotlib.colors import PowerNorm

    num = len(counts)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    side = float(np.clip(3 + 0.25 * num, 5, 14))
    figure = new_figure(side if num <= COUNTED else side + 5, side)
    panels = figure.subplots(
        1, 1 if num <= COUNTED else 2, squeeze=False,
        width_ratios=None if num <= COUNTED else [side, 5],
    )[0]  # fmt: skip
    axes = panels[0]
    # the square root shows a confusion of 2 % too
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    shown = axes.imshow(share, cmap="Blues", norm=norm, interpolation="nearest")
    figure.colorbar(shown, ax=axes, shrink=0.6, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if num <= NAMED:
        short = [shorten(name) for name in names]
        axes.set_xticks(range(num), short, rotation=90, fontsize=8)
        axes.set_yticks(range(num), short, fontsize=8)
    if num <= COUNTED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if share[row, column] > 0.4 else "black"
                axes.text(column, row, int(count), ha="center", va="center", color=color)
    else:
        panels[1].axis("off")
        panels[1].text(0, 1, confusions(counts, names), va="top", fontsize=10)
    figure.savefig(picture, dpi=150)


def confusions(counts: np.ndarray, names: Sequence[str]) -> str:
    """The most frequent mistakes, a line each: true -> guess, how many, which share."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    lines = ["most frequent confusions (true -> guess)"]
    for place in np.argsort(wrong, axis=None)[::-1][:LISTED]:
        row, column = divmod(int(place), len(wrong))
        if wrong[row, column]:
            share = wrong[row, column] / counts[row].sum()
            lines.append(
                f"{shorten(names[row])} -> {shorten(names[column])}: "
                f"{int(wrong[row, column])} ({share:.0%})"
            )
    return "\n".join(lines)


def draw_neighbours(
    queries: np.ndarray,
    neighbours: np.ndarray,
    query_names: Sequence[str],
    neighbour_names: Sequence[Sequence[str]],
    picture: Path,
) -> None:
    """A row for each test image: itself, then its neighbours, framed green if of the same class.

    Shapes: queries (Q, S, S, 3), neighbours (Q, K, S, S, 3), uint8. Names are "" without labels.
    """
    num_rows, num_columns = len(queries), neighbours.shape[1] + 1
    figure = new_figure(1.2 * num_columns, 1.4 * num_rows)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
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
    grid[0, 0].set_ylabel("test image", fontsize=8)
    figure.savefig(picture, dpi=100)


def shorten(name: str) -> str:
    """A class name that fits."""
    return name if len(name) <= LONGEST else name[: LONGEST - 3] + "..."
