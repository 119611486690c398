"""What the compiled ResNet-50 step would do on an H200, counted without one; in other processes.

The figures are exact: a change that costs traffic, launches, memory or collectives fails here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from compare import compare
from predict.limit import count
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.network.norm import set_views

ROOT = Path(__file__).parent.parent
LOOPS = "statistics", "reduce", "conv"  # kernels that copy their next tiles ahead
pytest.importorskip("triton")


def told_by(*command: str) -> dict:
    """The JSON line of a script, run with Triton's compiler and not its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600,
        check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_compiled_step_moves_launches_and_keeps_no_more_than_it_did():
    ours = told_by("profiling/compiled.py", "--steps", "ours")["ours"]
    assert ours["mb_per_image"] <= 661.8  # the plain two-pass step: 796.8
    assert ours["launches"] <= 629  # 1,244
    # Inductor sees one call for a convolution's two gradients; the roofline counts each pass
    limit = count(ModelConfig(), MethodConfig(), images=256, size=224)
    passes = [p for p in limit.products if p.name.startswith("backbone")]
    moved = sum(2 * sum(p.elements) * p.passes for p in passes) / 256 / 1e6
    assert ours["mb_per_image_by_kind"]["convolution"] == round(moved, 2)
    # a clone that Inductor had to make would be among its own kernels
    assert ours["mb_per_image_by_kind"]["Inductor's own"] <= 7.1
    (kept,) = (ROOT / "profiling/results").glob("compiled-resnet50_*.json")
    before = json.loads(kept.read_text())
    rows, total = compare(before, {"ours": ours}, tolerance=0.0, only=["ours.*"])
    assert total >= 10 and not [row for row in rows if row[-1]]  # the committed result's figures
    assert ours["saved_mb_per_image"] <= before["plain"]["saved_mb_per_image"]


@pytest.mark.slow
def test_no_graph_break_and_fewer_than_half_the_collectives_of_sync_batch_norm():
    found = told_by("profiling/collectives.py")
    assert found["graph_breaks"] == 0
    assert found["two_pass_sync_batch_norm"] == 228
    (kept,) = (ROOT / "profiling/results").glob("collectives-resnet50_*.json")
    rows, _ = compare(
        json.loads(kept.read_text()), found, tolerance=0.0, only=["*coll*", "*graph*"]
    )
    assert not rows
    for passes in found["collectives_by_pass"].values():
        assert len(passes["by_graph"]) == 6  # cut at buckets of gradients, of 25 MiB
    assert found["collectives"] == 106  # 57 layers, of which a block end with downsample shares one


@pytest.mark.slow
def test_every_kernel_compiles_without_spills_and_keeps_memory_busy():
    found = told_by("profiling/kernels.py", "--compile-only", "--replay-cache", "--images=64")
    kernels = found["kernels"]
    names = {row["kernel"].split()[0] for row in kernels}
    assert names == {
        "statistics", "merge_statistics", "apply", "apply_pool", "reduce", "merge_sums", "backward",
        "losses", "merge_losses", "shift", "normalize", "blur", "conv_statistics", "conv_reduce",
    }  # fmt: skip
    for row in kernels:
        # a merge waits for one load after another of each view alone
        assert row["loops"] == 0 or not row["kernel"].startswith("merge"), row["kernel"]
        for arch in ("sm_80", "sm_90", "sm_100"):
            assert row[arch]["spills"] == 0, (row["kernel"], arch)
            if not row["kernel"].startswith("conv"):
                assert row[arch]["registers"] <= 128, (row["kernel"], arch)  # two programs at once
        # of the products on sm_90 alone: an A100 holds one of conv_statistics, a B200 one or two
        assert row["sm_90"]["registers"] * row["warps"] <= 128 * max(8, row["warps"])
    assert len(found["heavy_shapes"]) > 30
    for row in found["heavy_shapes"]:
        assert row["of_little_h100"] >= row["of_little_h200"] >= 1, row
        assert row["sectors"][0] == row["sectors"][1], row  # none is touched in part
        assert max(row["load_bytes"]) == (8 if "pool" in row["kernel"] else 16), row
        is_loop = row["kernel"].startswith(LOOPS) and "pool" not in row["kernel"]
        assert row["copies_ahead"] == is_loop, row
    assert len(found["replayed"]) > 10
    for row in found["replayed"]:  # of the L2 cache: a pass finds what the one before it left
        formula, *by_cache = row["mb"].values()
        for first, second in by_cache:
            assert abs(first / formula[0] - 1) < 0.03 and second < formula[1], row


def saved_bytes(model: nn.Module, images: int, *, two_pass: bool) -> int:
    """Bytes that autograd keeps in a bf16 step at 224 pixels, every storage once, in eager mode."""
    kept, storages = [], {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for part in model.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(mode.from_tensor(value.detach()).detach())
            for name, value in part._buffers.items():
                part._buffers[name] = mode.from_tensor(value)
        own = {id(t.untyped_storage()._cdata) for t in model.state_dict().values()}

        def keep(tensor):
            kept.append(tensor)  # alive, so that no storage is used twice
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        views = torch.empty(2 * images, 3, 224, 224, dtype=torch.bfloat16)
        views = views.to(memory_format=torch.channels_last)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            if two_pass:
                z = [model.projector(model.backbone(x)) for x in views.chunk(2)]
                p = [model.predictor(one) for one in z]
            else:
                p = z = model(views)
        assert p and z and own
    return sum(storages.values())


def kept_per_image(*, two_pass: bool = False, **options) -> float:
    """MB that one more image keeps: what does not depend on the batch falls out."""

    def model() -> SimSiam:
        made = SimSiam(ModelConfig(**options), MethodConfig())
        made = made.to(memory_format=torch.channels_last)
        if two_pass:
            set_views(made, 1)
        return made

    four, eight = (saved_bytes(model(), n, two_pass=two_pass) for n in (4, 8))
    return (eight - four) / 4 / 1e6


def test_eager_keeps_no_more_than_plain_torch_and_recomputing_four_fifths_of_it():
    plain = kept_per_image(two_pass=True, kernels="plain")  # ReLU in place
    ours = kept_per_image(kernels="triton")
    recompute = kept_per_image(kernels="triton", recompute=True)
    assert plain == pytest.approx(87, abs=1)  # 2 x (41.4 of activations + 1.6 of max-pool's int64)
    assert ours <= plain
    assert recompute <= 0.8 * plain
