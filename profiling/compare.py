"""Two results side by side: `python profiling/compare.py A.json B.json --tolerance 0.05`.

Every number of the two files that differs is shown; exit code 1 if one of the chosen ones got
worse by more than the tolerance, or is no number any more. --only takes name patterns, e.g.
"ours.launches". Counts (bytes, launches, FLOPs, collectives, graph breaks) do not depend on the
clock: the tests compare those with tolerance 0.
A newcomer's mistake: a gate on images/s from two machines. Use --only on counts or on ratios.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import fnmatch
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from train.run.program import refuse

MORE_IS_BETTER = ("*images_per_s*", "*ratios.*", "*share*", "*mfu*", "*gb_per_s*", "*efficiency*",
                  "*knn_top1*", "*tflop_per_s*")  # fmt: skip
NOT_COMPARED = ("config.*", "measure.*", "environment.*", "files.*", "timeline.*", "n", "*.n",
                "*.images")  # fmt: skip
SETTINGS = ("config.*", "measure.*", "environment.device", "environment.cores",
            "environment.world")  # fmt: skip
NO_SETTINGS = ("config.out", "measure.save")


def leaves(value: object, name: str = "") -> dict[str, object]:
    """Every text, number, boolean and null of a JSON value by its dotted name."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, object] = {}
    for key, inner in items:
        found |= leaves(inner, f"{name}.{key}" if name else str(key))
    return found


def numbers(value: object) -> dict[str, float]:
    """Every number of a JSON value by its dotted name."""
    return {
        name: float(leaf)
        for name, leaf in leaves(value).items()
        if isinstance(leaf, int | float) and not isinstance(leaf, bool)
    }


def other_settings(before: dict, after: dict) -> list[str]:
    """What two results were not made with alike, "name (before, after)" each."""
    a, b = leaves(before), leaves(after)
    return [
        f"{name} ({a[name]}, {b[name]})"
        for name in sorted(a.keys() & b.keys())
        if matches(name, SETTINGS) and not matches(name, NO_SETTINGS) and a[name] != b[name]
    ]


def matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    """Whether a dotted name fits one of the patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def compare(
    before: dict, after: dict, *, tolerance: float, only: list[str] | None = None
) -> tuple[list[tuple[str, float | None, float | None, bool]], int]:
    """Rows (name, before, after, is_worse) of what differs, and how many names were compared.

    A number that only one side has is worse where it was there before. Raises: ValueError if
    nothing can be compared.
    """
    a, b = numbers(before), numbers(after)
    names = [
        name
        for name in sorted(a.keys() | b.keys())
        if (matches(name, only) if only else not matches(name, NOT_COMPARED))
    ]
    if not set(names) & a.keys() & b.keys():
        raise ValueError("the two results have none of the numbers asked for in common")
    rows = []
    for name in names:
        old, new = a.get(name), b.get(name)
        if old == new:
            continue
        if old is None or new is None:
            rows.append((name, old, new, new is None))
            continue
        loss = old - new if matches(name, MORE_IS_BETTER) else new - old
        rows.append((name, old, new, not loss <= tolerance * abs(old)))  # nan too
    return rows, len(names)


def read(path: Path) -> dict:
    """A result file. Raises: ValueError if it is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: give two files of profiling/results/") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no result file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no result file: it holds no JSON object")
    return found


def main() -> None:
    """Read the flags, compare, print the table and one JSON line; exit 1 if something got worse."""
    parser = argparse.ArgumentParser(description="Compare two results.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="share that may be lost")
    parser.add_argument("--only", nargs="+", help="patterns of names, e.g. 'ours.*'")
    arguments = parser.parse_args()
    if not 0 <= arguments.tolerance < float("inf"):
        refuse(f"--tolerance is a share of at least 0, got {arguments.tolerance}")
    try:
        before, after = read(arguments.before), read(arguments.after)
        rows, total = compare(before, after, tolerance=arguments.tolerance, only=arguments.only)
    except ValueError as error:
        refuse(str(error), code=1)
    if others := other_settings(before, after):
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        print(
            f"warning: the two were not made alike: {'; '.join(others[:5])}{more}. Times and rates "
            "then say little: compare counts or ratios with --only", file=sys.stderr,
        )  # fmt: skip
    table = Table(title=f"{total} numbers compared, those that differ")
    for name in ("name", "before", "after", "change", ""):
        table.add_column(name, justify="left" if name == "name" else "right", no_wrap=True)
    for name, old, new, is_worse in rows:
        change = f"{new / old - 1:+.1%}" if old and new is not None else ""
        cells = ["" if value is None else f"{value:g}" for value in (old, new)]
        table.add_row(name, *cells, change, "worse" if is_worse else "")
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 120).print(table)
    worse = [name for name, _, _, is_worse in rows if is_worse]
    print(json.dumps({"compared": total, "differ": len(rows), "worse": worse}))
    if worse:
        sys.exit(1)


if __name__ == "__main__":
    main()
