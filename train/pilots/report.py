"""The pilot's report, as HTML in one file and as text."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.pilots.look import Images
from train.pilots.trial import Standing, Verdict

SHOWN = 8  # curves and spectra


def describe(images: Images) -> list[str]:
    """What was seen of the images, a line for each thing."""
    formats = ", ".join(f"{count} {kind}" for kind, count in images.formats.items())
    sides = " / ".join(str(side) for side in images.sides.values())
    bad = "".join(f"; {count} x {reason}" for reason, count in images.reasons.items())
    return [
        f"{images.count} images, {images.classes or 'no'} classes; {images.read} read ({formats})",
        f"shorter side, percentiles 5 / 50 / 95: {sides} pixels",
        f"{images.bad} bad{bad}",
        f"{images.gray:.0%} gray, {images.blank:.0%} of nearly one colour; contrast "
        f"{images.contrast:.2f}",
        f"{images.duplicates:.1%} are copies: {len(images.exact)} groups of equal files, "
        f"{len(images.near)} pairs that look alike",
        f"channel means {images.mean}, deviations {images.std}",
    ]


def rows_of(untrained: dict | None, ranked: Sequence[Standing]) -> list[list[str]]:
    """The table of settings, best first, the untrained encoder last."""
    rows, named = [], [(str(each.trial.setting), each.judgement) for each in ranked]
    if untrained is not None:
        named.append(("untrained", untrained))
    for name, found in named:
        rank, knn = found.get("rank_z"), found.get("knn")
        state = "diverged" if "diverged" in found else "collapsed" if found["collapsed"] else ""
        row = [name, str(found["step"]), f"{found['score']:.1f}"]
        row += ["" if rank is None else f"{rank:.1f}", "" if knn is None else f"{knn:.1f}", state]
        rows.append(row)
    return rows


HEADERS = ("setting", "steps", "score", "rank of z", "kNN [%]", "")


def as_text(images: Images, verdict: Verdict, rows: list[list[str]], command: str | None) -> str:
    """The report for a terminal."""
    widths = [max(len(row[i]) for row in [list(HEADERS), *rows]) for i in range(len(HEADERS))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [list(HEADERS), *rows]
    ]
    lines = [*describe(images), "", *table, "", f"{verdict.name}: {verdict.evidence}"]
    return "\n".join([*lines, *([f"train with: {command}"] if command else [])]) + "\n"


def as_html(text: str, pictures: dict[str, bytes]) -> str:
    """The report as one file: pictures are embedded."""
    parts = ["<!doctype html><meta charset=utf-8><title>Pilot</title>"]
    parts.append("<style>body{font-family:sans-serif;max-width:60em;margin:2em auto}</style>")
    parts.append(f"<h1>Pilot</h1><pre>{html.escape(text)}</pre>")
    for title, data in pictures.items():
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        parts.append(f'<h2>{html.escape(title)}</h2><img src="{source}" style="max-width:100%">')
    return "\n".join(parts) + "\n"


def png(figure: Any) -> bytes:
    """A matplotlib Figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, dpi=110)
    return file.getvalue()


def draw_trials(untrained: dict, ranked: Sequence[Standing]) -> bytes:
    """Score, loss and collapse meter over steps, and the spectra, of the best and the worst."""
    from matplotlib.figure import Figure

    half = SHOWN // 2
    chosen = [*ranked[:half], *ranked[half:][-half:]]
    figure = Figure(figsize=(10, 8), layout="constrained")
    (scores, losses), (meters, spectra) = figure.subplots(2, 2)
    for each in chosen:
        known, label = each.trial.read(), str(each.trial.setting)
        points = [(0, untrained["score"]), *((j["step"], j["score"]) for j in known["judged"])]
        scores.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        curve = np.array(known["curve"]).reshape(-1, 3)
        losses.plot(curve[:, 0], curve[:, 1])
        meters.plot(curve[:, 0], curve[:, 2])
        values = each.judgement.get("spectrum") or []
        spectra.loglog([1 << i for i in range(len(values))], values)
    for axes, title in (
        (scores, "score"),
        (losses, "loss"),
        (meters, "std(z/|z|) sqrt(d)"),
        (spectra, "singular values of the features"),
    ):
        axes.set_title(title)
        axes.grid(alpha=0.3)
    scores.legend(fontsize=6)
    return png(figure)


def draw_views(views: np.ndarray) -> bytes:
    """Views that training would see, one image a column. Shapes: (V, N, S, S, 3) uint8."""
    from matplotlib.figure import Figure

    grid = np.concatenate([np.concatenate(list(view), axis=1) for view in views])
    figure = Figure(figsize=(10, 10 * grid.shape[0] / grid.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid)
    axes.set_axis_off()
    return png(figure)
