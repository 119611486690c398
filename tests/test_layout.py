"""The rules that keep imports working and files readable."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from forked import PACKAGES, forked

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("pipeline", "kernels", "train", "profiling", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in SOURCES
    if path.parent.name != "tests" and '__name__ == "__main__"' in path.read_text()
]


FLOORS = (
    "kernels/gpu", "kernels", "pipeline/sources", "pipeline", "train/network", "train/methods",
    "train/config", "train/distributed", "train/run", "train/evaluation", "train/studies",
    "train/pilots", "train",
    "profiling/stand_ins", "profiling/measure", "profiling/predict", "profiling/suite",
    "profiling",
)  # fmt: skip
"""A folder imports from itself and from those before it; kernels/ and pipeline/ not from each
other."""


def folder_of(path: str) -> str | None:
    """The innermost of FLOORS that a path lies in."""
    found = [floor for floor in FLOORS if path.startswith(floor + "/")]
    return max(found, key=len, default=None)


def imported_folders(path: Path) -> set[str]:
    """Of FLOORS those that hold what a file imports, inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {f"{alias.name}.x" for alias in node.names}
    places = {name.replace(".", "/") for name in names}
    # profiling/ is no package: its files and folders are imported by name
    inner = {path.stem for path in (ROOT / "profiling").iterdir()} - {"kernels"}
    places |= {f"profiling/{place}" for place in places if place.split("/")[0] in inner}
    return {folder for place in places if (folder := folder_of(place + "/"))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_imports_only_from_folders_below_it(path):
    own = folder_of(str(path.relative_to(ROOT)))
    if own is None:  # tests/ may import all
        return
    below = FLOORS[: FLOORS.index(own) + 1]
    apart = {"kernels": "pipeline", "pipeline": "kernels"}.get(own.split("/")[0], "-")
    for folder in imported_folders(path):
        assert folder in below and not folder.startswith(apart), (own, folder)


def test_no_file_of_train_asks_for_a_method_by_name():
    for path in SOURCES:
        if path.is_relative_to(ROOT / "train") and path.parent.name != "methods":
            assert not re.search(r"method\.name\s*(==|!=|in\b)", path.read_text()), path


def test_every_folder_says_what_lives_in_it():
    for folder in FLOORS:
        if folder != "profiling":
            text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
            assert text


def test_no_file_is_named_like_a_standard_module():
    # trace.py is a script that no module imports
    names = {path.stem for path in SOURCES} - {"__init__", "trace"}
    assert not names & set(sys.stdlib_module_names)


def test_profiling_and_tests_are_not_packages():
    assert not (ROOT / "profiling" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_imports_are_absolute_and_only_the_pipeline_knows_dali():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                module = node.module or ""
                if module.startswith("nvidia.dali"):
                    assert path.relative_to(ROOT).parts[0] in ("pipeline", "tests", "profiling"), (
                        path
                    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is_and_is_ascii(path):
    text = path.read_text()
    assert text.isascii()
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("script", SCRIPTS)
def test_entry_scripts_run_from_any_folder(script, tmp_path):
    done = forked([str(ROOT / script), "--help"], cwd=tmp_path, modules=PACKAGES)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_importing_the_training_script_needs_no_tensorboard_matplotlib_or_sklearn():
    code = (
        "import sys, train.main; "
        "print([m for m in ('tensorboard', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_step_imports_and_trains_without_dali():
    """A GPU machine without it can still show what the step and the kernels do."""
    code = (
        "import sys; sys.modules['nvidia.dali'] = None; sys.path.append('profiling')\n"
        "import runpy, throughput, train.doctor; runpy.run_path('profiling/kernels.py')\n"
        "sys.argv[1:] = ['--what=step', '--peers=false', '--precision=fp32', '--repeats=1',\n"
        "    '--model.arch=resnet18', '--model.width=8', '--augment.size=16',\n"
        "    '--data.batch_size=4']\n"
        "throughput.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["images_per_s"]["step"] > 0


def test_without_triton_everything_imports_and_asking_for_it_is_refused():
    code = (
        "import importlib.util as util, sys; real = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "import torch, train.main\n"
        "from kernels.batch_norm import Norm, NormOptions, batch_norm_act\n"
        "x, norm = torch.randn(4, 3), Norm()\n"
        "assert not batch_norm_act(x, norm).isnan().any() and 'triton' not in sys.modules\n"
        "batch_norm_act(x, norm, NormOptions(kernels='triton'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "ValueError: --model.kernels triton: the package triton is not" in done.stderr
