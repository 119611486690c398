"""Images/s on 1 to 1,024 GPUs, on paper: docs/scaling.md has the formula and its tests.

    python profiling/scaling.py                                  step time from the roofline
    python profiling/scaling.py --measured RESULT.json           from profiling/throughput.py's

Nothing is measured, and the table is no promise: its inputs are in the JSON line. Bytes and
collectives of a step are those that profiling/collectives.py counted, the gradients are the
model's, the step is composed in profiling/predict/step_model.py. The step of one GPU is measured
(--measured) or predicted, part by part, in profiling/predict/step_time.py.
"""

import root_first  # isort: skip # noqa: F401

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from measure.charts import draw_scaling
from measure.results import check_save, errors_in_one_line, newest, print_table, save_and_print
from pipeline.sources.paths import named_path
from pipeline.streams import protect_output
from predict.fabric import Fabric
from predict.limit import GPUS, count
from predict.scaling_checks import RESNET50_BYTES, against_hosts, against_mlperf
from predict.step_model import Step, predict, work_of
from predict.step_time import against_published, step_time
from train.config import MethodConfig, ModelConfig
from train.run.folder import environment

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
IMAGES = (256, 64)
SIZE = 224


def read_measured(paths: list[Path]) -> dict[int, float]:
    """Images a GPU -> seconds a step, of results of profiling/throughput.py on one GPU.

    Raises: ValueError for a result of several ranks, of another model, or without a step.
    """
    seconds = {}
    for path in paths:
        try:
            result = json.loads(path.read_text())
            rate = result["step"]["ours"]["images_per_s"]["p50"]
            config, machine = result["config"], result["environment"]
            arch, size = config["model"]["arch"], config["augment"]["size"]
            world, images = machine["world"], config["data"]["batch_size"]
            is_cuda = machine["cuda"] is not None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--measured {path}: no step of profiling/throughput.py ({type(error).__name__}: "
                f"{error}): make it with --what step --save NAME"
            ) from error
        problem = ""
        if world != 1:
            problem = f"of {world} ranks, whose messages are in it: measure one GPU"
        elif not is_cuda:
            problem = "of a CPU, the network is that of GPUs: measure one GPU"
        elif (arch, size) != ("resnet50", SIZE):
            problem = f"{arch} at {size} pixels; the counted collectives are of resnet50 at {SIZE}"
        if problem:
            raise ValueError(f"--measured {path}: {problem}")
        seconds[images] = images / rate
    return seconds


def step_seconds(images: int, known: dict[int, list[float]], *, fixed_s: float) -> list[float]:
    """Steps of one GPU with that many images, from the known ones of the nearest number.

    fixed + (step - fixed) x images / images of the known step
    """
    nearest = min(known, key=lambda n: abs(n - images))
    if nearest == images:
        return known[images]
    return [fixed_s + (s - fixed_s) * images / nearest for s in known[nearest]]


def forecast_ranks(arguments: argparse.Namespace, fabric: Fabric) -> dict:
    """The whole prediction, and the checks of its formula. Raises: ValueError, as read_measured."""
    given = read_measured(arguments.measured)
    counted = newest("collectives-resnet50")
    if counted is None:
        raise ValueError(
            "profiling/results/ has no collectives-resnet50_*.json: keep there what "
            "`python profiling/collectives.py` prints"
        )
    counts = count(ModelConfig(), MethodConfig(), images=IMAGES[0], size=SIZE)
    passes = counted["collectives_by_pass"]
    forward, backward = ((sums["number"], float(sums["bytes"])) for sums in passes.values())
    gpu, gradient_bytes = GPUS[arguments.gpu], 4 * counts.parameters
    sums = {"forward_sums": forward, "backward_sums": backward}
    work = work_of(counts, gpu=gpu, gradient_bytes=gradient_bytes, **sums)
    resnet50 = work_of(counts, gpu=GPUS["h100"], gradient_bytes=RESNET50_BYTES)
    mlperf = against_mlperf(resnet50, Fabric())  # NVIDIA's own network, whatever the flags say
    one_gpu = {
        n: step_time(count(ModelConfig(), MethodConfig(), images=n, size=SIZE), arguments.gpu)
        for n in given or IMAGES[:1]
    }
    for n, seconds in given.items():
        best, worst = one_gpu[n]["step_ms"]
        measured_ms = round(1e3 * seconds, 2)
        one_gpu[n] |= {"measured_ms": measured_ms, "holds": best <= measured_ms <= worst}
    predicted = {n: [ms / 1e3 for ms in step["step_ms"]] for n, step in one_gpu.items()}
    known = {n: [seconds] for n, seconds in given.items()} or predicted

    def row(images: int, ranks: int) -> dict:
        alone = step_seconds(images, known, fixed_s=mlperf["fixed_ms"] / 1e3)
        how = {"overlap": arguments.overlap}
        steps = [predict(work, fabric, ranks, compute_s=s, **how) for s in alone]
        return of_ranks(steps, alone, images=images * ranks)

    network = {k: v for k, v in dataclasses.asdict(fabric).items() if k != "protocols"}
    result: dict = {
        "measured": bool(given),
        "step_from": [str(path) for path in arguments.measured] or "predicted",
        "one_gpu": one_gpu,
        "published": against_published(),
        "gpu": arguments.gpu,
        "overlap": arguments.overlap,
        "fabric": network,
        "collectives": passes,
        "gradient_bytes": gradient_bytes,
        "fixed_ms": mlperf["fixed_ms"],
        "images_per_gpu": {n: {ranks: row(n, ranks) for ranks in RANKS} for n in IMAGES},
        "mlperf": mlperf,
    }
    throttled = newest("throttled")
    if throttled is not None:
        result["hosts"] = against_hosts(throttled, overlap=True)
    return result


