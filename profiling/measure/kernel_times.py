"""Times of the batch-norm sites of ResNet-50 and of the loss, beside the peers in the same run.

profiling/kernels.py calls this where there is a CUDA device. All variants of a site take turns, so
that clocks and temperature are the same for all. Not yet run on a GPU; a test runs it on small
sites in Triton's interpreter, where its times mean nothing.
Times are the GPU's: `clock` lets the stream sleep until the host has queued the whole call, as in a
step that the GPU limits. Not a CUDA graph: torch.compile's and apex's calls and autograd's backward
pass would each have to be captured, in separate memory.
Before each call the L2 cache is filled with other data, read and not written, so that nothing has
to be written back meanwhile. In a step what the convolution has just written is partly in the cache
still: sites of less than 50 MB are faster in a step, for all variants. The second pass of a call
does hit what the first left, so GB/s can be above a copy's.
apex's NHWC group batch norm takes part where apex was built with it (--bnp). The official code
makes two passes: the peers get the two views apart, and pay no concatenation.

Bytes that a site must move, E elements of b bytes, the formula of GB/s:
    relu, none   forward 3 b E                        backward 5 b E
    residual     forward 4 b E + E/8                  backward 7 b E + E/8   (two gradients come in)
    norm         forward 5 b E + E/8                  backward 10 b E + E/8
    pool         forward 2.25 b E + E/4               backward 3.5 b E + E/2
"""

import importlib.util
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.batch_norm import (
    Norm,
    NormOptions,
    batch_norm_act,
    batch_norm_act_pool,
    block_end,
)
from kernels.choose import Kernels
from kernels.cosine import symmetric_neg_cosine
from kernels.normalize import normalize_views
from pipeline.augment import AugmentConfig, draw_views, pack_draws

WARMUP = 10
SLEEP_CYCLES, MAX_SLEEP_CYCLES = 1 << 20, 1 << 30  # 0.5 ms at first, half a second at most
STAGES = ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7))  # planes, blocks, pixels a side
MOVED = {  # (words, bytes) an element, forward and backward
    "relu": ((3, 0), (5, 0)),
    "none": ((3, 0), (5, 0)),
    "residual": ((4, 1 / 8), (7, 1 / 8)),
    "norm": ((5, 1 / 8), (10, 1 / 8)),
    "pool": ((2.25, 1 / 4), (3.5, 1 / 2)),
}
Outputs = list[Tensor]
Variant = tuple[Callable[[], Outputs], list[Tensor]]
"""A forward call, and what the gradient is taken of."""


@dataclass(frozen=True)
class Site:
    """A call in the network: (N, C, H, W) or (N, C) of both views, and what is fused with it."""

    kind: str
    """relu; none (no ReLU, no affine); residual; norm (a second batch norm); pool."""
    shape: tuple[int, ...]

    def moved(self, itemsize: int) -> tuple[float, float]:
        """Bytes that forward and backward must move."""
        elements = float(torch.Size(self.shape).numel())
        forward, backward = ((w * itemsize + b) * elements for w, b in MOVED[self.kind])
        return forward, backward


def resnet50_sites(images: int) -> Iterator[Site]:
    """The 53 calls of a step at 224 pixels, which hold its 57 batch norms."""
    rows = 2 * images
    yield Site("pool", (rows, 64, 112, 112))
    for planes, blocks, side in STAGES:
        for block in range(blocks):
            before = side if block or side == 56 else 2 * side  # the stride is on the 3x3
            yield Site("relu", (rows, planes, before, before))
            yield Site("relu", (rows, planes, side, side))
            yield Site("residual" if block else "norm", (rows, 4 * planes, side, side))
    for kind, channels in (("relu", 2048), ("relu", 2048), ("none", 2048), ("relu", 512)):
        yield Site(kind, (rows, channels))


