"""Run one of the paper's studies over seeds: `python train/study.py NAME`, or all of them.

    python train/study.py all                                        # the digits, on a CPU
    python train/study.py all --config configs/cifar10.yaml --data.root DIR          # a GPU

train/studies/variants.py says what each study compares, train/studies/runs.py does the runs,
several at once, train/studies/report.py makes study-NAME.json, .md and .png of them, in --out. The
same command goes on with a study that was stopped. A newcomer's mistake: one more seed for one
variant. --seeds is for all; what is there is kept.
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

from pipeline.sources.digits import write_digits
from pipeline.sources.folder import list_images, split_root
from train.config import Config, MethodConfig, at_least
from train.config.parser import build_parser, explain, flags
from train.distributed import resolve_device
from train.run.data import DIGITS, check_apart
from train.run.folder import Log, environment
from train.run.program import error_text, print_result, refuse
from train.studies.report import draw, markdown, otherwise, summarize
from train.studies.runs import plan_places, plan_runs, run_all
from train.studies.variants import Study, studies

ALL = "all"
PRESET = Path(__file__).parent.parent / "configs" / "study.yaml"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How often and how many at once; every other flag is train/main.py's and goes to all runs."""

    seeds: int = 3
    """Runs of each variant: the seeds --seed, --seed + 1, ..."""
    jobs: int = 0
    """Runs at once; 0: one for each GPU, or each core where there is none."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        at_least("seeds", self.seeds, 1)
        at_least("jobs", self.jobs, 0)


def read_flags(words: Sequence[str]) -> tuple[str, StudyConfig, Config]:
    """The study's name, its flags and the baseline. Exits with 2 and one line for a mistake."""
    parser = build_parser(
        "train/study.py", "Run the paper's studies over seeds.", usage="[flags] NAME", root=DIGITS
    )
    parser.add_argument(
        "name",
        help="stop-gradient, predictor, batch-norm, symmetry, similarity, dimension, batch-size, "
        "alternation, moving-average, methods, or all.",
    )
    parser.add_class_arguments(StudyConfig, as_group=True)
    if not any(word.split("=")[0] == "--config" for word in words):
        words = [f"--config={PRESET}", *words]
    try:
        found = vars(parser.instantiate(parser.parse_args(words)))
        found.pop("config", None)
        name, names = found.pop("name"), [part.name for part in dataclasses.fields(StudyConfig)]
        own = StudyConfig(**{name: found.pop(name) for name in names})
        base = Config(**found)
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
    """The studies of a name. Exits with 2 and the nearest name for an unknown one."""
    if name == ALL:
        return list(known.values())
    if name not in known:
        near = difflib.get_close_matches(name, [*known, ALL], n=1, cutoff=0)[0]
        refuse(f"study {name} is unknown: perhaps you meant {near}, of {', '.join(known)}, {ALL}")
    return [known[name]]


def run_studies(chosen: Sequence[Study], own: StudyConfig, base: Config, out: Path) -> dict:
    """Do what is left of the runs and write every study's table and figure; the result."""
    began, log = time.monotonic(), Log(out / "log.txt")
    root = str(write_digits(out / "digits-jpeg")) if base.data.root == DIGITS else base.data.root
    images = len(list_images(split_root(root)[0]))
    check_apart(out, *split_root(root), base.data.val)
    rows = {row.name: row for study in chosen for row in study.rows}
    seeds = range(base.seed, base.seed + own.seeds)
    runs, reasons = plan_runs(rows.values(), base, out=out, root=root, images=images, seeds=seeds)
    if not runs:
        raise ValueError(f"no variant can be run: {next(iter(reasons.values()))}")
    # one seed of all variants, then the next: a study that is stopped has something of each
    wanted = {run.folder: run for of_seed in zip(*runs.values(), strict=True) for run in of_seed}
    left = [run for run in wanted.values() if run.result() is None]
    device = resolve_device(base.device)
    places = plan_places(own.jobs, with_gpus=device == "cuda")
    log(f"{len(wanted)} runs, {len(wanted) - len(left)} of them done, {len(places)} at once")
    failed, stopped = run_all(left, places, log)
    about = {
        "command": shlex.join(["python", "train/study.py", *sys.argv[1:]]),
        "images": images,
        "config": dataclasses.asdict(base),
        "environment": environment(1, torch.device(device)),
    }
    found = [summarize(study, runs, reasons=reasons, failed=failed) | about for study in chosen]
    return {
        "state": "preempted" if stopped else "failed" if failed else "finished",
        "n": own.seeds,
        "runs": len(wanted),
        "run_now": len(left),
        "failed": {str(run.folder): reason for run, reason in failed.items()},
        "left_out": reasons,
        "at_once": len(places),
        "seconds": round(time.monotonic() - began, 1),
        "otherwise": {one["study"]: names for one in found if (names := otherwise(one))},
        "files": [str(path) for one in found for path in write(one, out)],
        "environment": about["environment"],
    }


def write(found: dict, out: Path) -> list[Path]:
    """A study's JSON file, table and figure; the table goes to stderr too."""
    base = out / f"study-{found['study']}"
    text, table = json.dumps(found, indent=1), markdown(found)
    text = re.sub(r"\[[-\d.,\s]+\]", lambda numbers: re.sub(r"\s+", "", numbers[0]), text)
    base.with_suffix(".json").write_text(text + "\n")
    base.with_suffix(".md").write_text(
        f"# {found['title']} ({found['source']}), n = {found['n']}\n\n{table}"
    )
    draw(found, base.with_suffix(".png"))
    print(f"\n{found['title']}, n = {found['n']}\n{table}", file=sys.stderr)
    return [base.with_suffix(kind) for kind in (".json", ".md", ".png")]


def main() -> None:
    """Read the flags, run, print the result as the last line of stdout."""
    name, own, base = read_flags(sys.argv[1:])
    chosen, out = choose(name, studies(base)), Path(base.out or "runs/study")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            result = run_studies(chosen, own, base, out)
            (out / f"result-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    except Timeout:
        refuse(f"--out {out} is in use by another study: wait, or choose another folder", code=1)
    except (ValueError, OSError) as error:
        refuse(error_text(error, out), code=1)
    print_result(result, kept=out / f"result-{name}.json")
    if result["failed"]:
        refuse(f"{len(result['failed'])} of {result['runs']} runs failed, see above", code=1)


if __name__ == "__main__":
    main()
