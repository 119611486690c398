"""A rank that hangs, in Python or in C, leaves its stacks in a file, and a line names the file."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launched import TINY
from test_watch import failure
from train.distributed.watch import DEAD_S, MAX_TIMEOUTS, RankStatus

ROOT = Path(__file__).parent.parent
HANGS = {
    "python": "while True: pass",
    "c": "ctypes.CDLL(None).sleep(60)",
    "c with Python's lock": "ctypes.PyDLL(None).sleep(60)",
}
ALONE = """
import ctypes, pathlib, sys
from train.distributed.world import Stacks
stacks = Stacks(pathlib.Path(sys.argv[1]), rank=3, timeout_s=0.5)
stacks.allow()
def stands_here():
    {hang}
stands_here()
"""
RUN = """
import ctypes, os, time
from train import loop, main
step = loop.train_step
def stands_here(*arguments):
    if arguments[-1].step == 2 and os.environ.get("RANK", "1") == "1":
        {hang}
    return step(*arguments)
loop.train_step = stands_here
main.main()
"""


def environment() -> dict:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_a_process_that_hangs_writes_down_where(tmp_path, hang):
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE.format(hang=hang), tmp_path], env=environment(), cwd=ROOT
    )
    path, limit = tmp_path / "stacks-rank-3.txt", time.monotonic() + 60
    while not (path.exists() and "stands_here" in path.read_text()):
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    text = path.read_text()
    assert text.startswith("rank 3 on host ") and "Timeout (0:00:00.5" in text


def flags(out: Path, images: Path) -> list[str]:
    return [*TINY, f"--data.root={images}", f"--out={out}", "--timeout_s=5", "--max_steps=3",
            "--model.width=8"]  # fmt: skip


def test_a_slow_step_of_one_process_is_reported_with_its_file_and_the_run_ends_well(
    tmp_path, tiny_images
):
    program = tmp_path / "slow.py"
    program.write_text(RUN.format(hang="time.sleep(7)"))
    done = subprocess.run(
        [sys.executable, program, *flags(tmp_path / "run", tiny_images)], cwd=ROOT, check=False,
        capture_output=True, text=True, timeout=200, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "--timeout_s" in line]
    path = Path(re.search(r"its stacks are in (\S+)$", line).group(1))
    assert path == tmp_path / "run/stacks-rank-0.txt" and "stands_here" in path.read_text()


def test_the_line_that_names_a_hanging_rank_names_its_stacks(tmp_path, tiny_images):
    program = tmp_path / "hang.py"
    program.write_text(RUN.format(hang="ctypes.PyDLL(None).sleep(60)"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         program, *flags(tmp_path / "run", tiny_images)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    path = tmp_path / "run/stacks-rank-1.txt"
    assert f"rank 1 on host {os.uname().nodename} has had no heartbeat" in line
    assert line.endswith(f"its stacks are in {path} on its host")
    assert "stands_here" in path.read_text()
    assert (
        "At the end:" in (tmp_path / "run/stacks-rank-0.txt").read_text()
    )  # the waiting rank's too


def test_a_run_in_time_leaves_no_stacks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(hang="stacks.close()"), tmp_path / "gone"],
        env=environment() | {"TMPDIR": str(tmp_path)}, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.returncode == 0 and not list(tmp_path.iterdir())  # the folder in $TMPDIR neither


def test_of_several_silent_ranks_the_one_silent_longest_is_named():
    noticed = RankStatus(0, 0.5, "node0", 7, error="NCCL error", is_lost=True)
    dead = RankStatus(3, DEAD_S + 9, "node3", 7)
    ended_by_nccl = [RankStatus(rank, DEAD_S + 1, f"node{rank}", 7) for rank in (1, 2)]
    assert "rank 3 on host node3 exited" in failure(noticed, *ended_by_nccl, dead, broken_s=14)


def test_ranks_whose_main_threads_all_wait_for_cuda_are_ended_after_ten_times_as_long():
    waiting = [RankStatus(r, 0.5, f"node{r}", 8, late_s=601, stacks=f"run/{r}") for r in (0, 2, 3)]
    behind = RankStatus(1, 0.5, "node1", 7, late_s=601, stacks="run/1")
    text = failure(behind, *waiting)
    assert text.startswith(
        "rank 1 on host node1 is alive but keeps the others waiting: 601 s beyond"
    )
    assert text.endswith("its stacks are in run/1 on its host")
    in_time = [
        RankStatus(r, 0.5, f"node{r}", 8, late_s=60 * MAX_TIMEOUTS, stacks="x") for r in range(4)
    ]
    assert failure(*in_time) == ""
    together = [
        RankStatus(r, 0.5, f"node{r}", 8, late_s=601 + r, stacks=f"run/{r}") for r in range(4)
    ]
    assert failure(*together).endswith("its stacks are in run/3 on its host")
