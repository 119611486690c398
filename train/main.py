"""Train a SimSiam encoder: `python train/main.py --data.root DIR`, or under torchrun.

The table of contents, in the order in which a batch of images passes it:
pipeline/ (list, order, read, decode, augment) -> kernels/normalize -> train/methods/simsiam
(resnet, heads, loss) -> train/run/optim -> train/loop (log, kNN) -> train/run/state (checkpoint).
There is no --resume: the same command continues the run in its --out folder.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

from kernels.choose import use_triton
from pipeline.order import SampleOrder
from pipeline.streams import print_result, protect_output
from train import distributed
from train.config import Config
from train.distributed import World, from_main
from train.distributed.watch import may_restart
from train.distributed.world import watched
from train.loop import train, write_features
from train.run import checkpoint, conv_choice, state, versions
from train.run.data import content_hash, open_data
from train.run.folder import (
    SLOW_PRECISION,
    Log,
    RunFolder,
    RunWriter,
    environment,
    is_slow_precision,
)
from train.run.optim import GuardedStep, Schedule, build_optimizer
from train.run.program import exit_on_error, read_config
from train.run.report import finish
from train.run.state import TrainState
from train.run.step_graph import StepGraph


def build_state(
    config: Config, world: World, images: int, *, tell: Callable[[str], None] = lambda line: None
) -> TrainState:
    """The model from the seed, the same on all ranks, and its optimizer, at step 0.

    images: number of training images; tell: called with a line for memory taken beside the network.
    """
    with_triton = use_triton(config.model.kernels, torch.empty(0, device=world.device))
    for flag in ("recompute", "conv_stats"):
        if getattr(config.model, flag) in (True, "true") and not with_triton:
            raise ValueError(
                f"--model.{flag} true needs the Triton kernels, which run on a CUDA device: leave "
                "it false with --model.kernels plain and on the CPU"
            )
    torch.manual_seed(config.seed)
    model = state.build_method(config, images=images, device=world.device, tell=tell)
    model = model.to(device=world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload] - missing in torch's stub
    model.sync_over(world.sums)
    optimizer = build_optimizer(model, config.optim, lr=config.lr, device=world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
    compiled = {"auto": world.device.type == "cuda", "true": True, "false": False}
    if compiled[config.compile]:
        # under DDP cut at its buckets, so that gradients are sent early; free: profiling/LOG.md
        model.compile(dynamic=False)
    ddp: nn.Module = model
    if world.size > 1:
        ddp = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[world.local_rank] if world.device.type == "cuda" else None,
            **distributed.own_buffers(),  # synchronised batch norm keeps them equal
            gradient_as_bucket_view=True,
        )
    graph, problem = None, why_no_graph(config, world)
    if problem is not None and config.cuda_graph == "true":
        raise ValueError(f"--cuda_graph true: {problem}: leave it out")
    if problem is None and config.cuda_graph != "false":
        only_short = config.cuda_graph == "auto"
        graph = StepGraph(optimizer, world.device, only_short=only_short)
    return TrainState(model, ddp, optimizer, GuardedStep(optimizer, scaler, world.device), graph)


def why_no_graph(config: Config, world: World) -> str | None:
    """Why a step of this run cannot be recorded as a CUDA graph, or None."""
    spec = config.method.spec
    problems = {
        "it needs a CUDA device": world.device.type != "cuda",
        "several GPUs exchange gradients between the launches": world.size > 1,
        f"a step of {spec.title} with these flags is not the same each time": not spec.is_static,
        "the loss scale of --precision fp16 changes from step to step": config.precision == "fp16",
        "apex's optimizer takes its learning rate as a number": config.optim.implementation
        == "apex",
    }
    return next((problem for problem, is_there in problems.items() if is_there), None)


def run(config: Config, world: World, out: Path, folder: RunFolder | None, log: Log) -> dict:
    """Train in the folder `out`, from its newest checkpoint if it has one; the run's result."""
    data = open_data(config.data, out=out, seed=config.seed, world=world)
    source = data.train.source
    order = SampleOrder(len(source), batch_size=config.data.batch_size, seed=config.seed)
    schedule = Schedule(order, config.epochs, config.max_steps)
    current = build_state(config, world, len(source), tell=log)
    conv_choice.choose(current.model, config, world, out / conv_choice.FILE, log)
    facts = state.run_facts(config, source.fingerprint, world)
    if config.data.verify:
        facts["content"] = content_hash(source, world, log)
    # rank 0 reads it and sends it: hosts need not see the same disk
    saved = checkpoint.load_newest(out / "checkpoints", log=log.warn) if world.is_main else None
    saved = from_main(world, saved)
    if saved is not None:
        state.check_same_run(saved.facts, facts, out)
        if world.is_main:
            state.tell_changes(saved, source, facts, log.warn)
        facts = {name: saved.facts[name] for name in ("content",) if name in saved.facts} | facts
        state.restore(current, saved)
        log(f"continuing {out} at step {current.step}")
    elif config.init:
        state.start_from(current.model, Path(config.init), log=log)
    if folder is not None:
        folder.describe(dataclasses.asdict(config), environment(world.size, world.device))
        folder.status("running", current.step)
    writer = RunWriter(folder, log, facts, step=current.step)
    if folder is not None:
        writer.metrics.text("config", (out / "config.yaml").read_text())
    if is_slow_precision(config.precision, world.device):
        log.warn(SLOW_PRECISION)
    if world.device.type == "cuda" and (wheel := versions.dali()).ok is False:
        log.warn(f"{wheel.found}: {wheel.remedy}")
    log(
        f"{len(source)} images, {order.steps_per_epoch} steps an epoch, {world.size} x "
        f"{world.device}, global batch {order.batch_size}, learning rate {config.lr:.4g}"
    )
    for kind, count in source.skipped.items():
        log(f"left out under {source.root}: {count} x {kind}")
    for line in data.notes:
        log(line)
    with watched(out, world, config.timeout_s) as stacks:
        ended = train(config, world, data, current, schedule, writer, stacks)
        if ended == "finished":
            write_features(config, world, data, current, writer)
        return finish(config, world, current, schedule, writer, ended=ended)


@record
def main() -> None:
    """Read the flags, train, print the result as the last line of stdout."""
    config = read_config()
    folder, log = None, Log(None)
    out = Path(config.out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    memory = "lower --data.batch_size, the sizes of views or --model, or use more GPUs"
    stopped = "stopped; the same command with its --out continues from its checkpoint"
    # the folder closes after the world, whose end may name the rank that is gone
    with (
        exit_on_error(out, memory_remedy=f"{memory} for the same batch", stopped=stopped),
        ExitStack() as opened,
        distributed.start(config.device, config) as world,
    ):
        distributed.stop_at_once(world)
        versions.refuse_misfits(config.device)
        # rank 0's: a config.yaml that was copied alone names no folder on another host
        if not from_main(world, config.out) and may_restart():
            raise ValueError("--max-restarts needs --out DIR: a restart would begin a new run")
        out = Path(from_main(world, str(out)))
        if world.is_main:
            folder = opened.enter_context(RunFolder(str(out)))
            log = Log(folder.path / "log.txt")
            if world.watch is not None:
                world.watch.on_end = folder.fail
        result = run(config, world, out, folder, log)
    if folder is not None:
        print_result(result, kept=folder.path / "result.json")


if __name__ == "__main__":
    protect_output()
    main()
