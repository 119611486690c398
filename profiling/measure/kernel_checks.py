"""Every Triton kernel once, with every switch, against its plain twin: what to run on a new GPU.

`python profiling/kernels.py --each-once real` takes shapes of ResNet-50 at 224 pixels; `--each-once
small` odd shapes of a few thousand elements, for compute-sanitizer or Triton's interpreter. Not yet
run on a GPU; a test runs the small shapes in the interpreter and fails for a kernel that is left
out. The error against fp64 is at most twice that of PyTorch's own operations in the same dtype.
Inputs keep away from ReLU's kink and from equal values in a window of max-pool: two results that
are both right differ there.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels import batch_norm
from kernels.batch_norm import Norm, NormOptions, batch_norm_act, batch_norm_act_conv
from kernels.choose import Kernels
from kernels.cosine import symmetric_neg_cosine
from kernels.norm_autograd import ConvOptions, rows_of
from kernels.normalize import finish_views, normalize_views
from pipeline.augment import AugmentConfig, ViewDraws, pack_draws

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Shape = tuple[int, ...]
# 70 channels: two blocks, the last with 6; 70 rows a view of 35: two programs to merge
ODD: Shape = (4, 70, 5, 7)
SHAPES: dict[str, dict[str, Shape]] = {
    # rows of both views of 256 images; each from another stage of the network
    "real": {
        "relu": (512, 64, 56, 56),
        "none": (512, 2048),
        "residual": (512, 512, 28, 28),
        "norm": (512, 1024, 14, 14),
        "pool": (512, 64, 112, 112),
        "recompute": (512, 512, 7, 7),
        "conv": (512, 64, 56, 56),
        "conv residual": (512, 512, 28, 28),
        "conv norm": (512, 1024, 14, 14),
        "sync": (512, 64, 56, 56),
        "loss": (2, 256, 2048),
        **dict.fromkeys(("normalize", "colors"), (512, 224, 224, 3)),
    },
    "small": {
        **dict.fromkeys(("relu", "residual", "norm", "pool", "recompute", "sync"), ODD),
        **dict.fromkeys(("conv", "conv residual", "conv norm"), ODD),
        **{"none": (6, 5), "loss": (2, 131, 37), "normalize": (3, 41, 37, 3)},
        **{"colors": (4, 61, 37, 3)},
    },
}
Named = dict[str, Tensor]
Switches = dict[str, dict[str, set]]
"""Launched kernels by name, each with the values that its switches took."""


@dataclass
class Case:
    """A call, its tensors, and the gradients of its first results. In fp64 it is the reference."""

    tensors: Named
    call: Callable[[Named, Kernels], Named]
    grads: list[Tensor] = field(default_factory=list)
    formula: Callable[[Named], Named] | None = None
    """The reference of a call whose plain twin computes in fp32 whatever its input's dtype."""

    def run(self, how: Kernels, *, exact: bool = False) -> Named:
        """Results and, as "d" and their name, gradients of the tensors."""
        leaves = {name: value.detach() for name, value in self.tensors.items()}
        for name, value in leaves.items():
            if value.is_floating_point():
                dtype = torch.float64 if exact else value.dtype
                leaves[name] = value.to(dtype).requires_grad_()
        results = self.formula(leaves) if exact and self.formula else self.call(leaves, how)
        pairs = list(zip(results.values(), self.grads, strict=False))
        torch.autograd.backward([y for y, _ in pairs], [grad.to(y.dtype) for y, grad in pairs])
        gradients = {f"d{n}": t.grad for n, t in leaves.items() if t.grad is not None}
        return {name: value.detach() for name, value in (results | gradients).items()}


@contextmanager
def recording(launched: Switches) -> Iterator[None]:
    """Every launch within is noted, and made."""

    def noting(wrap: Callable, kernel: Any) -> Any:
        wrapped, seen = wrap(kernel), launched.setdefault(kernel.__name__, {})

        class Noting:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable:
                def run(*args: Any, **options: Any) -> None:
                    for name, value in options.items():
                        if name.isupper() and not name.startswith("BLOCK"):
                            seen.setdefault(name, set()).add(value)
                    wrapped[grid](*args, **options)

                return run

        return Noting()

    modules = [module for module in kernel_modules() if hasattr(module, "wrap_triton")]
    saved = [module.wrap_triton for module in modules]
    for module, wrap in zip(modules, saved, strict=True):
        module.wrap_triton = lambda kernel, wrap=wrap: noting(wrap, kernel)
    try:
        yield
    finally:
        for module, wrap in zip(modules, saved, strict=True):
            module.wrap_triton = wrap


