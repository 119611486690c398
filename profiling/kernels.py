"""The Triton kernels by themselves: what they compile to anywhere, how fast they are on a GPU.

    python profiling/kernels.py --compile-only   registers, spills, bytes in flight (no GPU)
    python profiling/kernels.py --compile-only --replay-cache    and bytes that the L2 cache saves
    python profiling/kernels.py                  time of each of ResNet-50's sites, beside the peers
    python profiling/kernels.py --each-once real     each against its plain twin, at real shapes
    TRITON_INTERPRET=1 python profiling/kernels.py --each-once small      without a GPU, odd shapes

--compile-only traces one step of ResNet-50 (224 pixels, 256 images) on fake tensors, keeps every
kernel that would be launched, those of --model.conv_stats true too, and compiles each for sm_80,
sm_90 and sm_100. Its bytes are counted,
not measured: each tensor that a kernel gets is moved once, as in profiling/compiled.py. For the
heaviest shapes it prints what an H100 or H200 has in flight to memory beside what Little's law asks
(predict/in_flight.py says how each figure is had); with --replay-cache also the bytes that reach
memory where a pass follows another (predict/cache_model.py). Not yet run on a GPU.
"""

import root_first  # isort: skip # noqa: F401

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch

from kernels.conv_times import Times, compare
from kernels.gpu.launch import INTERPRETED
from measure.kernel_checks import check_each
from measure.kernel_times import apex_batch_norm, measure, resnet50_sites
from measure.results import print_table
from pipeline.sources.paths import named_path
from pipeline.streams import print_result, protect_output
from predict.cache_model import CACHES, TILED, replayed
from predict.in_flight import (
    BANDWIDTHS,
    MULTIPROCESSORS,
    in_flight,
    num_loops,
    resident_programs,
)
from predict.kernel_code import Compiled, Launch, compile_for, launches_of_a_step
from train.network.resnet import ResNet
from train.run.conv_choice import conv_sites, label
from train.run.folder import environment
from train.run.program import refuse

ARCHS = (80, 90, 100)
HEAVY = 0.9
"""Of the bytes of a step's kernels: the share of the heavy shapes."""


def compile_table(images: int, dtype: torch.dtype, *, replay_cache: bool) -> dict[str, list[dict]]:
    """What each kernel compiles to, and what keeps memory busy on an H100 or H200. Printed too."""
    launches = sorted(launches_of_a_step(images, dtype), key=lambda launch: launch.label)
    same_code: dict[str, list[Launch]] = {}
    for launch in launches:
        same_code.setdefault(launch.code_key, []).append(launch)
    made = {
        key: {arch: compile_for(group[0], arch) for arch in ARCHS}
        for key, group in same_code.items()
    }
    kernels = []
    for key, group in same_code.items():
        heaviest = max(group, key=lambda launch: launch.bytes)
        kernels.append(
            {
                "kernel": group[0].label,
                "launches": sum(launch.count for launch in group),
                "warps": group[0].options.get("num_warps", 4),
                "loops": num_loops(made[key][90].sass),
                "bytes_per_element": round(heaviest.bytes / math.prod(heaviest.shape), 3),
            }
            | {f"sm_{arch}": compiled.resources for arch, compiled in made[key].items()}
        )
    # those that --model.stem_channels 4 and 8 replace the views' by are compiled only
    launches = [launch for launch in launches if launch.constants.get("CHANNELS", 3) == 3]
    fused, launches = (
        [launch for launch in launches if launch.kernel.__name__.startswith("_conv") is is_fused]
        for is_fused in (True, False)
    )
    heavy = heaviest_of(launches) + heaviest_of(fused)
    in_flights = [in_flight(launch, made[launch.code_key][90]) for launch in heavy]
    print_compiled(kernels, in_flights)
    found = {"kernels": kernels, "heavy_shapes": in_flights}
    if replay_cache:
        found["replayed"] = replay_table(heavy, launches, made)
    return found


