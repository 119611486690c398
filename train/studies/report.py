"""A study's table and figure from its runs: mean and range over seeds beside the paper's number.

Two variants count as different if their ranges over seeds do not overlap; of two equal ones, three
seeds each part in one case of ten.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.run.folder import read_metrics
from train.studies.runs import Run
from train.studies.variants import Outcome, Row, Study

LABELS = {
    "train/loss": "loss",
    "train/z_std": "std(z/|z|) sqrt(d)",
    "eval/knn_top1": "kNN top-1 [%]",
}
WORDS = {"learns": "learns", "fails": "does not learn", "collapse": "collapses", "worse": "worse"}
WORDS |= {"same": "the same", "better": "better", "mixed": "collapses with some seeds"}
FIGURES = ("knn_top1", "knn_top1_untrained", "loss", "z_std")


def summarize(
    study: Study, runs: dict[str, list[Run]], *, reasons: dict[str, str], failed: dict[Run, str]
) -> dict:
    """The content of a study's JSON file, for its table and its figure.

    reasons: why variants were left out; failed: why runs were.
    """
    rows: list[dict] = []
    reference: dict | None = None
    for row in study.rows:
        of_row = runs.get(row.name, [])
        summary = summarize_row(row, of_row)
        if row.name in reasons:
            summary["left_out"] = reasons[row.name]
        if errors := [failed[run] for run in of_row if run in failed]:
            summary["failed"] = errors
        reference = None if row.is_reference else reference
        summary["outcome"] = outcome(summary, reference)
        reference = reference or summary
        summary["verdict"] = verdict(row.outcome, summary["outcome"])
        rows.append(summary)
    return {
        "study": study.name,
        "title": study.title,
        "source": study.source,
        "n": max(row["n"] for row in rows),
        "revisions": sorted({run["revision"] for row in rows for run in row["runs"]}),
        "panels": study.panels,
        "rows": rows,
    }


def summarize_row(row: Row, runs: Sequence[Run]) -> dict:
    """The finished runs of a variant."""
    results = {run: result for run in runs if (result := run.result()) is not None}
    values = list(results.values())
    summary: dict = {"name": row.name, "label": row.label, "flags": row.flags, "paper": row.paper}
    summary |= {"paper_outcome": row.outcome, "paper_says": row.says, "n": len(results)}
    summary["collapsed"] = sum(bool(result["collapsed"]) for result in values)
    summary["collapse_threshold"] = values[0]["collapse_threshold"] if values else None
    for key in *FIGURES, "train_s":
        summary[key] = spread([result[key] for result in values])
    summary["runs"] = [
        {"seed": run.seed}
        | {key: result[key] for key in FIGURES}
        | {"revision": str(run.read("env.json").get("revision"))}
        | {"curves": read_curves(run.folder / "metrics.jsonl")}
        for run, result in results.items()
    ]
    return summary


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, least and largest; None without values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}


def read_curves(metrics: Path) -> dict[str, list[list[float]]]:
    """[epoch, value] points by tag."""
    rows = read_metrics(metrics)
    return {
        tag: [[round(row["epoch"], 3), round(row[tag], 4)] for row in rows if tag in row]
        for tag in LABELS
    }


def outcome(row: dict, reference: dict | None) -> Outcome | str | None:
    """The outcome of a row; None if the runs cannot show it.

    A row collapses if all its runs do by the meter. Otherwise kNN decides: without a reference the
    row is compared with the untrained encoder, else with that row.
    """
    if not row["n"] or row["knn_top1"] is None:
        return None
    if row["collapsed"]:
        return "collapse" if row["collapsed"] == row["n"] else "mixed"
    if reference is None:
        gains = [run["knn_top1"] - run["knn_top1_untrained"] for run in row["runs"]]
        return "learns" if min(gains) > 0 else "fails"
    other = reference["knn_top1"]
    if other is None or min(row["n"], reference["n"]) < 2:
        return None
    if row["knn_top1"]["max"] < other["min"]:
        return "worse"
    return "better" if row["knn_top1"]["min"] > other["max"] else "same"


def verdict(paper: Outcome | None, ours: str | None) -> str:
    """Whether the outcome is the paper's."""
    if paper is None or ours is None:
        return ""
    return "yes" if paper == ours else "within the spread" if ours == "same" else "no"


