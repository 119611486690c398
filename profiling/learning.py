"""What is learned in how many epochs and hours, ours beside other programs on the same cores.

    python profiling/learning.py --data.root DIR --out LEARNING --minutes 110     # until "finished"

DIR holds train/<class>/*.jpg and test/<class>/*.jpg. Without --config it is configs/learning.yaml,
CIFAR-10; all flags of train/main.py apply, and go to all programs. ours is train/main.py itself,
the others are profiling/train_peer.py's: the same images, network, initial weights, recipe and kNN.
They take turns of eval.every_epochs epochs, each in a new process with all cores, so that what else
the machine does hits all alike. Hours are of training with each one's own loading; kNN, checkpoints
and starts do not count.

The same command resumes. --minutes ends it between two turns; after Ctrl-C or SIGTERM ours resumes
at the step that it had reached, a peer at the beginning of the epoch that was in progress.
"""

import root_first  # isort: skip # noqa: F401

import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import yaml
from filelock import FileLock, Timeout
from jsonargparse import ArgumentError

from measure.charts import draw_learning
from measure.peer_training import check_peer
from measure.results import ROOT, check_save, print_table, save_and_print
from pipeline.sources.folder import list_images
from pipeline.sources.splits import split_root
from pipeline.streams import protect_output
from train.config import Config, at_least, flat
from train.config.parser import build_parser, explain, flags, parse_config, with_brackets
from train.distributed import StopSignal, resolve_device
from train.run.data import check_apart
from train.run.folder import Log, environment, read_metrics
from train.run.program import exit_on_error, refuse
from train.studies.report import cell, spread
from train.studies.runs import ALONE, MAIN, POLL_S, Place, Run, failure, plan_places, start

PRESET = ROOT / "configs" / "learning.yaml"
TRAIN_PEER = ROOT / "profiling" / "train_peer.py"
Program = Literal["ours", "lightly", "official"]


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """Which programs, and how long; every other flag is train/main.py's and goes to all runs."""

    programs: tuple[Program, ...] = ("ours", "lightly")
    """Which to train, e.g. --programs ours,lightly,official."""
    seeds: int = 2
    """Runs of each program: the seeds --seed, --seed + 1, ..."""
    minutes: float = 0.0
    """Begin no turn that would end later than so many minutes from the start; the first is done in
    any case, and the same command resumes. 0: until all is done."""
    save: str = ""
    """Once all is done, also write profiling/results/<this>_<device>_<yyyymm>.json and .png."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        at_least("seeds", self.seeds, 1)
        at_least("minutes", self.minutes, 0)
        check_save(self.save)
        if not self.programs or len(set(self.programs)) < len(self.programs):
            raise ValueError("programs must name at least one, and each once")


@dataclass(frozen=True)
class Turn:
    """A run continued to this many steps."""

    run: Run
    steps: int

    def is_done(self) -> bool:
        """Whether a process of the run has ended there, or further."""
        result = self.run.read("result.json")
        return result.get("steps", 0) >= self.steps


def read_flags(words: Sequence[str]) -> tuple[LearningConfig, Config]:
    """The program's own flags and the runs'. Exits with 2 and one line for a mistake in them."""
    description = "Compare what programs learn, over epochs and hours."
    parser = build_parser("profiling/learning.py", description)
    parser.add_class_arguments(LearningConfig, as_group=True)
    if not any(word.split("=")[0] == "--config" for word in words):
        words = [f"--config={PRESET}", *words]
    try:
        values = vars(parser.instantiate(parser.parse_args(with_brackets(words, ["--programs"]))))
        values.pop("config", None)
        own = LearningConfig(**{f.name: values.pop(f.name) for f in fields(LearningConfig)})
        config = Config(**values)
        if config.max_steps:
            raise ValueError("--max_steps is set for each turn: leave it out, and give --epochs")
        return own, config
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        refuse(explain(str(error), [*flags(), *flags(LearningConfig)]))


def keep_settings(config: Config, out: Path) -> Path:
    """A preset of the runs' settings. Raises: ValueError if the folder has runs of others."""
    preset, now = out / "settings.yaml", flat(dataclasses.replace(config, out=""))
    if preset.exists():
        before = flat(parse_config([f"--config={preset}"]))
        if changed := [f"--{name} was {was}" for name, was in before.items() if was != now[name]]:
            raise ValueError(
                f"{out} holds runs with other settings ({', '.join(changed)}): use the same, or "
                "another --out"
            )
    settings = dataclasses.asdict(dataclasses.replace(config, out=""))
    preset.write_text(yaml.safe_dump(settings, sort_keys=False))
    return preset


