"""The end of a run: result.json, curves as a PNG, and the table of results.

A collapsed run has the best loss: the collapse meter and kNN are shown beside it.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipeline.loader import eval_loader
from pipeline.sources.reader import ImageReader
from train.config import Config
from train.distributed import World, from_main
from train.methods import MethodSpec
from train.run.folder import RunWriter, read_metrics
from train.run.optim import Schedule
from train.run.state import TrainState, comparable

HEALTH = ("rank_features", "rank_z", "rank_limit", "decay_features", "partially_collapsed")
HEALTH += ("spectrum_features", "spectrum_z")  # of evaluation/health.measure_health
COLLAPSED = 0.1  # of the meter in evaluation mode: below it a run counts as collapsed


def finish(
    config: Config,
    world: World,
    current: TrainState,
    schedule: Schedule,
    run: RunWriter,
    *,
    ended: str,
) -> dict:
    """Write the end of a run on rank 0, log how to continue it; returns the result.

    images_per_s counts training steps alone.
    """
    steps = sorted(int(step) for step in current.knn)
    loss, z_std = (finite(current.last.get(f"train/{name}")) for name in ("loss", "z_std"))
    newest = steps[-1] if steps else 0
    threshold, train_s = collapse_threshold(config, world.size), current.train_s
    images = current.step * config.data.batch_size
    result = {
        "knn_top1": current.knn[str(newest)] if newest else None,
        "knn_step": newest or None,
        "knn_top1_untrained": None if config.init else current.knn.get("0"),
        "loss": loss,
        "z_std": z_std,
        "collapsed": None if z_std is None else z_std < threshold,
        "collapse_threshold": threshold,
        "method": config.method.name,
        "stop_gradient": config.method.stop_gradient,
        "views": len(config.views),
        "images_per_s": images / train_s if train_s else None,
        "data_wait_pct": 100 * current.wait_s / train_s if train_s else None,
        "train_s": train_s,
        "steps": current.step,
        "batch_size": config.data.batch_size,
        "bad_images": int(current.last.get("data/bad_samples", 0)),
        **{name: current.health.get(name) for name in HEALTH},
        "knn_by_step": {step: current.knn[str(step)] for step in steps},
        "state": ended,
        "run": str(run.folder.path) if run.folder is not None else "",
    }
    if run.folder is not None:
        folder, method = run.folder, config.method.spec
        run.metrics.hyper_parameters(comparable(config), result)
        run.metrics.close()
        try:
            draw_curves(folder.path, threshold=threshold, method=method)
        except OSError as error:
            run.log.warn(f"curves.png was not drawn: {error}. metrics.jsonl has the values")
        folder.write("result.json", result)
        folder.status(ended, current.step)
        if ended == "preempted":
            run.log(
                f"stopped at step {current.step} of {schedule.last}; the checkpoint is in "
                f"{folder.checkpoints}. The same command continues from it: {folder.command()}"
            )
        print_table(result, method)
    return from_main(world, result)  # the others wait until all is written


def finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON does not have: a skipped step among the last ones."""
    return value if value is not None and math.isfinite(value) else None


def thumbnails(
    reader: ImageReader, ids: Tensor, *, config: Config, device: torch.device, side: int = 32
) -> Tensor:
    """(N, side, side, 3) uint8 pictures of the samples."""
    sizes: dict = {"resize": side, "size": side, "batch_size": 256}
    loader = eval_loader(reader, ids.cpu().numpy(), **sizes, options=config.dali, device=device)
    return torch.cat([batch.images for batch in loader])


def collapse_threshold(config: Config, num_ranks: int) -> float:
    """The value of std(z/|z|) * sqrt(d) below which a run counts as collapsed.

    1 is features spread over the sphere. 0 cannot be reached where the projector ends in batch
    norm: it keeps the mean over the batch at 0, so that in a collapsed batch of N images all but k
    outliers share one direction and the meter reads 2 sqrt(k / N). Seen on the digits without
    stop-gradient, N = 64: 0.250 = 2 / sqrt(64) at the end, 0.25 to 0.45 before; with it 0.98.
    Without batch norm at its end 0 is reached, and a mean that all images share keeps the meter of
    a healthy run well below 1.
    """
    if not config.method.spec.ends_in_norm(config.model):
        return 0.1
    rows = config.data.batch_size // num_ranks
    return min(0.5, max(0.1, 4 / rows**0.5))


