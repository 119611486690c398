"""What torch.compile would launch and move on an H200, told on a machine without a GPU.

    python profiling/compiled.py                our step and the plain two-pass one, ResNet-50

A training step is traced with fake CPU tensors; the forward and backward graphs are moved to fake
CUDA tensors, and Inductor's own scheduler and Triton code generator run on them. Nothing is
executed. Bytes are Inductor's count: every buffer once a kernel; but a convolution's backward is
two kernels, the gradients of input and weight, which both read dy (cudnn_convolution_backward in
torch's aten/src/ATen/native/cudnn/ConvShared.cpp). No clock is in these figures, so two versions of
a model can be compared exactly.
Both are the least: workspaces and split-k reductions inside a call of cuDNN or cuBLAS, and the
padding of the stem's three channels, cannot be known here. The optimizer and the normalisation of
uint8 views are outside of the compiled graphs and are not counted.
A newcomer's mistake: taking them for times. Cache hits and achieved bandwidth are not in them.

profiling/launches.py compares with torch.profiler's: not yet run on a GPU.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import argparse
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode

from stand_ins.fake_h200 import pretend_h200, trace, triton_for_h200
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.network.norm import set_views


class FusedStep(nn.Module):
    """Our step: both views in one forward. The autocast is the CUDA step's, traced on the CPU."""

    def __init__(self, model: SimSiam):
        super().__init__()
        self.model = model

    def forward(self, views: Tensor) -> Tensor:
        """The loss of (2 N, 3, S, S) views."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(views)[0]


class TwoPassStep(nn.Module):
    """The plain step: the official code's two passes through PyTorch's own operations."""

    def __init__(self, model: SimSiam):
        super().__init__()
        self.model = model
        set_views(model, 1)

    def forward(self, views: Tensor) -> Tensor:
        """The loss of (2 N, 3, S, S) views."""
        model, cosine = self.model, nn.functional.cosine_similarity
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z1, z2 = (model.projector(model.backbone(x)) for x in views.chunk(2))
            p1, p2 = model.predictor(z1), model.predictor(z2)
        pairs = ((p1, z2), (p2, z1))
        losses = [cosine(p.float(), z.detach().float(), dim=1).mean() for p, z in pairs]
        return -(losses[0] + losses[1]) / 2


STEPS: dict[str, tuple[type[FusedStep] | type[TwoPassStep], dict[str, Any]]] = {
    "ours": (FusedStep, {"kernels": "triton"}),
    "recompute": (FusedStep, {"kernels": "triton", "recompute": True}),
    "plain": (TwoPassStep, {"kernels": "plain"}),
}


def saved_bytes(forward: Any) -> int:
    """Bytes that the forward graph keeps for the backward: its outputs but the loss and inputs."""
    (outputs,) = next(n for n in forward.graph.nodes if n.op == "output").args
    found = {}
    for node in outputs[1:]:
        value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
        if isinstance(value, Tensor) and node.op != "placeholder":
            found[node] = value.numel() * value.element_size()
    return sum(found.values())


class _Captured(Exception):
    """The code was generated: go no further."""


def generate(name: str, graph: Any, args: list) -> Counter:
    """Run Inductor on one graph; launches and bytes by kind of kernel."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    found, real = Counter(), GraphLowering.compile_to_module

    def capture(self: Any) -> None:
        code = self.codegen()[0]
        text = getattr(code, "value", code)
        found["launches"] = text.count(".run(")
        for node, words in self.count_bytes()[1]:
            num_bytes = words * 4 - _written_only(node)  # Inductor counts in units of 4 bytes
            calls = int(_is_library_call(node) and num_bytes > 0)
            if "convolution_backward" in str(getattr(node.node, "op_overload", "")):
                calls, num_bytes = convolution_backward(node.node)
            found["launches"] += calls
            found[f"bytes of {_kind(node)}"] += num_bytes
        raise _Captured

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        args = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
            if isinstance(a, Tensor) else a
            for a in args
        ]  # fmt: skip
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
    graph.recompile()
    FakeTensorProp(graph, fake_mode).propagate_dont_convert_inputs(*args)
    GraphLowering.compile_to_module = capture  # type: ignore[method-assign]
    try:
        with torch.no_grad(), tracing(TracingContext(fake_mode)):
            compile_fx_inner(graph, args, is_backward=name == "backward")
    except Exception as error:
        cause: Any = error
        while cause is not None and not isinstance(cause, _Captured):
            cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
        if cause is None:
            raise
    finally:
        GraphLowering.compile_to_module = real  # type: ignore[method-assign]
    return found


def _is_user_kernel(node: Any) -> bool:
    return type(node.node).__name__ == "UserDefinedTritonKernel"


def _is_library_call(node: Any) -> bool:
    """A user's Triton kernel is an extern node too, but its launch is a .run in the code."""
    return type(node).__name__.startswith("Extern") and not _is_user_kernel(node)


