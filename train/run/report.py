"""The end of a run: curves as a PNG, and the table of results.

A newcomer's mistake: expecting the loss curve to tell whether training works. A collapsed run has
the best loss; that is why the collapse meter and kNN stand beside it.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from train.methods import MethodSpec
from train.run.metrics import read_metrics

COLLAPSED = 0.1  # of the meter in evaluation mode: below it a run counts as collapsed


def collapse_threshold(batch_per_rank: int, *, ends_in_norm: bool = True) -> float:
    """The value of std(z/|z|) * sqrt(d) below which a run counts as collapsed.

    1 is features spread over the sphere. 0 cannot be reached where the projector ends in batch
    norm: it keeps the mean over the batch at 0, so that in a collapsed batch of N images all but k
    outliers share one direction and the meter reads 2 sqrt(k / N). Seen on the digits without
    stop-gradient, N = 64: 0.250 = 2 / sqrt(64) at the end, 0.25 to 0.45 on the way; with it 0.98.
    Without batch norm there 0 is reached, and a mean that all images share keeps the meter of a
    healthy run well below 1.
    """
    if not ends_in_norm:
        return 0.1
    return min(0.5, max(0.1, 4 / batch_per_rank**0.5))


def draw_curves(metrics: Path, picture: Path, *, threshold: float, method: MethodSpec) -> None:
    """Loss, collapse meter and kNN over steps, one above the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, least = read_metrics(metrics), method.least_loss
    figure = Figure(figsize=(7, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("train/loss", "loss" + (f" ({least:g} is the least)" if least is not None else "")),
        ("train/z_std", "std(z/|z|) * sqrt(d)"),
        ("eval/knn_top1", "kNN top-1 [%]"),
    )
    rows_of_axes = figure.subplots(len(panels), sharex=True)
    for axes, (tag, label) in zip(rows_of_axes, panels, strict=True):
        points = [(row["step"], row[tag]) for row in rows if tag in row]
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, values, marker="o" if len(points) < 30 else None, markersize=3)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if tag == "train/z_std":
            axes.axhline(threshold, linestyle=":", color="tab:red")
            axes.set_ylim(bottom=0)
    rows_of_axes[-1].set_xlabel("step")
    figure.savefig(picture, dpi=120)


def stderr_console() -> Console:
    """The terminal's width where there is one."""
    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else 100)


def print_table(result: dict, method: MethodSpec) -> None:
    """The results for people, on stderr; the JSON line on stdout is for programs."""
    table = Table(title=f"{method.title} run")
    table.add_column("")
    table.add_column("result", justify="right")
    for key, label, form in (
        ("knn_top1_untrained", "kNN top-1, untrained encoder", "{:.1f} %"),
        ("knn_top1", f"kNN top-1 after {result['knn_step'] or result['steps']} steps", "{:.1f} %"),
        ("loss", "loss", "{:.4f}"),
        ("z_std", "std(z/|z|) * sqrt(d)", "{:.3f}"),
        ("images_per_s", f"images/s ({result['views']} views each)", "{:.1f}"),
        ("data_wait_pct", "waiting for data", "{:.1f} %"),
        ("steps", "steps", "{}"),
        ("bad_images", "unreadable images, replaced", "{}"),
        ("run", "run folder", "{}"),
    ):
        value = result[key]
        table.add_row(label, "not measured" if value is None else form.format(value))
    console = stderr_console()
    console.print(table)
    if result["collapsed"]:
        advice = collapse_advice(
            result["z_std"], threshold=result["collapse_threshold"], method=method
        )
        console.print(advice, soft_wrap=True)


def print_evaluation(result: dict, method: MethodSpec) -> None:
    """The results of train/evaluate.py for people, on stderr."""
    table = Table(title=f"Encoder after step {result['step']}")
    for name in ("", "top-1", "top-5"):
        table.add_column(name, justify="right" if name else "left")
    rows = [(f"kNN, k = {k}", found) for k, found in result["knn"].items()]
    if (fast := result["fast_probe"]) is not None:
        rows.append((f"fast probe on cached features, learning rate {fast['lr']}", fast))
    if (linear := result["linear_probe"]) is not None:
        rows += [
            (f"linear probe (LARS, {linear['epochs']} epochs), learning rate {lr}", found)
            for lr, found in linear["by_lr"].items()
        ]
    for label, found in rows:
        top5 = "needs 5 classes" if found["top5"] is None else f"{found['top5']:.2f} %"
        table.add_row(label, f"{found['top1']:.2f} %", top5)
    for key, label in (
        ("rankme", "RankMe of the projector's outputs (the paper's)"),
        ("rankme_features", "RankMe of the backbone's features"),
        ("collapse_meter", "collapse meter std(z/|z|) * sqrt(d)"),
    ):
        value = result[key]
        table.add_row(label, "no projector" if value is None else f"{value:.3g}", "")
    console = stderr_console()
    console.print(table)
    if result["collapsed"]:
        advice = collapse_advice(result["collapse_meter"], threshold=COLLAPSED, method=method)
        console.print(advice, soft_wrap=True)
    console.print(f"pictures and evaluation.json: {result['out']}", soft_wrap=True)


def collapse_advice(z_std: float, *, threshold: float, method: MethodSpec) -> str:
    """One line that says what happened and what to change."""
    cause = (
        f"expected with --{method.collapses_by} false; set it to true"
        if method.collapses_by is not None
        else "lower --optim.lr for this batch size, check the augmentations, keep batch norm in "
        "the projector"
    )
    return (
        f"COLLAPSED: std(z/|z|) * sqrt(d) is {z_std:.3f}, below {threshold:.2f}: nearly all images "
        f"get one representation, and a low loss is not good here. Remedy: {cause}."
    )