def heaviest_of(launches: list[Launch]) -> list[Launch]:
    """Those that move the share HEAVY of all bytes, the heaviest first."""
    ordered = sorted(launches, key=lambda launch: -launch.count * launch.bytes)
    moved = list(itertools.accumulate(launch.count * launch.bytes for launch in ordered))
    return ordered[: 1 + sum(num_bytes < HEAVY * moved[-1] for num_bytes in moved)]


def replay_table(
    heavy: list[Launch], launches: list[Launch], made: dict[str, dict[int, Compiled]]
) -> list[dict]:
    """A row for each heavy pass that follows the one that sums for it. Printed too."""
    resident = {
        launch.code_key: MULTIPROCESSORS
        * resident_programs(made[launch.code_key][90].resources, launch.options["num_warps"])
        for launch in launches
        if launch.kernel.__name__ in TILED
    }
    rows = [
        replayed(launch, launches, resident)
        for launch in heavy
        if launch.kernel.__name__ in ("_apply", "_backward") and not launch.arguments.get("POOLED")
    ]
    names = ("formula", *CACHES)
    cells = [
        (
            row["kernel"],
            "x".join(map(str, row["shape"])),
            row["launches"],
            *(" / ".join(f"{row['mb'][name][i]:.1f}" for name in names) for i in (0, 1)),
            " / ".join(f"{row['mb'][name][1] / row['mb']['formula'][1]:.3f}" for name in CACHES),
        )
        for row in rows
    ]
    sizes = " / ".join(names)
    columns = ("second pass", "shape", "launches", f"first pass, MB: {sizes}")
    columns += (f"second pass, MB: {sizes}", "second of formula")
    title = "bytes that reach memory by a model of the L2 cache; no GPU ran it"
    print_table(title, columns, cells, align="ll", width=180)
    return rows


def print_compiled(kernels: list[dict], heavy: list[dict]) -> None:
    """The tables of --compile-only, on stderr."""
    columns = (
        "kernel",
        "launches",
        "warps",
        "loops",
        "bytes an element",
        *(f"sm_{a}" for a in ARCHS),
    )
    cells: list = [
        [
            f"{v['registers']} / {v['shared']} / {v['spills']}" if isinstance(v, dict) else v
            for v in row.values()
        ]
        for row in kernels
    ]
    print_table("registers / shared bytes / spilled bytes", columns, cells, width=160)
    cells = [
        (
            row["kernel"],
            "x".join(map(str, row["shape"])),
            row["launches"],
            f"{row['in_flight_kib']} {'copied ahead' if row['copies_ahead'] else 'loaded'}",
            " / ".join(str(row[f"of_little_{gpu}"]) for gpu in BANDWIDTHS),
            ", ".join(map(str, row["load_bytes"])),
            " of ".join(map(str, row["sectors"])),
            f"{row['resident_programs']} / {row['occupancy']:.0%}",
        )
        for row in heavy
    ]
    columns = ("kernel", "shape", "launches", "KiB in flight", "of Little's law, H100 / H200")
    columns += ("bytes a load", "sectors", "resident / warps")
    title = (
        f"sm_90, {HEAVY:.0%} of the kernels' bytes; profiling/predict/in_flight.py; no GPU ran it"
    )
    print_table(title, columns, cells, align="ll", width=180)


def print_times(result: dict) -> None:
    """The measured table for people, on stderr."""
    names = [key for key in result["sites"][0] if key.endswith("_ms")]
    rows: list = []
    for row in result["sites"]:
        site = f"{row['kind']} {'x'.join(map(str, row['shape']))}"
        times = (" / ".join(f"{ms:.3f}" for ms in row[name]) for name in names)
        share = " / ".join(f"{part:.0%}" for part in row["share_of_copy"])
        rows.append((site, row["count"], *times, share))
    sums = (f"{result['sum_ms'][name]:.2f}" for name in names)
    rows += [None, ("sum over sites", "", *sums, "")]
    columns = ("site", "count", *(name[:-3] for name in names), "share of copy")
    print_table("milliseconds forward / backward", columns, rows, width=160)


