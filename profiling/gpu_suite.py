"""What only a GPU can show, in the order of what it shows: `python profiling/gpu_suite.py OUT`.

    python profiling/gpu_suite.py OUT --minutes 15 --images DIR    what fits; again: what is left
    python profiling/gpu_suite.py OUT --stages step,memcheck       some; the table shows all of OUT
    python profiling/gpu_suite.py OUT --minutes 15 --rehearse      the same lines, tiny, anywhere

Stages, their seconds and needs: profiling/suite/stages.py; extras.py has those that run only
when named. DIR holds imagenet/ (photos) and cifar10/ (train/ and test/ with class folders); a stage
whose images, or DALI, are missing waits for a later call. Each figure is in OUT/<stage>.json
the moment it is known, each program's output in OUT/<stage>-*.log, compiled code in OUT/cache. A
stage that crashes, hangs or runs out of time stops no other, and is tried once more after the
others; a training is resumed. docs/gpu_suite.md: the calls for a machine that takes 64 MB at a
time. Exit code 1 where a goal was missed or a stage failed. Not yet run on a GPU. A rehearsal shows
that the commands run; its figures mean nothing.
"""

import root_first  # isort: skip # noqa: F401

import argparse
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import torch

from measure.results import print_table
from pipeline.sources.paths import named_path
from pipeline.streams import print_result, protect_output
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
    is_good = written["ended"] and written["error"] is None
    if stage.takes_the_rest and is_good:
        return [result.get("state") for result in written["found"].values()] == ["finished"]
    return is_good or written["attempts"] >= ATTEMPTS


def met_needs(suite: Suite) -> set[str]:
    """Which of a stage's needs are met. A rehearsal has embedded images."""
    find = importlib.util.find_spec  # of a module whose parent is missing it raises
    met = {"dali"} if find("nvidia") is not None and find("nvidia.dali") is not None else set()
    for part in ("imagenet", "cifar10"):
        if suite.rehearse if suite.images is None else (suite.images / part).is_dir():
            met.add(part)
    return met


def choose(names: list[str], out: Path, left: float, met: set[str]) -> tuple[str | None, dict]:
    """The stage to run now, and why each one that is not done has to wait."""
    waiting, fits = {}, []
    for name in names:
        stage, written = ALL[name], read(out, name)
        if is_done(stage, written):
            continue
        if missing := [need for need in stage.needs if need not in met]:
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
        name, waiting = choose(rest, suite.out, left, met_needs(suite))
        if name is None:
            return waiting
        line = f"{name}, about {ALL[name].seconds:.0f} s, {left:.0f} are left ..."
        print(line, file=sys.stderr, flush=True)
        run_stage(name, suite, left)
        ran.append(name)


def summary(out: Path) -> dict:
    """All stages that OUT holds, in order, and what was missed."""
    stages = [read(out, name) for name in ALL if (out / f"{name}.json").exists()]
    checks = [(stage["stage"], check) for stage in stages for check in stage["checks"]]
    bad = [stage for stage in stages if stage["error"] or not stage["ended"]]
    return {
        "stages": stages,
        "missed": [f"{name}: {c['what']}" for name, c in checks if c["verdict"] == "fail"],
        "failed": {stage["stage"]: stage["error"] or "was cut off" for stage in bad},
    }


def print_stages(stages: list[dict]) -> None:
    """The table for people, on stderr."""
    rows: list = []
    for stage in stages:
        title = f"{stage['stage']} ({stage['seconds']:.0f} s)"
        for check in stage["checks"]:
            value = "none" if check["value"] is None else f"{check['value']:.5g}"
            rows.append((title, check["what"], value, check["goal"], check["verdict"]))
            title = ""
        if stage["error"]:
            rows.append((title, "failed", "", "", stage["error"][:100]))
        rows.append(None)
    columns = ("stage", "figure", "value", "goal", "")
    print_table("GPU suite", columns, rows, align="llrll", width=160)


def main() -> None:
    """Read the flags, run the stages, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="What only a GPU can show, in stages.")
    parser.add_argument(
        "out", type=named_path, help="folder of the results; kept from call to call"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="what fits is taken")
    parser.add_argument("--images", type=named_path, help="folder with imagenet/ and cifar10/")
    named = f"names between commas; also {', '.join(EXTRAS)}"
    parser.add_argument("--stages", default=",".join(STAGES), help=named)
    parser.add_argument("--rehearse", action="store_true", help="tiny, on any machine, no goals")
    parser.add_argument("--apex", type=named_path, help="checkout of NVIDIA/apex to build")
    arguments = parser.parse_args()
    names, images = arguments.stages.split(","), arguments.images
    if unknown := [name for name in names if name not in ALL]:
        refuse(f"--stages {unknown[0]} is unknown: there are {', '.join(ALL)}")
    if not arguments.minutes > 0:
        refuse(f"--minutes must be above 0, got {arguments.minutes}")
    if images is not None and not images.is_dir():
        refuse(f"--images {images} is no folder")
    if not arguments.rehearse and not torch.cuda.is_available():
        refuse("no CUDA device: give --rehearse to run the same commands, tiny", code=1)
    out = arguments.out.resolve()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    suite = Suite(out, images, arguments.rehearse, arguments.apex)
    waiting = run_all(names, suite, 60 * arguments.minutes)
    result = summary(out)
    print_stages(result.pop("stages"))
    for name, why in waiting.items():
        print(f"{name} waits: {why}", file=sys.stderr)
    print_result({"out": str(out), **result, "waiting": waiting}, kept=out)
    if result["missed"] or result["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    protect_output()
    main()
