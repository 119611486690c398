"""Run one of the paper's studies over seeds: `python train/study.py NAME`, or all of them.

    python train/study.py all                                        # the digits, on a CPU
    python train/study.py all --config configs/cifar10.yaml --data.root DIR          # a GPU

train/studies/variants.py defines what each study compares, runs.py executes the runs, several at
once, report.py writes study-NAME.json, .md and .png to --out. The same command resumes a study that
was stopped; with more --seeds it adds runs to all variants and keeps the finished ones.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import dataclasses
import difflib
import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from jsonargparse import ArgumentError

from pipeline.sources.folder import list_images
from pipeline.sources.splits import split_root
from pipeline.streams import print_result, protect_output
from train.config import Config, MethodConfig, at_least
from train.config.parser import build_parser, explain, flags
from train.distributed import resolve_device
from train.run.data import DIGITS, check_apart, image_root
from train.run.folder import Log, environment
from train.run.program import exit_on_error, refuse
from train.studies.report import draw, markdown, summarize, unlike_paper
from train.studies.runs import plan_places, plan_runs, run_all
from train.studies.variants import Study, studies

ALL = "all"
PRESET = Path(__file__).parent.parent / "configs" / "study.yaml"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How many runs; every other flag is train/main.py's and goes to all runs."""

    seeds: int = 3
    """Runs of each variant: the seeds --seed, --seed + 1, ..."""
    jobs: int = 0
    """Runs at once; 0: one for each GPU, or each core without GPUs."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        at_least("seeds", self.seeds, 1)
        at_least("jobs", self.jobs, 0)


def read_flags(words: Sequence[str]) -> tuple[str, StudyConfig, Config]:
    """The study's name, its flags and the baseline. Exits with 2 and one line for a mistake."""
    description = "Run the paper's studies over seeds."
    parser = build_parser("train/study.py", description, usage="[flags] NAME", root=DIGITS)
    names = "stop-gradient, predictor, batch-norm, symmetry, similarity, dimension, batch-size"
    names += ", views, alternation, moving-average, methods, or all."
    parser.add_argument("name", help=names)
    parser.add_class_arguments(StudyConfig, as_group=True)
    if not any(word.split("=")[0] == "--config" for word in words):
        words = [f"--config={PRESET}", *words]
    try:
        values = vars(parser.instantiate(parser.parse_args(words)))
        values.pop("config", None)
        name = values.pop("name")
        own = StudyConfig(**{key: values.pop(key) for key in flags(StudyConfig)})
        base = Config(**values)
        varied = base.method, base.model.head_norm, base.optim.constant_predictor_lr
        if varied != (MethodConfig(), "default", True):
            raise ValueError(
                "the studies vary --method.*, --model.head_norm and --optim.constant_predictor_lr "
                "themselves, around SimSiam as it is: leave them out"
            )
        return name, own, base
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        refuse(explain(str(error), [*flags(), *flags(StudyConfig)]))


def choose(name: str, known: Mapping[str, Study]) -> list[Study]:
    """The studies of a name. Exits with 2 and the nearest name if it is unknown."""
    if name == ALL:
        return list(known.values())
    if name not in known:
        near = difflib.get_close_matches(name, [*known, ALL], n=1, cutoff=0)[0]
        refuse(f"study {name} is unknown: perhaps you meant {near}, of {', '.join(known)}, {ALL}")
    return [known[name]]


def run_studies(chosen: Sequence[Study], own: StudyConfig, base: Config, out: Path) -> dict:
    """Execute the unfinished runs and write every study's table and figure; returns the result."""
    began, log = time.monotonic(), Log(out / "log.txt")
    root = image_root(base.data.root, out)
    images = len(list_images(split_root(root)[0]))
    check_apart(out, *split_root(root), base.data.val)
    rows = {row.name: row for study in chosen for row in study.rows}
    seeds = range(base.seed, base.seed + own.seeds)
    runs, reasons = plan_runs(rows.values(), base, out=out, root=root, images=images, seeds=seeds)
    if not runs:
        raise ValueError(f"no variant can be run: {next(iter(reasons.values()))}")
    # one seed of all variants, then the next: a stopped study has runs of each
    wanted = {run.folder: run for of_seed in zip(*runs.values(), strict=True) for run in of_seed}
    left = [run for run in wanted.values() if run.result() is None]
    device = resolve_device(base.device)
    places = plan_places(own.jobs, with_gpus=device == "cuda")
    log(f"{len(wanted)} runs, {len(wanted) - len(left)} of them done, {len(places)} at once")
    failed, stopped = run_all(left, places, log)
    command = shlex.join(["python", "train/study.py", *sys.argv[1:]])
    about: dict = {"command": command, "images": images, "config": dataclasses.asdict(base)}
    about["environment"] = environment(1, torch.device(device))
    summaries = [summarize(study, runs, reasons=reasons, failed=failed) | about for study in chosen]
    unlike = {s["study"]: [row["name"] for row in unlike_paper(s)] for s in summaries}
    return {
        "state": "preempted" if stopped else "failed" if failed else "finished",
        "n": own.seeds,
        "runs": len(wanted),
        "run_now": len(left),
        "failed": {str(run.folder): reason for run, reason in failed.items()},
        "left_out": reasons,
        "at_once": len(places),
        "seconds": round(time.monotonic() - began, 1),
        "otherwise": {study: names for study, names in unlike.items() if names},
        "files": [str(path) for summary in summaries for path in write(summary, out)],
        "environment": about["environment"],
    }


def write(summary: dict, out: Path) -> list[Path]:
    """A study's JSON file, table and figure; the table goes to stderr too."""
    files = [out / f"study-{summary['study']}{kind}" for kind in (".json", ".md", ".png")]
    text, table = json.dumps(summary, indent=1), markdown(summary)
    text = re.sub(r"\[[-\d.,\s]+\]", lambda numbers: re.sub(r"\s+", "", numbers[0]), text)
    title, n = summary["title"], summary["n"]
    files[0].write_text(text + "\n")
    files[1].write_text(f"# {title} ({summary['source']}), n = {n}\n\n{table}")
    draw(summary, files[2])
    print(f"\n{title}, n = {n}\n{table}", file=sys.stderr)
    return files


def main() -> None:
    """Read the flags, run, print the result as the last line of stdout."""
    name, own, base = read_flags(sys.argv[1:])
    chosen, out = choose(name, studies(base)), Path(base.out or "runs/study")
    path = out / f"result-{name}.json"
    with exit_on_error(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(out / ".lock", timeout=0):
                result = run_studies(chosen, own, base, out)
                path.write_text(json.dumps(result, indent=1) + "\n")
        except Timeout:
            refuse(f"--out {out} is in use by another study: wait, or choose another", code=1)
    print_result(result, kept=path)
    if result["failed"]:
        refuse(f"{len(result['failed'])} of {result['runs']} runs failed, see above", code=1)


if __name__ == "__main__":
    protect_output()
    main()
