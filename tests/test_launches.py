"""Kernels of a step from a profiler's trace, constructed here: groups, ranges, counted bytes."""

import pytest

from launches import beside, counted, prediction
from measure.results import newest
from measure.step_trace import device_work, timeline
from pipeline.augment import AugmentConfig
from train.config import Config, DataConfig, MethodConfig, ModelConfig

NAMES = {
    "_apply": "ours",
    "_merge_sums": "ours",
    "triton_poi_fused__to_copy_3": "Inductor's own",
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128": "library",
    "void cudnn::ops::nchwToNhwcKernel<float>": "library",
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN": "library",
    "void splitKreduce_kernel<32, 16, int>": "library",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedSgd>": "torch's own",
    "void at::native::elementwise_kernel<4, conv>": "torch's own",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL": "collectives",
}


class Trace:
    """Events of a host that launches and of a GPU that follows."""

    def __init__(self):
        self.events = []

    def range(self, name: str, ts: float, dur: float) -> None:
        self.events.append({"name": name, "cat": "user_annotation", "ts": ts, "dur": dur, "tid": 1})

    def kernel(self, name: str, launch: float, ts: float, dur: float, cat: str = "kernel") -> None:
        number = len(self.events)
        self.events += [
            {"name": "cuLaunchKernelEx", "cat": "cuda_driver", "ts": launch, "dur": 1, "tid": 2,
             "args": {"correlation": number}},
            {"name": name, "cat": cat, "ts": ts, "dur": dur, "args": {"correlation": number}},
        ]  # fmt: skip

    @property
    def json(self) -> dict:
        return {"traceEvents": self.events}


@pytest.fixture
def two_steps() -> Trace:
    trace = Trace()
    for begin in (0.0, 10_000.0):
        trace.range("normalize", begin, 100)
        trace.range("forward", begin + 100, 100)
        trace.range("backward", begin + 200, 100)
        trace.range("optimizer", begin + 300, 100)
        trace.kernel("_normalize", begin + 50, begin + 500, 100)
        trace.kernel("_apply", begin + 150, begin + 1000, 1000)
        trace.kernel("_reduce", begin + 250, begin + 2000, 2000)  # by another thread
        trace.kernel("void cutlass::Kernel2<wgrad>", begin + 260, begin + 4000, 500)
        trace.kernel("void cutlass::Kernel2<dgrad>", begin + 270, begin + 4500, 500)
        trace.kernel("Memset (Device)", begin + 280, begin + 5000, 10, "gpu_memset")
        trace.kernel("void at::native::multi_tensor_apply_kernel<>", begin + 350, begin + 6000, 50)
    return trace


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_of_the_group_that_its_name_says(name):
    trace = Trace()
    trace.range("forward", 0, 10)
    trace.kernel(name, 5, 20, 3)
    (group,) = counted(trace.json, steps=1)["in_graphs"]
    assert group == NAMES[name]


def test_launches_and_times_are_a_steps_and_apart_by_where_they_were_launched(two_steps):
    found = counted(two_steps.json, steps=2)
    assert found["in_graphs"] == {
        "ours": {"launches": 2, "ms": 3.0},
        "library": {"launches": 2, "ms": 1.0},
        "copies and fills": {"launches": 1, "ms": pytest.approx(0.01)},
    }
    assert found["ours_by_kernel"] == {
        "apply": {"launches": 1, "ms": 1.0}, "reduce": {"launches": 1, "ms": 2.0},
    }  # fmt: skip
    assert found["outside"] == {
        "ours": {"launches": 1, "ms": pytest.approx(0.1)},
        "torch's own": {"launches": 1, "ms": pytest.approx(0.05)},
    }


def test_what_was_launched_outside_of_all_ranges_has_none(two_steps):
    two_steps.kernel("_apply", 9_000, 9_100, 1)
    assert [e["ts"] for within, e in device_work(two_steps.json) if within is None] == [9_100]


def test_the_ranges_on_the_gpu_hold_what_another_thread_launched(two_steps):
    assert timeline(two_steps.json) == [
        {"name": "normalize", "begin_ms": 0.0, "ms": 0.1},
        {"name": "forward", "begin_ms": 0.5, "ms": 1.0},
        {"name": "backward", "begin_ms": 1.5, "ms": 3.01},
        {"name": "optimizer", "begin_ms": 5.5, "ms": 0.05},
    ]


def test_counted_bytes_over_the_profilers_times_are_gigabytes_a_second(two_steps):
    kept = newest("compiled-resnet50")["ours"]
    found = beside(counted(two_steps.json, steps=2), kept, images=256)
    assert (found["launches"], found["launches_counted"]) == (5, kept["launches"])
    kinds = kept["mb_per_image_by_kind"]
    library = kinds["convolution"] + kinds["matrix product"]
    assert found["gb_per_s"] == {
        "library": round(256 * library / 1.0, 1),
        "ours": round(256 * (sum(kinds.values()) - library - kinds["Inductor's own"]) / 3.0, 1),
        "apply": round(256 * kinds["apply"] / 1.0, 1),
        "reduce": round(256 * kinds["reduce"] / 2.0, 1),
    }


def test_only_the_step_that_was_counted_is_compared():
    def config(precision="bf16", size=224, compiled="auto", **model) -> Config:
        return Config(
            data=DataConfig(root="none"), model=ModelConfig(**model), precision=precision,
            augment=AugmentConfig(size=size), method=MethodConfig(), compile=compiled,
        )  # fmt: skip

    kept = newest("compiled-resnet50")
    assert prediction(config(), 1) == (kept["ours"], "")
    assert prediction(config(recompute=True), 1) == (kept["recompute"], "")
    for other in (
        config(arch="resnet18"), config(size=32), config("fp16"), config(compiled="false"),
        config(kernels="plain"),
    ):  # fmt: skip
        found, reason = prediction(other, 1)
        assert found is None and reason.startswith("counted for")
    assert prediction(config(), 2)[0] is None