def kernel_modules() -> list[Any]:
    """The modules of kernels/."""
    modules = pkgutil.walk_packages(kernels.__path__, "kernels.")
    return [importlib.import_module(module.name) for module in modules]


def jit_functions() -> dict[str, Any]:
    """Every function of kernels/ that @triton.jit decorates, by name."""
    return {
        value.__name__: value
        for module in kernel_modules()
        for value in vars(module).values()
        if type(value).__name__ in ("JITFunction", "InterpretedFunction")
    }


def reached(launched: set[str]) -> set[str]:
    """The launched kernels and the functions that these call."""
    sources = {name: inspect.getsource(function.fn) for name, function in jit_functions().items()}
    names, waiting = set(), set(launched)
    while waiting:
        names |= waiting
        called = {word for name in waiting for word in re.findall(r"\w+", sources[name])}
        waiting = (called & sources.keys()) - names
    return names


class Draw:
    """Seeded inputs on a device."""

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

    def index(self, shape: Shape) -> list[Tensor]:
        """The coordinate along each axis, to be broadcast."""
        axes = [torch.arange(size, device=self.device) for size in shape]
        return [a.view(-1, *[1] * (len(shape) - 1 - number)) for number, a in enumerate(axes)]

    def away_from_zero(self, shape: Shape) -> Tensor:
        """Values of at least 0.5 whose signs are a chequered pattern: their mean is near 0."""
        sign = 1 - 2 * (sum(self.index(shape), start=torch.tensor(0)) % 2)
        return self.laid_out(sign * (0.5 + 0.5 * self.normal(*shape).abs()))

    def windows(self, shape: Shape) -> Tensor:
        """Each window of max-pool holds levels that differ."""
        image, channel, line, column = self.index(shape)
        levels = torch.tensor([-4.0, 2, -1, 4, 1, -3, 5, -2, 3], device=self.device)
        level = levels[(3 * (line % 3) + column % 3 + image + channel) % 9]
        return self.laid_out(level + 0.1 * self.normal(*shape))

    def params(self, channels: int, num_norms: int) -> Named:
        """Of batch norms, fp32; the biases do not reach from 0.5 to ReLU's kink."""
        params = {}
        for end in ("", "2")[:num_norms]:
            for name, low, width in (("weight", 0.75, 0.5), ("bias", -0.05, 0.1)):
                unit = torch.rand(channels, generator=self.generator, device=self.device)
                params[name + end] = low + width * unit
        return params


def norm_case(kind: str, shape: Shape, draw: Draw) -> Case:
    """Batch norm with what is fused with it, and its running statistics.

    relu; none (no ReLU, no affine part); residual (a block's end); norm (whose shortcut is
    normalised too); pool (the stem's end); recompute (ReLU and a 1x1 convolution whose input is not
    kept for the backward pass).
    """
    tensors = {"x": draw.windows(shape) if kind == "pool" else draw.away_from_zero(shape)}
    if kind in ("residual", "norm"):
        tensors["skip"] = draw.away_from_zero(shape)
    if kind != "none":
        tensors |= draw.params(shape[1], 2 if kind == "norm" else 1)
    if kind == "recompute":
        tensors["conv"] = draw.normal(4 * shape[1], shape[1], 1, 1) / shape[1] ** 0.5

    def call(given: Named, how: Kernels) -> Named:
        x, (norm, norm2) = given["x"], (norm_of(given, end) for end in ("", "2"))
        results, second = {}, norm2 if kind == "norm" else None
        options = NormOptions(2, kernels=how, relu=kind != "none")
        if kind == "pool":
            results["y"] = batch_norm.batch_norm_act_pool(x, norm, options)
        elif kind == "recompute" and how == "triton":
            results["y"], *_ = batch_norm_act_conv(
                x, norm, given["conv"], NormOptions(2), conv=ConvOptions(recompute=True)
            )
        elif "skip" in given:
            results["y"], results["again"] = batch_norm.block_end(
                x, norm, given["skip"], second, options
            )
        else:
            y = batch_norm_act(x, norm, options)
            results["y"] = F.conv2d(y, given["conv"].to(x.dtype)) if "conv" in given else y
        for end, used in (("", norm), ("2", second)):
            if used is not None:
                results[f"running_mean{end}"] = used.running_mean
                results[f"running_var{end}"] = used.running_var
        return results

    with torch.no_grad():
        y = call(tensors, "plain")["y"]
    keeps = y > 0.1 if kind == "pool" else torch.ones_like(y)  # no gradient at a low maximum
    num_grads = 2 if "skip" in tensors else 1
    grads = [draw.laid_out(draw.normal(*y.shape) * keeps) for _ in range(num_grads)]
    return Case(tensors, call, grads)


