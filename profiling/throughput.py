"""How fast this pipeline is here, what bounds it, against whom, and how far from the limit.

    python profiling/throughput.py                       this machine
    torchrun --nnodes 4 ... profiling/throughput.py      a cluster
    python profiling/throughput.py --dry-run --gpus 8

Images/s are source images a second, two views each. All flags of train/main.py apply. What
could not be measured is printed with the reason.
A newcomer's mistake: comparing rates of two runs. Ratios are of one run, variants in turn.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import dataclasses
import json

import torch

from measure.charts import draw, print_tables
from measure.harness import MeasureConfig, open_images, read_flags, with_batch
from measure.results import result_path, save_json
from measure.step_times import measure_end_to_end, measure_step, open_step, random_batch
from measure.step_trace import collectives, timeline, trace_of
from measure.turns import Timing, ratios
from pipeline.cores import usable_cores
from pipeline.sources.reader import ImageReader
from predict.forecast import forecast
from predict.limit import measure_limit, most_times
from train import distributed
from train.config import Config
from train.distributed import World, gather
from train.run.folder import environment, has_fast_bf16
from train.run.program import refuse
from train.window import peak_gib

LOADER_ROWS = 64  # images a batch and rank, where training's batch is smaller


def say(world: World, text: str) -> None:
    """Progress, on rank 0's stderr."""
    if world.is_main:
        print(text, file=sys.stderr, flush=True)


def total_rate(world: World, timing: Timing) -> tuple[float, list[float]]:
    """Images/s over all ranks, and of each (medians)."""
    rates = gather(world, None if timing.not_measured else timing.rate())
    known = [rate for rate in rates if rate is not None]
    return sum(known), known


def measure(config: Config, m: MeasureConfig, world: World) -> dict:
    """All parts that were asked for; the same on every rank."""
    found: dict = {"ratios": {}, "images_per_s": {}}
    reader = None
    if {"loader", "host", "end_to_end"} & set(m.what):
        reader = open_images(config, world)
    if "loader" in m.what:
        assert reader is not None
        measure_loader_part(reader, config, m, world, found)
    if "host" in m.what:
        from measure.host_cost import measure_host  # imports DALI

        assert reader is not None
        say(world, "host: the loader without decoding ...")
        found["host"] = measure_host(reader, config, world, n=m.repeats)
    if "step" in m.what:
        measure_step_part(config, m, world, found)
    if "end_to_end" in m.what:
        assert reader is not None
        measure_both(reader, config, m, world, found)
    if "limit" in m.what:
        compare_with_limit(config, world, found)
    if "ranks" in m.what:
        found |= measure_ranks(config, m, world, found)
    found["memory"] = memory(world)
    return found


