"""Every Triton kernel once, with every switch, against its plain twin: what to run on a new GPU.

`python profiling/kernels.py --each-once real` takes shapes of ResNet-50 at 224 pixels; `--each-once
small` odd shapes of a few thousand elements, for compute-sanitizer or Triton's interpreter. Not yet
run on a GPU; a test runs the small shapes in the interpreter and fails for a kernel that is left
out. The error against fp64 is at most twice that of PyTorch's own operations in the same dtype.
A newcomer's mistake: values near ReLU's kink, or equal ones in a window of max-pool. Both sides are
right there and differ; the inputs keep away from it.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.batch_norm import (
    Norm,
    NormOptions,
    batch_norm_act,
    batch_norm_act_conv,
    batch_norm_act_pool,
    block_end,
)  # fmt: skip
from kernels.choose import Kernels
from kernels.cosine import symmetric_neg_cosine
from kernels.norm_autograd import rows_of
from kernels.normalize import normalize_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    # rows of both views of 256 images; one stage of the network each
    "real": {
        "relu": (512, 64, 56, 56), "none": (512, 2048), "residual": (512, 512, 28, 28),
        "norm": (512, 1024, 14, 14), "pool": (512, 64, 112, 112), "recompute": (512, 512, 7, 7),
        "sync": (512, 64, 56, 56), "loss": (2, 256, 2048), "normalize": (512, 224, 224, 3),
    },
    # 70 channels: two blocks, the last with 6; 70 rows a view of 35: two programs to merge
    "small": {
        "relu": (4, 70, 5, 7), "none": (6, 5), "residual": (4, 70, 5, 7), "norm": (4, 70, 5, 7),
        "pool": (4, 70, 5, 7), "recompute": (4, 70, 5, 7), "sync": (4, 70, 5, 7),
        "loss": (2, 131, 37), "normalize": (3, 41, 37, 3),
    },
}  # fmt: skip
Named = dict[str, Tensor]


@dataclass
class Case:
    """A call, its tensors, and the gradients of its first results. In fp64 it is the reference."""

    tensors: Named
    call: Callable[[Named, Kernels], Named]
    grads: list[Tensor] = field(default_factory=list)
    formula: Callable[[Named], Named] | None = None
    """The reference of a call whose plain twin computes in fp32 whatever it is given."""

    def run(self, how: Kernels, *, exact: bool = False) -> Named:
        """Results and, as "d" and their name, gradients of the tensors."""
        leaves = {
            name: value.detach().to(torch.float64 if exact else value.dtype).requires_grad_()
            if value.is_floating_point() else value
            for name, value in self.tensors.items()
        }  # fmt: skip
        found = self.formula(leaves) if exact and self.formula else self.call(leaves, how)
        outputs = list(found.values())[: len(self.grads)]
        torch.autograd.backward(
            outputs, [g.to(y.dtype) for g, y in zip(self.grads, outputs, strict=True)]
        )
        gradients = {f"d{n}": t.grad for n, t in leaves.items() if t.grad is not None}
        return {name: value.detach() for name, value in (found | gradients).items()}


@dataclass
class Launched:
    """Kernels that were launched, by name, each with the values that its switches took."""

    switches: dict[str, dict[str, set]] = field(default_factory=dict)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Every launch within is noted, and made."""
        saved = []
        for module in kernel_modules():
            if (wrap := getattr(module, "wrap_triton", None)) is not None:
                saved.append((module, wrap))
                module.wrap_triton = lambda kernel, wrap=wrap: self._noting(kernel, wrap(kernel))
        try:
            yield
        finally:
            for module, wrap in saved:
                module.wrap_triton = wrap

    def _noting(self, kernel: Any, wrapped: Any) -> Any:
        launched = self

        class Noting:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable:
                def run(*args: Any, **options: Any) -> None:
                    seen = launched.switches.setdefault(kernel.__name__, {})
                    for name, value in options.items():
                        if name.isupper() and not name.startswith("BLOCK"):
                            seen.setdefault(name, set()).add(value)
                    wrapped[grid](*args, **options)

                return run

        return Noting()

    def add(self, other: "Launched") -> None:
        """Take in what another has noted."""
        for kernel, switches in other.switches.items():
            for name, values in switches.items():
                self.switches.setdefault(kernel, {}).setdefault(name, set()).update(values)
            self.switches.setdefault(kernel, {})

    def reached(self) -> set[str]:
        """The launched kernels and the functions that these call."""
        sources = {name: inspect.getsource(one.fn) for name, one in jit_functions().items()}
        found: set[str] = set()
        waiting = set(self.switches)
        while waiting:
            found |= waiting
            called = {w for name in waiting for w in re.findall(r"\w+", sources[name])}
            waiting = (called & sources.keys()) - found
        return found