def convolution_backward(call: Any) -> tuple[int, int]:
    """Kernels and bytes of aten.convolution_backward: dy and weight -> dx, dy and x -> dweight."""
    dy, x, weight = (int(b.get_numel()) * b.get_dtype().itemsize for b in call.inputs)
    wants_input, wants_weight, wants_bias = call.constant_args[-3:]  # its output_mask
    assert not wants_bias, "cuDNN's gradient of a bias is a sum of its own: count it"
    return wants_input + wants_weight, (wants_input + wants_weight) * (dy + x + weight)


def _written_only(node: Any) -> int:
    """Bytes of a Triton kernel's outputs, which Inductor counts as read too."""
    if not _is_user_kernel(node):
        return 0
    outputs = node.node.mutable_args
    return sum(int(b.get_numel()) * b.get_dtype().itemsize for b in outputs)


def _kind(node: Any) -> str:
    if _is_user_kernel(node):
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        kernel: Any = kernel_side_table.get_kernel(node.node.kernel_idx)
        while hasattr(kernel, "fn"):  # Inductor wraps it in an autotuner of one choice
            kernel = kernel.fn
        return kernel.__name__.lstrip("_")
    if _is_library_call(node):
        target = str(getattr(node.node, "op_overload", "") or node.node.python_kernel_name)
        return "convolution" if "convolution" in target else "matrix product"
    return "Inductor's own"


def count_step(which: str, *, images: int, arch: str, saved_only: bool = False) -> dict:
    """Launches, MB per image and MB per image by kind of kernel of a step at 224 pixels in bf16.

    With saved_only just what is kept for the backward pass: no code is generated.
    """
    triton_for_h200()
    inductor.force_disable_caches, inductor.compile_threads = True, 1
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)  # each capture ends in an error
    step, options = STEPS[which]
    model = SimSiam(ModelConfig(arch=arch, **options), MethodConfig())  # type: ignore[arg-type]
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with FakeTensorMode():
        views = torch.empty(2 * images, 3, 224, 224, dtype=torch.bfloat16)
        views = views.to(memory_format=torch.channels_last)
    total: Counter = Counter()
    graphs = trace(step(model), [views])
    saved = round(saved_bytes(graphs["forward"][0]) / images / 1e6, 2)
    if saved_only:
        return {"saved_mb_per_image": saved}
    with pretend_h200():
        for name, (graph, args) in graphs.items():
            total += generate(name, graph, args)
    kinds = {k.removeprefix("bytes of "): v for k, v in total.items() if k != "launches"}
    return {
        "mb_per_image": round(sum(kinds.values()) / images / 1e6, 2),
        "launches": total["launches"],
        "saved_mb_per_image": saved,
        "mb_per_image_by_kind": {
            kind: round(v / images / 1e6, 2)
            for kind, v in sorted(kinds.items(), key=lambda item: -item[1])
        },
    }


def print_counts(found: dict[str, dict]) -> None:
    """The table for people, on stderr."""
    table = Table(title="counted, not measured: one step, bf16, H200")
    table.add_column("MB per image")
    for which in found:
        table.add_column(which, justify="right")
    kinds = {kind: None for one in found.values() for kind in one["mb_per_image_by_kind"]}
    for kind in kinds:
        cells = [one["mb_per_image_by_kind"].get(kind) for one in found.values()]
        table.add_row(kind, *("" if cell is None else f"{cell:.1f}" for cell in cells))
    table.add_section()
    table.add_row("all", *(f"{one['mb_per_image']:.1f}" for one in found.values()))
    kept = (f"{one['saved_mb_per_image']:.1f}" for one in found.values())
    table.add_row("kept for backward", *kept)
    table.add_row("launches", *(str(one["launches"]) for one in found.values()))
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 100).print(table)


def main() -> None:
    """Read the flags, count, print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="Count a compiled step's launches and bytes.")
    parser.add_argument("--images", type=int, default=256, help="images of a step")
    parser.add_argument("--arch", choices=("resnet18", "resnet50"), default="resnet50")
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--saved-only", action="store_true", help="what is kept for backward")
    parser.add_argument("--save", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    found = {}
    for which in arguments.steps:
        print(f"compiling {which}, about a minute ...", file=sys.stderr, flush=True)
        found[which] = count_step(
            which, images=arguments.images, arch=arguments.arch, saved_only=arguments.saved_only
        )
    if not arguments.saved_only:
        print_counts(found)
    import triton

    facts = {"n": 1, "device": "none: counted for an H200",
             "images": arguments.images, "arch": arguments.arch, "torch": torch.__version__,
             "triton": triton.__version__}  # fmt: skip
    line = json.dumps(found | facts)
    if arguments.save is not None:
        arguments.save.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
