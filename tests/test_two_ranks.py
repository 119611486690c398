"""What two ranks do alike: skip a step bad on one, stop at the signal of one, compare weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forked import ROOT, forked
from test_sync_norm import free_port
from test_train import TINY

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    """Of each rank: weights before and after each step, steps skipped, warnings, last step."""
    done = forked(["tests/two_ranks.py", str(free_port())])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_weight_on_any(ranks):
    start, first, second, third = ranks[0]["weights"]
    assert start != first == second != third
    assert ranks[1]["weights"] == ranks[0]["weights"]
    assert [rank["skipped"] for rank in ranks] == [1, 1]


def test_a_rank_whose_weights_differ_in_one_bit_is_named(ranks):
    equal, (line,) = ranks[0]["warnings"]
    assert equal == [] and ranks[1]["warnings"] == [equal, [line]]
    assert line.startswith(f"the weights of rank 1 on host {os.uname().nodename} are not")


def test_a_variant_that_fails_on_one_rank_is_left_out_on_all(ranks):
    for rank, rate in zip(ranks, (10, 5), strict=True):
        assert rank["turns"]["fails"] == {"not_measured": "ValueError: no such peer"}
        assert rank["turns"]["ours"]["images_per_s"]["p50"] == rate


def test_a_failure_that_others_wait_for_in_a_collective_is_raised_after_the_time_limit(ranks):
    waiting, failing = ranks[0]["failed"]
    assert waiting == "out of memory"
    assert failing.startswith("out of memory; 0 s (--timeout_s) later")


def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks):
    assert [rank["stopped_at"] for rank in ranks] == [rank["signalled"] + 1 for rank in ranks]


@pytest.mark.slow
def test_a_closed_pipe_a_tilde_a_copied_run_and_an_edited_image_are_to_two_ranks_as_to_one(
    tiny_images, tmp_path
):
    shutil.copytree(tiny_images, tmp_path / "images")
    run, copy = tmp_path / "run", tmp_path / "copy"

    def torchrun(*flags: str, output: int = subprocess.PIPE) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc-per-node=2", "train/main.py", *TINY, *flags]
        streams: dict = {"stdout": output, "stderr": output, "text": True, "cwd": ROOT}
        env = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        return subprocess.run(words, env=env, timeout=300, check=False, **streams)

    def status(folder: Path) -> dict:
        return json.loads((folder / "status.json").read_text())

    reader, writer = os.pipe()
    os.close(reader)
    flags = "--data.root=~/images", "--out=~/run", "--data.verify=true"
    assert torchrun(*flags, "--max_steps=2", output=writer).returncode == 0
    os.close(writer)
    assert status(run) == {"state": "finished", "step": 2} and not Path(ROOT, "~").exists()
    assert "stderr cannot be written (Broken pipe)" in (run / "log.txt").read_text()

    shutil.copytree(run, copy)
    done = torchrun(f"--config={copy}/config.yaml", "--max_steps=3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (status(copy)["step"], status(run)["step"]) == (3, 2)

    image = next((tmp_path / "images").rglob("*.*g"))
    content = bytearray(image.read_bytes())
    content[-5] ^= 1
    image.write_bytes(content)
    done = torchrun(f"--config={copy}/config.yaml", "--max_steps=4")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1, done.stderr
    assert "was trained on other images" in errors[0]
    assert status(copy) == {"state": "finished", "step": 3}


@pytest.mark.slow
def test_hosts_that_find_another_or_no_checkpoint_end_with_one_line(tiny_images, tmp_path):
    run = tmp_path / "run"
    flags = f"--data.root={tiny_images}", f"--out={run}", "--checkpoint_every=1", "--max_steps=2"
    assert forked(["train/main.py", *TINY, *flags]).returncode == 0
    shutil.copytree(run, tmp_path / "older")
    shutil.rmtree(max((tmp_path / "older/checkpoints").iterdir()))

    def evaluated(*runs: Path) -> list[str]:
        """Errors that both ranks print; each has its own run folder, as on two hosts."""
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        address |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        words = [sys.executable, "train/features.py", f"--data.root={tiny_images}"]
        words += [f"--out={tmp_path}/features"]
        ranks = [
            subprocess.Popen(
                [*words, str(folder)], env=os.environ | address | {"RANK": str(rank)}, cwd=ROOT,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for rank, folder in enumerate(runs)
        ]  # fmt: skip
        ends = [rank.communicate(timeout=120)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [1, 1], ends
        lines = "".join(ends).splitlines()
        return [line for line in lines if line.startswith("error: ")]

    (error,) = evaluated(run, tmp_path / "older")
    assert "is of step 1 on host" in error and "and of step 2 on host" in error
    (error,) = evaluated(run, tmp_path / "none")
    assert "is not a run folder" in error and "host " in error