class Inputs:
    """Tensors of a site on a device: one batch for ours, the same views apart for the peers."""

    def __init__(self, site: Site, dtype: torch.dtype, device: torch.device):
        def draw() -> Tensor:
            x = torch.randn(site.shape, device=device).to(dtype)
            return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

        def full(*values: float) -> list[Tensor]:
            return [torch.full((site.shape[1],), float(value), device=device) for value in values]

        self.site, self.ends_block = site, site.kind in ("residual", "norm")
        self.leaves = [draw().requires_grad_() for _ in range(2 if self.ends_block else 1)]
        self.apart = [[v.detach().requires_grad_() for v in t.chunk(2)] for t in self.leaves]
        is_affine = site.kind != "none"
        self.params = [p.requires_grad_() for p in full(1, 0, 1, 0)] if is_affine else []
        self.running = full(0, 1, 0, 1)

    def norms(self) -> tuple[Norm, Norm]:
        """The first and the second batch norm."""
        params: list = self.params or [None] * 4
        return Norm(*params[:2], *self.running[:2]), Norm(*params[2:], *self.running[2:])

    def ours(self, kernels: Kernels) -> Outputs:
        """Our call: the result, at a block's end twice."""
        norm, norm2 = self.norms()
        x, kind = self.leaves[0], self.site.kind
        options = NormOptions(2, kernels=kernels, relu=kind != "none")
        if kind == "pool":
            return [batch_norm_act_pool(x, norm, options)]
        if not self.ends_block:
            return [batch_norm_act(x, norm, options)]
        second = norm2 if kind == "norm" else None
        return list(block_end(x, norm, self.leaves[1], second, options))

    def plain(self) -> Outputs:
        """PyTorch's own operations on each view, ReLU in place."""

        def apply(norm: Norm, x: Tensor) -> Tensor:
            return F.batch_norm(x, norm[2], norm[3], norm[0], norm[1], True)

        norm, norm2 = self.norms()
        outputs = []
        for x, *shortcut in zip(*self.apart, strict=True):
            y = apply(norm, x)
            if shortcut:
                y = y + (apply(norm2, shortcut[0]) if self.site.kind == "norm" else shortcut[0])
            y = y if self.site.kind == "none" else F.relu(y, inplace=True)
            outputs.append(F.max_pool2d(y, 3, 2, 1) if self.site.kind == "pool" else y)
        return outputs

    def apex(self, norm_class: type[nn.Module]) -> Callable[[], Outputs]:
        """A call of apex's modules on each view. Source: apex/contrib/groupbn/batch_norm.py."""
        kind, channels, device = self.site.kind, self.site.shape[1], self.leaves[0].device
        # each view has its modules: they keep one batch's statistics for the backward pass
        firsts, seconds = (
            [norm_class(channels, fuse_relu=relu).to(device) for _ in self.apart[0]]
            for relu in (kind != "none", False)
        )

        def call() -> Outputs:
            outputs = []
            for index, view in enumerate(zip(*self.apart, strict=True)):
                x, *shortcut = (t if t.dim() == 4 else t[:, :, None, None] for t in view)
                x, *shortcut = (t.permute(0, 2, 3, 1) for t in (x, *shortcut))  # apex wants NHWC
                if kind == "norm":
                    shortcut = [seconds[index](shortcut[0])]
                y = firsts[index](x, *shortcut).permute(0, 3, 1, 2)
                outputs.append(F.max_pool2d(y, 3, 2, 1) if kind == "pool" else y)
            return [y.reshape(y.shape[:2]) if self.leaves[0].dim() == 2 else y for y in outputs]

        return call

    def wanted(self, *, ours: bool) -> list[Tensor]:
        """What the gradient is taken of."""
        leaves = self.leaves if ours else [view for pair in self.apart for view in pair]
        used = self.params if self.site.kind == "norm" else self.params[:2]
        return [*leaves, *used]


def apex_batch_norm() -> type[nn.Module] | None:
    """apex's NHWC group batch norm, fp16 alone; None where apex was built without it."""
    if importlib.util.find_spec("bnp") is None:  # its CUDA extension
        return None
    return importlib.import_module("apex.contrib.groupbn.batch_norm").BatchNorm2d_NHWC