def conv_case(kind: str, shape: Shape, draw: Draw) -> Case:
    """A 1x1 convolution between two batch norms, the first of which may end a block."""
    tensors = {"x": draw.away_from_zero(shape)}
    if kind != "conv":
        tensors["skip"] = draw.away_from_zero(shape)
    tensors |= draw.params(shape[1], 2 if kind == "conv norm" else 1)
    channels = 2 * shape[1] if kind == "conv" else shape[1] // 4
    tensors["conv"] = draw.normal(channels, shape[1], 1, 1) / shape[1] ** 0.5

    def call(given: Named, how: Kernels) -> Named:
        x, conv, (norm, norm2) = given["x"], given["conv"], (norm_of(given, e) for e in ("", "2"))
        options, skip = NormOptions(2, kernels=how), given.get("skip")
        second, part = norm2 if kind == "conv norm" else None, None
        if how == "triton":
            fused = ConvOptions(statistics=True, reduce=True)
            z, part, again = batch_norm_act_conv(
                x, norm, conv, options, conv=fused, shortcut=skip, shortcut_norm=second
            )
        elif skip is None:
            z, again = F.conv2d(batch_norm_act(x, norm, options), conv.to(x.dtype)), None
        else:
            y, again = batch_norm.block_end(x, norm, skip, second, options)
            z = F.conv2d(y, conv.to(x.dtype))
        after = norm_of({"x": z}, "")
        y = batch_norm_act(z, after, options._replace(relu=False), part=part)
        assert after.running_mean is not None and after.running_var is not None
        results = {"y": y} if again is None else {"y": y, "again": again}
        return results | {"mean": after.running_mean, "var": after.running_var}

    with torch.no_grad():
        results = [y for y in call(tensors, "plain").values() if y.dim() == 4]
    return Case(tensors, call, [draw.laid_out(draw.normal(*y.shape)) for y in results])


def norm_of(tensors: Named, end: str) -> Norm:
    """A batch norm with the case's parameters, if it has any, and new running statistics."""
    x = tensors["x"]
    dtype = torch.promote_types(x.dtype, torch.float32)
    running = [torch.full((x.shape[1],), v, dtype=dtype, device=x.device) for v in (0.0, 1.0)]
    return Norm(tensors.get(f"weight{end}"), tensors.get(f"bias{end}"), *running)


def sync_case(_kind: str, shape: Shape, draw: Draw) -> Case:
    """The statistics that ranks exchange: mean and variance, no running ones."""

    def call(given: Named, how: Kernels) -> Named:
        rows = rows_of(given["x"].detach())
        if how == "triton":
            from kernels.gpu import norm_forward

            mean, var = norm_forward.statistics(rows, None, None, 2, 0.1, 1e-5, True)
        else:
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).unflatten(0, (2, -1))
            var, mean = torch.var_mean(rows, dim=1, correction=0)
        return {"mean": mean, "var": var}

    return Case({"x": draw.away_from_zero(shape)}, call)


def loss_case(_kind: str, shape: Shape, draw: Draw) -> Case:
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


