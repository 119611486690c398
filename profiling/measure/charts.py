"""The tables and pictures of the results of throughput.py, scaling.py and learning.py.

Nothing is computed here: what is shown is in the JSON line already.
"""

from collections.abc import Iterator
from pathlib import Path

from measure.results import print_table


def print_tables(result: dict) -> None:
    """The tables for people, on stderr."""
    columns = ("part", "variant", "p10", "p50", "p90", "n", "ours / this")
    title = f"images/s (two views each), {result['environment']['device']}"
    print_table(title, columns, rate_rows(result), align="ll")
    print_table("", (), fact_rows(result))


def rate_rows(result: dict) -> Iterator[tuple | None]:
    """A row for each variant; a line after each part."""
    for part in ("loader", "step", "end_to_end"):
        for name, row in result.get(part, {}).items():
            if not isinstance(row, dict):
                continue
            if "not_measured" in row:
                yield part, name, "not measured:", row["not_measured"]
                continue
            cells = (f"{value:.2f}" for value in row["images_per_s"].values())
            yield part, name, *cells, row["n"], result["ratios"].get(f"{part}/{name}")
        yield None


def fact_rows(result: dict) -> Iterator[tuple[str, str]]:
    """Name and value of what is no rate."""
    for stage, row in result.get("stages", {}).items():
        yield f"loader, {stage}", f"{row['ms_per_image']} ms an image"
    for where, row in result.get("host", {}).items():
        if isinstance(row, dict):
            slowed = ", ".join(
                f"{each['slowed_times']} times at {each['images_per_s_beside']} images/s"
                for each in row["launches"]
            )
            cost = f"{row['images_per_cpu_s']} images a second of CPU time"
            yield f"loader without decoding, {where}", f"{cost}; launches slowed {slowed}"
    if "end_to_end" in result:
        yield "data wait", f"{result['end_to_end']['data_wait_pct']} %"
    for part in ("limit", "ranks", "memory"):
        for name, value in result.get(part, {}).items():
            yield f"{part}, {name}", f"{value:.5g}" if isinstance(value, float) else str(value)
    if (overlap := result["ratios"].get("end_to_end/slower")) is not None:
        yield "end to end / slower of loader and step", str(overlap)