def kernel_modules() -> list[Any]:
    """The modules of kernels/."""
    return [
        importlib.import_module(one.name)
        for one in pkgutil.walk_packages(kernels.__path__, "kernels.")
    ]


def jit_functions() -> dict[str, Any]:
    """Every function of kernels/ that @triton.jit decorates, by name."""
    return {
        value.__name__: value
        for module in kernel_modules()
        for value in vars(module).values()
        if type(value).__name__ in ("JITFunction", "InterpretedFunction")
    }


class Draw:
    """Seeded inputs on a device, and the cases made of them."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values in fp32."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def laid_out(self, x: Tensor) -> Tensor:
        """In the case's dtype, channels last."""
        x = x.to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()

    def index(self, shape: tuple[int, ...]) -> list[Tensor]:
        """The coordinate along each axis, to be broadcast."""
        return [
            torch.arange(size, device=self.device).view([-1] + [1] * (len(shape) - 1 - axis))
            for axis, size in enumerate(shape)
        ]

    def away_from_zero(self, shape: tuple[int, ...]) -> Tensor:
        """Values of at least 0.5 whose signs are a chequered pattern: their mean is near 0."""
        sign = 1 - 2 * (sum(self.index(shape), start=torch.tensor(0)) % 2)
        return self.laid_out(sign * (0.5 + 0.5 * self.normal(*shape).abs()))

    def params(self, channels: int) -> Named:
        """Of two batch norms, fp32; the biases do not reach from 0.5 to ReLU's kink."""

        def uniform(low: float, high: float) -> Tensor:
            unit = torch.rand(channels, generator=self.generator, device=self.device)
            return low + (high - low) * unit

        found = {}
        for end in ("", "2"):
            found |= {f"weight{end}": uniform(0.75, 1.25), f"bias{end}": uniform(-0.05, 0.05)}
        return found


def norm_of(tensors: Named, end: str = "") -> Norm:
    """A batch norm with the case's parameters, if it has any, and new running statistics."""
    x = tensors["x"]
    dtype = torch.promote_types(x.dtype, torch.float32)
    running = [torch.full((x.shape[1],), v, dtype=dtype, device=x.device) for v in (0.0, 1.0)]
    return Norm(tensors.get(f"weight{end}"), tensors.get(f"bias{end}"), *running)


def norm_case(kind: str, shape: tuple[int, ...], draw: Draw) -> Case:
    """batch_norm_act with ReLU; "none": without it and its affine part."""
    tensors = {"x": draw.away_from_zero(shape)}
    if kind == "relu":
        params = draw.params(shape[1])
        tensors |= {name: params[name] for name in ("weight", "bias")}

    def call(given: Named, how: Kernels) -> Named:
        norm = norm_of(given)
        options = NormOptions(2, kernels=how, relu=kind == "relu")
        y = batch_norm_act(given["x"], norm, options)
        return {"y": y} | running_of(norm)

    return Case(tensors, call, [draw.laid_out(draw.normal(*shape))])