def views_case(kind: str, shape: Shape, draw: Draw) -> Case:
    """uint8 crops to activations; colors: coloured, every other one blurred, solarized before."""
    crops = torch.randint(0, 256, shape, generator=draw.generator, device=draw.device)
    draws = clear_draws(crops) if kind == "colors" else None

    def call(given: Named, how: Kernels) -> Named:
        views, options = given["views"], {"draws": draws, "kernels": how}
        y = {
            f"y of {channels} channels": normalize_views(
                views, MEAN, STD, draw.dtype, channels=channels, **options
            )
            for channels in (3, 4, 8)
        }
        return y | {"finished": finish_views(views, **options)}

    def formula(given: Named) -> Named:
        mean, std = (torch.tensor(v, device=draw.device).double() for v in (MEAN, STD))
        finished = finish_views(given["views"], draws, kernels="plain")
        y = (finished.double() / 255 - mean) / std
        wide = {f"y of {channels} channels": F.pad(y, (0, channels - 3)) for channels in (3, 4, 8)}
        images = {name: value.permute(0, 3, 1, 2) for name, value in wide.items()}
        return images | {"finished": finished}

    return Case({"views": crops.to(torch.uint8)}, call, formula=formula)


def clear_draws(crops: Tensor) -> Tensor:
    """Draws with which no value is near a tie of roundings: two results that are right agree.

    The shift of each channel is a quarter of 1/1024 above a multiple of it.
    """
    count, rng = len(crops), np.random.default_rng(0)
    mean = crops.double().mean((1, 2)).cpu().numpy()
    color = rng.integers(-300, 1100, (count, 3, 3)) / 1024
    shift = (rng.integers(-20_000, 20_000, (count, 3)) + 0.25) / 1024
    color_mean = np.eye(3) * (shift / mean)[:, None]
    odd = np.arange(count) % 2 == 1
    sigma = np.where(odd, rng.uniform(0.1, 2, count), 0)
    window, solarize = np.zeros((count, 2)), np.arange(count) % 4 < 2
    arrays = (window, window, color, color_mean, sigma, solarize)
    drawn = ViewDraws(*(array.astype(np.float32) for array in arrays))
    return torch.from_numpy(pack_draws([AugmentConfig()], [drawn])).to(crops.device)


CASES: dict[str, Callable[[str, Shape, Draw], Case]] = {
    **dict.fromkeys(("relu", "none", "residual", "norm", "pool", "recompute"), norm_case),
    **dict.fromkeys(("conv", "conv residual", "conv norm"), conv_case),
    **{"sync": sync_case, "loss": loss_case, "normalize": views_case, "colors": views_case},
}


def errors_of(case: Case, launched: Switches) -> dict[str, list[float]]:
    """[ours, plain, allowed] of every result and gradient; notes what is launched.

    allowed is twice plain's and a few units in fp32's last place of the largest value.
    """
    with recording(launched):
        ours = case.run("triton")
    exact, plain, errors = case.run("plain", exact=True), case.run("plain"), {}
    for name, reference in exact.items():
        assert ours[name].dtype == plain[name].dtype, name
        ours_off, plain_off = (
            (results[name].double() - reference).abs().max().item() for results in (ours, plain)
        )
        floor = 1e-6 * max(1.0, reference.abs().max().item())
        errors[name] = [ours_off, plain_off, 2 * plain_off + floor]
    return errors


def check_each(size: str, dtype: torch.dtype, device: torch.device) -> dict:
    """Every case of SHAPES[size]: errors, what failed, what was launched and what was not."""
    cases, failed, largest = {}, [], 0.0
    launched: Switches = {}
    for kind, shape in SHAPES[size].items():
        errors = errors_of(CASES[kind](kind, shape, Draw(dtype, device)), launched)
        cases[kind] = {"shape": list(shape), "ours_plain_allowed": errors}
        for name, (error, _, allowed) in errors.items():
            largest = max(largest, error / allowed)
            if not error <= allowed:  # NaN fails too
                failed.append(f"{kind}: {name} is off by {error:.3g}, allowed {allowed:.3g}")
    left_out = sorted(jit_functions().keys() - reached(set(launched)))
    return {
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "kernels": {
            name: {switch: sorted(values) for switch, values in switches.items()}
            for name, switches in sorted(launched.items())
        },
        "max_error_by_allowed": round(largest, 4),
        "failed": failed + [f"{name} was not launched" for name in left_out],
        "cases": cases,
    }
