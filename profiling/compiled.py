"""What torch.compile would launch and move on an H200, counted on a machine without a GPU.

    python profiling/compiled.py                our step and the plain two-pass one, ResNet-50

A training step is traced with fake CPU tensors; the forward and backward graphs are moved to fake
CUDA tensors, and Inductor's own scheduler and Triton code generator run on them. Nothing is
executed. Bytes are Inductor's count: every buffer once a kernel; but a convolution's backward is
two kernels, the gradients of input and weight, which both read dy (cudnn_convolution_backward in
torch's aten/src/ATen/native/cudnn/ConvShared.cpp). No clock is in these figures, so two versions of
a model can be compared exactly; they are not times: cache hits and achieved bandwidth are not in
them. Both are the least: workspaces and split-k reductions inside a call of cuDNN or cuBLAS, and
the padding of the stem's three channels, cannot be known without a GPU. The optimizer and the
normalisation of uint8 views are outside of the compiled graphs and are not counted.

profiling/launches.py compares with torch.profiler's: not yet run on a GPU.
"""

import root_first  # isort: skip # noqa: F401

import argparse
import json
import logging
import sys
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode

from measure.results import print_table
from pipeline.sources.paths import named_path
from pipeline.streams import print_result, protect_output
from stand_ins.fake_h200 import pretend_h200, trace, triton_for_h200
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.network.norm import set_views
from train.network.resnet import LAYERS


class Step(nn.Module):
    """A model's loss as a module. The autocast is the CUDA step's, traced on the CPU.

    Ours: both views in one forward. two_pass: the official code's two passes through PyTorch's own
    operations.
    """

    def __init__(self, model: SimSiam, *, two_pass: bool):
        super().__init__()
        self.model, self.two_pass = model, two_pass
        if two_pass:
            set_views(model, 1)

    def forward(self, views: Tensor) -> Tensor:
        """The loss of (2 N, 3, S, S) views."""
        model, cosine = self.model, nn.functional.cosine_similarity
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if not self.two_pass:
                return model(views)[0]
            z1, z2 = (model.projector(model.backbone(x)) for x in views.chunk(2))
            p1, p2 = model.predictor(z1), model.predictor(z2)
        pairs = ((p1, z2), (p2, z1))
        losses = [cosine(p.float(), z.detach().float(), dim=1).mean() for p, z in pairs]
        return -(losses[0] + losses[1]) / 2


STEPS: dict[str, dict[str, Any]] = {
    "ours": {"kernels": "triton"},
    "recompute": {"kernels": "triton", "recompute": True},
    "conv_stats": {"kernels": "triton", "conv_stats": "true"},
    "stem_4": {"kernels": "triton", "stem_channels": 4},
    "stem_8": {"kernels": "triton", "stem_channels": 8},
    "plain": {"kernels": "plain"},
}


def saved_bytes(forward: Any) -> int:
    """Bytes that the forward graph keeps for the backward: its outputs but the loss and inputs."""
    (outputs,) = next(n for n in forward.graph.nodes if n.op == "output").args
    nodes = {n for n in outputs[1:] if isinstance(n, torch.fx.Node) and n.op != "placeholder"}
    values = [node.meta.get("val") for node in nodes]
    return sum(
        value.numel() * value.element_size() for value in values if isinstance(value, Tensor)
    )


class _Captured(Exception):
    """The code was generated: go no further."""