def block_case(kind: str, shape: tuple[int, ...], draw: Draw) -> Case:
    """A block's end with a plain shortcut, or "norm": one that is normalised too."""
    tensors = {"x": draw.away_from_zero(shape), "skip": draw.away_from_zero(shape)}
    params = draw.params(shape[1])
    tensors |= {name: params[name] for name in list(params)[: 4 if kind == "norm" else 2]}

    def call(given: Named, how: Kernels) -> Named:
        norm, norm2 = norm_of(given), norm_of(given, "2") if kind == "norm" else None
        y, again = block_end(given["x"], norm, given["skip"], norm2, NormOptions(2, kernels=how))
        found = {"y": y, "again": again} | running_of(norm)
        return found | ({} if norm2 is None else running_of(norm2, "2"))

    return Case(tensors, call, [draw.laid_out(draw.normal(*shape)) for _ in range(2)])


def running_of(norm: Norm, end: str = "") -> Named:
    """The running statistics by name."""
    assert norm.running_mean is not None and norm.running_var is not None
    return {f"running_mean{end}": norm.running_mean, f"running_var{end}": norm.running_var}


def pool_case(shape: tuple[int, ...], draw: Draw) -> Case:
    """The stem's end. Each window holds levels that differ; where its maximum is low, dy is 0."""
    image, channel, line, column = draw.index(shape)
    levels = torch.tensor([-4.0, 2, -1, 4, 1, -3, 5, -2, 3], device=draw.device)
    x = levels[(3 * (line % 3) + column % 3 + image + channel) % 9] + 0.1 * draw.normal(*shape)
    params = draw.params(shape[1])
    tensors = {"x": draw.laid_out(x), "weight": params["weight"], "bias": params["bias"]}

    def call(given: Named, how: Kernels) -> Named:
        norm = norm_of(given)
        y = batch_norm_act_pool(given["x"], norm, NormOptions(2, kernels=how))
        return {"y": y} | running_of(norm)

    with torch.no_grad():
        y = call(tensors, "plain")["y"]
    return Case(tensors, call, [draw.laid_out(draw.normal(*y.shape) * (y > 0.1))])


def recompute_case(shape: tuple[int, ...], draw: Draw, *, outputs: int) -> Case:
    """Batch norm, ReLU and a 1x1 convolution whose input is not kept for the backward pass."""
    params = draw.params(shape[1])
    tensors = {
        "x": draw.away_from_zero(shape), "weight": params["weight"], "bias": params["bias"],
        "conv": draw.normal(outputs, shape[1], 1, 1) / shape[1] ** 0.5,
    }  # fmt: skip

    def call(given: Named, how: Kernels) -> Named:
        norm, x, conv = norm_of(given), given["x"], given["conv"]
        if how == "triton":
            options, shape = NormOptions(2), {"stride": (1, 1), "padding": (0, 0)}
            y = batch_norm_act_conv(x, norm, conv, options, **shape)
        else:
            hidden = batch_norm_act(x, norm, NormOptions(2, kernels=how))
            y = F.conv2d(hidden, conv.to(x.dtype))
        return {"y": y} | running_of(norm)

    size = (shape[0], outputs, *shape[2:])
    return Case(tensors, call, [draw.laid_out(draw.normal(*size))])


def sync_case(shape: tuple[int, ...], draw: Draw) -> Case:
    """The statistics that ranks exchange: mean and variance, no running ones."""
    tensors = {"x": draw.away_from_zero(shape)}

    def call(given: Named, how: Kernels) -> Named:
        rows = rows_of(given["x"].detach())
        if how == "triton":
            from kernels.gpu import norm_forward

            mean, var = norm_forward.statistics(rows, None, None, 2, 0.1, 1e-5, True)
        else:
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(0, (2, -1))
            var, mean = torch.var_mean(rows, dim=1, correction=0)
        return {"mean": mean, "var": var}

    return Case(tensors, call)


