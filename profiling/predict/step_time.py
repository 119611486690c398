"""The time of a step on one GPU as a range, part by part, which a measurement can prove wrong.

    products       passes x max(FLOPs / rate, bytes / bandwidth) / PRODUCT_SHARE
    between them   bytes x (1 - share that the L2 cache serves) / (bandwidth x COPY_SHARE)
    optimizer      bytes / (bandwidth x COPY_SHARE)
    launches       number x LAUNCH_S

Rate and bandwidth are those of predict/limit.py, the L2's share is that of predict/cache_model.py
in the newest kernels_*.json. The three ranges are assumptions: against_published() compares the
formula with published speeds of ResNet-50, all of which are within its range.
"""

from dataclasses import dataclass, replace

from measure.results import newest
from predict.limit import GPUS, OPTIMIZER_BYTES, Counts, count
from train.config import MethodConfig, ModelConfig

Range = tuple[float, float]
"""At best and at worst."""

PRODUCT_SHARE: Range = (0.75, 0.5)
"""What convolutions and linear layers reach of their roofline."""
COPY_SHARE: Range = (0.92, 0.8)
"""What kernels bound by memory reach of a copy's bandwidth."""
LAUNCH_S: Range = (1e-6, 3e-6)
"""From the end of a kernel to the first loads of the next."""
CACHES = {"h100": "50 MB", "h200": "60 MB"}  # of predict/cache_model.py
LAUNCHES = {"layer": 2, "pass": 1, "site": 6, "second batch norm": 2, "step": 14}
"""A cast of each weight and of its gradient; passes of products; statistics, merge, apply, reduce,
merge, backward; statistics and merge. Together 2 % from what profiling/compiled.py counts."""


def launches(counts: Counts) -> int:
    """Kernels of forward and backward pass, by LAUNCHES."""
    numbers = {
        "layer": len(counts.products),
        "pass": sum(product.passes for product in counts.products),
        "site": len(counts.sites),
        "second batch norm": sum(site.kind == "norm" for site in counts.sites),
        "step": 1,
    }
    return sum(LAUNCHES[name] * number for name, number in numbers.items())


def cache_share(gpu: str, itemsize: int) -> float:
    """The share of the bytes between products that the L2 cache serves; 0 where it is not known."""
    result = newest("kernels")
    if gpu not in CACHES or result is None or not result.get("replayed"):
        return 0.0
    served = sum(
        row["launches"] * (row["mb"]["formula"][1] - row["mb"][CACHES[gpu]][1])
        for row in result["replayed"]
    )
    counts = count(ModelConfig(), MethodConfig(), images=result["images"], size=224)
    return 1e6 * served / counts.site_bytes(itemsize)


def step_time(counts: Counts, gpu: str, *, itemsize: int = 2) -> dict:
    """A step of ours.

    Units: milliseconds, images a second; a pair is the figure at best and at worst.
    """
    bandwidth = GPUS[gpu][1]
    between = counts.site_bytes(itemsize) * (1 - cache_share(gpu, itemsize))
    seconds = {
        "products": products(counts, gpu, itemsize=itemsize),
        "between them": over(between / bandwidth, COPY_SHARE),
        "optimizer": over(OPTIMIZER_BYTES * counts.parameters / bandwidth, COPY_SHARE),
        "launches": (launches(counts) * LAUNCH_S[0], launches(counts) * LAUNCH_S[1]),
    }
    best, worst = (sum(part[end] for part in seconds.values()) for end in (0, 1))
    return {
        "step_ms": [round(1e3 * best, 2), round(1e3 * worst, 2)],
        "images_per_s": [round(counts.images / best), round(counts.images / worst)],
        "parts_ms": {
            name: [round(1e3 * second, 2) for second in part] for name, part in seconds.items()
        },
        "launches": launches(counts),
    }


def products(counts: Counts, gpu: str, *, itemsize: int) -> Range:
    """Seconds of all passes of convolutions and linear layers."""
    rate, bandwidth = GPUS[gpu]
    least_s = sum(
        p.passes * max(2 * p.macs / rate, itemsize * sum(p.elements) / bandwidth)
        for p in counts.products
    )
    return over(least_s, PRODUCT_SHARE)


def over(seconds: float, share: Range) -> Range:
    """The time where only a share of the rate is reached."""
    return seconds / share[0], seconds / share[1]


@dataclass(frozen=True)
class Published:
    """A speed of supervised ResNet-50 v1.5 at 224 pixels in 16 bits, channels last."""

    name: str
    gpu: str
    batch_size: int
    images_per_s: float
    """Of one GPU."""
    between_mb: float
    """Bytes an image between the convolutions."""


EAGER, FUSED = 281.0, 155.0
"""Eager: 10 words an element of a batch norm with ReLU (forward 4, backward 6), 16 at a block's end
(7, and 9 with the sum of two gradients), 5 of a shortcut's batch norm, 2 bytes each. Fused: the
normalisation is part of the next convolution, the statistics of the one before."""
PUBLISHED = (
    Published("MLPerf 4.0, MXNet", "h200", 400, 7951, FUSED),
    Published("MLPerf 4.0, MXNet", "h100", 400, 7161, FUSED),
    Published("MLPerf 2.1, MXNet", "a100", 408, 3398, FUSED),
    Published("DeepLearningExamples, PyTorch eager", "a100", 256, 2470, EAGER),
)
"""Source: logs of github.com/mlcommons/training_results_v4.0 and _v2.1, NVIDIA (images over epoch
seconds, eight GPUs); github.com/NVIDIA/DeepLearningExamples, resnet50v1.5/README.md (one GPU)."""


def against_published() -> list[dict]:
    """The formula for other programs' ResNet-50 beside their published images a second."""
    rows = []
    for run in PUBLISHED:
        counts = count(ModelConfig(), MethodConfig(), images=run.batch_size // 2, size=224)
        backbone = [p for p in counts.products if p.name.startswith("backbone")]
        counts = replace(counts, products=tuple(backbone))
        between_s = 1e6 * run.between_mb * run.batch_size / GPUS[run.gpu][1]
        number = launches(counts)
        ends = zip(
            products(counts, run.gpu, itemsize=2),
            over(between_s, COPY_SHARE),
            LAUNCH_S,
            strict=True,
        )
        predicted = [round(run.batch_size / (p + b + number * one)) for p, b, one in ends]
        published = {"published": run.images_per_s, "predicted": predicted}
        rows.append({"program": run.name, "gpu": run.gpu, **published})
    return rows