def measure_loader_part(
    reader: ImageReader, config: Config, m: MeasureConfig, world: World, found: dict
) -> None:
    """The loader, its stages and its peers."""
    from measure.loader_times import measure_loader, measure_stages  # imports DALI

    say(world, "loader: ours" + (" and its peers" if m.peers else "") + " ...")
    rows = max(LOADER_ROWS, config.data.batch_size // world.size)
    larger = with_batch(config, rows * world.size)
    timings = measure_loader(
        reader,
        larger,
        world,
        peers=m.peers,
        n=m.repeats,
        budget_s=m.budget_s,
        images=m.loader_images,
    )
    found["loader"] = {name: timing.summary() for name, timing in timings.items()}
    found["stages"] = measure_stages(reader, larger, world, n=m.repeats)
    found["ratios"] |= ratios("loader", timings)
    found["images_per_s"]["loader"] = round(total_rate(world, timings["ours"])[0], 2)


def measure_step_part(config: Config, m: MeasureConfig, world: World, found: dict) -> None:
    """The step, its peers, and each rank's part of it."""
    say(world, "step: ours" + (" and its peers" if m.peers else "") + " ...")
    timings = measure_step(
        config,
        world,
        peers=m.peers,
        steps=m.steps,
        warmup=m.warmup,
        n=m.repeats,
        budget_s=m.budget_s,
    )
    found["step"] = {name: timing.summary() for name, timing in timings.items()}
    found["ratios"] |= ratios("step", timings)
    total, each = total_rate(world, timings["ours"])
    found["images_per_s"]["step"] = round(total, 2)
    if each:
        found["ranks"] = {"total_images_per_s": total, "images_per_s": each,
                          "slowest_rank": each.index(min(each))}  # fmt: skip


def measure_both(
    reader: ImageReader, config: Config, m: MeasureConfig, world: World, found: dict
) -> None:
    """Loader and step together, against the slower of the two."""
    say(world, "end to end ...")
    timing, wait = measure_end_to_end(
        reader, config, world, steps=max(m.steps, 3), n=m.repeats, budget_s=m.budget_s
    )
    found["end_to_end"] = {"ours": timing.summary(), "data_wait_pct": round(wait, 2)}
    rates = found["images_per_s"]
    rates["end_to_end"] = round(total_rate(world, timing)[0], 2)
    slower = min(rates.get("loader", 0), rates.get("step", 0))
    if slower and timing.not_measured is None:
        found["ratios"]["end_to_end/slower"] = round(rates["end_to_end"] / slower, 3)


def compare_with_limit(config: Config, world: World, found: dict) -> None:
    """The roofline of a rank's step, and how much of it the measured step reaches."""
    say(world, "limit ...")
    limit = measure_limit(config, world.device, rows=config.data.batch_size // world.size)
    per_rank = found["images_per_s"].get("step", 0) / world.size
    if per_rank:
        flops = per_rank * limit["gflop_per_image"] * 1e9
        limit["share_of_roofline"] = round(per_rank / limit["images_per_s"], 4)
        limit["mfu"] = round(flops / (limit["matmul_tflop_per_s"] * 1e12), 4)
    found["limit"] = limit | most_times(limit["images_per_s"], found.get("step", {}))


def measure_ranks(config: Config, m: MeasureConfig, world: World, before: dict) -> dict:
    """Where a step goes, its collectives, and how ranks scale against one in this run."""
    (state, step), batch = open_step(config, world), random_batch(config, world)
    trace = trace_of(lambda: step(batch), world.device)
    found: dict = {"timeline": timeline(trace)}
    if world.size == 1 or "ranks" not in before:
        return found
    say(world, "one rank alone ...")
    rows = config.data.batch_size // world.size
    alone = None
    if world.is_main:
        timing = measure_step(
            with_batch(config, rows), world.alone(), peers=False, steps=m.steps,
            warmup=m.warmup, n=m.repeats, budget_s=m.budget_s,
        )["ours"]  # fmt: skip
        alone = None if timing.not_measured else timing.rate()
    alone = distributed.from_main(world, alone)
    learned = (p for p in state.model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in learned)
    found["ranks"] = before["ranks"] | {
        "one_rank_alone_images_per_s": alone,
        "scaling_efficiency": round(before["ranks"]["total_images_per_s"] / world.size / alone, 4)
        if alone else None,
        "collectives_per_step": collectives(trace),
        "gradient_bytes_per_step": 4 * parameters,
    }  # fmt: skip
    return found


def memory(world: World) -> dict:
    """Peak memory of the slowest rank's process in GiB, by who took it."""
    mine = {"host_gib": round(peak_gib(torch.device("cpu")), 3)}
    if world.device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(world.device)
        free, total = torch.cuda.mem_get_info(world.device)
        others = total - free - torch.cuda.memory_reserved(world.device)
        mine["torch_active_gib"] = round(peak_gib(world.device), 3)
        mine["torch_reserved_gib"] = round(reserved / 2**30, 3)
        mine["dali_and_contexts_gib"] = round(others / 2**30, 3)
    everywhere = gather(world, mine)
    return {name: max(one[name] for one in everywhere) for name in mine}


def check_method(config: Config, m: MeasureConfig) -> None:
    """Raise ValueError if a part that is SimSiam's alone is asked for with another method."""
    if m.dry_run:
        asked = {"--dry-run": "leave it out"}
    else:
        asked = {"--peers true": "give --peers false"} if m.peers else {}
        if "limit" in m.what:
            asked["--what limit"] = "give --what loader,step,end_to_end,ranks"
    if config.method.name != "simsiam" and asked:
        raise ValueError(
            f"{' and '.join(asked)}: for SimSiam's step alone, --method.name is "
            f"{config.method.name}: {' and '.join(asked.values())}"
        )


def main() -> None:
    """Read the flags, measure, print the tables and one JSON line."""
    config, m = read_flags("profiling/throughput.py", "Measure images per second.")
    try:
        check_method(config, m)
        if m.dry_run:
            print(json.dumps(forecast(config, gpu=m.gpu, gpus=m.gpus)))
            return
        with distributed.start(config.device, config) as world:
            if config.data.batch_size % world.size:
                raise ValueError(
                    f"{world.size} processes do not divide --data.batch_size "
                    f"{config.data.batch_size}"
                )
            cores = usable_cores()
            if config.dali.threads > cores:
                say(world, f"warning: --dali.threads {config.dali.threads} on {cores} cores: "
                    "they will wait for each other; 0 takes what is there")  # fmt: skip
            if config.precision == "bf16" and world.device.type == "cpu" and not has_fast_bf16():
                say(world, "warning: this CPU has no bf16 instructions: software computes them; "
                    "--precision fp32 is many times faster here")  # fmt: skip
            m = m.filled(world.device)
            found = measure(config, m, world)
            found |= {
                "n": m.repeats,
                "config": dataclasses.asdict(config),
                "measure": dataclasses.asdict(m),
                "environment": environment(world.size, world.device),
            }  # fmt: skip
            is_main = world.is_main
    except (ValueError, OSError) as error:
        refuse(str(error), code=1)
    if is_main:
        print_tables(found)
        if m.save:
            picture = result_path(m.save, found["environment"]["device"], ".png")
            draw(found, picture)
            found["files"] = [save_json(m.save, found), str(picture)]
        print(json.dumps(found))


if __name__ == "__main__":
    main()
