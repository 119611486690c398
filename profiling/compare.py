"""Two results side by side: `python profiling/compare.py A.json B.json --tolerance 0.05`.

Every number of the two files that differs is shown; exit code 1 if one of the chosen ones got
worse by more than the tolerance, or is missing in B. --only takes name patterns, e.g.
"ours.launches". Counts (bytes, launches, FLOPs, collectives, graph breaks) do not depend on the
clock: the tests compare those with tolerance 0. Rates of two machines say nothing: use --only on
counts or on ratios.
"""

import root_first  # isort: skip # noqa: F401

import argparse
import json
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

from measure.results import errors_in_one_line, print_table
from pipeline.sources.paths import named_path
from pipeline.streams import print_result, protect_output
from train.run.program import refuse

MORE_IS_BETTER = re.compile(
    r"images_per_s|ratios\.|share|mfu|gb_per_s|efficiency|knn_top1|tflop_per_s"
)
NOT_COMPARED = re.compile(r"(config|measure|environment|files|timeline)\.|n$|.*\.(n|images)$")
SETTINGS = re.compile(r"(config|measure)\.(?!out$|save$)|environment\.(device|cores|world)$")
Row = tuple[str, float | None, float | None, str]


def leaves(value: object, name: str = "") -> dict[str, object]:
    """Every text, number, boolean and null of a JSON value by its dotted name."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    named: dict[str, object] = {}
    for key, inner in items:
        named |= leaves(inner, f"{name}.{key}" if name else str(key))
    return named


def numbers(value: object) -> dict[str, float]:
    """Every number of a JSON value by its dotted name."""
    return {
        name: float(leaf)
        for name, leaf in leaves(value).items()
        if isinstance(leaf, int | float) and not isinstance(leaf, bool)
    }


def other_settings(before: dict, after: dict) -> list[str]:
    """The settings in which two results differ, "name (before, after)" each."""
    a, b = leaves(before), leaves(after)
    return [
        f"{name} ({a[name]}, {b[name]})"
        for name in sorted(a.keys() & b.keys())
        if SETTINGS.match(name) and a[name] != b[name]
    ]


def compare(
    before: dict, after: dict, *, tolerance: float, only: list[str] | None = None
) -> tuple[list[Row], int]:
    """Rows (name, before, after, verdict) of what differs, and how many names were compared.

    The verdict is "worse", "missing" (a number that only `before` has), "new" (only `after`) or "".
    Raises: ValueError if nothing can be compared.
    """
    a, b = numbers(before), numbers(after)
    names = [
        name
        for name in sorted(a.keys() | b.keys())
        if (any(fnmatch(name, p) for p in only) if only else not NOT_COMPARED.match(name))
    ]
    if not set(names) & a.keys() & b.keys():
        raise ValueError("the two results have none of the numbers asked for in common")
    rows: list[Row] = []
    for name in names:
        old, new = a.get(name), b.get(name)
        if old is None or new is None:
            rows.append((name, old, new, "new" if old is None else "missing"))
        elif old != new:
            loss = old - new if MORE_IS_BETTER.search(name) else new - old
            is_worse = not loss <= tolerance * abs(old)  # nan too
            rows.append((name, old, new, "worse" if is_worse else ""))
    return rows, len(names)


def read(path: Path) -> dict:
    """A result file. Raises: ValueError if it is none."""
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: give two files of profiling/results/") from error
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no result file: {error}") from error
    if not isinstance(result, dict):
        raise ValueError(f"{path} is no result file: it holds no JSON object")
    return result


def print_rows(rows: list[Row], total: int) -> None:
    """The table for people, on stderr; one line where nothing differs."""
    if not rows:
        print(f"{total} numbers compared: no difference", file=sys.stderr)
        return
    cells = [
        (
            name,
            *(None if value is None else f"{value:g}" for value in (old, new)),
            f"{new / old - 1:+.1%}" if old and new is not None else "",
            verdict,
        )
        for name, old, new, verdict in rows
    ]
    columns = ("name", "before", "after", "change", "")
    title = f"{total} numbers compared, those that differ"
    print_table(title, columns, cells, width=120, wrap=False)


def main() -> None:
    """Read the flags, compare, print; exit 1 if a number is worse or missing."""
    parser = argparse.ArgumentParser(description="Compare two results.")
    parser.add_argument("before", type=named_path)
    parser.add_argument("after", type=named_path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="share that may be lost")
    parser.add_argument("--only", nargs="+", help="patterns of names, e.g. 'ours.*'")
    arguments = parser.parse_args()
    if not 0 <= arguments.tolerance < float("inf"):
        refuse(f"--tolerance is a share of at least 0, got {arguments.tolerance}")
    with errors_in_one_line():
        before, after = read(arguments.before), read(arguments.after)
        rows, total = compare(before, after, tolerance=arguments.tolerance, only=arguments.only)
    if others := other_settings(before, after):
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        text = f"{'; '.join(others[:5])}{more}. Times and rates cannot be compared: use --only"
        print(f"warning: the settings differ: {text}", file=sys.stderr)
    print_rows(rows, total)
    worse, missing = ([row[0] for row in rows if row[3] == v] for v in ("worse", "missing"))
    print_result({"compared": total, "differ": len(rows), "worse": worse, "missing": missing})
    if worse or missing:
        sys.exit(1)


if __name__ == "__main__":
    protect_output()
    main()