def plan_turns(own: LearningConfig, config: Config, out: Path, steps_per_epoch: int) -> list[Turn]:
    """All turns in order: the programs alternate, to the end of a seed, then of the next."""
    preset = keep_settings(config, out)
    every, turns = config.eval.every_epochs, []
    ends = [*range(every, config.epochs, every), config.epochs]
    for seed in range(config.seed, config.seed + own.seeds):
        for epoch in ends:
            for program in own.programs:
                folder, steps = out / program / f"seed-{seed}", epoch * steps_per_epoch
                script = [str(MAIN)] if program == "ours" else [str(TRAIN_PEER), program]
                words = [f"--config={preset}", f"--seed={seed}", f"--out={folder}"]
                command = sys.executable, *script, *words, f"--max_steps={steps}"
                turns.append(Turn(Run(program, seed, folder, command), steps))
    return turns


def take_turns(turns: Sequence[Turn], place: Place, *, minutes: float, log: Log) -> str:
    """Run the turns; returns "finished", or "paused" after `minutes` or a signal.

    Raises: ValueError with the reason of a run that failed.
    """
    stop = StopSignal(ALONE)
    seconds: list[tuple[str, float]] = []
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    process = None
    try:
        for number, turn in enumerate(turns):
            began, program = time.monotonic(), turn.run.variant
            expected_s = max((took for name, took in seconds if name == program), default=0.0)
            if seconds and began + expected_s > deadline:
                return "paused"
            process, is_stopping = start(turn.run, place), False
            while process.poll() is None:
                if stop.agreed() and not is_stopping:
                    process.terminate()
                    is_stopping = True
                time.sleep(POLL_S)
            if stop.agreed():
                return "paused"
            if (reason := failure(turn.run, process.returncode)) is not None:
                raise ValueError(f"{program}, seed {turn.run.seed}: {reason}")
            seconds.append((program, time.monotonic() - began))
            left_s = statistics.mean(took for _, took in seconds) * (len(turns) - number - 1)
            log(f"{number + 1}/{len(turns)}  {figures(turn.run)}; {left_s / 60:.0f} min left")
        return "finished"
    finally:
        if process is not None and process.poll() is None:
            process.kill()
        stop.close()


def figures(run: Run) -> str:
    """Where a run is, in one line."""
    result = run.read("result.json")
    knn = "no kNN" if result["knn_top1"] is None else f"kNN {result['knn_top1']:.2f} %"
    hours = f"{result['train_s'] / 3600:.3f} h of training"
    return f"{run.variant}, seed {run.seed}: {result['steps']} steps, {knn}, {hours}"


def run_of(run: Run) -> dict | None:
    """A run's curves: [epoch, hours of training, kNN top-1], [epoch, loss]; None before a turn."""
    result, rows = run.read("result.json"), read_metrics(run.folder / "metrics.jsonl")
    if not result:
        return None
    knn = [row for row in rows if "eval/knn_top1" in row]
    loss = [row for row in rows if "train/loss" in row]
    return {
        "seed": run.seed,
        "revision": run.read("env.json").get("revision"),
        "steps": result["steps"],
        "train_s": result["train_s"],
        "images_per_s": result["images_per_s"],
        "knn": [[row["epoch"], row["train_s"] / 3600, row["eval/knn_top1"]] for row in knn],
        "loss": [[round(row["epoch"], 3), round(row["train/loss"], 4)] for row in loss],
    }


