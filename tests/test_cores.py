"""How many threads a rank takes: cores, quota of the container, share of the machine's ranks."""

import os

import pytest
import torch

from pipeline.decode import DecodeOptions
from pipeline.loader import num_threads
from pipeline.machine import usable_cores
from train.distributed import devices

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000\n"}, 64),
        ("0::/", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/", {"cpu.max": "250000 100000\n"}, 2),  # the third thread would stop all three
        ("0::/", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/", {"cpu.max": "12800000 100000\n"}, 64),  # more than there are
        ("0::/pod/job", {"pod/cpu.max": "600000 100000", "pod/job/cpu.max": "max 100000"}, 6),
        ("0::/host/path/unseen", {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/docker/ab",
         {"cpu,cpuacct/cpu.cfs_quota_us": "800000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
         8),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "1"}, 64),
        ("5:cpuset:/", {"cpu.max": "400000 100000"}, 64),  # v2 is not this process's
    ],
)  # fmt: skip
def test_a_containers_quota_counts_where_it_is_less_than_the_cores(
    group, files, cores, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64))
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group + "\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert usable_cores(tmp_path) == cores


def test_cores_without_cgroups_are_those_of_the_affinity_mask(tmp_path):
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_a_ranks_threads_are_its_share_and_at_most_8_beside_a_gpu(monkeypatch):
    monkeypatch.setattr("pipeline.loader.usable_cores", lambda: 224)
    default, asked = DecodeOptions(), DecodeOptions(threads=24)
    assert num_threads(default, local_world=8, device=torch.device("cpu")) == 28
    assert num_threads(default, local_world=8, device=CUDA) == 8
    assert num_threads(default, local_world=56, device=CUDA) == 4
    assert num_threads(default, local_world=500, device=CUDA) == 1
    assert num_threads(asked, local_world=8, device=CUDA) == 24


def test_a_gpu_process_works_on_one_stream_that_goes_before_dalis(monkeypatch):
    set_on = []
    monkeypatch.delenv("TORCH_NCCL_HIGH_PRIORITY", raising=False)
    monkeypatch.setattr(devices, "resolve_device", lambda device: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: set_on.append(("device", index)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda priority: ("stream", priority))
    monkeypatch.setattr(torch.cuda, "set_stream", set_on.append)
    before = torch.backends.cudnn.benchmark
    try:
        assert devices.take_device("cuda", 1, 2) == torch.device("cuda", 1)
    finally:
        torch.backends.cudnn.benchmark = before
    assert set_on == [("device", 1), ("stream", -1)]  # the stream is the device's that is current
    assert os.environ["TORCH_NCCL_HIGH_PRIORITY"] == "1"


def test_torchs_threads_are_a_ranks_share_of_the_quota(monkeypatch):
    taken = []
    monkeypatch.setattr(devices, "usable_cores", lambda: 12)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    devices.take_device("cpu", 0, 4)
    assert taken == [3]
