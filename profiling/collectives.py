"""Collectives and graph breaks of a step whose batch norm is synchronised over ranks.

    python profiling/collectives.py      ours under torch.compile; nn.SyncBatchNorm's two passes

Counted for ResNet-50 on fake tensors and a fake process group of two ranks: nothing is sent.
Ours is the step that several ranks run: cut by torch's DDPOptimizer where DistributedDataParallel
ends a bucket of gradients, so that they are sent during the backward pass. Gradients' all_reduces
are the same for both and are not counted.
"""

import root_first  # isort: skip # noqa: F401

import argparse
from collections import Counter
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.streams import print_result, protect_output
from stand_ins.fake_h200 import triton_for_h200, with_fake_parameters
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.network.norm import BatchNorm, Convolved
from train.network.resnet import LAYERS

BUCKET = 25 << 20  # bytes; DistributedDataParallel's default


def compiled_step(arch: Any, kernels: Any) -> dict[str, Any]:
    """Collectives in the graphs that torch.compile(fullgraph=True) makes, and graph breaks (0).

    Units: for each pass the number of collectives, that of each graph, and the bytes that a rank
    puts into them.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    graphs: dict[str, list] = {"forward": [], "backward": []}

    def keep(name: str, graph: Any, _inputs: Any) -> Any:
        graphs[name].append(graph)
        return make_boxed_func(graph.forward)

    compilers = {"fw_compiler": partial(keep, "forward"), "bw_compiler": partial(keep, "backward")}
    each = aot_autograd(**compilers, partition_fn=min_cut_rematerialization_partition)
    backend = DDPOptimizer(bucket_bytes_cap=BUCKET, backend_compile_fn=each).compile_fn
    model = SimSiam(ModelConfig(arch=arch, kernels=kernels), MethodConfig())
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.sync_over(dist.group.WORLD)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with_fake_parameters(model, mode)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with mode:
        views = torch.empty(8, 3, 224, 224).to(memory_format=torch.channels_last)
        # fullgraph: a graph break would be an error
        loss, _ = torch.compile(model, fullgraph=True, backend=backend)(views)
        loss.backward()
    result: dict = {"graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values())}
    for name, parts in graphs.items():
        sums = [
            [n.meta["val"] for n in part.graph.nodes if "all_reduce" in str(n.target)]
            for part in parts
        ]
        num_bytes = sum(value.numel() * value.itemsize for part in sums for value in part)
        by_graph = [len(part) for part in sums]
        result[name] = {"number": sum(by_graph), "bytes": num_bytes, "by_graph": by_graph}
    return result


class TorchSync(nn.Module):
    """nn.SyncBatchNorm's function behind our module's calls; the module refuses CPU tensors."""

    def __init__(self, ours: BatchNorm):
        super().__init__()
        channels = len(ours.running_mean)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean, self.var = nn.Buffer(torch.zeros(channels)), nn.Buffer(torch.ones(channels))

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor:
        """Shapes: (N, C, H, W) or (N, C)."""
        from torch.nn.modules._functions import SyncBatchNorm

        y: Any = SyncBatchNorm.apply(
            x, self.weight, self.bias, self.mean, self.var, 1e-5, 0.1, dist.group.WORLD, 2
        )
        return torch.relu(y) if relu else y

    def convolve(self, x: Tensor, conv: nn.Module) -> Convolved:
        """conv(x)."""
        return Convolved(conv(x))

    def then_conv(self, x: Convolved, conv: nn.Module) -> Convolved:
        """conv(relu(norm(x)))."""
        return Convolved(conv(self(x.x, relu=True)))

    def pool(self, x: Tensor) -> Tensor:
        """The stem's end."""
        return nn.functional.max_pool2d(self(x, relu=True), 3, stride=2, padding=1)

    def end_block(self, x: Convolved, shortcut: Convolved, downsample: Any = None) -> tuple:
        """The end of a residual block."""
        skip = shortcut.x if downsample is None else downsample(shortcut.x)
        y = torch.relu(self(x.x) + skip)
        return y, y

    def end_block_then_conv(self, x: Any, shortcut: Any, downsample: Any, conv: Any) -> tuple:
        """The end of a residual block and the next block's first convolution."""
        y, skip = self.end_block(x, shortcut, downsample)
        return Convolved(conv(y)), skip


def replace_norms(module: nn.Module) -> None:
    """Every BatchNorm of ours becomes a TorchSync."""
    for name, child in module.named_children():
        if isinstance(child, BatchNorm):
            setattr(module, name, TorchSync(child))
        else:
            replace_norms(child)


def two_pass_step(arch: Any) -> int:
    """Collectives that two passes through nn.SyncBatchNorm call, counted as they are called.

    Its primitives exist for CUDA alone; only the shapes of their results matter.
    """
    calls = Counter()

    def gather(out: Any, *_args: Any, **_options: Any) -> None:
        calls["forward"] += 1
        for part in out if isinstance(out, list) else [out]:
            part.fill_(1)  # counts of 0 would be left out

    def reduce(*_args: Any, **_options: Any) -> None:
        calls["backward"] += 1

    model = SimSiam(ModelConfig(arch=arch, kernels="plain"), MethodConfig())
    replace_norms(model)
    torch.batch_norm_stats = lambda x, _eps: (x.new_empty(x.shape[1]),) * 2
    torch.batch_norm_gather_stats_with_counts = lambda _x, means, *_: (means[0], means[0])
    torch.batch_norm_elemt = lambda x, *_: torch.empty_like(x)
    torch.batch_norm_backward_reduce = lambda _dy, _x, mean, *_: (mean,) * 4
    torch.batch_norm_backward_elemt = lambda dy, *_: torch.empty_like(dy)
    for name in ("all_gather", "all_gather_into_tensor", "all_gather_single"):
        setattr(dist, name, gather)
    dist.all_reduce = reduce
    x = torch.empty(2, 3, 32, 32).to(memory_format=torch.channels_last)
    passes = [model.predictor(model.projector(model.backbone(x))).sum() for _ in range(2)]
    (passes[0] + passes[1]).backward()
    return calls.total()


def main() -> None:
    """Count, print one JSON line."""
    parser = argparse.ArgumentParser(description="Count the collectives of a synchronised step.")
    parser.add_argument("--arch", choices=tuple(LAYERS), default="resnet50")
    parser.add_argument("--kernels", choices=("triton", "plain"), default="triton")
    flags = parser.parse_args()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    triton_for_h200()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    passes = compiled_step(flags.arch, flags.kernels)
    result = {"n": 1, "device": "none: counted on fake tensors", "torch": torch.__version__}
    result |= {"arch": flags.arch, "graph_breaks": passes.pop("graph_breaks")}
    result["collectives"] = sum(counts["number"] for counts in passes.values())
    result["collectives_by_pass"] = passes
    result["two_pass_sync_batch_norm"] = two_pass_step(flags.arch)
    print_result(result)


if __name__ == "__main__":
    protect_output()
    main()