def check(size: str, dtype: torch.dtype) -> None:
    """Run every kernel once; one JSON line, exit code 1 where one is wrong or was left out."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        if not INTERPRETED:
            refuse("no CUDA device to run kernels on: set TRITON_INTERPRET=1", code=1)
        if size == "real":
            refuse("--each-once real takes hours in Triton's interpreter: give small", code=1)
        if dtype == torch.bfloat16:
            print("in float32: Triton's interpreter truncates bfloat16", file=sys.stderr)
            dtype = torch.float32
    result = check_each(size, dtype, device)
    for failure in result["failed"]:
        print(failure, file=sys.stderr)
    print_result(result)
    if result["failed"]:
        raise SystemExit(1)


def time_sites(images: int, n: int, save: Path | None) -> dict:
    """Measure ResNet-50's sites on the GPU; the table on stderr, the result also in a file."""
    if not torch.cuda.is_available():
        refuse("no CUDA device to measure on: give --compile-only", code=1)
    device, apex = torch.device("cuda", 0), apex_batch_norm()
    if apex is None:
        print("apex's batch norm is not measured: no apex built with --bnp", file=sys.stderr)
    result = measure(list(resnet50_sites(images)), device, n=n, apex=apex)
    result["convolutions"] = time_convolutions(images, device)
    result["environment"] = environment(1, device)
    if save is not None:
        save.write_text(json.dumps(result, indent=1) + "\n")
    print_times(result)
    return result


def time_convolutions(images: int, device: torch.device) -> list[dict]:
    """What --model.conv_stats auto measures in a step of ResNet-50 in bf16. Printed too."""
    net = ResNet("resnet50", stem="imagenet")
    counts = Counter(site for *_, site in conv_sites(net, 2, 2 * images, 224, torch.bfloat16))
    rows = []
    for site, count in counts.items():
        rows.append({"site": label(site), "count": count} | compare(site, device)._asdict())
    cells = [
        (
            *list(row.values())[:2],
            *(f"{row[name]:.3f}" for name in Times._fields[:2]),
            row["agrees"],
        )
        for row in rows
    ]
    columns = ("1x1 convolution", "count", "fused ms", "separate ms", "agree")
    print_table("with batch norm's sums, as --model.conv_stats auto", columns, cells, width=160)
    return rows


def main() -> None:
    """Read the flags; check, compile or measure; print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="Compile or measure the Triton kernels.")
    parser.add_argument("--compile-only", action="store_true", help="no GPU: resources and bytes")
    parser.add_argument("--replay-cache", action="store_true", help="with --compile-only: the L2")
    parser.add_argument("--each-once", choices=("real", "small"), help="shapes of the check")
    parser.add_argument("--n", type=int, default=30, help="timed turns of each site")
    parser.add_argument("--save", type=named_path, help="also write the JSON to this file")
    parser.add_argument("--images", type=int, default=256, help="images of a step")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    flags = parser.parse_args()
    dtype = getattr(torch, flags.dtype)
    if flags.replay_cache and not flags.compile_only:
        refuse("--replay-cache replays what --compile-only compiles: give both", code=1)
    if flags.each_once is not None:
        check(flags.each_once, dtype)
    elif flags.compile_only:
        if INTERPRETED:
            refuse("--compile-only compiles nothing with TRITON_INTERPRET=1: unset it", code=1)
        result = {"images": flags.images, "dtype": flags.dtype, "triton": version("triton"), "n": 1}
        result |= compile_table(flags.images, dtype, replay_cache=flags.replay_cache)
        if flags.save is not None:
            flags.save.write_text(json.dumps(result) + "\n")
        print_result(result, kept=flags.save)
    else:
        print_result(time_sites(flags.images, flags.n, flags.save), kept=flags.save)


if __name__ == "__main__":
    protect_output()
    main()
