"""What only a GPU can show, in the order of what it tells: `python profiling/gpu_suite.py OUT`.

    python profiling/gpu_suite.py OUT --minutes 15 --images DIR    what fits; again: what is left
    python profiling/gpu_suite.py OUT --stages step,memcheck       some; the table shows all of OUT
    python profiling/gpu_suite.py OUT --minutes 15 --rehearse      the same lines, tiny, anywhere

Stages, their seconds and needs: profiling/suite/stages.py; extras.py has those that run only
when named. DIR holds imagenet/ (photos) and cifar10/ (train/ and test/ with class folders); what
needs images, or DALI, that is not there waits for a later call. Each figure is in OUT/<stage>.json
the moment it is known, each program's output in OUT/<stage>-*.log, compiled code in OUT/cache. A
stage that crashes, hangs or runs out of time costs no other one, and is tried once more after the
others; a training is resumed. docs/gpu_suite.md: the calls for a machine that takes 64 MB at a
time. Exit code 1 where a goal was missed or a stage failed. Not yet run on a GPU.
A newcomer's mistake: reading a rehearsal's figures. It shows that the commands run, no more.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import argparse
import importlib.util
import json
import math
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suite.checks import OutOfTime, StageFailed, Suite
from suite.extras import EXTRAS
from suite.stages import STAGES, Stage
from train.run.program import refuse

ALL = STAGES | EXTRAS
ATTEMPTS = 2
MARGIN_S = 5.0  # for the table, and to end the program of a stage


def read(out: Path, name: str) -> dict:
    """What OUT holds of a stage; of one that has not begun nothing has ended."""
    path = out / f"{name}.json"
    if not path.exists():
        return {"stage": name, "ended": False, "error": None, "attempts": 0, "checks": []}
    return json.loads(path.read_text())


def is_done(stage: Stage, written: dict) -> bool:
    """Whether a stage has all its figures, or has failed often enough."""
    if stage.takes_the_rest and written["ended"] and written["error"] is None:
        state = [found.get("state") for found in written["found"].values()]
        return state == ["finished"]
    return (written["ended"] and written["error"] is None) or written["attempts"] >= ATTEMPTS


def has_dali() -> bool:
    """Whether DALI is installed; it is not imported."""
    find = importlib.util.find_spec  # of a module whose parent is missing it raises
    return find("nvidia") is not None and find("nvidia.dali") is not None


def what_is_there(suite: Suite) -> set[str]:
    """Which of a stage's needs are met. A rehearsal has embedded images."""
    found = {"dali"} if has_dali() else set()
    for part in ("imagenet", "cifar10"):
        if suite.images is None or (suite.images / part).is_dir():
            found |= {part} if suite.images is not None or suite.rehearse else set()
    return found


def choose(names: list[str], out: Path, left: float, has: set[str]) -> tuple[str | None, dict]:
    """The stage to run now, and why each one that is not done has to wait."""
    waiting, fits = {}, []
    for name in names:
        stage, written = ALL[name], read(out, name)
        if is_done(stage, written):
            continue
        if missing := [need for need in stage.needs if need not in has]:
            waiting[name] = f"needs {' and '.join(missing)}"
        elif stage.seconds > left:
            waiting[name] = f"takes {stage.seconds:.0f} s, {max(0.0, left):.0f} are left"
        else:
            fits.append((written["attempts"], names.index(name), name))
    return (min(fits)[2] if fits else None), waiting


def run_stage(name: str, suite: Suite, left: float) -> None:
    """Run a stage and write OUT/<stage>.json, whatever happens in it."""
    stage, before = ALL[name], read(suite.out, name)
    attempts = before["attempts"] + (not stage.takes_the_rest or before["error"] is not None)
    # one that hangs leaves time for the others
    limit = left if stage.takes_the_rest else min(left, 2 * stage.seconds + 30)
    suite.begin, error = time.monotonic(), None
    suite.stage, suite.deadline = name, suite.begin + limit
    suite.found, suite.checks = {}, []
    suite.write(ended=False, attempts=attempts)
    try:
        stage.run(suite)
    except (OutOfTime, StageFailed) as problem:
        error = str(problem)
    except (OSError, LookupError, ValueError, TypeError) as problem:  # a figure is not as expected
        error = f"{type(problem).__name__}: {problem}"
    suite.write(ended=True, error=error, attempts=attempts)


