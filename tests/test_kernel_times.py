"""The timing of kernels: its sites and bytes; run on small sites where its times mean nothing."""

import pytest
import torch
from torch import nn

from kernel_times import Inputs, Site, apex_batch_norm, measure, resnet50_sites
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.norm import BatchNorm


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
    found = measure(sites, torch.device("cpu"), compiled=False, n=2)
    assert [row["count"] for row in found["sites"]] == [1, 1, 1, 1, 1, 2]
    assert set(found["ratios"]) == {"eager_bf16/ours", "eager_fp16/ours"}
    for row in found["sites"]:
        moved = Site(row["kind"], tuple(row["shape"])).moved(2)
        for bytes_moved, ms, rate in zip(moved, row["ours_ms"], row["gb_per_s"], strict=True):
            assert abs(bytes_moved / ms / 1e6 - rate) <= 0.05 + 0.02 * rate  # of rounded figures
    assert set(found["loss_us"]) == {"ours", "eager"}


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
    found = measure([site], torch.device("cpu"), compiled=False, n=1, apex=ChannelsLastNorm)
    assert found["sites"][0]["apex_fp16_ms"][1] > 0


def test_apex_is_left_out_where_it_is_not_installed():
    assert apex_batch_norm() is None
