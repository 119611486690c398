"""Times of a 1x1 convolution beside a batch norm on this GPU: fused kernels against separate ones.

Fused is kernels/gpu/norm_conv.py; separate is cuDNN's convolution and the batch norm's own kernel.
Both run on the same random tensors, and the fused result is checked before its time counts.
"""

import statistics
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.norm_autograd import rows_of

WARM_UP, TIMED = 3, 10  # calls: compilation and cuDNN's search are in the first


class Site(NamedTuple):
    """A pass of a 1x1 convolution of stride 1 and what it can be fused with."""

    kind: Literal["statistics", "relu", "residual", "norm"]
    """statistics: forward, with those of the batch norm that follows. The others: backward, with
    the reduction of the batch norm before, after which comes ReLU, a shortcut and ReLU, or a
    shortcut with its own batch norm and ReLU."""
    views: int
    shape: tuple[int, int, int, int]
    """Of its input, (N, C, H, W) over all views."""
    outputs: int
    dtype: torch.dtype


class Times(NamedTuple):
    """Medians, and whether the fused result is right."""

    fused_ms: float
    separate_ms: float
    agrees: bool

    @property
    def gain_ms(self) -> float:
        """What the fused kernels gain; 0 where they are slower or wrong."""
        return max(0.0, self.separate_ms - self.fused_ms) if self.agrees else 0.0


Passes = tuple[Callable[[], object], Callable[[], object], Callable[[], bool]]
"""The fused and the separate kernels, and whether their results agree."""


def compare(site: Site, device: torch.device) -> Times:
    """Times of both on random tensors; where the fused kernels need more shared memory, no gain."""
    from triton.runtime.errors import OutOfResources

    fused, separate, agree = (forward if site.kind == "statistics" else backward)(site, device)
    separate_ms = median_ms(separate)
    try:
        return Times(median_ms(fused), separate_ms, agree())
    except OutOfResources:
        return Times(0.0, separate_ms, agrees=False)


def median_ms(call: Callable[[], object]) -> float:
    """Milliseconds of a call on the GPU, after WARM_UP calls."""
    for _ in range(WARM_UP):
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TIMED)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in marks)


def forward(site: Site, device: torch.device) -> Passes:
    """The convolution and the statistics of its output."""
    from kernels.gpu.norm_conv import conv_statistics, merge_statistics
    from kernels.gpu.norm_forward import statistics as read_statistics

    draw = Draw(site, device)
    y, weight = draw.map(site.shape[1]).abs_(), draw.weight()
    how = 0.1, 1e-5, True

    def fused() -> tuple[Tensor, Tensor, Tensor]:
        z, part = conv_statistics(rows_of(y), weight.flatten(1), site.views)
        return z, *merge_statistics(part, None, None, len(z) // site.views, *how)

    def separate() -> tuple[Tensor, Tensor, Tensor]:
        z = rows_of(F.conv2d(y, weight))
        return z, *read_statistics(z, None, None, site.views, *how)

    def agree() -> bool:
        z, *found = fused()
        expected = read_statistics(z, None, None, site.views, *how)
        return is_near(z, separate()[0]) and all(map(is_near, found, expected))

    return fused, separate, agree


def backward(site: Site, device: torch.device) -> Passes:
    """The gradient of the convolution's input, and the reduction of the batch norm before it."""
    from kernels.gpu.norm_backward import reduce
    from kernels.gpu.norm_conv import conv_reduce
    from kernels.gpu.norm_forward import apply

    draw, channels = Draw(site, device), site.shape[1]
    x, weight = draw.map(channels), draw.weight()
    x += x.sign() / 2  # y is not near 0, where the sign depends on how a kernel rounds
    norms = 2 if site.kind == "norm" else 1
    statistics = [torch.zeros(site.views, channels, device=device)]
    statistics.append(torch.ones_like(statistics[0]))
    inputs = [rows_of(x), *statistics]
    params = [t for _ in range(norms) for t in (statistics[1][0], statistics[0][0])]
    shortcut = None if site.kind == "relu" else rows_of(draw.map(channels))
    if site.kind == "norm":
        inputs, shortcut = [*inputs, shortcut, *statistics], None
    _, bits = apply(inputs, shortcut, params, True)
    dz = draw.map(site.outputs)
    dy2 = None if site.kind == "relu" else rows_of(draw.map(channels))
    how = (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (True, False, False)

    def fused() -> tuple[Tensor, ...]:
        return conv_reduce(rows_of(dz), weight.flatten(1), dy2, inputs, params, bits)

    def separate(write_g: bool = dy2 is not None) -> tuple[Tensor, ...]:
        dy, *_ = torch.ops.aten.convolution_backward(dz, x, weight, None, *how)
        dys = [rows_of(dy), *([] if dy2 is None else [dy2])]
        return reduce(dys, inputs, params, bits, True, write_g, [])

    def agree() -> bool:
        g, *found = fused()
        _, *expected = reduce([g], inputs, params, bits, True, False, [])
        return is_near(g, separate(True)[0]) and all(map(is_near, found, expected))

    return fused, separate, agree


class Draw:
    """Random tensors of a site, the same each time."""

    def __init__(self, site: Site, device: torch.device):
        self.site, self.device = site, device
        self.generator = torch.Generator(device).manual_seed(0)

    def map(self, channels: int) -> Tensor:
        """(N, channels, H, W) channels_last."""
        n, _, h, w = self.site.shape
        return self._normal(n, h, w, channels).permute(0, 3, 1, 2)

    def weight(self) -> Tensor:
        """The convolution's, with outputs of variance 1."""
        channels = self.site.shape[1]
        return self._normal(self.site.outputs, channels, 1, 1) / channels**0.5

    def _normal(self, *shape: int) -> Tensor:
        how = {"generator": self.generator, "device": self.device, "dtype": self.site.dtype}
        return torch.randn(*shape, **how)


def is_near(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by rounding alone; NaN differs. Sums are fp32 (V, ...).

    A wrong tile changes its elements by as much as they are, and a sum over 2 M rows by 1e-2.
    """
    allowed = 4 * torch.finfo(found.dtype).eps
    if found.dtype == torch.float32:
        allowed = 4e-3 if torch.backends.cudnn.allow_tf32 and found.is_cuda else 1e-4
    return bool((found - expected).abs().max() <= allowed * expected.abs().max())