def loss_case(shape: tuple[int, ...], draw: Draw) -> Case:
    """The loss, the collapse meter and the gradient of p."""
    p, z = (draw.laid_out(draw.normal(*shape) + 0.3) for _ in range(2))

    def call(given: Named, how: Kernels) -> Named:
        loss, z_std = symmetric_neg_cosine(given["p"], given["z"].detach(), kernels=how)
        return {"loss": loss, "z_std": z_std}

    def formula(given: Named) -> Named:
        target = F.normalize(given["z"].detach(), dim=-1)
        loss = -(F.normalize(given["p"], dim=-1) * target.flip(0)).sum(-1).mean()
        return {"loss": loss, "z_std": target.std(1, correction=0).mean()}

    return Case({"p": p, "z": z}, call, [torch.ones((), device=draw.device)], formula)


def normalize_case(shape: tuple[int, ...], draw: Draw) -> Case:
    """uint8 views to activations."""
    views = torch.randint(0, 256, shape, generator=draw.generator, device=draw.device)

    def call(given: Named, how: Kernels) -> Named:
        return {"y": normalize_views(given["views"], MEAN, STD, draw.dtype, kernels=how)}

    def formula(given: Named) -> Named:
        mean, std = (torch.tensor(v, device=draw.device).double() for v in (MEAN, STD))
        return {"y": ((given["views"].double() / 255 - mean) / std).permute(0, 3, 1, 2)}

    return Case({"views": views.to(torch.uint8)}, call, formula=formula)


def make_case(kind: str, shape: tuple[int, ...], draw: Draw) -> Case:
    """The case of one of SHAPES' names."""
    if kind in ("relu", "none"):
        return norm_case(kind, shape, draw)
    if kind in ("residual", "norm"):
        return block_case(kind, shape, draw)
    if kind == "recompute":
        return recompute_case(shape, draw, outputs=4 * shape[1])
    others = {"pool": pool_case, "sync": sync_case, "loss": loss_case, "normalize": normalize_case}
    return others[kind](shape, draw)


def errors_of(case: Case) -> tuple[dict[str, list[float]], Launched]:
    """[ours, plain, allowed] of every result and gradient, and what was launched.

    allowed is twice plain's and a few units in fp32's last place of the largest value.
    """
    launched = Launched()
    with launched.recording():
        ours = case.run("triton")
    exact, plain, found = case.run("plain", exact=True), case.run("plain"), {}
    for name, reference in exact.items():
        assert ours[name].dtype == plain[name].dtype, name
        error, allowed = (
            (one[name].double() - reference).abs().max().item() for one in (ours, plain)
        )
        floor = 1e-6 * max(1.0, reference.abs().max().item())
        found[name] = [error, allowed, 2 * allowed + floor]
    return found, launched


def check_each(size: str, dtype: torch.dtype, device: torch.device) -> dict:
    """Every case of SHAPES[size]: errors, what failed, what was launched and what was not."""
    cases, failed, largest = {}, [], 0.0
    every = Launched()
    for kind, shape in SHAPES[size].items():
        errors, launched = errors_of(make_case(kind, shape, Draw(dtype, device)))
        cases[kind] = {"shape": list(shape), "ours_plain_allowed": errors}
        for name, (error, _, allowed) in errors.items():
            largest = max(largest, error / allowed)
            if not error <= allowed:  # NaN fails too
                failed.append(f"{kind}: {name} is off by {error:.3g}, allowed {allowed:.3g}")
        every.add(launched)
    left_out = sorted(jit_functions().keys() - every.reached())
    failed += [f"{name} was not launched" for name in left_out]
    return {
        "size": size, "dtype": str(dtype).removeprefix("torch."), "device": str(device),
        "kernels": {
            name: {switch: sorted(values) for switch, values in switches.items()}
            for name, switches in sorted(every.switches.items())
        },
        "max_error_by_allowed": round(largest, 4), "failed": failed, "cases": cases,
    }  # fmt: skip
