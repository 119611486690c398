"""How much code a batch passes, and there is: `python tests/size.py`; one JSON line.

files_on_the_way, lines_on_the_way: train/main.py, and each whole file of which a function runs from
the loop's start to the end of a CPU training of two steps of the digits, in all threads. What is
imported and not called is not on the way.
"""

import ast
import contextlib
import inspect
import json
import runpy
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDERS = ("train", "pipeline", "kernels", "profiling", "deploy")


def files_on_the_way(out: str) -> set[Path]:
    """Files of the project with a function that a tiny training calls once it loops."""
    seen: set[str] = {"train/main.py"}
    loops = False

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal loops
        code = frame.f_code
        loops |= code.co_name == "train" and code.co_filename.endswith("train/loop.py")
        if loops and event == "call" and code.co_flags & inspect.CO_OPTIMIZED:  # a function
            seen.add(code.co_filename)

    sys.argv = ["train/main.py", "--config=configs/demo.yaml", "--device=cpu"]
    sys.argv += ["--max_steps=2", f"--out={out}/run"]
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the counts alone
            runpy.run_path("train/main.py", run_name="__main__")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type] - as documented
    # run_path names its own file as it was given
    paths = {(ROOT / name).resolve() for name in seen if not name.startswith("<")}
    roots = [ROOT / folder for folder in FOLDERS[:3]]
    return {path for path in paths if any(path.is_relative_to(root) for root in roots)}


def lines(paths: set[Path]) -> int:
    """All lines of the files."""
    return sum(len(path.read_text().splitlines()) for path in paths)


def num_skips(paths: set[Path]) -> int:
    """Comments in the files that keep ruff from formatting."""
    return sum(path.read_text().count("# fmt: " + "skip") for path in paths)


def most_parameters(paths: set[Path]) -> list:
    """[number, file:function] of the longest signature."""
    signatures = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                given = node.args
                number = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
                signatures.append((number, f"{path.relative_to(ROOT)}:{node.name}"))
    return list(max(signatures))


def main() -> None:
    """Count and print."""
    with tempfile.TemporaryDirectory() as out:
        way = files_on_the_way(out)
    source = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    counts = {
        "files_on_the_way": len(way),
        "lines_on_the_way": lines(way),
        "source_lines": lines(source),
        "files_in_train": len(list((ROOT / "train").glob("*.py"))),
        "most_parameters": most_parameters(source),
        "fmt_skip": num_skips(source),
        "fmt_skip_in_tests": num_skips(set(ROOT.glob("tests/*.py"))),
        "readme_lines": lines({ROOT / "README.md"}),
        "way": sorted(str(path.relative_to(ROOT)) for path in way),
    }
    print(json.dumps(counts))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    main()
