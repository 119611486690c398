"""Images/s of this pipeline on this machine, what limits them, and beside which peers.

    python profiling/throughput.py                       this machine
    torchrun --nnodes 4 ... profiling/throughput.py      a cluster
    python profiling/throughput.py --dry-run --gpus 8

Images/s are source images a second, two views each. All flags of train/main.py apply. What
could not be measured is printed with the reason. Ratios are of one run, whose variants take turns:
rates of two runs cannot be compared.
"""

import root_first  # isort: skip # noqa: F401

import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from measure.charts import draw, print_tables
from measure.harness import MeasureConfig, open_images, read_flags, with_batch
from measure.results import errors_in_one_line, save_and_print
from measure.step_times import measure_end_to_end, measure_step, open_step, random_batch
from measure.step_trace import collectives, timeline, trace_of
from measure.turns import Timing, ratios
from pipeline.machine import usable_cores
from pipeline.sources.reader import ImageReader
from pipeline.streams import print_result, protect_output
from predict.forecast import forecast
from predict.limit import measure_limit, most_times
from train import distributed
from train.config import Config
from train.distributed import World, gather
from train.run.folder import environment, has_fast_bf16
from train.window import peak_gib

LOADER_ROWS = 64  # images a batch and rank, where training's batch is smaller


def say(world: World, text: str) -> None:
    """Progress, on rank 0's stderr."""
    if world.is_main:
        print(text, file=sys.stderr, flush=True)


