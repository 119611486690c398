"""Kernels of a training step by torch.profiler, beside those that profiling/compiled.py counts.

    python profiling/launches.py                     compiled ResNet-50, 256 images, random views
    python profiling/launches.py --compile false     eager

For each group (ours, Inductor's, libraries, torch's own, copies, collectives) the launches and
milliseconds of one step, in the compiled graphs (forward and backward) and outside of them
(normalisation, optimizer). The profiler has no count of bytes: GB/s are the counted bytes over its
durations, for each of our kernels and for the library's and Inductor's as a whole. Not yet run on a
GPU; a test feeds a constructed trace.
A newcomer's mistake: adding the milliseconds up to a step. Streams overlap, and between kernels the
GPU waits.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import json
import re
from functools import partial

from rich.console import Console
from rich.table import Table

from measure.harness import read_flags
from measure.kernel_checks import jit_functions
from measure.results import newest
from measure.step_times import open_step, random_batch
from measure.step_trace import device_work, trace_of
from train import distributed
from train.config import Config
from train.run.folder import environment
from train.run.program import refuse

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
    found: dict[str, dict] = {"in_graphs": {}, "outside": {}, "ours_by_kernel": {}}
    for within, event in device_work(trace):
        part = "in_graphs" if within is not None and within["name"] in IN_GRAPHS else "outside"
        group = group_of(event, ours)
        keys = [(part, group)]
        if group == "ours" and part == "in_graphs":
            keys.append(("ours_by_kernel", event["name"].lstrip("_")))
        for place, key in keys:
            one = found[place].setdefault(key, {"launches": 0.0, "ms": 0.0})
            one["launches"] += 1 / steps
            one["ms"] += event["dur"] / 1e3 / steps
    return found


def beside(found: dict, predicted: dict, *, images: int) -> dict:
    """The counted launches and bytes of a step beside the profiler's; GB/s of what has bytes."""
    kinds = dict(predicted["mb_per_image_by_kind"])
    library = sum(kinds.pop(kind, 0.0) for kind in ("convolution", "matrix product"))
    mb = {"library": library, "Inductor's own": kinds.pop("Inductor's own", 0.0)}
    mb["ours"] = sum(kinds.values())
    rates = {
        name: round(mb_per_image * images / one["ms"], 1)  # MB a millisecond are GB a second
        for where, names in ((found["in_graphs"], mb), (found["ours_by_kernel"], kinds))
        for name, mb_per_image in names.items()
        if (one := where.get(name)) and one["ms"] > 0
    }
    launches = sum(one["launches"] for one in found["in_graphs"].values())
    return {
        "launches": launches, "launches_counted": predicted["launches"],
        "mb_per_image_counted": predicted["mb_per_image"], "gb_per_s": rates,
    }  # fmt: skip


def prediction(config: Config, world_size: int) -> tuple[dict | None, str]:
    """What compiled.py counted for such a step, or why there is nothing to compare with."""
    which = "recompute" if config.model.recompute else "ours"
    kept = newest("compiled-resnet50")
    if (config.method.name, config.model.arch, config.augment.size) != (
        "simsiam", "resnet50", 224
    ) or config.model.kernels == "plain":  # fmt: skip
        return None, "counted for SimSiam's ResNet-50 at 224 pixels with our kernels alone"
    if config.compile == "false" or config.precision != "bf16" or world_size != 1:
        return None, "counted for a compiled step in bf16 on one GPU alone"
    if kept is None:
        return None, "profiling/results/ has no compiled-resnet50_*.json"
    return kept[which], ""


def print_found(found: dict) -> None:
    """The table for people, on stderr."""
    table = Table(title="kernels of a step, by torch.profiler")
    for name in ("where", "group", "launches", "ms", "GB/s, of counted bytes"):
        table.add_column(name, justify="left" if name in ("where", "group") else "right")
    rates = (found["beside_compiled"] or {}).get("gb_per_s", {})
    for where in ("in_graphs", "ours_by_kernel", "outside"):
        for name, one in sorted(found[where].items(), key=lambda item: -item[1]["ms"]):
            rate = "" if where == "outside" else str(rates.get(name, ""))
            table.add_row(where, name, f"{one['launches']:.0f}", f"{one['ms']:.3f}", rate)
        table.add_section()
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 100).print(table)


def main() -> None:
    """Read the flags, profile, print the table and one JSON line."""
    config, _ = read_flags("profiling/launches.py", "Count the kernels of a training step.")
    try:
        with distributed.start(config.device, config) as world:
            if world.device.type != "cuda":
                raise ValueError("--device cpu launches no kernel: a CUDA device is needed")
            step = partial(open_step(config, world)[1], random_batch(config, world))
            for _ in range(WARMUP):
                step()
            found = counted(trace_of(step, world.device, steps=STEPS), steps=STEPS)
            predicted, reason = prediction(config, world.size)
            images = config.data.batch_size // world.size
            found["beside_compiled"] = predicted and beside(found, predicted, images=images)
            found |= {"not_compared": reason, "images": images}
            found["environment"] = environment(world.size, world.device)
    except (ValueError, OSError) as error:
        refuse(str(error), code=1)
    if world.is_main:
        print_found(found)
        print(json.dumps(found | {"n": STEPS}))


if __name__ == "__main__":
    main()
