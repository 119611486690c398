"""What the GPU suite's calls carry: parts no larger than a call, whole again on the other side."""

import json
import lzma
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import gpu_calls
from gpu_calls import bring_back, cut, gather, pins, prune, run


@pytest.fixture
def calls(tmp_path) -> list[Path]:
    """Two archives, of 2,500 and of 700 kB, in calls of 1 MB each."""
    rng, archives = np.random.default_rng(0), []
    for name, sizes in (("programs", (800, 1700)), ("imagenet", (700,))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number, size in enumerate(sizes):
                path = tmp_path / f"{name}-{number}"
                path.write_bytes(rng.bytes(1000 * size))
                tar.add(path, path.name)
        archives.append(tmp_path / f"{name}.tar")
    return cut(archives, tmp_path / "calls", 1_000_000)


def test_no_call_carries_more_than_it_may_and_all_but_the_last_are_full(calls):
    sizes = [sum(path.stat().st_size for path in call.iterdir()) for call in calls]
    assert sizes[:-1] == [1_000_000] * 3 and 0 < sizes[-1] <= 1_000_000
    assert [call.name for call in calls] == ["1", "2", "3", "4"]


def test_an_archive_is_unpacked_once_all_of_it_has_come_in_any_order(calls, tmp_path):
    home = tmp_path / "home"
    done = [gather(calls[number], home) for number in (3, 0, 2, 1)]
    assert done == [[], [], ["imagenet.tar"], ["programs.tar"]]
    for name, place in (("programs-1", "site"), ("imagenet-0", "images")):
        assert (home / place / name).read_bytes() == (tmp_path / name).read_bytes()
    assert list((home / "parts").iterdir()) == []  # the disk holds nothing twice


def test_figures_and_compiled_code_come_back_and_can_be_carried_to_another_machine(tmp_path):
    out, results = tmp_path / "home" / "out", tmp_path / "results"
    for name in ("step.json", "cache/triton/a.cubin", "runs/demo/result.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    (out / "runs/demo/model.safetensors").write_text("large")
    assert all(bring_back(out, results).values())
    assert gather(results, tmp_path / "other") == ["cache.tar.xz", "figures.tar.xz"]
    other = tmp_path / "other" / "out"
    found = {str(path.relative_to(other)) for path in other.rglob("*") if path.is_file()}
    assert found == {"step.json", "cache/triton/a.cubin", "runs/demo/result.json"}


def test_what_is_too_large_to_come_back_is_left_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_calls, "MOST_BACK", 1000)
    (tmp_path / "out" / "cache").mkdir(parents=True)
    (tmp_path / "out" / "cache" / "a").write_bytes(np.random.default_rng(0).bytes(5000))
    assert bring_back(tmp_path / "out", tmp_path / "results")["cache"] == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["figures.tar.xz"]


def test_libraries_for_another_python_and_headers_are_not_carried(tmp_path):
    for name in ("a/b.cpython-311-x86_64-linux-gnu.so", "a/b.cpython-312-x86_64-linux-gnu.so",
                 "a/include/c.h", "numpy/d.py", "a/libe.so"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    prune(tmp_path, "3.12")
    kept = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert kept == ["a/b.cpython-312-x86_64-linux-gnu.so", "a/libe.so"]


def test_the_pinned_versions_are_carried():
    assert pins()["jsonargparse"].count(".") == 2
    assert any(name.startswith("nvidia-dali-cuda") for name in pins())


def test_machine_code_is_packed_so_that_python_unpacks_it(tmp_path):
    (tmp_path / "site").mkdir()
    whole = (Path(torch.__file__).parent / "lib" / "libtorch_python.so").read_bytes()
    library = whole[len(whole) // 2 :][: 2 << 20]  # code, not the names at its end
    (tmp_path / "site" / "a.so").write_bytes(library)
    packed = gpu_calls.archive(tmp_path / "site", tmp_path / "dali.tar.xz")
    assert packed.stat().st_size <= len(lzma.compress(library))
    gpu_calls.unpack([packed], tmp_path)
    assert (tmp_path / "a.so").read_bytes() == library


def test_a_call_runs_the_suite_with_what_has_come_and_says_how_it_ended(
    calls, tmp_path, monkeypatch, capsys
):
    seen = []

    def suite(command, *, env, **_):
        seen.append((command[1:], env["PYTHONPATH"].split(":")[0]))
        (tmp_path / "home" / "out").mkdir(exist_ok=True)
        (tmp_path / "home" / "out" / "step.json").write_text("{}")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", suite)
    home = tmp_path / "home"
    for call in (calls[0], calls[3], calls[2]):
        assert run(call, home, tmp_path / "results", ["--minutes=2"]) == 1
    line = ["profiling/gpu_suite.py", str(home / "out"), "--images", str(home / "images")]
    assert seen == [([*line, "--minutes=2"], str(home / "site"))] * 3
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["exit_code"] == 1 and answer["unpacked"] == ["imagenet.tar"]
    assert answer["bytes_back"]["figures"] > 0
