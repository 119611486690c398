"""The timing of kernels: its sites and bytes; run on small sites where its times mean nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from measure import kernel_times
from measure.kernel_times import (
    Inputs,
    Site,
    apex_batch_norm,
    clock,
    measure,
    resnet50_sites,
    time_site,
)
from measure.step_times import repeated
from measure.turns import Timing
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.network.norm import BatchNorm


def test_the_sites_are_those_of_the_network():
    sites = list(resnet50_sites(4))
    channels = sorted(s.shape[1] for s in sites for _ in range(1 + (s.kind == "norm")))
    model = SimSiam(ModelConfig(), MethodConfig())
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    assert channels == sorted(len(norm.running_mean) for norm in norms) and len(norms) == 57
    # activations of a view, speed.md 2: 11.11 M elements in 53 convolutions' outputs
    elements = sum(torch.Size(s.shape).numel() * (1 + (s.kind == "norm")) for s in sites)
    assert abs(elements / 8 - 11.11e6) < 0.02e6


def test_every_kind_of_site_is_timed_beside_its_peers():
    kinds = ("relu", "none", "residual", "norm", "pool")
    sites = [Site(kind, (4, 8, 5, 5)) for kind in kinds] + [Site("relu", (4, 8))] * 2
    found = measure(sites, torch.device("cpu"), compiled=False, n=1)
    assert [row["count"] for row in found["sites"]] == [1, 1, 1, 1, 1, 2]
    assert set(found["ratios"]) == {"eager_bf16/ours", "eager_fp16/ours"}
    for row in found["sites"]:
        moved = Site(row["kind"], tuple(row["shape"])).moved(2)
        for bytes_moved, ms, rate in zip(moved, row["ours_ms"], row["gb_per_s"], strict=True):
            assert abs(bytes_moved / ms / 1e6 - rate) <= 0.05 + 0.02 * rate  # of rounded figures
    assert set(found["loss_us"]) == {"ours", "eager"}
    assert set(found["views_ms"]) == {"ours", "plain"}


class Gpu:
    """A stream and a host with a clock each, in seconds: what torch.cuda shows of them."""

    def __init__(self):
        self.host = self.stream = 0.0
        self.sleeps = []

    def queue(self, gpu_s: float, host_s: float = 5e-6) -> None:
        self.host += host_s
        self.stream = max(self.stream, self.host) + gpu_s

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self.queue(cycles / 2e9)

    def event(gpu, **_):  # noqa: N805 - the event's own self is below
        class Event:
            def record(self):
                self.at = max(gpu.stream, gpu.host)

            def query(self):
                return self.at <= gpu.host

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        return Event()


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    made = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    monkeypatch.setattr(torch.cuda, "_sleep", made.sleep)
    monkeypatch.setattr(kernel_times, "other_data", lambda _: torch.zeros(1))
    return made


def test_a_call_that_takes_longer_to_queue_than_to_run_is_timed_by_the_gpu(gpu):
    def call() -> str:
        for _ in range(3):
            gpu.queue(24e-6, host_s=60e-6)
        return "result"

    seconds, result = clock(torch.device("cuda"), call)
    assert seconds == pytest.approx(72e-6) and result == "result"
    assert len(gpu.sleeps) == 1


def test_a_call_that_was_not_queued_in_time_is_made_again_behind_a_longer_sleep(gpu):
    def call() -> None:
        gpu.queue(24e-6, host_s=2e-3)
        gpu.queue(24e-6, host_s=2e-3)

    assert clock(torch.device("cuda"), call)[0] == pytest.approx(48e-6)
    assert gpu.sleeps == [1 << 20, 1 << 22, 1 << 24]


def test_a_call_that_waits_for_the_device_is_not_timed(gpu):
    def call() -> None:
        gpu.queue(24e-6)
        gpu.host = gpu.stream  # as .item() does

    with pytest.raises(RuntimeError, match="waits for the device"):
        clock(torch.device("cuda"), call)


@pytest.mark.parametrize(("gpu_s", "host_s", "share"), [(60e-3, 9e-3, 0.0), (2e-3, 9e-3, 1.0)])
def test_steps_that_the_host_limits_are_counted(gpu, monkeypatch, gpu_s, host_s, share):
    stream = SimpleNamespace(query=lambda: gpu.stream <= gpu.host)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    timing = Timing(1)

    def step() -> None:
        gpu.queue(0.0, host_s=host_s / 2)
        gpu.queue(gpu_s, host_s=0.0)
        gpu.queue(0.0, host_s=host_s / 2)

    idle = timing.gpu_was_idle
    timing.seconds.append(repeated(step, torch.device("cuda"), steps=4, idle=idle)())
    assert timing.summary()["share_of_steps_that_the_host_limits"] == share
    assert timing.seconds[0] == pytest.approx(4 * max(gpu_s, host_s), rel=0.1)


class ChannelsLastNorm(nn.Module):
    """What apex's module computes, on (N, H, W, C), by PyTorch."""

    def __init__(self, channels: int, *, fuse_relu: bool):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(channels), fuse_relu

    def forward(self, x, z=None):
        assert x.is_contiguous() and (z is None or (self.relu and z.is_contiguous()))
        y = self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        y = y if z is None else y + z
        return torch.relu(y) if self.relu else y


@pytest.mark.parametrize("kind", ["relu", "none", "residual", "norm", "pool", "rows"])
def test_apexs_modules_are_given_what_the_plain_operations_get(kind):
    site = Site("relu", (4, 8)) if kind == "rows" else Site(kind, (4, 8, 5, 5))
    inputs = Inputs(site, torch.float32, torch.device("cpu"))
    for ours, plain in zip(inputs.apex(ChannelsLastNorm)(), inputs.plain(), strict=True):
        torch.testing.assert_close(ours, plain)
    how = {"kernels": "triton", "compiled": False, "n": 1, "apex": ChannelsLastNorm}
    assert time_site(site, torch.device("cpu"), **how)["apex_fp16_ms"][1] > 0


def test_apex_is_left_out_where_it_is_not_installed():
    assert apex_batch_norm() is None
