"""Images/s on 1 to 1,024 GPUs, on paper: docs/scaling.md has the formula and its tests.

    python profiling/scaling.py                                  step time from the roofline
    python profiling/scaling.py --measured RESULT.json           from profiling/throughput.py's

Nothing here is measured. Bytes and collectives of a step are those that profiling/collectives.py
counted, the gradients are the model's, the step is put together in profiling/predict/step_model.py.
The step of one GPU is measured (--measured) or the forecast of profiling/predict/forecast.py.
A newcomer's mistake: taking the table for a promise. Its inputs are in the JSON line.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from measure.charts import draw_scaling
from measure.results import check_save, newest, result_path, save_json
from predict.fabric import Fabric
from predict.forecast import REACHED
from predict.limit import GPUS, count
from predict.scaling_checks import RESNET50_BYTES, against_hosts, against_mlperf
from predict.step_model import Step, predict, work_of
from train.config import MethodConfig, ModelConfig
from train.run.folder import environment
from train.run.program import refuse

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
IMAGES = (256, 64)
SIZE = 224


def read_measured(paths: list[Path]) -> dict[int, float]:
    """Images a GPU -> seconds a step, of results of profiling/throughput.py on one GPU.

    Raises: ValueError for a result of several ranks, of another model, or without a step.
    """
    found = {}
    for path in paths:
        try:
            one = json.loads(path.read_text())
            rate = one["step"]["ours"]["images_per_s"]["p50"]
            model, size = one["config"]["model"], one["config"]["augment"]["size"]
            world, images = one["environment"]["world"], one["config"]["data"]["batch_size"]
            is_cuda = one["environment"]["cuda"] is not None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--measured {path}: no step of profiling/throughput.py ({type(error).__name__}: "
                f"{error}): make it with --what step --save NAME"
            ) from error
        if world != 1:
            raise ValueError(f"--measured {path}: of {world} ranks, whose messages are in it: "
                             "measure one GPU")  # fmt: skip
        if not is_cuda:
            raise ValueError(f"--measured {path}: of a CPU, the network is that of GPUs: measure "
                             "one GPU")  # fmt: skip
        if (model["arch"], size) != ("resnet50", SIZE):
            raise ValueError(f"--measured {path}: {model['arch']} at {size} pixels; the counted "
                             f"collectives are of resnet50 at {SIZE}")  # fmt: skip
        found[images] = images / rate
    return found


def step_seconds(images: int, known: dict[int, list[float]], *, fixed_s: float) -> list[float]:
    """Steps of one GPU with so many images, from the known ones of the nearest number.

    fixed + (step - fixed) x images / images of the known step
    """
    if images in known:
        return known[images]
    nearest = min(known, key=lambda n: abs(n - images))
    return [fixed_s + (s - fixed_s) * images / nearest for s in known[nearest]]


def forecast_ranks(arguments: argparse.Namespace, fabric: Fabric) -> dict:
    """The whole prediction, and the checks of its formula. Raises: ValueError, as read_measured."""
    given = read_measured(arguments.measured)
    counted = newest("collectives-resnet50")
    if counted is None:
        raise ValueError("profiling/results/ has no collectives-resnet50_*.json: keep there what "
                         "`python profiling/collectives.py` prints")  # fmt: skip
    counts = count(ModelConfig(), MethodConfig(), images=IMAGES[0], size=SIZE)
    passes = counted["collectives_by_pass"].values()
    forward_sums, backward_sums = ((one["number"], float(one["bytes"])) for one in passes)
    gpu = GPUS[arguments.gpu]
    work = work_of(counts, gpu=gpu, gradient_bytes=4.0 * counts.parameters,
                   forward_sums=forward_sums, backward_sums=backward_sums)  # fmt: skip
    resnet50 = work_of(counts, gpu=GPUS["h100"], gradient_bytes=RESNET50_BYTES)
    mlperf = against_mlperf(resnet50, Fabric())  # NVIDIA's own network, whatever the flags say
    found: dict = {
        "measured": bool(given),
        "step_from": [str(path) for path in arguments.measured] or "roofline forecast",
        "gpu": arguments.gpu,
        "overlap": arguments.overlap,
        "fabric": {k: v for k, v in dataclasses.asdict(fabric).items() if k != "protocols"},
        "collectives": counted["collectives_by_pass"],
        "gradient_bytes": 4 * counts.parameters,
        "fixed_ms": mlperf["fixed_ms"],
        "images_per_gpu": {},
        "mlperf": mlperf,
    }
    least_s = counts.seconds(*gpu)  # of 256 images; the forecast is from 60 to 70 % of the roofline
    forecast = {IMAGES[0]: [least_s / share for share in reversed(REACHED)]}
    known = {n: [seconds] for n, seconds in given.items()} or forecast
    for images in IMAGES:
        alone = step_seconds(images, known, fixed_s=mlperf["fixed_ms"] / 1e3)
        found["images_per_gpu"][images] = {
            ranks: of_ranks(
                [predict(work, fabric, ranks, compute_s=s, overlap=arguments.overlap)
                 for s in alone], alone, images=images * ranks,
            )
            for ranks in RANKS
        }  # fmt: skip
    throttled = newest("throttled")
    if throttled is not None:
        found["hosts"] = against_hosts(throttled, overlap=True)
    return found


def of_ranks(steps: list[Step], alone: list[float], *, images: int) -> dict:
    """The figures of one row; where the step of one GPU is a range, from its longer end."""
    pairs = list(zip(steps, alone, strict=True))[::-1]
    return {
        "images_per_s": [round(images / step.seconds, 1) for step, _ in pairs],
        "efficiency": [round(one_s / step.seconds, 4) for step, one_s in pairs],
        "step_ms": [round(1e3 * step.seconds, 3) for step, _ in pairs],
        "batch_norm_ms": round(1e3 * steps[0].sums_s, 3),
        "gradient_wait_ms": [round(1e3 * step.gradients_s, 3) for step, _ in pairs],
    }


def print_table(found: dict) -> None:
    """The table for people, on stderr."""
    title = f"predicted, images/s; step of one GPU: {found['step_from']}"
    table = Table(title=title)
    for name in ("GPUs", "images a GPU", "images/s", "of one GPU's rate", "batch norm ms",
                 "gradient wait ms"):  # fmt: skip
        table.add_column(name, justify="right")
    for images, rows in found["images_per_gpu"].items():
        for ranks, one in rows.items():
            span = [" to ".join(form.format(v) for v in dict.fromkeys(one[name])) for name, form in
                    (("images_per_s", "{:,.0f}"), ("efficiency", "{:.1%}"))]  # fmt: skip
            table.add_row(str(ranks), str(images), *span, f"{one['batch_norm_ms']:.2f}",
                          f"{max(one['gradient_wait_ms']):.2f}")  # fmt: skip
        table.add_section()
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 110).print(table)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Predict images/s of 1 to 1,024 GPUs.")
    fabric = Fabric()
    parser.add_argument(
        "--measured", type=Path, nargs="*", default=[],
        help="results of profiling/throughput.py on one GPU, one a batch size",
    )  # fmt: skip
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h200", help="of the roofline")
    parser.add_argument("--gpus-per-node", type=int, default=fabric.gpus_per_node)
    parser.add_argument("--node-gb-per-s", type=float, default=fabric.node_gb_per_s)
    parser.add_argument("--net-gb-per-s", type=float, default=fabric.net_gb_per_s,
                        help="between nodes, all adapters of one together")  # fmt: skip
    parser.add_argument("--net-us", type=float, default=fabric.net_us,
                        help="added to NCCL's own latency of each hop between nodes")  # fmt: skip
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True,
                        help="send gradients during the backward pass, or after it")  # fmt: skip
    parser.add_argument("--save", default="", help="profiling/results/<this>_<gpu>_<yyyymm>")
    return parser.parse_args()


def main() -> None:
    """Read the flags, predict, print the table and one JSON line."""
    arguments = read_arguments()
    try:
        check_save(arguments.save)
        fabric = Fabric(arguments.gpus_per_node, arguments.node_gb_per_s, arguments.net_gb_per_s,
                        arguments.net_us)  # fmt: skip
        found = forecast_ranks(arguments, fabric)
    except (ValueError, OSError) as error:
        refuse(str(error), code=1)
    device = f"{arguments.gpu}-predicted"
    found |= {"n": 1, "environment": environment(1, torch.device("cpu")) | {"device": device}}
    print_table(found)
    if arguments.save:
        picture = result_path(arguments.save, device, ".png")
        draw_scaling(found, picture)
        found["files"] = [save_json(arguments.save, found), str(picture)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
