"""Keep the results of finished runs: `python profiling/record.py NAME RUN [RUN ...]`.

Reads result.json, env.json, config.yaml and the metrics of each run folder and writes
profiling/results/NAME_<device>_<yyyymm>.json. The figures of README and
docs/measured.md point to these files.
A newcomer's mistake: recording runs of different code together. They must share one revision.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import argparse
import json
import re
import statistics
from pathlib import Path

import yaml

from measure.results import result_path
from train.run.folder import read_metrics
from train.run.program import refuse


def read_run(run: Path) -> dict:
    """What a finished run left behind. Raises: ValueError if it is not finished."""
    try:
        parts = {name: json.loads((run / f"{name}.json").read_text()) for name in ("result", "env")}
    except FileNotFoundError as error:
        raise ValueError(
            f"{run} has no {Path(error.filename).name}: is the run finished?"
        ) from error
    if parts["result"]["state"] != "finished":
        state = parts["result"]["state"]
        raise ValueError(f"{run} is {state}, not finished: start it again first")
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    return {
        **parts,
        "config": yaml.safe_load((run / "config.yaml").read_text()),
        "command": re.sub(r"^\S*/", "", (run / "command.txt").read_text().strip()),
        "images_per_s_p50": statistics.median(row["throughput/images_per_sec"] for row in rows),
        "curve": [{key: row[key] for key in ("step", "train/loss", "train/z_std")} for row in rows],
    }


def record(name: str, runs: list[Path]) -> Path:
    """Write the results of the runs, which must be of one revision, machine and CPU setting."""
    found = [read_run(run) for run in runs]
    for part in ("revision", "device", "cpu_capability", "onednn_max_cpu_isa"):
        values = {str(run["env"].get(part)) for run in found}
        if len(values) > 1:
            raise ValueError(f"the runs differ in {part}: {', '.join(sorted(values))}")
    path = result_path(name, found[0]["env"]["device"])
    path.write_text(json.dumps({"n": len(found), "runs": found}, indent=1) + "\n")
    return path


def main() -> None:
    """Read the flags, record, print the file's name as one JSON line."""
    parser = argparse.ArgumentParser(description="Keep the results of finished runs.")
    parser.add_argument("name", help="what was measured, e.g. cifar10-3-epochs")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    arguments = parser.parse_args()
    try:
        path = record(arguments.name, arguments.runs)
    except (ValueError, OSError) as error:
        refuse(str(error), code=1)
    print(json.dumps({"file": str(path)}))


if __name__ == "__main__":
    main()
