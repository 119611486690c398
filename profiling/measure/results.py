"""What the programs print and keep: tables, a JSON line, files of profiling/results/.

A result is never edited by hand: every file was written by a committed command.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.streams import print_result
from train.run.program import refuse

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "profiling" / "results"


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


def save_json(name: str, result: dict) -> str:
    """Write a result that holds its environment; returns the file's name."""
    path = result_path(name, result["environment"]["device"])
    path.write_text(json.dumps(result, indent=1) + "\n")
    return str(path)


def save_and_print(
    result: dict, name: str, draw: Callable[[dict, Path], None] | None = None
) -> None:
    """Keep a result and its picture if --save gave a name; print it as one JSON line."""
    if name:
        pictures = []
        if draw is not None:
            pictures = [result_path(name, result["environment"]["device"], ".png")]
            draw(result, pictures[0])
        result["files"] = [save_json(name, result), *map(str, pictures)]
    print_result(result, kept=result.get("files"))


def newest(name: str) -> dict | None:
    """The newest result of that name in profiling/results/, None where there is none."""
    paths = sorted(RESULTS.glob(f"{name}_*.json"), key=lambda path: path.stem[-6:])
    return json.loads(paths[-1].read_text()) if paths else None


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence | None],
    *,
    align: str = "l",
    width: int = 110,
    wrap: bool = True,
) -> None:
    """A table on stderr. A row None draws a line, a cell None is empty; no columns: no header.

    align: "l" or "r" for each of the first columns; the rest are aligned right.
    """
    table = Table(title=title or None, show_header=bool(columns))
    for name, side in zip(columns, align.ljust(len(columns), "r"), strict=False):
        table.add_column(name, justify="left" if side == "l" else "right", no_wrap=not wrap)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else width).print(table)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """A ValueError or OSError becomes one line on stderr and exit code 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        refuse(str(error), code=1)
