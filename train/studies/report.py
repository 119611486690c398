"""A study's table and figure from its runs: mean and spread over seeds beside the paper's number.

A newcomer's mistake: taking every difference for one. Two variants count as different where their
ranges over seeds do not overlap; of two equal ones three seeds each part in one case of ten.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from train.run.folder import read_metrics
from train.studies.runs import Run
from train.studies.variants import Outcome, Row, Study

LABELS = {
    "train/loss": "loss",
    "train/z_std": "std(z/|z|) sqrt(d)",
    "eval/knn_top1": "kNN top-1 [%]",
}
WORDS = {
    "learns": "learns", "fails": "does not learn", "collapse": "collapses", "worse": "worse",
    "same": "the same", "better": "better", "mixed": "collapses with some seeds",
}  # fmt: skip


def summarize(
    study: Study, runs: Mapping[str, Sequence[Run]], *, reasons: Mapping[str, str],
    failed: Mapping[Run, str],
) -> dict:  # fmt: skip
    """What the study found, for its JSON file, its table and its figure.

    reasons: why variants were left out; failed: why runs were.
    """
    rows = []
    for row in study.rows:
        found = summarize_row(row, runs.get(row.name, ()))
        errors = [failed[run] for run in runs.get(row.name, ()) if run in failed]
        if row.name in reasons:
            found["left_out"] = reasons[row.name]
        if errors:
            found["failed"] = errors
        found["outcome"] = outcome(found, rows[0] if rows else None)
        found["verdict"] = verdict(row.outcome, found["outcome"])
        rows.append(found)
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
    found = {run: result for run in runs if (result := run.result()) is not None}
    results = list(found.values())
    return {
        "name": row.name,
        "label": row.label,
        "flags": row.flags,
        "paper": row.paper,
        "paper_outcome": row.outcome,
        "paper_says": row.says,
        "n": len(found),
        "collapsed": sum(bool(result["collapsed"]) for result in results),
        "collapse_threshold": next((result["collapse_threshold"] for result in results), None),
        **{
            key: spread([result[key] for result in results])
            for key in ("knn_top1", "knn_top1_untrained", "loss", "z_std", "train_s")
        },
        "runs": [
            {
                "seed": run.seed,
                **{key: result[key] for key in ("knn_top1", "knn_top1_untrained", "loss", "z_std")},
                "revision": str(run.read("env.json").get("revision")),
                "curves": read_curves(run.folder / "metrics.jsonl"),
            }
            for run, result in found.items()
        ],
    }


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, least and largest; None where there is nothing to tell."""
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
    """What happened in a row; None where that cannot be said.

    A collapse is one of all runs by the meter. Otherwise kNN counts: of the first row against the
    untrained encoder's, of the others against the first row's.
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


def verdict(paper: Outcome | None, here: str | None) -> str:
    """Whether it is as in the paper."""
    if paper is None or here is None:
        return ""
    if paper == here:
        return "yes"
    return "within the spread" if here == "same" else "no"


def markdown(found: dict) -> str:
    """The table of a study."""
    reference = found["rows"][0]
    lines = [
        "| | paper: top-1 | | here: kNN top-1 [%] | loss | std(z/\\|z\\|) sqrt(d) | | as there |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if (untrained := reference["knn_top1_untrained"]) is not None:
        lines.append(f"| untrained encoder | | | {cell(untrained, 1)} | | | | |")
    for row in found["rows"]:
        paper = "" if row["paper"] is None else f"{row['paper']:.1f}"
        label, says = (row[key].replace("|", r"\|") for key in ("label", "paper_says"))
        start = f"| {label} | {paper} | {says} |"
        if "left_out" in row:
            lines.append(f"{start} left out: {row['left_out']} | | | | |")
            continue
        here = WORDS.get(row["outcome"] or "", "")
        if row["n"] < found["n"]:
            here += f" (n = {row['n']})"
        if "failed" in row:
            here += f" ({len(row['failed'])} failed)"
        cells = cell(row["knn_top1"], 1), cell(row["loss"], 3), cell(row["z_std"], 2)
        lines.append(f"{start} {' | '.join(cells)} | {here.strip()} | {row['verdict']} |")
    if len(levels := thresholds(found)) > 1:
        words = [f"below {level:.2f} for {', '.join(names)}" for level, names in levels.items()]
        lines.append(f"\nA run collapses where the std is {'; '.join(words)}.")
    lines += [
        f"\nOtherwise than in the paper: {row['label']} ({WORDS[row['outcome']]} here, "
        f"{WORDS[row['paper_outcome']]} there)."
        for row in found["rows"]
        if row["verdict"] == "no"
    ]
    return "\n".join(lines) + "\n"


def thresholds(found: dict) -> dict[float, list[str]]:
    """Below which value of the collapse meter which rows count as collapsed."""
    levels: dict[float, list[str]] = {}
    for row in found["rows"]:
        if row["n"]:
            levels.setdefault(row["collapse_threshold"], []).append(row["label"])
    return levels


def otherwise(found: dict) -> list[str]:
    """The variants whose outcome is not the paper's."""
    return [row["name"] for row in found["rows"] if row["verdict"] == "no"]


def cell(value: dict[str, float] | None, digits: int) -> str:
    """Mean and range."""
    if value is None:
        return ""
    mean, low, high = (f"{value[key]:.{digits}f}" for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} to {high})"


def draw(found: dict, picture: Path) -> None:
    """The curves of all rows over epochs: the mean over seeds, and the range as a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = found["panels"]
    figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    row_of_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, tag in zip(row_of_axes, panels, strict=True):
        for number, row in enumerate(found["rows"]):
            points = [run["curves"][tag] for run in row["runs"] if run["curves"][tag]]
            if not points:
                continue
            epochs = [epoch for epoch, _ in points[0]]
            values = [[value for _, value in at] for at in zip(*points, strict=True)]
            means, color = [sum(at) / len(at) for at in values], f"C{number}"
            axes.plot(epochs, means, color=color, label=row["label"])
            axes.fill_between(
                epochs, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel(LABELS[tag])
        axes.grid(alpha=0.3)
        if tag == "train/z_std":
            for level in thresholds(found):
                axes.axhline(level, linestyle=":", color="gray")
            axes.set_ylim(bottom=0)
    handles, labels = row_of_axes[-1].get_legend_handles_labels()
    # below the panels: inside, it hid the bands of the runs that it names
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"{found['title']}, n = {found['n']}", fontsize=10)
    figure.savefig(picture, dpi=110)
