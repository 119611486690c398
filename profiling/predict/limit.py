"""The limit: FLOPs and bytes of a step counted from the model, and the time that they must take.

Convolutions and linear layers: forward, gradient of the input, gradient of the weight; each takes
the longer of FLOPs / matmul rate and bytes / bandwidth, every tensor once a pass. What is between
them (batch norm, ReLU, shortcut, max-pool): the bytes of measure/kernel_times.Site over the
bandwidth. The optimizer: 28 bytes a parameter (fp32 weight, gradient, momentum read; weight and
momentum written; a 16-bit copy read and written). Rate and bandwidth are measured in the same run.

    share of the roofline = roofline seconds / measured seconds
    MFU = FLOPs of a step / (measured seconds x matmul rate); 2 FLOPs a multiply-add, nothing twice

MFU does not show the quality of a ResNet step, which is bound by bytes: NVIDIA's MLPerf run on an
H200 has 24 % of the measured matmul rate, and 62 % of its roofline.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from measure.kernel_times import Site, clock, copy_bandwidth
from train.config import Config, MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.network.model import DTYPES

OPTIMIZER_BYTES = 28
GPUS = {  # (matmul FLOP/s in bf16, bytes/s of a copy): H200 measured by others, the rest assumed
    "h200": (790e12, 4.3e12),
    "h100": (750e12, 2.95e12),
    "a100": (270e12, 1.75e12),
}
"""Where no GPU can be measured (--dry-run): assumptions, but for the H200's copy and product."""
GPU_GIB = {"h200": 140, "h100": 79, "a100": 80}
"""Memory. Assumptions until read off a card; of A100 and H100 those sold with 80 GB."""


@dataclass(frozen=True)
class Product:
    """One convolution or linear layer of a step, for all rows of both views."""

    name: str
    macs: float
    """Multiply-adds of the forward pass."""
    elements: tuple[int, int, int]
    """Of input, output, weight."""
    needs_input_grad: bool

    @property
    def passes(self) -> int:
        """Forward, weight's gradient, and the input's unless the input is an image."""
        return 3 if self.needs_input_grad else 2


@dataclass(frozen=True)
class Counts:
    """What a step must compute and move."""

    products: tuple[Product, ...]
    sites: tuple[Site, ...]
    parameters: int
    images: int

    @property
    def flops(self) -> float:
        """Of a step."""
        return sum(2 * p.macs * p.passes for p in self.products)

    def product_bytes(self, itemsize: int) -> float:
        """Read and written by convolutions and linear layers, weights left out."""
        return sum(itemsize * sum(p.elements[:2]) * p.passes for p in self.products)

    def site_bytes(self, itemsize: int) -> float:
        """Read and written between them."""
        return sum(sum(site.moved(itemsize)) for site in self.sites)

    def saved_bytes(self, itemsize: int) -> float:
        """Kept for the backward pass: what goes into batch norms and what convolutions read."""
        outputs = sum(p.elements[1] for p in self.products)
        normed = sum(torch.Size(s.shape).numel() for s in self.sites)
        return float(itemsize * (outputs + normed))

    def seconds(self, flop_rate: float, bandwidth: float, *, itemsize: int = 2) -> float:
        """The least time of a step."""
        total = 0.0
        for p in self.products:
            moved_s = itemsize * sum(p.elements) / bandwidth
            total += p.passes * max(2 * p.macs / flop_rate, moved_s)
        return total + (self.site_bytes(itemsize) + OPTIMIZER_BYTES * self.parameters) / bandwidth


@lru_cache
def count(config: ModelConfig, method: MethodConfig, *, images: int, size: int) -> Counts:
    """Counts of a step of `images` images, from a forward pass on fake tensors.

    Shapes: two views of (images, 3, size, size).
    """
    products, sites = [], []

    def record(name: str, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        x, weight = inputs[0], module.get_parameter("weight")
        macs = output.numel() * weight[0].numel()
        elements = (x.numel(), output.numel(), weight.numel())
        products.append(Product(name, macs, elements, name != "backbone.conv1"))
        if (kind := site_kind(name, module, model)) is not None:
            sites.append(Site(kind, tuple(output.shape)))

    with FakeTensorMode():
        model = SimSiam(config, method)
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(partial(record, name))
        views = torch.empty(2 * images, 3, size, size)
        model(views.to(memory_format=torch.channels_last))
        parameters = sum(p.numel() for p in model.parameters())
    return Counts(tuple(products), tuple(sites), parameters, images)


def site_kind(name: str, module: nn.Module, model: SimSiam) -> str | None:
    """The kind of site that follows a layer; None where there is none or it is another layer's."""
    path, _, last = name.rpartition(".")
    parent: Any = model.get_submodule(path)
    if name == "backbone.conv1":
        return "pool" if module.stride == (2, 2) else "relu"
    if isinstance(module, nn.Linear):
        if not hasattr(parent, "norm"):
            return None  # the predictor's output
        return "relu" if parent.relu else "none"
    if "downsample" in path.split("."):
        return None  # the block's end normalises it too
    if last != ("conv3" if hasattr(parent, "conv3") else "conv2"):
        return "relu"
    return "residual" if parent.downsample is None else "norm"


def matmul_rate(device: torch.device, dtype: torch.dtype, *, n: int = 20) -> float:
    """FLOP/s of a large product of random matrices: the fastest of n, as a limit should be."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = [clock(device, lambda: a @ b)[0] for _ in range(n + 5)][5:]
    return 2 * side**3 / min(times)


def measure_limit(config: Config, device: torch.device, *, rows: int) -> dict:
    """The roofline of a step of `rows` images on this device, with what it is made of."""
    dtype = DTYPES[config.precision]
    counts = count(config.model, config.method, images=rows, size=config.augment.size)
    rate = matmul_rate(device, dtype)
    mib = 1024 if device.type == "cuda" else 256
    bandwidth = 1e9 * max(copy_bandwidth(device, mib=mib, n=7) for _ in range(3))
    return describe(counts, rate, bandwidth, itemsize=dtype.itemsize)


def describe(counts: Counts, rate: float, bandwidth: float, *, itemsize: int) -> dict:
    """The figures of a roofline."""
    seconds = counts.seconds(rate, bandwidth, itemsize=itemsize)
    moved = counts.product_bytes(itemsize) + counts.site_bytes(itemsize)
    return {
        "gflop_per_image": round(counts.flops / counts.images / 1e9, 3),
        "mb_per_image": round(moved / counts.images / 1e6, 2),
        "matmul_tflop_per_s": round(rate / 1e12, 3),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "step_ms": round(1e3 * seconds, 3),
        "images_per_s": round(counts.images / seconds, 1),
    }


def most_times(images_per_s: float, step: dict[str, dict]) -> dict[str, float]:
    """How many times each measured peer the roofline is: no step of these FLOPs can be more."""
    return {
        f"at_most_times_{name}": round(images_per_s / summary["images_per_s"]["p50"], 3)
        for name, summary in step.items()
        if name != "ours" and "images_per_s" in summary
    }
