"""Named ranges and collectives of a step, from torch.profiler's trace of it."""

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

RANGES = ("data", "normalize", "forward", "backward", "optimizer")
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
COLLECTIVES = ("gloo:", "nccl:")
ITEMSIZE = {"float": 4, "double": 8, "long int": 8, "int": 4, "c10::BFloat16": 2, "c10::Half": 2}


def trace_of(step: Callable[[], object], device: torch.device, *, steps: int = 2) -> dict:
    """The Chrome trace of `steps` calls after one that is not traced."""
    step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())


def host_ranges(trace: dict) -> list[dict]:
    """The named ranges as the host entered them, in order."""
    ranges = [e for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    return sorted((e for e in ranges if e["name"] in RANGES), key=lambda e: e["ts"])


def device_work(trace: dict) -> list[tuple[dict | None, dict]]:
    """(named range, event) of every kernel, copy and fill on a GPU.

    By the time of the launch, on whatever thread: autograd launches the backward pass from a thread
    that the annotations of the calling thread do not cover. The range is None for what was launched
    outside of all.
    """
    events, ranges = trace["traceEvents"], host_ranges(trace)
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }

    def range_of(event: dict) -> dict | None:
        at = launched.get(event["args"].get("correlation"), -math.inf)
        return next((r for r in ranges if r["ts"] <= at < r["ts"] + r["dur"]), None)

    return [(range_of(event), event) for event in events if event.get("cat") in DEVICE_WORK]


def timeline(trace: dict) -> list[dict]:
    """name, begin_ms and ms of the named ranges of the trace's last step, on the device's side."""
    ranges = host_ranges(trace)
    if work := device_work(trace):
        on_device = []
        for host_range in ranges:
            if events := [event for within, event in work if within is host_range]:
                begin, end = min(e["ts"] for e in events), max(e["ts"] + e["dur"] for e in events)
                on_device.append({"name": host_range["name"], "ts": begin, "dur": end - begin})
        ranges = on_device
    last = {e["name"]: e for e in ranges}
    begin = min((e["ts"] for e in last.values()), default=0)
    return [
        {"name": name, "begin_ms": (e["ts"] - begin) / 1e3, "ms": e["dur"] / 1e3}
        for name, e in sorted(last.items(), key=lambda item: item[1]["ts"])
    ]


def collectives(trace: dict, *, steps: int = 2) -> dict[str, dict[str, float]]:
    """number and bytes of collectives a step by name, as this rank's process group issued them."""
    calls: dict[str, dict[str, float]] = defaultdict(lambda: {"number": 0.0, "bytes": 0.0})
    for event in trace["traceEvents"]:
        name = event.get("name", "")
        is_host = event.get("cat") in ("cpu_op", "user_annotation")
        if is_host and name.startswith(COLLECTIVES):
            calls[name]["number"] += 1 / steps
            args = event.get("args", {})
            inputs = zip(args.get("Input Dims", []), args.get("Input type", []), strict=False)
            for shape, kind in inputs:
                calls[name]["bytes"] += math.prod(shape) * ITEMSIZE.get(kind, 0) / steps
    return dict(calls)
