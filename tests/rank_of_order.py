"""One of two ranks whose compiled steps tests/test_order.py compares; a line for each method.

    python tests/rank_of_order.py RANK PORT

Steps run in DistributedDataParallel as in training, cut by DDPOptimizer. Inductor generates the
code of each graph, whose collectives are noted; the graph itself is run, without the C++
compiler. What was sent is read from gloo's flight recorder.
"""

import copy
import dataclasses
import json
import os
import re
import sys
from typing import Any

if not __package__:  # run as a script, like those of profiling/
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import torch
import torch.distributed as dist
from torch import nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering

from pipeline.augment import AugmentConfig
from train.config import Config, DataConfig, MethodConfig, ModelConfig
from train.distributed import own_buffers
from train.methods import method
from train.methods.moco import MoCoConfig
from train.methods.swav import SwAVConfig
from train.network.norm import BatchNorm
from train.run.state import build_method

ROWS, SIZE = 4, 8
METHODS = {
    "byol": MethodConfig(name="byol"),
    "moco": MethodConfig(name="moco", moco=MoCoConfig(queue=16)),
    "swav": MethodConfig(name="swav", swav=SwAVConfig(prototypes=7, queue=8, queue_from_epoch=0)),
}
MODEL = ModelConfig(
    arch="resnet18", stem="cifar", width=8, projector_layers=2, projector_dim=16,
    projector_hidden=16, predictor_hidden=8,
)  # fmt: skip
LARGE = dataclasses.replace(MODEL, projector_layers=4, projector_hidden=600)  # of two buckets


class TinyBackbone(nn.Module):
    """One layer in place of the ResNet."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), BatchNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: (N, 3, S, S) -> (N, 8)."""
        return self.norm(self.conv(x), relu=True).mean((2, 3))


class _Generated(Exception):
    """The code is there: compile no C++."""


graphs: list[dict] = []


def generate(graph: Any, inputs: Any, **options: Any) -> Any:
    """Note the collectives in Inductor's code of a graph, in order; returns the graph to run."""
    runnable, real = copy.deepcopy(graph), GraphLowering.compile_to_module

    def capture(self: Any) -> None:
        code = self.codegen()[0]
        calls = re.findall(r"_c10d_functional\.(?!wait)\S+\(.*\)", getattr(code, "value", code))
        graphs.append({"is_backward": options.get("is_backward", False), "calls": calls})
        raise _Generated

    GraphLowering.compile_to_module = capture  # type: ignore[method-assign]
    try:
        compile_fx.compile_fx_inner(graph, inputs, **options)
    except Exception as error:
        if not isinstance(getattr(error, "inner_exception", error), _Generated):
            raise
    finally:
        GraphLowering.compile_to_module = real  # type: ignore[method-assign]
    return make_boxed_func(runnable.forward)


def backend(graph: Any, inputs: Any, **_options: Any) -> Any:
    """Inductor, but for the C++ compiler."""
    return compile_fx.compile_fx(graph, inputs, inner_compile=generate)


def compiled_steps(name: str, rank: int) -> dict:
    """The graphs of the compiled step, and what was sent, in the order of the launches.

    Two steps of the one with buckets: DistributedDataParallel makes them after the first.
    """
    method.build_backbone = lambda model: TinyBackbone()
    torch.manual_seed(0)
    config = Config(
        data=DataConfig(root=".", batch_size=2 * ROWS), method=METHODS[name],
        model=LARGE if name == "byol" else MODEL,
        augment=AugmentConfig(size=SIZE), precision="fp32",
    )  # fmt: skip
    model = build_method(config, images=2 * ROWS, device=torch.device("cpu"))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.sync_over(dist.new_group())
    model.compile(dynamic=False, backend=backend)
    ddp = nn.parallel.DistributedDataParallel(
        model, **own_buffers(), gradient_as_bucket_view=True, bucket_cap_mb=1
    )
    graphs.clear()
    begin = len(recorded())
    for step in range(2 if name == "byol" else 1):
        model.before_step(step)
        views = torch.randn(2 * ROWS, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
        loss, _ = ddp(views, torch.arange(ROWS) + rank * ROWS, None)
        loss.backward()
    return {"graphs": list(graphs), "sent": recorded()[begin:]}


def recorded() -> list:
    """What this process sent, of gloo's flight recorder: (operation, shapes, group)."""
    trace = json.loads(torch._C._distributed_c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
    names = ("profiling_name", "input_sizes", "process_group")
    return [[entry[name] for name in names] for entry in trace["entries"]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch._inductor.config.cpp.vec_isa_ok = False  # else it asks the C++ compiler
    own_rank, port = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=own_rank)
    for one in METHODS:
        torch._dynamo.reset()
        print(json.dumps({"method": one} | compiled_steps(one, own_rank)), flush=True)
    dist.destroy_process_group()
