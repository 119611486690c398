"""How a run ends where the machine is at fault: nothing is lost, and one line says what to do."""

import contextlib
import errno
import json
import os
import signal
import socket
import types
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from train.config import DataConfig
from train.distributed import StopSignal, World, startup, stop_at_once
from train.distributed.startup import open_store, read_ranks
from train.distributed.world import STOP_SIGNALS
from train.run import state
from train.run.data import open_data
from train.run.folder import Log, Metrics, RunFolder, revision
from train.run.program import exit_on_error, is_disk_full, is_out_of_memory
from train.run.report import finite

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_run_only_where_the_last_checkpoint_is_lost(monkeypatch):
    told = []
    monkeypatch.setattr(state, "save", lambda *args: (_ for _ in ()).throw(FULL))
    run = types.SimpleNamespace(
        folder=types.SimpleNamespace(checkpoints=Path("x")), facts={},
        log=types.SimpleNamespace(warn=told.append),
    )  # fmt: skip
    state.save_checkpoint(None, run)
    assert "No space left" in told[0] and "Training continues" in told[0]
    with pytest.raises(OSError, match="No space left"):
        state.save_checkpoint(None, run, is_last=True)


def test_a_full_disk_takes_no_line_of_the_log_from_the_user(monkeypatch, tmp_path, capsys):
    Log(Path("/dev/full"))("a line")
    assert "a line" in (said := capsys.readouterr().err) and "lacks (No space left" in said
    metrics = Metrics(tmp_path, step=0, log=Log(None))
    metrics.path = Path("/dev/full")
    metrics.scalars(1, {"train/loss": -0.5})
    assert '"train/loss": -0.5' in capsys.readouterr().err
    metrics.close()
    folder = RunFolder(str(tmp_path / "run"))
    (folder.path / "bad_files.jsonl").symlink_to("/dev/full")
    folder.add_bad_files([{"file": "a.jpg", "reason": "cut"}])
    folder.close()
    assert '"file": "a.jpg"' in capsys.readouterr().err