def draw_curves(folder: Path, *, threshold: float, method: MethodSpec) -> None:
    """curves.png from metrics.jsonl: loss, collapse meter, rank and kNN over steps; spectra."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, least = read_metrics(folder / "metrics.jsonl"), method.least_loss
    figure = Figure(figsize=(7, 11), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        (("train/loss",), "loss" + (f" ({least:g} is the least)" if least is not None else "")),
        (("train/z_std",), "std(z/|z|) * sqrt(d)"),
        (("eval/rank_features", "eval/rank_z"), "effective rank"),
        (("eval/knn_top1",), "kNN top-1 [%]"),
    )
    *over_steps, last = figure.subplots(len(panels) + 1)
    for axes, (tags, label) in zip(over_steps, panels, strict=True):
        for tag in tags:
            points = [(row["step"], row[tag]) for row in rows if row.get(tag) is not None]
            steps, values = zip(*points, strict=True) if points else ((), ())
            marker = "o" if len(points) < 30 else None
            axes.plot(steps, values, marker=marker, markersize=3, label=tag.split("_")[-1])
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.sharex(over_steps[0])
        if tags == ("train/z_std",):
            axes.axhline(threshold, linestyle=":", color="tab:red")
            axes.set_ylim(bottom=0)
        if len(tags) > 1:
            axes.legend()
    over_steps[-1].set_xlabel("step")
    measured = [row for row in rows if row.get("eval/spectrum_z")]
    plot_spectra(last, {f"step {row['step']}": row for row in measured[:1] + measured[1:][-1:]})
    figure.savefig(folder / "curves.png", dpi=120)


def plot_spectra(axes: Any, rows: dict[str, dict]) -> None:
    """Singular values of the features (dashed) and of z against their number, by label."""
    for color, (label, row) in enumerate(rows.items()):
        for name, style in ("features", "--"), ("z", "-"):
            values = row[f"eval/spectrum_{name}"]
            numbers = [1 << i for i in range(len(values))]
            axes.loglog(numbers, values, style, color=f"C{color}", label=f"{name}, {label}")
    axes.set_xlabel("number of the direction")
    axes.set_ylabel("singular value / largest")
    axes.set_ylim(bottom=1e-4)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend()


def spectra_figure(row: dict) -> Any:
    """The spectra of one measurement, for TensorBoard."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    plot_spectra(figure.subplots(), {f"step {row['step']}": row})
    return figure


def print_on_stderr(content: Table | str) -> None:
    """A table as wide as the terminal where there is one, or a line."""
    width = None if sys.stderr.isatty() else 100
    console = Console(file=sys.stderr, width=width, markup=False)  # a path may have brackets
    console.print(content, soft_wrap=isinstance(content, str))


def print_table(result: dict, method: MethodSpec) -> None:
    """The results for people, on stderr; the JSON line on stdout is for programs."""
    table = Table("", title=f"{method.title} run")
    table.add_column("result", justify="right")
    for key, label, form in (
        ("knn_top1_untrained", "kNN top-1, untrained encoder", "{:.1f} %"),
        ("knn_top1", f"kNN top-1 after {result['knn_step'] or result['steps']} steps", "{:.1f} %"),
        ("rank_features", "effective rank of the features", "{:.1f}"),
        ("rank_z", f"effective rank of z, at most {result['rank_limit'] or 'its size'}", "{:.1f}"),
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
    print_on_stderr(table)
    if result["collapsed"]:
        threshold = result["collapse_threshold"]
        print_on_stderr(collapse_advice(result["z_std"], threshold=threshold, method=method))


def print_evaluation(result: dict, method: MethodSpec) -> None:
    """The results of train/evaluate.py for people, on stderr."""
    table = Table(title=f"Encoder after step {result['step']}")
    for name in ("", "top-1", "top-5"):
        table.add_column(name, justify="right" if name else "left")
    rows = [(f"kNN, k = {k}", accuracy) for k, accuracy in result["knn"].items()]
    if (fast := result["fast_probe"]) is not None:
        rows.append((f"fast probe on cached features, learning rate {fast['lr']}", fast))
    for few in result["few_labels"]:
        label = f"fast probe, {100 * few['fraction']:g} % of the labels ({few['labels']})"
        rows.append((f"{label}, {few['draws']} draws", few))
    if (linear := result["linear_probe"]) is not None:
        rows += [
            (f"linear probe (LARS, {linear['epochs']} epochs), learning rate {lr}", accuracy)
            for lr, accuracy in linear["by_lr"].items()
        ]
    for label, accuracy in rows:
        top5 = "needs 5 classes" if accuracy["top5"] is None else percent(accuracy["top5"])
        table.add_row(label, percent(accuracy["top1"]), top5)
    for key, label in (
        ("rankme", "RankMe of the projector's outputs (the paper's)"),
        ("rankme_features", "RankMe of the backbone's features"),
        ("collapse_meter", "collapse meter std(z/|z|) * sqrt(d)"),
    ):
        value = result[key]
        table.add_row(label, "no projector" if value is None else f"{value:.3g}", "")
    print_on_stderr(table)
    if result["collapsed"]:
        meter = result["collapse_meter"]
        print_on_stderr(collapse_advice(meter, threshold=COLLAPSED, method=method))
    print_on_stderr(f"pictures and evaluation.json: {result['out']}")


def percent(value: float | dict) -> str:
    """A percentage; of several draws their mean and standard deviation."""
    if not isinstance(value, dict):
        return f"{value:.2f} %"
    std = "" if value["std"] is None else f" +- {value['std']:.2f}"
    return f"{value['mean']:.2f}{std} %"


def collapse_advice(z_std: float, *, threshold: float, method: MethodSpec) -> str:
    """One line that says what happened and what to change."""
    remedy = method.collapse_remedy or (
        "lower --optim.lr, and leave batch norm in the projector (--model.head_norm default)"
    )
    return (
        f"COLLAPSED: std(z/|z|) * sqrt(d) is {z_std:.3f}, below {threshold:.2f}: nearly all images "
        f"get one representation, and a low loss is not good here. Remedy: {remedy}."
    )
