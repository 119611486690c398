"""Kernels of a training step by torch.profiler, beside those that profiling/compiled.py counts.

    python profiling/launches.py                     compiled ResNet-50, 256 images, random views
    python profiling/launches.py --compile false     eager

For each group (ours, Inductor's, libraries, torch's own, copies, collectives) the launches and
milliseconds of one step, in the compiled graphs (forward and backward) and outside of them
(normalisation, optimizer). They do not add up to a step: streams overlap, and between kernels the
GPU waits. The profiler has no count of bytes: GB/s are the counted bytes over its durations, for
each of our kernels and for the library's and Inductor's as a whole. Not yet run on a GPU; a test
feeds a constructed trace.
"""

import root_first  # isort: skip # noqa: F401

import re
from collections import defaultdict

from measure.harness import read_flags
from measure.kernel_checks import jit_functions
from measure.results import errors_in_one_line, newest, print_table
from measure.step_times import open_step, random_batch
from measure.step_trace import device_work, trace_of
from pipeline.streams import print_result, protect_output
from train import distributed
from train.config import Config
from train.run.folder import environment

WARMUP, STEPS = 5, 2
IN_GRAPHS = ("forward", "backward")
LIBRARY = re.compile(
    "cudnn|cutlass|cublas|xmma|gemm|gemv|nvjet|conv|wgrad|dgrad|fprop|splitk|nchw|nhwc"
)


def group_of(event: dict, ours: set[str]) -> str:
    """The group of a kernel, copy or fill, by its category and name."""
    name = event["name"]
    if event["cat"] != "kernel":
        return "copies and fills"
    if name in ours:
        return "ours"
    if name.startswith("nccl"):
        return "collectives"
    if name.startswith("triton_"):
        return "Inductor's own"
    is_torch = name.startswith(("void at::", "void at_cuda_detail::"))
    return "library" if not is_torch and LIBRARY.search(name.lower()) else "torch's own"


def counted(trace: dict, *, steps: int) -> dict:
    """Launches and ms a step: {"in_graphs" | "outside": {group: ...}}, and ours by kernel."""
    ours = set(jit_functions())
    parts = ("in_graphs", "outside", "ours_by_kernel")
    counts: dict = {part: defaultdict(lambda: {"launches": 0.0, "ms": 0.0}) for part in parts}
    for within, event in device_work(trace):
        part = "in_graphs" if within is not None and within["name"] in IN_GRAPHS else "outside"
        group = group_of(event, ours)
        rows = [counts[part][group]]
        if group == "ours" and part == "in_graphs":
            rows.append(counts["ours_by_kernel"][event["name"].lstrip("_")])
        for row in rows:
            row["launches"] += 1 / steps
            row["ms"] += event["dur"] / 1e3 / steps
    return {part: dict(rows) for part, rows in counts.items()}


def beside(counts: dict, predicted: dict, *, images: int) -> dict:
    """The counted launches and bytes of a step beside the profiler's; GB/s of what has bytes."""
    kinds = dict(predicted["mb_per_image_by_kind"])
    library = sum(kinds.pop(kind, 0.0) for kind in ("convolution", "matrix product"))
    mb = {"library": library, "Inductor's own": kinds.pop("Inductor's own", 0.0)}
    mb["ours"] = sum(kinds.values())
    rates = {
        name: round(mb_per_image * images / row["ms"], 1)  # MB a millisecond are GB a second
        for part, names in (("in_graphs", mb), ("ours_by_kernel", kinds))
        for name, mb_per_image in names.items()
        if (row := counts[part].get(name)) and row["ms"] > 0
    }
    return {
        "launches": sum(row["launches"] for row in counts["in_graphs"].values()),
        "launches_counted": predicted["launches"],
        "mb_per_image_counted": predicted["mb_per_image"],
        "gb_per_s": rates,
    }


def prediction(config: Config, world_size: int) -> tuple[dict | None, str]:
    """What compiled.py counted for such a step, or why there is nothing to compare with."""
    step = (config.method.name, config.model.arch, config.augment.size)
    if step != ("simsiam", "resnet50", 224) or config.model.kernels == "plain":
        return None, "counted for SimSiam's ResNet-50 at 224 pixels with our kernels alone"
    if config.compile == "false" or config.precision != "bf16" or world_size != 1:
        return None, "counted for a compiled step in bf16 on one GPU alone"
    kept = newest("compiled-resnet50")
    if kept is None:
        return None, "profiling/results/ has no compiled-resnet50_*.json"
    return kept["recompute" if config.model.recompute else "ours"], ""


def print_counts(result: dict) -> None:
    """The table for people, on stderr."""
    rates = (result["beside_compiled"] or {}).get("gb_per_s", {})
    rows: list = []
    for part in ("in_graphs", "ours_by_kernel", "outside"):
        for name, row in sorted(result[part].items(), key=lambda item: -item[1]["ms"]):
            rate = None if part == "outside" else rates.get(name)
            rows.append((part, name, f"{row['launches']:.0f}", f"{row['ms']:.3f}", rate))
        rows.append(None)
    columns = ("where", "group", "launches", "ms", "GB/s, of counted bytes")
    title = "kernels of a step, by torch.profiler"
    print_table(title, columns, rows, align="ll", width=100)


def main() -> None:
    """Read the flags, profile, print the table and one JSON line."""
    config, m = read_flags("profiling/launches.py", "Count the kernels of a training step.")
    with errors_in_one_line(), distributed.start(config.device, config, options=m) as world:
        if world.device.type != "cuda":
            raise ValueError("--device cpu launches no kernel: a CUDA device is needed")
        _, train = open_step(config, world)
        batch = random_batch(config, world)
        for _ in range(WARMUP):
            train(batch)
        result = counted(trace_of(lambda: train(batch), world.device, steps=STEPS), steps=STEPS)
        predicted, reason = prediction(config, world.size)
        images = config.data.batch_size // world.size
        result["beside_compiled"] = predicted and beside(result, predicted, images=images)
        result |= {"not_compared": reason, "images": images}
        result["environment"] = environment(world.size, world.device)
    if world.is_main:
        print_counts(result)
        print_result(result | {"n": STEPS})


if __name__ == "__main__":
    protect_output()
    main()
