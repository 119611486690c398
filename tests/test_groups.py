"""The process groups of a run; NCCL ends no process before the watch has named the rank."""

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from train.distributed import startup
from train.distributed.startup import nccl_settings, open_groups
from train.distributed.watch import GRACE_S, MAX_TIMEOUTS

T = 60.0


@pytest.fixture
def opened(monkeypatch) -> list[tuple[str, dict]]:
    """The groups that are asked for, in order; none is made."""
    asked: list[tuple[str, dict]] = []

    def init(backend, **options):
        asked.append((backend, options))

    def new(backend=None, **options):
        asked.append((backend, options))
        return f"group {len(asked) - 1}"

    monkeypatch.setattr(startup.os, "environ", dict(os.environ))
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(dist, "new_group", new)
    options = SimpleNamespace(Options=lambda: SimpleNamespace(is_high_priority_stream=False))
    monkeypatch.setattr(dist, "ProcessGroupNCCL", options, raising=False)
    return asked


def open_on(device: str, out: str = "") -> tuple:
    common = {"store": dist.HashStore(), "rank": 0, "world_size": 2}
    return open_groups(common, device=torch.device(device), timeout_s=T, out=out)


def test_batch_norms_sums_have_a_communicator_of_high_priority(opened):
    sums, host = open_on("cuda:1")
    (first, _), (backend, second), (third, _) = opened
    assert (first, backend, third) == ("nccl", None, "gloo")  # None: as the first
    assert second["pg_options"].is_high_priority_stream
    assert second["pg_options"]._timeout == second["timeout"]  # else torch warns
    assert (sums, host) == ("group 1", "group 2")


def test_gloo_has_a_group_for_the_sums_too(opened):
    sums, _ = open_on("cpu")
    assert [backend for backend, _ in opened] == ["gloo", None] and sums == "group 1"


def test_nccl_ends_a_process_later_than_the_latest_failure(opened):
    open_on("cuda:0")
    longest_s = (MAX_TIMEOUTS + 1) * T + GRACE_S  # a rank that is alive and hangs
    after_error_s = 4 * int(startup.os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) / 1000
    assert after_error_s > longest_s
    assert int(startup.os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > longest_s
    assert opened[0][1]["timeout"] > opened[2][1]["timeout"] == timedelta(seconds=MAX_TIMEOUTS * T)


def test_what_the_user_set_for_nccl_stays(opened):
    startup.os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] = "7"
    open_on("cuda:0")
    assert startup.os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "7"


def test_the_flight_recorder_is_on_and_dumps_into_the_run_folder():
    settings = nccl_settings(T, "runs/a")
    assert int(settings["TORCH_FR_BUFFER_SIZE"]) > 0
    assert settings["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    prefix = settings["TORCH_FR_DUMP_TEMP_FILE"]  # the rank is appended
    assert prefix == f"{Path.cwd()}/runs/a/nccl-trace-rank-"
    assert "TORCH_FR_DUMP_TEMP_FILE" not in nccl_settings(T, "")


@pytest.mark.parametrize("name", sorted(nccl_settings(T, "runs/a")))
def test_torch_or_nccl_knows_each_name(name):
    headers = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d"
    text = "".join((headers / f"{one}.hpp").read_text() for one in
                   ("ProcessGroupNCCL", "FlightRecorder"))  # fmt: skip
    library = (Path(torch.__file__).parent / "lib/libtorch_cpu.so").read_bytes()
    known = text.encode() + library
    assert name.encode() in known or name == "NCCL_LAUNCH_ORDER_IMPLICIT"  # NCCL's own