def clock(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of a call. On a GPU its own time alone, from a cold L2 cache.

    The stream sleeps while the call is queued. If it woke up before that was done, the call is
    made again behind a longer sleep. Raises: RuntimeError for a call that waits for the device.
    """
    if device.type != "cuda":
        begin = time.perf_counter()
        result = call()
        return time.perf_counter() - begin, result
    cycles = SLEEP_CYCLES
    while cycles <= MAX_SLEEP_CYCLES:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        other_data(device).sum()
        start.record()
        result = call()
        end.record()
        was_queued_in_time = not start.query()
        end.synchronize()
        if was_queued_in_time:
            return start.elapsed_time(end) / 1e3, result
        cycles *= 4
    raise RuntimeError("a timed call waits for the device: its time on the GPU cannot be had")


@lru_cache(maxsize=1)
def other_data(device: torch.device) -> Tensor:
    """256 MiB, more than any L2 cache holds."""
    return torch.zeros(64 << 20, device=device)


def time_turns(
    variants: dict[str, Variant], device: torch.device, n: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of forward and backward of each variant, taking turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    warmup = WARMUP if device.type == "cuda" else 1
    for _ in range(warmup + n):
        for name, (forward, wanted) in variants.items():
            forward_s, outputs = clock(device, forward)
            grads = [torch.ones_like(y) for y in outputs]

            def backward(outputs=outputs, wanted=wanted, grads=grads) -> Any:
                return torch.autograd.grad(outputs, wanted, grads)

            times[name].append((forward_s, clock(device, backward)[0]))
    medians = {}
    for name, pairs in times.items():
        forward_s, backward_s = map(statistics.median, zip(*pairs[warmup:], strict=True))
        medians[name] = (forward_s, backward_s)
    return medians


def time_site(
    site: Site,
    device: torch.device,
    *,
    kernels: Kernels,
    compiled: bool,
    n: int,
    apex: type[nn.Module] | None,
) -> dict:
    """A row: milliseconds of each variant, and what ours moves a second."""
    inputs, half = (Inputs(site, dtype, device) for dtype in (torch.bfloat16, torch.float16))
    variants: dict[str, Variant] = {
        "ours": (lambda: inputs.ours(kernels), inputs.wanted(ours=True)),
        "eager_bf16": (inputs.plain, inputs.wanted(ours=False)),
        "eager_fp16": (half.plain, half.wanted(ours=False)),
    }
    if apex is not None:
        variants["apex_fp16"] = (half.apex(apex), half.wanted(ours=False)[: 2 * len(half.leaves)])
    if compiled:
        torch._dynamo.reset()  # a graph for each site, whatever the sites before
        call = torch.compile(inputs.plain, dynamic=False)
        variants["compiled_plain"] = (call, inputs.wanted(ours=False))
    times = time_turns(variants, device, n)
    row: dict[str, Any] = {"kind": site.kind, "shape": list(site.shape)}
    row |= {f"{name}_ms": [round(1e3 * s, 4) for s in pair] for name, pair in times.items()}
    pairs = zip(site.moved(2), times["ours"], strict=True)
    return row | {"gb_per_s": [round(moved / s / 1e9, 1) for moved, s in pairs]}


def copy_bandwidth(device: torch.device, *, mib: int = 1024, n: int = 20) -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.randint(0, 255, (mib << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [clock(device, lambda: target.copy_(source))[0] for _ in range(n + 3)][3:]
    return 2 * source.numel() / statistics.median(times) / 1e9


def time_loss(device: torch.device, *, kernels: Kernels, rows: int = 256, n: int = 50) -> dict:
    """Microseconds of the loss's forward and backward at 2 x rows x 2048 in bf16."""
    p, z = (torch.randn(2, rows, 2048, device=device).bfloat16() for _ in range(2))
    leaf = p.requires_grad_()

    def variant(how: Kernels) -> Variant:
        return lambda: [symmetric_neg_cosine(leaf, z, kernels=how)[0]], [leaf]

    times = time_turns({"ours": variant(kernels), "eager": variant("plain")}, device, n)
    return {name: [round(s * 1e6, 2) for s in pair] for name, pair in times.items()}


def random_draws(views: Sequence[AugmentConfig], rows: int, device: torch.device) -> Tensor:
    """Draws of colours and blur as the loader gives them beside a GPU: (V, rows, 20 + R)."""
    rng, sizes = np.random.default_rng(0), np.full((rows, 2), 500)
    drawn = draw_views(views, rng, sizes, slice(0, rows), rows)
    return torch.from_numpy(pack_draws(views, drawn)).to(device)


def time_views(
    device: torch.device, *, kernels: Kernels, rows: int = 256, size: int = 224, n: int = 50
) -> dict:
    """Milliseconds of the step's first op: both views of `rows` images to bf16."""
    draws = random_draws([AugmentConfig()] * 2, rows, device)
    shape = 2 * rows, size, size, 3
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    values, found = ((0.5,) * 3, (0.5,) * 3, torch.bfloat16), {}
    for name, how in (("ours", kernels), ("plain", "plain")):
        options = {"draws": draws, "kernels": how}
        times = [
            clock(device, lambda options=options: normalize_views(crops, *values, **options))[0]
            for _ in range(n + 3)
        ]
        found[name] = round(1e3 * statistics.median(times[3:]), 4)
    return found


def measure(
    sites: list[Site],
    device: torch.device,
    *,
    kernels: Kernels = "triton",
    compiled: bool = True,
    n: int = 30,
    apex: type[nn.Module] | None = None,
) -> dict:
    """All sites, each shape once and counted, the sums over sites and the ratios of the goals."""
    mib, loss_rows, view_sizes = 1024, 256, {}
    if device.type != "cuda":
        mib, loss_rows, view_sizes = 16, 4, {"rows": 2, "size": 16}
    bandwidth = copy_bandwidth(device, mib=mib)
    rows = []
    for site, count in Counter(sites).items():
        row = time_site(site, device, kernels=kernels, compiled=compiled, n=n, apex=apex)
        share = [round(g / bandwidth, 3) for g in row["gb_per_s"]]
        rows.append(row | {"count": count, "share_of_copy": share})
    names = [key for key in rows[0] if key.endswith("_ms")]
    sums = {name: sum(row["count"] * sum(row[name]) for row in rows) for name in names}
    return {
        "n": n,
        "copy_gb_per_s": bandwidth,
        "sites": rows,
        "sum_ms": sums,
        "ratios": {f"{name[:-3]}/ours": sums[name] / sums["ours_ms"] for name in names[1:]},
        "loss_us": time_loss(device, kernels=kernels, rows=loss_rows, n=n),
        "views_ms": time_views(device, kernels=kernels, n=n, **view_sizes),
    }