def draw(result: dict, path: Path) -> None:
    """Bars of images/s with the roofline, and where a step's time is spent, as a PNG.

    Loader and step have an axis each, both from 0: on a CPU they differ a hundredfold, and on a
    logarithmic axis the height of a bar means nothing.
    """
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    bars = {
        panel: {
            f"{part}\n{name}": row["images_per_s"]["p50"]
            for part in parts
            for name, row in result.get(part, {}).items()
            if isinstance(row, dict) and "images_per_s" in row
        }
        for panel, parts in {"loader": ("loader",), "training": ("step", "end_to_end")}.items()
    }
    if not bars["training"] and "limit" not in result and bars["loader"]:
        del bars["training"]
    if not bars["loader"]:
        del bars["loader"]
    layout: list = [list(bars)] + ([["timeline"] * len(bars)] if result.get("timeline") else [])
    figure, axes = plt.subplot_mosaic(
        layout,
        figsize=(10, 6),
        width_ratios=[1 + len(values) for values in bars.values()],
        height_ratios=(3, 1)[: len(layout)],
        layout="constrained",
    )
    for panel, values in bars.items():
        axis = axes[panel]
        colors = ["tab:blue" if name.endswith("ours") else "tab:gray" for name in values]
        drawn = axis.bar(list(values), list(values.values()), color=colors)
        axis.bar_label(drawn, fmt="{:.4g}", fontsize=8)
        axis.set_ylabel("images/s, two views each")
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(panel, fontsize=9)
    if "limit" in result and "training" in bars:
        rate = result["limit"]["images_per_s"]
        label = f"roofline of a step: {rate}"
        axes["training"].axhline(rate, color="tab:red", linestyle="--", label=label)
        axes["training"].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{result['environment']['device']}, n = {result['n']}, medians")
    if "timeline" in axes:
        axis = axes["timeline"]
        for number, part in enumerate(result["timeline"]):
            place = {"left": part["begin_ms"], "color": f"C{number}", "label": part["name"]}
            axis.barh(0, part["ms"], **place)
        axis.set(yticks=[], xlabel="ms of one step, under the profiler")
        axis.legend(fontsize=8, ncols=5, loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_scaling(result: dict, path: Path) -> None:
    """Predicted images/s a GPU, and the formula beside MLPerf and throttled links, as a PNG."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figure, (rates, strong, links) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for number, (images, rows) in enumerate(result["images_per_gpu"].items()):
        ranks = [int(n) for n in rows]
        ends = [[row["images_per_s"][end] / int(n) for n, row in rows.items()] for end in (0, -1)]
        rates.fill_between(ranks, *ends, color=f"C{number}", alpha=0.3, linewidth=0)
        rates.plot(ranks, ends[0], color=f"C{number}", label=f"{images} images a GPU")
    rates.set(xscale="log", xlabel="GPUs", ylabel="images/s a GPU, two views each")
    rates.set_title(f"predicted, {result['gpu']}", fontsize=9)
    gpus = {int(n): row for n, row in result["mlperf"]["gpus"].items()}
    for name, mark, label in (
        ("published", "o", "MLPerf, published"),
        ("predicted", "x-", "formula, fitted to 8 and 512 GPUs"),
        ("by_messages_alone", "--", "messages alone"),
    ):
        strong.plot(list(gpus), [row[name] for row in gpus.values()], mark, label=label)
    for n, row in gpus.items():
        text = f"{row['images_per_gpu']} images"
        strong.annotate(text, (n, row["published"] + 150), fontsize=7)
    strong.set(xscale="log", xlabel="GPUs", ylabel="images/s a GPU, one view each", xlim=(5, 2e4))
    strong.set_title("ResNet-50 on H100, fewer images a GPU on more", fontsize=9)
    for axis in (rates, strong):
        axis.set_ylim(bottom=0)
    for number, ranks in enumerate((2, 4)):
        rows = [r for r in result.get("hosts", {}).get("steps", []) if r["ranks"] == ranks]
        names = [str(r["mbit_per_s"] or "none") for r in rows]
        for key, mark, label in (("step_s", "o", "measured"), ("predicted_s", "x--", "predicted")):
            seconds, label = [r[key] for r in rows], f"{ranks} ranks, {label}"
            links.plot(names, seconds, mark, color=f"C{number}", label=label)
    links.set(yscale="log", xlabel="Mbit/s of each host's link", ylabel="seconds a step")
    links.set_title("ResNet-18 of 32 channels, hosts on two cores", fontsize=9)
    for axis in (rates, strong, links):
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_learning(result: dict, path: Path) -> None:
    """kNN top-1 over epochs and over hours of training: the mean over seeds, the range as a band.

    Of runs of different length only what all of a program have is drawn.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    plt.switch_backend("agg")
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for name, program in result["programs"].items():
        curves = [run["knn"] for run in program["runs"] if run["knn"]]
        if not curves:
            continue
        points = np.array([curve[: min(map(len, curves))] for curve in curves])
        knn = points[..., 2]
        for axis, column in zip(panels, (0, 1), strict=True):
            x = points[..., column].mean(0)
            (line,) = axis.plot(x, knn.mean(0), "o-", markersize=3, label=f"{name}, n = {len(knn)}")
            axis.fill_between(x, knn.min(0), knn.max(0), color=line.get_color(), alpha=0.2)
    panels[0].set(xlabel="epoch", ylabel="kNN top-1 [%]")
    panels[1].set(xlabel="hours of training")
    for axis in panels:
        axis.grid(alpha=0.3)
        if axis.lines:  # none before the first turn has ended
            axis.legend(fontsize=8, loc="lower right")
    width = result["config"]["model"]["width"]
    network = f"{result['config']['model']['arch']} of {width} channels"
    device = f"{result['environment']['cores']} cores of {result['environment']['device']}"
    figure.suptitle(f"{network}, {result['images']} images, {device}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