def markdown(summary: dict) -> str:
    """The table of a study."""
    lines = [
        "| | paper: top-1 | | ours: kNN top-1 [%] | loss | std(z/\\|z\\|) sqrt(d) | "
        "| as in the paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if (untrained := summary["rows"][0]["knn_top1_untrained"]) is not None:
        lines.append(f"| untrained encoder | | | {cell(untrained, 1)} | | | | |")
    for row in summary["rows"]:
        paper = "" if row["paper"] is None else f"{row['paper']:.1f}"
        label, says = (row[key].replace("|", r"\|") for key in ("label", "paper_says"))
        start = f"| {label} | {paper} | {says} |"
        if "left_out" in row:
            lines.append(f"{start} left out: {row['left_out']} | | | | |")
            continue
        ours = WORDS.get(row["outcome"] or "", "")
        ours += f" (n = {row['n']})" if row["n"] < summary["n"] else ""
        ours += f" ({len(row['failed'])} failed)" if "failed" in row else ""
        cells = cell(row["knn_top1"], 1), cell(row["loss"], 3), cell(row["z_std"], 2)
        lines.append(f"{start} {' | '.join(cells)} | {ours.strip()} | {row['verdict']} |")
    if len(levels := thresholds(summary)) > 1:
        words = [f"below {level:.2f} for {', '.join(names)}" for level, names in levels.items()]
        lines.append(f"\nA run collapses where the std is {'; '.join(words)}.")
    for row in unlike_paper(summary):
        ours, paper = WORDS[row["outcome"]], WORDS[row["paper_outcome"]]
        lines.append(f"\nUnlike the paper: {row['label']} ({ours}; in the paper {paper}).")
    return "\n".join(lines) + "\n"


def thresholds(summary: dict) -> dict[float, list[str]]:
    """The rows by the value of the collapse meter below which they count as collapsed."""
    levels: dict[float, list[str]] = {}
    for row in summary["rows"]:
        if row["n"]:
            levels.setdefault(row["collapse_threshold"], []).append(row["label"])
    return levels


def unlike_paper(summary: dict) -> list[dict]:
    """The rows whose outcome is not the paper's."""
    return [row for row in summary["rows"] if row["verdict"] == "no"]


def cell(value: dict[str, float] | None, digits: int) -> str:
    """Mean and range."""
    if value is None:
        return ""
    mean, low, high = (f"{value[key]:.{digits}f}" for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} to {high})"


def draw(summary: dict, picture: Path) -> None:
    """The curves of all rows over epochs: the mean over seeds, and the range as a band."""
    from matplotlib.figure import Figure

    panels = summary["panels"]
    figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained")
    row_of_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, tag in zip(row_of_axes, panels, strict=True):
        for number, row in enumerate(summary["rows"]):
            if points := [run["curves"][tag] for run in row["runs"] if run["curves"][tag]]:
                epochs, values = np.moveaxis(np.array(points), 2, 0)  # (runs, points) each
                color = f"C{number}"
                axes.plot(epochs[0], values.mean(0), color=color, label=row["label"])
                low, high = values.min(0), values.max(0)
                axes.fill_between(epochs[0], low, high, color=color, alpha=0.2)
        axes.set(xlabel="epoch", ylabel=LABELS[tag])
        axes.grid(alpha=0.3)
        if tag == "train/z_std":
            for level in thresholds(summary):
                axes.axhline(level, linestyle=":", color="gray")
            axes.set_ylim(bottom=0)
    handles, labels = row_of_axes[-1].get_legend_handles_labels()
    # below the panels: inside, it would hide the bands of the runs
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"{summary['title']}, n = {summary['n']}", fontsize=10)
    figure.savefig(picture, dpi=110)
