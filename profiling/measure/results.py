"""Where results are kept: profiling/results/<what>_<device>_<yyyymm>.json.

A newcomer's mistake: editing a result by hand. Every file there was written by a committed command.
"""

import json
import os
import re
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"


def check_save(name: str) -> None:
    """Raise ValueError, before anything is measured, if a result of that name cannot be kept."""
    if not re.fullmatch(r"[\w.-]*", name):
        raise ValueError(f"save is a name for profiling/results/, not a path, got {name}")
    folder = RESULTS if RESULTS.exists() else RESULTS.parent
    if name and not os.access(folder, os.W_OK):
        raise ValueError(f"--save {name}: {folder} cannot be written; without it nothing is kept")


def result_path(name: str, device: str, kind: str = ".json") -> Path:
    """The file of a result."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}_{slug}_{time.strftime('%Y%m')}{kind}"


def save_json(name: str, found: dict) -> str:
    """Write a result that says its environment; returns the file's name."""
    path = result_path(name, found["environment"]["device"])
    path.write_text(json.dumps(found, indent=1) + "\n")
    return str(path)


def newest(name: str) -> dict | None:
    """The newest result of that name in profiling/results/, None where there is none."""
    paths = sorted(RESULTS.glob(f"{name}_*.json"), key=lambda path: path.stem[-6:])
    return json.loads(paths[-1].read_text()) if paths else None
