"""Train another program's SimSiam, with train/main.py's flags and run folder.

    python profiling/train_peer.py lightly --config configs/learning.yaml --data.root DIR --out RUN

lightly needs `pip install --no-deps lightly tqdm lightning-utilities`; official is the step of
facebookresearch/simsiam on views of our loader; both are in measure/peer_training.py. The clock
counts each one's own loading and steps; kNN, ours for all, and the checkpoint after each epoch are
not counted. profiling/learning.py compares the runs with train/main.py's. The same command resumes
at the epoch that was stopped.
"""

import root_first  # isort: skip # noqa: F401

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from jsonargparse import ArgumentError
from torch import nn

from measure.peer_training import (
    PEERS,
    Views,
    build_peer,
    check_peer,
    lightly_epochs,
    our_epochs,
    train_epoch,
)
from pipeline.machine import usable_cores
from pipeline.order import SampleOrder
from pipeline.streams import print_result, protect_output
from train.config import Config
from train.config.parser import build_parser, explain
from train.distributed import World, resolve_device, stop_at_once
from train.distributed.startup import follow_launcher
from train.evaluation.embed import knn_accuracy
from train.loop import knn_is_due
from train.network.model import build_backbone, set_tf32
from train.run import checkpoint, state
from train.run.data import RunData, open_data
from train.run.folder import Log, RunFolder, RunWriter, environment
from train.run.optim import Schedule
from train.run.program import exit_on_error, refuse
from train.run.state import TrainState


def read_flags(words: Sequence[str]) -> tuple[str, Config]:
    """The program's name and the run's flags. Exits with 2 and one line for a mistake."""
    description = "Train another program's SimSiam."
    parser = build_parser("profiling/train_peer.py", description, usage="--out RUN [flags] PROGRAM")
    parser.add_argument("program", help="lightly or official.")
    try:
        values = vars(parser.instantiate(parser.parse_args(words)))
        values.pop("config", None)
        name, config = values.pop("program"), Config(**values)
        if name not in PEERS:
            raise ValueError(f"program {name} is unknown: {' or '.join(PEERS)}")
        if not config.out:
            raise ValueError("--out RUN is required: the run's folder, which is resumed")
        return name, config
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        refuse(explain(str(error)))


def open_world(config: Config) -> World:
    """This process alone, with all cores, and no setting that ours makes for its own step."""
    if "WORLD_SIZE" in os.environ:  # set by profiling/learning.py
        follow_launcher()
    device = torch.device(resolve_device(config.device))
    set_tf32(config.precision, device)
    torch.set_num_threads(usable_cores())
    return World(0, 1, 0, 1, device, None)


def open_batches(
    name: str, config: Config, data: RunData, schedule: Schedule, device: torch.device
) -> Callable[[int], Iterator[Views]]:
    """The batches of an epoch, by its number."""
    if name == "lightly":
        return lightly_epochs(config, data.train.source.root, device)
    return our_epochs(config, data, schedule, device)


def check_knn(
    config: Config,
    world: World,
    data: RunData,
    current: TrainState,
    schedule: Schedule,
    run: RunWriter,
) -> None:
    """Log our kNN accuracy of the peer's encoder where it is due."""
    step = current.step
    if not knn_is_due(config, schedule, step) or str(step) in current.knn:
        return
    encoder, trunk = build_backbone(config.model), cast(nn.Module, current.ddp.trunk)
    encoder.load_state_dict(trunk.state_dict())  # its names are torchvision's
    encoder.to(device=world.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload] - missing in torch's stub
    top1 = knn_accuracy(encoder, data, config, world, tell=run.log)
    if top1 is None:
        return
    current.knn[str(step)] = top1
    epoch, train_s = step / schedule.steps_per_epoch, round(current.train_s, 3)
    run.log(f"epoch {epoch:.2f}  step {step}  kNN top-1 {top1:.2f} %")
    run.metrics.scalars(step, {"eval/knn_top1": top1}, epoch=epoch, train_s=train_s)


def train_epochs(
    name: str,
    config: Config,
    world: World,
    data: RunData,
    current: TrainState,
    schedule: Schedule,
    run: RunWriter,
) -> None:
    """Train to the schedule's last step, with kNN and a checkpoint after each epoch."""
    batches = open_batches(name, config, data, schedule, world.device)
    evaluated = config, world, data, current, schedule, run
    check_knn(*evaluated)
    while current.step < schedule.last:
        begin = current.train_s
        epoch = current.step // schedule.steps_per_epoch
        loss = train_epoch(current, config, schedule, batches(epoch))
        seconds = current.train_s - begin
        rate = schedule.steps_per_epoch * config.data.batch_size / seconds
        row = {"train/loss": loss, "throughput/images_per_sec": rate}
        row["train/lr"] = current.optimizer.param_groups[0]["lr"]
        current.last = row
        run.metrics.scalars(current.step, row, epoch=float(epoch + 1))
        run.log(f"epoch {epoch + 1}  step {current.step}  loss {loss:.4f}  {rate:.1f} images/s")
        check_knn(*evaluated)
        state.save_checkpoint(current, run, is_last=current.step == schedule.last)


def run_peer(name: str, config: Config, world: World, folder: RunFolder, log: Log) -> dict:
    """Train in the folder, from its newest checkpoint if it has one; the run's result."""
    data = open_data(config.data, out=folder.path, seed=config.seed, world=world)
    source = data.train.source
    order = SampleOrder(len(source), batch_size=config.data.batch_size, seed=config.seed)
    schedule = Schedule(order, config.epochs, config.max_steps)
    if schedule.last % schedule.steps_per_epoch:
        raise ValueError(
            f"--max_steps {config.max_steps} ends within an epoch of {schedule.steps_per_epoch} "
            "steps: a peer is trained for whole epochs"
        )
    current = build_peer(name, config, world, images=len(source))
    facts = state.run_facts(config, source.fingerprint, world)
    facts["config"]["program"] = name
    saved = checkpoint.load_newest(folder.checkpoints, log=log.warn)
    if saved is not None:
        state.check_same_run(saved.facts, facts, folder.path)
        state.restore(current, saved)
        log(f"continuing {folder.path} at step {current.step}")
    folder.describe(dataclasses.asdict(config), environment(1, world.device))
    folder.status("running", current.step)
    writer = RunWriter(folder, log, facts, step=current.step)
    train_epochs(name, config, world, data, current, schedule, writer)
    writer.metrics.close()
    result = {
        "program": name,
        "knn_top1": current.knn.get(str(current.step)),
        "knn_top1_untrained": current.knn.get("0"),
        "loss": current.last.get("train/loss"),
        "images_per_s": current.step * config.data.batch_size / current.train_s,
        "train_s": current.train_s,
        "steps": current.step,
        "state": "finished",
        "run": str(folder.path),
    }
    folder.write("result.json", result)
    folder.status("finished", current.step)
    return result


def main() -> None:
    """Read the flags, train, print the result as the last line of stdout."""
    name, config = read_flags(sys.argv[1:])
    out = Path(config.out)
    stopped = "stopped; the same command repeats the epoch that was in progress"
    with exit_on_error(out, stopped=stopped):
        check_peer(name, config)
        world = open_world(config)
        stop_at_once(world)
        with RunFolder(config.out) as folder:
            result = run_peer(name, config, world, folder, Log(out / "log.txt"))
    print_result(result, kept=out / "result.json")


if __name__ == "__main__":
    protect_output()
    main()
