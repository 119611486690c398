"""The tables and pictures of profiling/throughput.py's and scaling.py's results.

A newcomer's mistake: computing here. What is shown is in the JSON line already.
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def print_tables(found: dict) -> None:
    """The tables for people, on stderr."""
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 110)
    table = Table(title=f"images/s (two views each), {found['environment']['device']}")
    for name in ("part", "variant", "p10", "p50", "p90", "n", "ours / this"):
        table.add_column(name, justify="left" if name in ("part", "variant") else "right")
    for part in ("loader", "step", "end_to_end"):
        for name, one in found.get(part, {}).items():
            if not isinstance(one, dict):
                continue
            if "not_measured" in one:
                table.add_row(part, name, "not measured:", one["not_measured"])
                continue
            cells = [f"{value:.2f}" for value in one["images_per_s"].values()]
            ratio = found["ratios"].get(f"{part}/{name}")
            table.add_row(part, name, *cells, str(one["n"]), "" if ratio is None else f"{ratio}")
        table.add_section()
    console.print(table)
    facts = Table(show_header=False)
    for stage, one in found.get("stages", {}).items():
        facts.add_row(f"loader, {stage}", f"{one['ms_per_image']} ms an image")
    for way, one in found.get("host", {}).items():
        if isinstance(one, dict):
            slowed = (
                f"{each['slowed_times']} times at {each['images_per_s_beside']} images/s"
                for each in one["launches"]
            )
            facts.add_row(
                f"loader without decoding, {way}",
                f"{one['images_per_cpu_s']} images a second of CPU time; launches slowed "
                f"{', '.join(slowed)}",
            )
    if "end_to_end" in found:
        facts.add_row("data wait", f"{found['end_to_end']['data_wait_pct']} %")
    for part in ("limit", "ranks", "memory"):
        for name, value in found.get(part, {}).items():
            text = f"{value:.5g}" if isinstance(value, float) else str(value)
            facts.add_row(f"{part}, {name}", text)
    overlap = found["ratios"].get("end_to_end/slower")
    if overlap is not None:
        facts.add_row("end to end / slower of loader and step", str(overlap))
    console.print(facts)


def draw(found: dict, path: Path) -> None:
    """Bars of images/s with the roofline, and where a step goes, as a PNG.

    Loader and step have an axis each, both from 0: they lie a hundred times apart on a CPU, and the
    height of a bar on a logarithmic axis says nothing.
    """
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    panels = {"loader": ("loader",), "training": ("step", "end_to_end")}
    bars = {
        panel: {
            f"{part}\n{name}": one["images_per_s"]["p50"]
            for part in parts
            for name, one in found.get(part, {}).items()
            if isinstance(one, dict) and "images_per_s" in one
        }
        for panel, parts in panels.items()
    }
    if not bars["training"] and "limit" not in found and bars["loader"]:
        del bars["training"]
    if not bars["loader"]:
        del bars["loader"]
    layout: list = [list(bars)] + ([["timeline"] * len(bars)] if found.get("timeline") else [])
    figure, axes = plt.subplot_mosaic(
        layout,
        figsize=(10, 6),
        width_ratios=[1 + len(values) for values in bars.values()],
        height_ratios=(3, 1)[: len(layout)],
        layout="constrained",
    )
    for panel, values in bars.items():
        colors = ["tab:blue" if name.endswith("ours") else "tab:gray" for name in values]
        drawn = axes[panel].bar(list(values), list(values.values()), color=colors)
        axes[panel].bar_label(drawn, fmt="{:.4g}", fontsize=8)
        axes[panel].set_ylabel("images/s, two views each")
        axes[panel].tick_params(axis="x", labelsize=7)
        axes[panel].set_title(panel, fontsize=9)
    if "limit" in found and "training" in bars:
        at = found["limit"]["images_per_s"]
        label = f"roofline of a step: {at}"
        axes["training"].axhline(at, color="tab:red", linestyle="--", label=label)
        axes["training"].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"{found['environment']['device']}, n = {found['n']}, medians")
    if "timeline" in axes:
        for number, part in enumerate(found["timeline"]):
            color, begin = f"C{number}", part["begin_ms"]
            axes["timeline"].barh(0, part["ms"], left=begin, color=color, label=part["name"])
        axes["timeline"].set_yticks([])
        axes["timeline"].set_xlabel("ms of one step, under the profiler")
        axes["timeline"].legend(fontsize=8, ncols=5, loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_scaling(found: dict, path: Path) -> None:
    """Predicted images/s a GPU, and the formula beside MLPerf and throttled links, as a PNG."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    figure, (rates, strong, links) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for number, (images, rows) in enumerate(found["images_per_gpu"].items()):
        ranks = [int(n) for n in rows]
        ends = [[one["images_per_s"][end] / int(n) for n, one in rows.items()] for end in (0, -1)]
        rates.fill_between(ranks, *ends, color=f"C{number}", alpha=0.3, linewidth=0)
        rates.plot(ranks, ends[0], color=f"C{number}", label=f"{images} images a GPU")
    rates.set(xscale="log", xlabel="GPUs", ylabel="images/s a GPU, two views each")
    rates.set_ylim(bottom=0)
    rates.set_title(f"predicted, {found['gpu']}", fontsize=9)
    gpus = found["mlperf"]["gpus"]
    for name, mark, label in (
        ("published", "o", "MLPerf, published"),
        ("predicted", "x-", "formula, fitted to 8 and 512 GPUs"),
        ("by_messages_alone", "--", "messages alone"),
    ):
        strong.plot([int(n) for n in gpus], [one[name] for one in gpus.values()], mark, label=label)
    for n, one in gpus.items():
        text = f"{one['images_per_gpu']} images"
        strong.annotate(text, (int(n), one["published"] + 150), fontsize=7)
    strong.set(xscale="log", xlabel="GPUs", ylabel="images/s a GPU, one view each", xlim=(5, 2e4))
    strong.set_ylim(bottom=0)
    strong.set_title("ResNet-50 on H100, fewer images a GPU on more", fontsize=9)
    for number, ranks in enumerate((2, 4)):
        rows = [r for r in found.get("hosts", {}).get("steps", []) if r["ranks"] == ranks]
        names = [str(r["mbit_per_s"] or "none") for r in rows]
        color = f"C{number}"
        links.plot(names, [r["step_s"] for r in rows], "o", color=color, label=f"{ranks} measured")
        links.plot(names, [r["predicted_s"] for r in rows], "x--", color=color, label="predicted")
    links.set(yscale="log", xlabel="Mbit/s of each host's link", ylabel="seconds a step")
    links.set_title("ResNet-18 of 32 channels, hosts on two cores", fontsize=9)
    for one in (rates, strong, links):
        one.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
