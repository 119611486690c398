"""The Triton kernels by themselves: what they compile to anywhere, how fast they are on a GPU.

    python profiling/kernels.py --compile-only   registers, shared memory, spills, bytes (no GPU)
    python profiling/kernels.py                  time of each of ResNet-50's sites, beside the peers
    python profiling/kernels.py --each-once real     each against its plain twin, at real shapes
    TRITON_INTERPRET=1 python profiling/kernels.py --each-once small      without a GPU, odd shapes

--compile-only traces one step of ResNet-50 (224 pixels, 256 images) on fake tensors, keeps every
kernel that would be launched, and compiles each for sm_80, sm_90 and sm_100. Its bytes are counted,
not measured: each tensor that a kernel gets is moved once, as in profiling/compiled.py.
"""

import root_first  # isort: skip # noqa: F401

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.gpu.launch import INTERPRETED
from measure.kernel_checks import check_each
from measure.kernel_times import apex_batch_norm, measure, resnet50_sites
from measure.results import print_table
from pipeline.sources.paths import named_path
from pipeline.streams import print_result, protect_output
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.run.folder import environment
from train.run.program import refuse

ARCHS = (80, 90, 100)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float64: "*fp64",
    float: "fp32",
    int: "i32",
    bool: "i32",
}


@dataclass
class Launch:
    """A kernel as it would be launched: arguments by name, and launch options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    count: int = 0

    def __post_init__(self) -> None:
        """What Triton compiles for: constants, each argument's type, and 16-byte alignment."""
        constexprs = {self.kernel.arg_names[i] for i in self.kernel.constexprs}
        self.constants: dict[str, Any] = {}
        self.signature: dict[str, str] = {}
        self.aligned: dict[tuple[int], list] = {}
        for index, (name, value) in enumerate(self.arguments.items()):
            is_int = type(value) is int
            if name in constexprs or (is_int and value == 1):  # Triton compiles ones in too
                self.constants[name], self.signature[name] = value, "constexpr"
                continue
            self.signature[name] = TYPES[value.dtype if isinstance(value, Tensor) else type(value)]
            if isinstance(value, Tensor) or (is_int and value % 16 == 0):  # lets loads be vectors
                self.aligned[(index,)] = [["tt.divisibility", 16]]

    @property
    def tensors(self) -> list[Tensor]:
        """The distinct tensors: an argument that is not used is given another's tensor."""
        return list({id(v): v for v in self.arguments.values() if isinstance(v, Tensor)}.values())

    @property
    def key(self) -> str:
        """Equal for launches of the same machine code."""
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.aligned}"

    @property
    def label(self) -> str:
        """The kernel's name and its switches that are on."""
        parts = [self.kernel.__name__.lstrip("_")]
        for name, value in self.constants.items():
            if name.isupper() and value and not name.startswith("BLOCK"):
                parts.append(name.lower() if value is True else f"{name.lower()}={value}")
        return f"{' '.join(parts)} ({str(self.tensors[0].dtype).removeprefix('torch.')})"


def launches_of_a_step(images: int, dtype: torch.dtype) -> list[Launch]:
    """The distinct kernels of a ResNet-50 SimSiam step: forward, backward, normalisation, loss."""
    import torch._dynamo  # keeps a table of torch's functions: before one is replaced

    from kernels.normalize import normalize_views

    launches: dict[str, Launch] = {}

    class Recording:
        """Stands in for what torch.library.wrap_triton returns: keeps launches, makes none."""

        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return self.keep

        def keep(self, *args: Any, **kwargs: Any) -> None:
            names = self.kernel.arg_names
            values = dict(zip(names, args, strict=False)) | kwargs
            options = {k: v for k, v in kwargs.items() if k not in names}
            launch = Launch(self.kernel, {name: values[name] for name in names}, options)
            launches.setdefault(launch.key, launch).count += 1

    real = torch.library.wrap_triton
    torch.library.wrap_triton = Recording  # type: ignore[assignment]
    try:
        with FakeTensorMode():
            model = SimSiam(ModelConfig(kernels="triton"), MethodConfig())
            raw = torch.empty(2 * images, 224, 224, 3, dtype=torch.uint8)
            views = normalize_views(raw, (0.5,) * 3, (0.5,) * 3, dtype, kernels="triton")
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss, _ = model(views)
            loss.backward()
    finally:
        torch.library.wrap_triton = real
    return list(launches.values())