def test_the_failure_of_a_run_on_a_full_disk_is_told_and_not_another_one(tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    folder.status("running", 3)
    (folder.path / "log.txt").unlink()
    (folder.path / "log.txt").symlink_to("/dev/full")
    folder.fail("the trace")
    folder.close()
    assert json.loads((folder.path / "status.json").read_text()) == {"state": "failed", "step": 3}


@pytest.mark.parametrize("state", ["finished", "preempted", "running"])
def test_a_refused_start_leaves_an_ended_run_as_it_is_and_tells_that_a_killed_one_failed(
    tmp_path, state
):
    folder = RunFolder(str(tmp_path / "run"))
    folder.status(state, 12)
    folder.close()
    for begins, then in ((False, "failed" if state == "running" else state), (True, "failed")):
        again = RunFolder(str(tmp_path / "run"))
        if begins:
            again.status("running", 12)
        again.give_up("the trace")
        again.close()
        told = json.loads((folder.path / "status.json").read_text())
        assert told == {"state": then, "step": 12}


def test_a_signal_in_set_up_leaves_no_half_folder_and_one_in_a_run_says_preempted(tmp_path):
    folder = RunFolder(str(tmp_path / "new"))
    folder.stop()
    folder.close()
    assert not folder.path.exists()
    folder = RunFolder(str(tmp_path / "run"))
    folder.status("running", 7)
    folder.stop()
    folder.close()
    assert json.loads((folder.path / "status.json").read_text())["state"] == "preempted"


def test_outside_of_training_sigterm_is_an_interrupt_of_rank_0_alone():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        stop_at_once(ALONE)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        stop = StopSignal(ALONE)
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed()
        stop.close()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        stop_at_once(World(1, 2, 1, 2, torch.device("cpu"), None))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"RANK": "1"}, "contradict each other"),
        ({"LOCAL_WORLD_SIZE": "0"}, "contradict each other"),
        ({"WORLD_SIZE": "-1"}, "contradict each other"),
        ({"RANK": "x"}, "no whole numbers"),
        ({"WORLD_SIZE": ""}, "no whole numbers"),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "tcp",
            },
            "MASTER_PORT is 'tcp', no port",
        ),
        (
            {
                "RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "a",
                "MASTER_PORT": "65536",
            },
            "MASTER_PORT is '65536', no port",
        ),
        (
            {"WORLD_SIZE": "2"},
            "RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT are unset",
        ),
    ],
)
def test_a_part_of_torchruns_environment_is_refused(variables, part, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert read_ranks() == (0, 1, 0, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{part}.*torchrun"):
        read_ranks()


def test_a_port_that_is_taken_and_a_rank_0_that_nobody_started_are_reported(monkeypatch, capfd):
    monkeypatch.setattr(startup, "WARN_S", 0.1)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConnectionError, match=f"rank 1 .* reach rank 0 at localhost:{port}"):
            open_store(1, 2, timedelta(seconds=1))
        line = f"cannot reach rank 0 at localhost:{port}: start it"
        assert line in capfd.readouterr().err
        other.listen()
        with pytest.raises(ConnectionError, match=f"rank 0 .* cannot open port {port}: stop"):
            open_store(0, 2, timedelta(seconds=1))


def test_a_run_folder_among_the_images_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    config = DataConfig(root=str(tmp_path / "images"))
    with pytest.raises(ValueError, match="is in the images' folder .* Choose another"):
        open_data(config, out=tmp_path / "images" / "runs" / "a", seed=0, world=ALONE)


def test_out_of_memory_and_a_full_disk_are_known_by_whom_they_come_from():
    texts = ("DefaultCPUAllocator: can't allocate memory", "std::bad_alloc", "CUDA out of memory")
    assert all(is_out_of_memory(RuntimeError(f"x {text} y")) for text in texts)
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shape"))
    assert is_disk_full(OSError(errno.EFBIG, "of ulimit -f"))
    assert is_disk_full(FULL) and not is_disk_full(OSError(errno.EIO, "x"))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("--epochs must be at least 1"), 1, "--epochs must be at least 1"),
        (FloatingPointError("lower --optim.lr"), 1, "lower --optim.lr"),
        (FULL, 1, f"{FULL} (--out runs/a)"),
        (MemoryError(), 1, "out of memory (): lower the batch"),
        (RuntimeError("x\nDefaultCPUAllocator: can't allocate memory"), 1,
         "out of memory (DefaultCPUAllocator: can't allocate memory): lower the batch"),
        (ModuleNotFoundError("No module named 'nvidia.dali'", name="nvidia.dali"), 1,
         "nvidia.dali is missing: requirements.txt names what to install"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)  # fmt: skip
def test_what_a_user_can_fix_ends_a_program_with_one_line(error, code, line, capsys):
    with (
        pytest.raises(SystemExit) as ended,
        exit_on_error(Path("runs/a"), memory_remedy="lower the batch", stopped="stopped"),
    ):
        raise error
    assert ended.value.code == code and capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape"), MemoryError(), KeyboardInterrupt(),
     ModuleNotFoundError("x", name="train.nowhere")],
)  # fmt: skip
def test_an_error_for_which_a_program_has_no_remedy_keeps_its_traceback(error):
    with pytest.raises(type(error)), exit_on_error(Path("runs/a")):
        raise error


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "running"), (ValueError("x"), "failed"), (RuntimeError("x"), "failed"),
     (SystemExit(1), "failed"), (KeyboardInterrupt(), "preempted")],
)  # fmt: skip
def test_the_folder_of_a_training_says_how_it_ended_and_is_free_again(error, state, tmp_path):
    with contextlib.suppress(BaseException), RunFolder(str(tmp_path / "run")) as folder:
        folder.status("running", 7)
        if error is not None:
            raise error
    assert json.loads((tmp_path / "run/status.json").read_text()) == {"state": state, "step": 7}
    assert ("Traceback" in (tmp_path / "run/log.txt").read_text()) == (state == "failed")
    RunFolder(str(tmp_path / "run")).close()


def test_a_result_holds_no_number_that_json_lacks():
    assert finite(float("nan")) is None and finite(float("inf")) is None and finite(None) is None
    assert finite(-0.5) == -0.5


def test_without_git_a_run_has_no_revision_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert revision() is None