@dataclass
class Bench:
    """The parts that can be measured; each adds to `result`, the same on every rank."""

    config: Config
    m: MeasureConfig
    world: World
    result: dict = field(default_factory=lambda: {"ratios": {}, "images_per_s": {}})

    def run(self) -> dict:
        """All parts that were asked for."""
        wanted = set(self.m.what)
        reader: Any = None
        if wanted & {"loader", "host", "end_to_end"}:
            reader = open_images(self.config, self.world)
        parts = {
            "loader": lambda: self.loader(reader),
            "host": lambda: self.host(reader),
            "step": self.step,
            "end_to_end": lambda: self.end_to_end(reader),
            "limit": self.limit,
            "ranks": self.ranks,
        }
        for name, measure in parts.items():
            if name in wanted:
                measure()
        return self.result | {"memory": memory(self.world)}

    def add(self, part: str, timings: dict[str, Timing]) -> list[float]:
        """Keep the timings of a part; images/s of each rank (medians)."""
        rates = gather(self.world, None if timings["ours"].not_measured else timings["ours"].rate())
        rates = [rate for rate in rates if rate is not None]
        self.result[part] = {name: timing.summary() for name, timing in timings.items()}
        self.result["ratios"] |= ratios(part, timings)
        self.result["images_per_s"][part] = round(sum(rates), 2)
        return rates

    @property
    def with_peers(self) -> str:
        """For the line of progress."""
        return "ours and its peers ..." if self.m.peers else "ours ..."

    def loader(self, reader: ImageReader) -> None:
        """The loader, its stages and its peers."""
        from measure.loader_times import measure_loader, measure_stages  # imports DALI

        say(self.world, f"loader: {self.with_peers}")
        rows = max(LOADER_ROWS, self.config.data.batch_size // self.world.size)
        larger = with_batch(self.config, rows * self.world.size)
        self.add("loader", measure_loader(reader, larger, self.m, self.world))
        self.result["stages"] = measure_stages(reader, larger, self.world, n=self.m.repeats)

    def host(self, reader: ImageReader) -> None:
        """The loader without decoding."""
        from measure.host_cost import measure_host  # imports DALI

        say(self.world, "host: the loader without decoding ...")
        self.result["host"] = measure_host(reader, self.config, self.world, n=self.m.repeats)

    def step(self) -> None:
        """The step, its peers, and each rank's part of it."""
        say(self.world, f"step: {self.with_peers}")
        rates = self.add("step", measure_step(self.config, self.m, self.world))
        if rates:
            ranks = {"total_images_per_s": sum(rates), "images_per_s": rates}
            self.result["ranks"] = ranks | {"slowest_rank": rates.index(min(rates))}

    def end_to_end(self, reader: ImageReader) -> None:
        """Loader and step together, against the slower of the two."""
        say(self.world, "end to end ...")
        timing, wait = measure_end_to_end(reader, self.config, self.m, self.world)
        self.add("end_to_end", {"ours": timing})
        self.result["end_to_end"]["data_wait_pct"] = round(wait, 2)
        rates = self.result["images_per_s"]
        slower = min(rates.get("loader", 0), rates.get("step", 0))
        if slower and timing.not_measured is None:
            self.result["ratios"]["end_to_end/slower"] = round(rates["end_to_end"] / slower, 3)

    def limit(self) -> None:
        """The roofline of a rank's step, and how much of it the measured step reaches."""
        say(self.world, "limit ...")
        rows = self.config.data.batch_size // self.world.size
        limit = measure_limit(self.config, self.world.device, rows=rows)
        if per_rank := self.result["images_per_s"].get("step", 0) / self.world.size:
            flops = per_rank * limit["gflop_per_image"] * 1e9
            limit["share_of_roofline"] = round(per_rank / limit["images_per_s"], 4)
            limit["mfu"] = round(flops / (limit["matmul_tflop_per_s"] * 1e12), 4)
        peers = most_times(limit["images_per_s"], self.result.get("step", {}))
        self.result["limit"] = limit | peers

    def ranks(self) -> None:
        """Where a step's time is spent, its collectives, and how ranks scale against one."""
        world, rows = self.world, self.config.data.batch_size // self.world.size
        (state, train), batch = open_step(self.config, world), random_batch(self.config, world)
        trace = trace_of(lambda: train(batch), world.device)
        self.result["timeline"] = timeline(trace)
        if world.size == 1 or "ranks" not in self.result:
            return
        say(world, "one rank alone ...")
        alone, efficiency = None, None
        if world.is_main:
            without = replace(self.m, peers=False)
            timing = measure_step(with_batch(self.config, rows), without, world.alone())["ours"]
            alone = None if timing.not_measured else timing.rate()
        alone = distributed.from_main(world, alone)
        if alone:
            total = self.result["ranks"]["total_images_per_s"]
            efficiency = round(total / world.size / alone, 4)
        learned = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
        self.result["ranks"] |= {
            "one_rank_alone_images_per_s": alone,
            "scaling_efficiency": efficiency,
            "collectives_per_step": collectives(trace),
            "gradient_bytes_per_step": 4 * learned,
        }


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
    return {name: max(rank[name] for rank in everywhere) for name in mine}


def check_method(config: Config, m: MeasureConfig) -> None:
    """Raise ValueError if a part that is SimSiam's two views alone is asked for with others."""
    remedies = {"--dry-run": "leave it out"}
    if not m.dry_run:
        remedies = {"--peers true": "give --peers false"} if m.peers else {}
        if "limit" in m.what:
            remedies["--what limit"] = "give --what loader,step,end_to_end,ranks"
    name, views = config.method.name, config.method.spec.num_views
    if (name, views) != ("simsiam", 2) and remedies:
        raise ValueError(
            f"{' and '.join(remedies)}: for SimSiam's step of two views alone, --method.name is "
            f"{name}, with {views} views: {' and '.join(remedies.values())}"
        )


def check_machine(config: Config, world: World) -> None:
    """Warn of flags that make this machine slow. Raises: ValueError for a batch it cannot split."""
    batch_size, threads, cores = config.data.batch_size, config.dali.threads, usable_cores()
    if batch_size % world.size:
        raise ValueError(f"{world.size} processes do not divide --data.batch_size {batch_size}")
    if threads > cores:
        text = "they will wait for each other; 0 takes what is there"
        say(world, f"warning: --dali.threads {threads} on {cores} cores: {text}")
    if config.precision == "bf16" and world.device.type == "cpu" and not has_fast_bf16():
        text = "software computes them; --precision fp32 is many times faster"
        say(world, f"warning: this CPU has no bf16 instructions: {text}")


def main() -> None:
    """Read the flags, measure, print the tables and one JSON line."""
    config, m = read_flags("profiling/throughput.py", "Measure images per second.")
    with errors_in_one_line():
        check_method(config, m)
        if m.dry_run:
            print_result(forecast(config, gpu=m.gpu, gpus=m.gpus))
            return
        with distributed.start(config.device, config, options=m) as world:
            check_machine(config, world)
            m = m.filled(world.device)
            result = Bench(config, m, world).run()
            result |= {"n": m.repeats, "config": asdict(config), "measure": asdict(m)}
            result["environment"] = environment(world.size, world.device)
    if world.is_main:
        print_tables(result)
        save_and_print(result, m.save, draw)


if __name__ == "__main__":
    protect_output()
    main()