def compile_for(launch: Launch, arch: int) -> dict[str, int]:
    """Registers a thread, spilled bytes, and shared memory in bytes on sm_<arch>.

    Of what cuobjdump prints of the compiled kernel: a spill is on the stack.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants, attrs = launch.constants, launch.aligned
    source = ASTSource(launch.kernel, launch.signature, constexprs=constants, attrs=attrs)
    options = {**launch.options, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spills = used["STACK"] + used["LOCAL"]
    return {"registers": used["REG"], "spills": spills, "shared": made.metadata.shared}


def moved_bytes(launch: Launch) -> float:
    """Bytes moved per element of the largest tensor, every tensor once."""
    largest = max(launch.tensors, key=Tensor.numel)
    return sum(t.nbytes for t in launch.tensors) / largest.numel()


def compile_table(images: int, dtype: torch.dtype) -> list[dict]:
    """A row for each kernel: what it compiles to on each architecture. Printed too."""
    rows = [
        {
            "kernel": launch.label,
            "launches": launch.count,
            "warps": launch.options.get("num_warps", 4),
            "bytes_per_element": round(moved_bytes(launch), 3),
        }
        | {f"sm_{arch}": compile_for(launch, arch) for arch in ARCHS}
        for launch in sorted(launches_of_a_step(images, dtype), key=lambda launch: launch.label)
    ]
    columns = ("kernel", "launches", "warps", "bytes an element", *(f"sm_{a}" for a in ARCHS))
    cells = [
        [
            f"{v['registers']} / {v['shared']} / {v['spills']}" if isinstance(v, dict) else v
            for v in row.values()
        ]
        for row in rows
    ]
    print_table("registers / shared bytes / spilled bytes", columns, cells, width=160)
    return rows


def print_times(result: dict) -> None:
    """The measured table for people, on stderr."""
    names = [key for key in result["sites"][0] if key.endswith("_ms")]
    rows: list = []
    for row in result["sites"]:
        site = f"{row['kind']} {'x'.join(map(str, row['shape']))}"
        times = (" / ".join(f"{ms:.3f}" for ms in row[name]) for name in names)
        share = " / ".join(f"{part:.0%}" for part in row["share_of_copy"])
        rows.append((site, row["count"], *times, share))
    sums = (f"{result['sum_ms'][name]:.2f}" for name in names)
    rows += [None, ("sum over sites", "", *sums, "")]
    columns = ("site", "count", *(name[:-3] for name in names), "share of copy")
    print_table("milliseconds forward / backward", columns, rows, width=160)


def check(size: str, dtype: torch.dtype) -> None:
    """Run every kernel once; one JSON line, exit code 1 where one is wrong or was left out."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        if not INTERPRETED:
            refuse("no CUDA device to run kernels on: set TRITON_INTERPRET=1", code=1)
        if size == "real":
            refuse("--each-once real takes hours in Triton's interpreter: give small", code=1)
        if dtype == torch.bfloat16:
            print("in float32: Triton's interpreter truncates bfloat16", file=sys.stderr)
            dtype = torch.float32
    result = check_each(size, dtype, device)
    for failure in result["failed"]:
        print(failure, file=sys.stderr)
    print_result(result)
    if result["failed"]:
        raise SystemExit(1)


def time_sites(images: int, n: int, save: Path | None) -> dict:
    """Measure ResNet-50's sites on the GPU; the table on stderr, the result also in a file."""
    if not torch.cuda.is_available():
        refuse("no CUDA device to measure on: give --compile-only", code=1)
    device, apex = torch.device("cuda", 0), apex_batch_norm()
    if apex is None:
        print("apex's batch norm is not measured: no apex built with --bnp", file=sys.stderr)
    result = measure(list(resnet50_sites(images)), device, n=n, apex=apex)
    result["environment"] = environment(1, device)
    if save is not None:
        save.write_text(json.dumps(result, indent=1) + "\n")
    print_times(result)
    return result


def main() -> None:
    """Read the flags; check, compile or measure; print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="Compile or measure the Triton kernels.")
    parser.add_argument("--compile-only", action="store_true", help="no GPU: resources and bytes")
    parser.add_argument("--each-once", choices=("real", "small"), help="shapes of the check")
    parser.add_argument("--n", type=int, default=30, help="timed turns of each site")
    parser.add_argument("--save", type=named_path, help="also write the measured JSON to this file")
    parser.add_argument("--images", type=int, default=256, help="images of a step")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    flags = parser.parse_args()
    dtype = getattr(torch, flags.dtype)
    if flags.each_once is not None:
        check(flags.each_once, dtype)
    elif flags.compile_only:
        if INTERPRETED:
            refuse("--compile-only compiles nothing with TRITON_INTERPRET=1: unset it", code=1)
        rows = compile_table(flags.images, dtype)
        print_result({"images": flags.images, "dtype": flags.dtype, "kernels": rows})
    else:
        print_result(time_sites(flags.images, flags.n, flags.save), kept=flags.save)


if __name__ == "__main__":
    protect_output()
    main()
