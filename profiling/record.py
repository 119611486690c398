"""Keep the results of finished runs: `python profiling/record.py NAME RUN [RUN ...]`.

Reads result.json, env.json, config.yaml and the metrics of each run folder and writes
profiling/results/NAME_<device>_<yyyymm>.json. Takes folders of train/evaluate.py and
train/features.py too. The figures of README and docs/measured.md point to these files. The runs
must share one revision.
"""

import root_first  # isort: skip # noqa: F401

import argparse
import json
import re
import statistics
from pathlib import Path

import yaml

from measure.results import ROOT, errors_in_one_line, result_path
from pipeline.sources.paths import named_path
from pipeline.streams import print_result, protect_output
from train.run.folder import read_metrics

KINDS = "result.json", "evaluation.json", "features.json"  # of a training first


def read_run(run: Path) -> dict:
    """What a finished run left behind. Raises: ValueError if it is not finished."""
    kind = next((name for name in KINDS if (run / name).exists()), KINDS[0])
    try:
        result = json.loads((run / kind).read_text().replace(f"{ROOT}/", ""))
        env = json.loads((run / "env.json").read_text())
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise ValueError(f"{run} has no {name}: is the run finished?") from error
    parts = {
        "result": result,
        "env": env,
        "config": yaml.safe_load((run / "config.yaml").read_text()),
        "command": re.sub(r"^\S*/", "", (run / "command.txt").read_text().strip()),
    }
    if kind != KINDS[0]:
        return parts
    if (state := result["state"]) != "finished":
        raise ValueError(f"{run} is {state}, not finished: start it again first")
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    return {
        **parts,
        "images_per_s_p50": statistics.median(row["throughput/images_per_sec"] for row in rows),
        "curve": [{key: row[key] for key in ("step", "train/loss", "train/z_std")} for row in rows],
    }


def record(name: str, runs: list[Path]) -> Path:
    """Write the results of the runs, which must be of one revision, machine and CPU setting."""
    results = [read_run(run) for run in runs]
    for part in ("revision", "device", "cpu_capability", "onednn_max_cpu_isa"):
        values = {str(run["env"].get(part)) for run in results}
        if len(values) > 1:
            raise ValueError(f"the runs differ in {part}: {', '.join(sorted(values))}")
    path = result_path(name, results[0]["env"]["device"])
    path.write_text(json.dumps({"n": len(results), "runs": results}, indent=1) + "\n")
    return path


def main() -> None:
    """Read the flags, record, print the file's name as one JSON line."""
    parser = argparse.ArgumentParser(description="Keep the results of finished runs.")
    parser.add_argument("name", help="what was measured, e.g. cifar10-3-epochs")
    parser.add_argument("runs", type=named_path, nargs="+", help="run folders")
    arguments = parser.parse_args()
    with errors_in_one_line():
        path = record(arguments.name, arguments.runs)
    print_result({"file": str(path)}, kept=path)


if __name__ == "__main__":
    protect_output()
    main()
