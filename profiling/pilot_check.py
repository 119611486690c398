"""Does the pilot choose well? All its settings, trained to the end and compared by kNN.

    python profiling/pilot_check.py --data.root DIR --minutes 20 --out PILOT --save pilot-digits

Takes the flags of train/pilot.py, for images with labels. Runs the pilot, or takes one that is
there; then trains the settings that halving left, in copies of their folders, and measures kNN of
every labelled image among all others. Prints the rank correlation (Spearman) between each measure
without labels and kNN, of the score at the first part with kNN at the end, and the kNN of the
setting that was chosen, of the best and of the preset. The same command continues.
"""

import root_first  # isort: skip # noqa: F401

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from measure.results import check_save, print_table, save_and_print
from pipeline.streams import protect_output
from train.config import Config
from train.distributed import World, resolve_device, take_device
from train.evaluation.embed import embed, nearest, vote
from train.main import build_state
from train.network.resnet import ResNet
from train.pilot import Pilot, advance, prepare, run_pilot
from train.pilots.flags import read_flags
from train.pilots.space import Plan
from train.pilots.trial import Trial
from train.pilots.workers import Workers
from train.run import checkpoint, state
from train.run.data import RunData, open_data
from train.run.folder import Log, RunFolder, environment
from train.run.program import exit_on_error
from train.studies.runs import plan_places

MEASURES = {
    "score": 1,
    "retrieval": 1,
    "retrieval_z": 1,
    "rank_features": 1,
    "rank_z": 1,
    "decay": -1,
    "alignment": -1,
    "uniformity": -1,
    "collapse_meter": 1,
}
"""What a judgement holds without labels; -1 where less is better."""


def finish(trial: Trial, plan: Plan) -> dict:
    """In a worker: train the parts that are left and judge; kNN of all images. The judgement."""
    config = trial.config
    for part in plan.parts:
        diverged = any("diverged" in each for each in trial.read()["judged"])
        if trial.judged(part[1]) is None and not diverged:
            advance(trial, part, float("inf"))
    judged = trial.judged(trial.total) or trial.read()["judged"][-1]  # that of a divergence
    device = take_device(config.device, 0, 1, config.precision)
    world = World(0, 1, 0, 1, device, None)
    data = open_data(config.data, out=trial.folder, seed=config.seed, world=world)
    current = build_state(config, world, len(data.train.source))
    saved = checkpoint.load_newest(trial.folder / "checkpoints", log=trial.warn)
    assert saved is not None
    state.restore(current, saved)
    return judged | {"knn": others_vote(current.model.backbone, data, config, world)}


def others_vote(backbone: ResNet, data: RunData, config: Config, world: World) -> float:
    """kNN top-1 in percent of every labelled image among all others, held-out ones included."""
    assert data.bank is not None and data.queries is not None
    parts = [embed(backbone, images, config, world) for images in (data.bank, data.queries)]
    features, labels = (torch.cat(part) for part in list(zip(*parts, strict=True))[:2])
    similarity, index = nearest(features, features, config.eval.k + 1)
    is_self = index == torch.arange(len(index), device=index.device)[:, None]
    votes = similarity.masked_fill(is_self, float("-inf"))  # of weight 0
    classes, temperature = len(data.class_names), config.eval.temperature
    named = vote(votes, labels[index], num_classes=classes, temperature=temperature)
    return 100 * (named == labels).float().mean().item()


def finish_all(pilot: Pilot, folder: Path, jobs: int, log: Log) -> list[dict]:
    """Every setting, trained in a copy of its folder."""
    copies, trials = replace(pilot, folder=folder), []
    for trial in pilot.trials():
        trials.append(copies.trial(trial.setting, trial.total))
        has_weights = (trial.folder / "checkpoints").exists()  # else it is trained anew
        if has_weights and not (trials[-1].folder / "trial.json").exists():
            shutil.rmtree(trials[-1].folder)  # empty, or a copy that was stopped
            copy = folder / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(trial.folder, copy)
            copy.rename(trials[-1].folder)
    rows = []
    with Workers(plan_places(jobs, with_gpus=resolve_device(pilot.base.device) == "cuda")) as pool:
        began = time.monotonic()
        for trial, judged in pool.map(finish, trials, pilot.saved_plan()):
            early = trial.read()["judged"][0]["score"]
            rows.append({"setting": vars(trial.setting), "early_score": early, **judged})
            left = (time.monotonic() - began) * (len(trials) / len(rows) - 1) / 60
            log(f"{trial.setting}: kNN {judged['knn']:.1f} %; about {left:.1f} min left")
    return rows


def compare(rows: Sequence[dict], preset: dict, chosen: dict | None) -> dict:
    """Rank correlations with kNN, and the kNN of the settings that matter."""
    knn = [row["knn"] or 0.0 for row in rows]
    correlation: dict = {}
    for name, sign in MEASURES.items():
        known = [(row[name], k) for row, k in zip(rows, knn, strict=True) if has(row, name)]
        correlation[name] = sign * spearman([x for x, _ in known], [k for _, k in known])
    early = spearman([row["early_score"] for row in rows], knn)
    of = {tuple(row["setting"].values()): k for row, k in zip(rows, knn, strict=True)}
    return {
        "correlation": correlation,
        "correlation_early_score": early,
        "collapsed": sum(row["collapsed"] for row in rows),
        "knn_chosen": None if chosen is None else of[tuple(chosen.values())],
        "knn_best": max(knn),
        "knn_preset": of[tuple(preset.values())],
    }


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The rank correlation; 0 where one of them is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    found: Any = spearmanr(first, second)
    return float(found.statistic)


def has(row: dict, name: str) -> bool:
    """Whether a judgement has this measure: one of features that are not finite has none."""
    return row.get(name) is not None


def main() -> None:
    """Read the flags, run the pilot and the rest of its trials, print and keep the comparison."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save", default="")
    arguments, words = parser.parse_known_args()
    own, config = read_flags(words)
    out = Path(config.out or "runs/pilot")
    with exit_on_error(out, stopped="stopped; the same command continues"):
        check_save(arguments.save)
        with RunFolder(str(out)) as folder:
            folder.checkpoints.rmdir()
            log = Log(out / "log.txt")
            found = run_pilot(own, words, folder, log)
            pilot, _ = prepare(words, folder, Log(None))
            if not pilot.trials() or not found["images"]["classes"]:
                raise ValueError(f"{pilot.base.data.root}: no trials, or no class labels for kNN")
            rows = finish_all(pilot, out / "finished", own.jobs, log)
    rows.sort(key=lambda row: -(row["knn"] or 0.0))
    result = {
        "command": " ".join(["python", "profiling/pilot_check.py", *sys.argv[1:]]),
        "n": len(rows),
        **compare(rows, vars(pilot.trials()[0].setting), found["setting"]),
        "pilot": found,
        "settings": rows,
        "environment": environment(1, torch.device(resolve_device(pilot.base.device))),
    }
    print_table(
        f"{len(rows)} settings on {pilot.base.data.root}",
        ["lr", "crop", "color", "score", "early score", "rank of z", "kNN [%]"],
        [[*map(str, row["setting"].values()), *figures(row)] for row in rows],
    )
    save_and_print(result, arguments.save)


def figures(row: dict) -> list[str]:
    """The table's figures of a setting."""
    names = ("score", "early_score", "rank_z", "knn")
    return [f"{row[name]:.1f}" if has(row, name) else "" for name in names]


if __name__ == "__main__":
    protect_output()
    main()