def of_ranks(steps: list[Step], alone: list[float], *, images: int) -> dict:
    """The figures of a row; where the step of one GPU is a range, from its longer end."""
    pairs = list(zip(steps, alone, strict=True))[::-1]
    return {
        "images_per_s": [round(images / step.seconds, 1) for step, _ in pairs],
        "efficiency": [round(alone_s / step.seconds, 4) for step, alone_s in pairs],
        "step_ms": [round(1e3 * step.seconds, 3) for step, _ in pairs],
        "batch_norm_ms": round(1e3 * steps[0].sums_s, 3),
        "gradient_wait_ms": [round(1e3 * step.gradients_s, 3) for step, _ in pairs],
    }


def print_one_gpu(result: dict) -> None:
    """The step of one GPU, and the formula beside published speeds, on stderr."""
    rows: list = []
    for images, step in result["one_gpu"].items():
        parts = {f"{images} images": step["step_ms"], **step["parts_ms"]}
        rows += [(name, " to ".join(map(str, part)) + " ms") for name, part in parts.items()]
        if "measured_ms" in step:
            holds = "within the range" if step["holds"] else "OUTSIDE the range"
            rows.append((f"{images} images, measured", f"{step['measured_ms']} ms, {holds}"))
    rows.append(None)
    for run in result["published"]:
        best, worst = run["predicted"]
        cell = f"{worst:,} to {best:,} images/s, published {run['published']:,}"
        rows.append((f"{run['program']}, {run['gpu']}", cell))
    print_table(f"predicted: a step on one {result['gpu']}", ("what", "figure"), rows, align="ll")


def print_rates(result: dict) -> None:
    """The table for people, on stderr."""
    table: list = []
    for images, rows in result["images_per_gpu"].items():
        for ranks, row in rows.items():
            rates, shares = (
                " to ".join(form.format(value) for value in dict.fromkeys(row[name]))
                for name, form in (("images_per_s", "{:,.0f}"), ("efficiency", "{:.1%}"))
            )
            waits = row["batch_norm_ms"], max(row["gradient_wait_ms"])
            table.append((ranks, images, rates, shares, *(f"{ms:.2f}" for ms in waits)))
        table.append(None)
    columns = "GPUs,images a GPU,images/s,of one GPU's rate,batch norm ms,gradient wait ms"
    title = f"predicted, images/s; step of one GPU: {result['step_from']}"
    print_table(title, columns.split(","), table, align="r")


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Predict images/s of 1 to 1,024 GPUs.")
    add, fabric = parser.add_argument, Fabric()
    results = "results of profiling/throughput.py on one GPU, one a batch size"
    add("--measured", type=named_path, nargs="*", default=[], help=results)
    add("--gpu", choices=tuple(GPUS), default="h200", help="of the roofline")
    add("--gpus-per-node", type=int, default=fabric.gpus_per_node)
    add("--node-gb-per-s", type=float, default=fabric.node_gb_per_s)
    adapters = "between nodes, all adapters of one together"
    add("--net-gb-per-s", type=float, default=fabric.net_gb_per_s, help=adapters)
    latency = "added to NCCL's own latency of each hop between nodes"
    add("--net-us", type=float, default=fabric.net_us, help=latency)
    overlap = "send gradients during the backward pass, or after it"
    add("--overlap", action=argparse.BooleanOptionalAction, default=True, help=overlap)
    add("--save", default="", help="profiling/results/<this>_<gpu>_<yyyymm>")
    return parser.parse_args()


def main() -> None:
    """Read the flags, predict, print the table and one JSON line."""
    flags = read_arguments()
    with errors_in_one_line():
        check_save(flags.save)
        network = flags.gpus_per_node, flags.node_gb_per_s, flags.net_gb_per_s, flags.net_us
        result = forecast_ranks(flags, Fabric(*network))
    machine = environment(1, torch.device("cpu")) | {"device": f"{flags.gpu}-predicted"}
    result |= {"n": 1, "environment": machine}
    print_one_gpu(result)
    print_rates(result)
    save_and_print(result, flags.save, draw_scaling)


if __name__ == "__main__":
    protect_output()
    main()