def generate(name: str, graph: Any, args: list) -> Counter:
    """Run Inductor on one graph; launches and bytes by kind of kernel."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    counts, real = Counter(), GraphLowering.compile_to_module

    def capture(self: Any) -> None:
        code = self.codegen()[0]
        counts["launches"] = getattr(code, "value", code).count(".run(")
        for node, words in self.count_bytes()[1]:
            counts.update(count_node(node, 4 * words))  # Inductor counts in units of 4 bytes
        raise _Captured

    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def on_cuda(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")

    with fake_mode:
        args = [on_cuda(a) for a in args]
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
    return counts


def count_node(node: Any, num_bytes: int) -> dict[str, int]:
    """Library calls and bytes of a node of Inductor's schedule, for which it counts num_bytes.

    A user's Triton kernel is an extern node too, but its launch is a .run in the code, and its
    outputs, which Inductor counts as read too, are only written.
    """
    call = node.node
    if type(call).__name__ == "UserDefinedTritonKernel":
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        kernel: Any = kernel_side_table.get_kernel(call.kernel_idx)
        while hasattr(kernel, "fn"):  # Inductor wraps it in an autotuner of one choice
            kernel = kernel.fn
        return {
            f"bytes of {kernel.__name__.lstrip('_')}": num_bytes
            - sum(map(_bytes, call.mutable_args))
        }
    if not type(node).__name__.startswith("Extern"):
        return {"bytes of Inductor's own": num_bytes}
    operation = str(getattr(call, "op_overload", "") or call.python_kernel_name)
    launches = int(num_bytes > 0)
    if "convolution_backward" in operation:
        launches, num_bytes = convolution_backward(call)
    kind = "convolution" if "convolution" in operation else "matrix product"
    return {"launches": launches, f"bytes of {kind}": num_bytes}


def _bytes(buffer: Any) -> int:
    return int(buffer.get_numel()) * buffer.get_dtype().itemsize


def convolution_backward(call: Any) -> tuple[int, int]:
    """Kernels and bytes of aten.convolution_backward: dy and weight -> dx, dy and x -> dweight."""
    wants_input, wants_weight, wants_bias = call.constant_args[-3:]  # its output_mask
    assert not wants_bias, "cuDNN's gradient of a bias is a separate sum: count it"
    kernels = wants_input + wants_weight
    return kernels, kernels * sum(map(_bytes, call.inputs))


def count_step(which: str, *, images: int, arch: str, saved_only: bool = False) -> dict:
    """Launches, MB per image and MB per image by kind of kernel of a step at 224 pixels in bf16.

    With saved_only just what is kept for the backward pass: no code is generated.
    """
    triton_for_h200()
    inductor.force_disable_caches, inductor.compile_threads = True, 1
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)  # each capture ends in an error
    model = SimSiam(ModelConfig(arch=arch, **STEPS[which]), MethodConfig())  # type: ignore[arg-type]
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with FakeTensorMode():
        channels = STEPS[which].get("stem_channels", 3)
        views = torch.empty(2 * images, channels, 224, 224, dtype=torch.bfloat16)
        views = views.to(memory_format=torch.channels_last)
    graphs = trace(Step(model, two_pass=which == "plain"), [views])

    def mb_per_image(num_bytes: int) -> float:
        return round(num_bytes / images / 1e6, 2)

    saved = mb_per_image(saved_bytes(graphs["forward"][0]))
    if saved_only:
        return {"saved_mb_per_image": saved}
    total: Counter = Counter()
    with pretend_h200():
        for name, (graph, args) in graphs.items():
            total += generate(name, graph, args)
    launches = total.pop("launches")
    return {
        "mb_per_image": mb_per_image(total.total()),
        "launches": launches,
        "saved_mb_per_image": saved,
        "mb_per_image_by_kind": {
            kind.removeprefix("bytes of "): mb_per_image(v) for kind, v in total.most_common()
        },
    }


def print_counts(steps: dict[str, dict]) -> None:
    """The table for people, on stderr."""
    kinds = {kind: None for step in steps.values() for kind in step["mb_per_image_by_kind"]}
    rows: list = []
    for kind in kinds:
        cells = [step["mb_per_image_by_kind"].get(kind) for step in steps.values()]
        rows.append((kind, *("" if cell is None else f"{cell:.1f}" for cell in cells)))
    rows += [
        None,
        ("all", *(f"{step['mb_per_image']:.1f}" for step in steps.values())),
        ("kept for backward", *(f"{step['saved_mb_per_image']:.1f}" for step in steps.values())),
        ("launches", *(step["launches"] for step in steps.values())),
    ]
    title = "counted, not measured: one step, bf16, H200"
    print_table(title, ("MB per image", *steps), rows, width=100)


def main() -> None:
    """Read the flags, count, print the table and one JSON line."""
    import triton

    parser = argparse.ArgumentParser(description="Count a compiled step's launches and bytes.")
    parser.add_argument("--images", type=int, default=256, help="images of a step")
    parser.add_argument("--arch", choices=tuple(LAYERS), default="resnet50")
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--saved-only", action="store_true", help="what is kept for backward")
    parser.add_argument("--save", type=named_path, help="also write the JSON to this file")
    flags = parser.parse_args()
    result: dict = {}
    for which in flags.steps:
        print(f"compiling {which}, about a minute ...", file=sys.stderr, flush=True)
        how = {"images": flags.images, "arch": flags.arch, "saved_only": flags.saved_only}
        result[which] = count_step(which, **how)
    if not flags.saved_only:
        print_counts(result)
    result |= {"n": 1, "device": "none: counted for an H200", "images": flags.images}
    result |= {"arch": flags.arch, "torch": torch.__version__, "triton": triton.__version__}
    if flags.save is not None:
        flags.save.write_text(json.dumps(result) + "\n")
    print_result(result, kept=flags.save)


if __name__ == "__main__":
    protect_output()
    main()