def run_all(names: list[str], suite: Suite, seconds: float) -> dict[str, str]:
    """Run stages until none is left or fits; why each of the others has to wait."""
    end, ran = time.monotonic() + seconds, []
    while True:
        left = end - time.monotonic() - MARGIN_S
        rest = [name for name in names if not (ALL[name].takes_the_rest and name in ran)]
        name, waiting = choose(rest, suite.out, left, what_is_there(suite))
        if name is None:
            return waiting
        print(f"{name}, about {ALL[name].seconds:.0f} s, {left:.0f} are left ...",
              file=sys.stderr, flush=True)  # fmt: skip
        run_stage(name, suite, left)
        ran.append(name)


def summary(out: Path) -> dict:
    """All stages that OUT holds, in order, and what was missed."""
    stages = [read(out, name) for name in ALL if (out / f"{name}.json").exists()]
    missed = [f"{s['stage']}: {c['what']}" for s in stages for c in s["checks"]
              if c["verdict"] == "fail"]  # fmt: skip
    failed = {s["stage"]: s["error"] or "was cut off" for s in stages
              if s["error"] or not s["ended"]}  # fmt: skip
    return {"stages": stages, "missed": missed, "failed": failed}


def print_table(stages: list[dict]) -> None:
    """The table for people, on stderr."""
    table = Table(title="GPU suite")
    for name in ("stage", "figure", "value", "goal", ""):
        table.add_column(name, justify="right" if name == "value" else "left")
    for stage in stages:
        title = f"{stage['stage']} ({stage['seconds']:.0f} s)"
        for check in stage["checks"]:
            value = "none" if check["value"] is None else f"{check['value']:.5g}"
            what = escape(check["what"])  # "[images/s]" is no markup
            table.add_row(title, what, value, check["goal"], check["verdict"])
            title = ""
        if stage["error"]:
            table.add_row(title, "failed", "", "", escape(stage["error"][:100]))
        table.add_section()
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160).print(table)


def main() -> None:
    """Read the flags, run the stages, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="What only a GPU can show, in stages.")
    parser.add_argument("out", type=Path, help="folder of the results; kept from call to call")
    parser.add_argument("--minutes", type=float, default=math.inf, help="what fits is taken")
    parser.add_argument("--images", type=Path, help="folder with imagenet/ and cifar10/")
    parser.add_argument("--stages", default=",".join(STAGES),
                        help=f"names between commas; also {', '.join(EXTRAS)}")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="tiny, on any machine, no goals")
    parser.add_argument("--apex", type=Path, help="checkout of NVIDIA/apex to build")
    arguments = parser.parse_args()
    names = arguments.stages.split(",")
    if unknown := [name for name in names if name not in ALL]:
        refuse(f"--stages {unknown[0]} is unknown: there are {', '.join(ALL)}")
    if not arguments.minutes > 0:
        refuse(f"--minutes must be above 0, got {arguments.minutes}")
    if arguments.images is not None and not arguments.images.is_dir():
        refuse(f"--images {arguments.images} is no folder")
    if not arguments.rehearse and not torch.cuda.is_available():
        refuse("no CUDA device: give --rehearse to run the same commands, tiny", code=1)
    (arguments.out / "runs").mkdir(parents=True, exist_ok=True)
    out = arguments.out.resolve()
    suite = Suite(out, arguments.images, arguments.rehearse, arguments.apex)
    waiting = run_all(names, suite, 60 * arguments.minutes)
    found = summary(out)
    print_table(found["stages"])
    for name, why in waiting.items():
        print(f"{name} waits: {why}", file=sys.stderr)
    print(json.dumps({"out": str(out), "missed": found["missed"], "failed": found["failed"],
                      "waiting": waiting}))  # fmt: skip
    if found["missed"] or found["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