def summarize(runs: Sequence[Run], epochs: int) -> dict:
    """Each program's runs and their spread over seeds, and our images/s against its, seed by seed.

    hours and knn_top1 are of the runs that have reached the last epoch.
    """
    programs: dict[str, dict] = {}
    for run in runs:
        if (found := run_of(run)) is not None:
            programs.setdefault(run.variant, {"runs": []})["runs"].append(found)
    for program in programs.values():
        of = program["runs"]
        ends = [run["knn"][-1] for run in of if run["knn"][-1:] and run["knn"][-1][0] == epochs]
        program |= {
            "n": len(of),
            "images_per_s": spread([run["images_per_s"] for run in of]),
            "hours": spread([hours for _, hours, _ in ends]),
            "knn_top1": spread([top1 for _, _, top1 in ends]),
        }
    rates = {
        name: {run["seed"]: run["images_per_s"] for run in program["runs"] if run["train_s"]}
        for name, program in programs.items()
    }
    ours = rates.pop("ours", {})
    ratios = {
        f"ours/{name}": spread([ours[seed] / of[seed] for seed in of.keys() & ours.keys()])
        for name, of in rates.items()
    }
    return {"programs": programs, "images_per_s_ratios": ratios}


def show(result: dict) -> None:
    """The table for people, on stderr."""
    rows = [
        (name, of["n"], cell(of["knn_top1"], 2), cell(of["images_per_s"], 1), cell(of["hours"], 2),
         cell(result["images_per_s_ratios"].get(f"ours/{name}"), 2))
        for name, of in result["programs"].items()
    ]  # fmt: skip
    columns = "program", "runs", "kNN top-1 at the end [%]", "images/s", "hours", "ours / this"
    print_table(f"{result['epochs']} epochs, {result['state']}", columns, rows)


def compare(own: LearningConfig, config: Config, out: Path, log: Log) -> dict:
    """Take the turns that are left; the result, also in learning.json and learning.png."""
    roots = *split_root(config.data.root), config.data.val
    check_apart(out, *roots)
    images = len(list_images(roots[0]))
    steps_per_epoch = images // config.data.batch_size
    if not steps_per_epoch:
        raise ValueError(f"--data.batch_size {config.data.batch_size} exceeds the {images} images")
    turns = plan_turns(own, config, out, steps_per_epoch)
    left = [turn for turn in turns if not turn.is_done()]
    log(f"{len(turns)} turns of {config.eval.every_epochs} epochs, {len(left)} left")
    device = resolve_device(config.device)
    (place,) = plan_places(1, with_gpus=device == "cuda")
    state = take_turns(left, place, minutes=own.minutes, log=log)
    if state == "paused":
        log("paused; the same command resumes, a peer at the start of an epoch that was stopped")
    runs = list({turn.run.folder: turn.run for turn in turns}.values())
    result = {
        "state": state,
        "n": own.seeds,
        "command": shlex.join(["python", "profiling/learning.py", *sys.argv[1:]]),
        "images": images,
        "epochs": config.epochs,
        "batch_size": config.data.batch_size,
        **summarize(runs, config.epochs),
        "config": dataclasses.asdict(config),
        "environment": environment(1, torch.device(device)),
    }
    (out / "learning.json").write_text(json.dumps(result, indent=1) + "\n")
    draw_learning(result, out / "learning.png")
    return result


def main() -> None:
    """Read the flags, train, print the table and one JSON line."""
    own, config = read_flags(sys.argv[1:])
    out = Path(config.out or "runs/learning")
    with exit_on_error(out, stopped="stopped; the same command resumes"):
        for program in own.programs:
            if program != "ours":
                check_peer(program, config)
        out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(out / ".lock", timeout=0):
                result = compare(own, config, out, Log(out / "log.txt"))
        except Timeout:
            refuse(f"--out {out} is in use by another process: wait, or choose another", code=1)
        show(result)
        save_and_print(result, own.save * (result["state"] == "finished"), draw_learning)


if __name__ == "__main__":
    protect_output()
    main()
