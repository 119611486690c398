"""Every convolution of the networks that configs/ and the tests train, against double precision.

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python tests/convolutions.py

Output and both gradients, in fp32 and bf16, with one thread and with two, channels_last as in
training. A program of its own: a CPU's instructions are chosen once for a process, and a write past
a workspace may end it. It names each convolution before it runs, so that the last line is the one
that crashed or hangs. Further arguments are convolutions to check instead, as they are printed:
"rows inputs height width outputs kernel stride padding groups".
"""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script, like those of profiling/
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from train.config.parser import parse_config
from train.network.resnet import ResNet

ROOT = Path(__file__).parent.parent
TESTS = [  # (arch, stem, width, pixels): the tests' networks, and one where the fault shows
    ("resnet18", "cifar", 8, 8), ("resnet18", "cifar", 8, 16), ("resnet18", "cifar", 8, 32),
    ("resnet18", "cifar", 16, 32), ("resnet18", "imagenet", 8, 32), ("resnet18", "cifar", 4, 32),
    ("resnext50_32x4d", "cifar", 8, 16),
]  # fmt: skip
ROWS = (3, 16)
"""An odd number, which two threads cannot share out equally: where AVX-512 meets the fault; and one
at which AVX2 does."""
MOST = 9
"""The largest error by the one that is allowed on average. An element's is the product of two
normal numbers, the size of its partial sums and that of their rounding: of 1e8 none is 18 times the
mean."""


class Shape(NamedTuple):
    """One convolution."""

    rows: int
    inputs: int
    height: int
    width: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    groups: int = 1

    def __str__(self) -> str:
        return " ".join(map(str, self))


class Recorder(TorchFunctionMode):
    """Notes the shapes of all calls of conv2d."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[Shape] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            x, weight, bias, stride, padding, dilation, groups = args
            assert bias is None and dilation == (1, 1), "check() knows none of it"
            assert stride[0] == stride[1] and padding[0] == padding[1]
            self.shapes.add(Shape(*x.shape, weight.shape[0], *weight.shape[2:3], stride[0],
                                  padding[0], groups))  # fmt: skip
        return function(*args, **(kwargs or {}))


def networks() -> set[tuple]:
    """(arch, stem, width, pixels, rows) of every preset and test."""
    found = {(*network, rows) for network in TESTS for rows in ROWS}
    found.add(("resnext50_32x4d", "imagenet", 64, 32, min(ROWS)))  # groups of 4 to 32 channels
    for preset in sorted((ROOT / "configs").glob("*.yaml")):
        config = parse_config(["--config", str(preset), "--data.root=none"])
        sizes = {config.augment.size, config.eval.size}
        if config.method.name == "swav" and config.method.swav.small_views:
            sizes.add(config.method.swav.small_size)
        model = config.model
        for size in sizes:  # one of the large ones: more take minutes where bf16 is emulated
            rows = min(ROWS) if size <= 32 else 1
            found.add((model.arch, model.stem, model.width, size, rows))
    return found


def shapes() -> list[Shape]:
    """Of all networks, none twice."""
    recorder = Recorder()
    for arch, stem, width, size, rows in networks():
        with FakeTensorMode(), recorder:
            x = torch.empty(rows, 3, size, size).to(memory_format=torch.channels_last)
            ResNet(arch, stem=stem, width=width)(x)
    return sorted(recorder.shapes)


def convolved(shape: Shape, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dw and, unless x is an image, dx."""
    wanted = [weight.requires_grad_()] + [x.requires_grad_()] * (shape.inputs != 3)
    y = torch.nn.functional.conv2d(x, weight, None, shape.stride, shape.padding, 1, shape.groups)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def allowed(length: int, dtype: torch.dtype, partial_sums: int) -> float:
    """Twice the error of a plain sum of `length` products, relative to the result's mean square.

    Rounding errors of unit roundoff u that are independent: added one after the other, the worst
    of all orders, partial sums grow as sqrt(k), so the error is u sqrt(length / 6) of the result.
    It is fp32 that sums; the result is rounded to dtype once, or, where the CPU has no bf16 and
    PyTorch adds the images' weight gradients in it, once for each of `partial_sums`.
    """
    u, u_sum = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    return 2 * (u * (1 + (partial_sums / 6) ** 0.5) + u_sum * (length / 6) ** 0.5)


def check(shape: Shape, dtype: torch.dtype) -> list[str]:
    """What is further from double precision than rounding explains."""
    rows, inputs, height, width, outputs, kernel, stride, padding, groups = shape
    generator = torch.Generator().manual_seed(0)

    def made(*sizes: int) -> Tensor:
        values = torch.randn(sizes, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    out_height, out_width = (
        (side + 2 * padding - kernel) // stride + 1 for side in (height, width)
    )
    operands = (made(rows, inputs, height, width), made(outputs, inputs // groups, kernel, kernel),
                made(rows, outputs, out_height, out_width))  # fmt: skip
    exact = convolved(shape, *(value.double() for value in operands))
    lengths = {
        "output": (inputs // groups * kernel**2, 1),
        "weight's gradient": (
            rows * out_height * out_width,
            rows if dtype == torch.bfloat16 else 1,
        ),
        "input's gradient": (outputs // groups * kernel**2, 1),
    }
    wrong = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = convolved(shape, *(value.detach().clone() for value in operands))
        torch.set_num_threads(2)
        for (name, sums), value, true in zip(lengths.items(), found, exact, strict=False):
            scale = (true.norm() / true.count_nonzero() ** 0.5).item()
            error = value.double().sub_(true).div_(scale)
            mean = (error.norm() / error.numel() ** 0.5).item()
            most = max(map(abs, torch.stack(torch.aminmax(error)).tolist()))
            bound = allowed(sums[0], dtype, sums[1])
            if not (mean <= bound and most <= MOST * bound):
                wrong.append(f"{name} with {threads} threads: {mean:.1e} on average, "
                             f"{most:.1e} at most, allowed {bound:.1e}")  # fmt: skip
    return wrong


def main() -> None:
    """Check all; the exit code is 1 if one is wrong."""
    given = [Shape(*map(int, words.split())) for words in sys.argv[1:]]
    print(f"{torch.backends.cpu.get_cpu_capability()}", flush=True)
    is_wrong = False
    for shape in given or shapes():
        for dtype in (torch.float32, torch.bfloat16):
            start = time.perf_counter()
            print(shape, str(dtype).removeprefix("torch."), end=": ", flush=True)
            wrong = check(shape, dtype)
            is_wrong |= bool(wrong)
            print("; ".join(wrong) or "right", f"({time.perf_counter() - start:.2f} s)", flush=True)
    raise SystemExit(is_wrong)


if __name__ == "__main__":
    main()
