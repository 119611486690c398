"""The Triton kernels by themselves: what they compile to anywhere, how fast they are on a GPU.

    python profiling/kernels.py --compile-only   registers, shared memory, spills, bytes (no GPU)
    python profiling/kernels.py                  time of each of ResNet-50's sites, beside the peers
    python profiling/kernels.py --each-once real     each against its plain twin, at real shapes
    TRITON_INTERPRET=1 python profiling/kernels.py --each-once small      without a GPU, odd shapes

--compile-only traces one step of ResNet-50 (224 pixels, 256 images) on fake tensors, keeps every
kernel that would be launched, and compiles each for sm_80, sm_90 and sm_100.
A newcomer's mistake: reading the bytes as a measurement. They are counted: each tensor that a
kernel gets is moved once (what profiling/compiled.py counts for the whole step).
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.gpu.launch import INTERPRETED
from measure.kernel_checks import check_each
from measure.kernel_times import apex_batch_norm, measure, resnet50_sites
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.run.folder import environment
from train.run.program import refuse

ARCHS = (80, 90, 100)
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.uint8: "*u8", torch.int32: "*i32", torch.float64: "*fp64",
}  # fmt: skip


@dataclass
class Launch:
    """One kernel as it would be launched: arguments by name, and launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]
    count: int = 1

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments that are compiled in: constexpr ones and, as Triton does, integers of 1."""
        names = {self.kernel.arg_names[i] for i in self.kernel.constexprs}
        return {
            name: value
            for name, value in self.arguments.items()
            if name in names or (type(value) is int and value == 1)
        }

    @property
    def signature(self) -> dict[str, str]:
        """Triton's type of each argument."""
        constants = self.constants
        return {
            name: "constexpr" if name in constants
            else TYPES[value.dtype] if isinstance(value, Tensor)
            else "fp32" if isinstance(value, float) else "i32"
            for name, value in self.arguments.items()
        }  # fmt: skip

    @property
    def aligned(self) -> dict[tuple[int], list]:
        """Pointers, and integers that 16 divides: what lets loads be vectors."""
        constants = self.constants
        return {
            (index,): [["tt.divisibility", 16]]
            for index, (name, value) in enumerate(self.arguments.items())
            if name not in constants
            and (isinstance(value, Tensor) or (type(value) is int and value % 16 == 0))
        }

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
        x = next(v for v in self.arguments.values() if isinstance(v, Tensor))
        return f"{' '.join(parts)} ({str(x.dtype).removeprefix('torch.')})"


@dataclass
class Recorder:
    """Stands in for torch.library.wrap_triton: keeps launches instead of making them."""

    launches: dict[str, Launch] = field(default_factory=dict)

    def __call__(self, kernel: Any) -> Any:
        """What wrap_triton returns: an object to be indexed by the grid and called."""
        recorder = self

        class Recording:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def run(*args: Any, **kwargs: Any) -> None:
                    recorder.keep(kernel, grid, args, kwargs)

                return run

        return Recording()

    def keep(self, kernel: Any, grid: tuple[int, ...], args: tuple, kwargs: dict) -> None:
        """Count a launch, under the machine code that it needs."""
        options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {k: v for k, v in kwargs.items() if k in kernel.arg_names}
        launch = Launch(kernel, grid, {n: arguments[n] for n in kernel.arg_names}, options)
        if launch.key in self.launches:
            self.launches[launch.key].count += 1
        else:
            self.launches[launch.key] = launch


def launches_of_a_step(images: int, dtype: torch.dtype) -> list[Launch]:
    """The distinct kernels of a ResNet-50 SimSiam step: forward, backward, normalisation, loss."""
    import torch._dynamo  # keeps a table of torch's functions: before one is replaced

    from kernels.normalize import normalize_views

    recorder, real = Recorder(), torch.library.wrap_triton
    torch.library.wrap_triton = recorder  # type: ignore[assignment]
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
    return list(recorder.launches.values())


def compile_for(launch: Launch, arch: int) -> dict[str, int]:
    """Registers a thread, spilled bytes, and shared memory in bytes on sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        launch.kernel, launch.signature, constexprs=launch.constants, attrs=launch.aligned
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", arch, 32),
        options={**launch.options, "enable_fp_fusion": True},
    )  # fmt: skip
    return {**resources(made.asm["cubin"]), "shared": made.metadata.shared}


def resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of a compiled kernel. A spill lies on the stack."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def moved_bytes(launch: Launch) -> float:
    """Bytes moved per element of the largest tensor, every tensor once."""
    tensors = launch.tensors
    largest = max(tensors, key=Tensor.numel)
    return sum(t.numel() * t.element_size() for t in tensors) / largest.numel()


def compile_table(images: int, dtype: torch.dtype) -> list[dict]:
    """A row for each kernel: what it compiles to on each architecture."""
    rows = []
    for launch in sorted(launches_of_a_step(images, dtype), key=lambda launch: launch.label):
        row: dict[str, Any] = {
            "kernel": launch.label, "launches": launch.count,
            "warps": launch.options.get("num_warps", 4),
            "bytes_per_element": round(moved_bytes(launch), 3),
        }  # fmt: skip
        rows.append(row | {f"sm_{arch}": compile_for(launch, arch) for arch in ARCHS})
    return rows


def print_compiled(rows: list[dict]) -> None:
    """The table for people, on stderr."""
    table = Table(title="registers / shared bytes / spilled bytes")
    for name in ("kernel", "launches", "warps", "bytes an element", *(f"sm_{a}" for a in ARCHS)):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for row in rows:
        cells = [f"{r['registers']} / {r['shared']} / {r['spills']}"
                 for r in (row[f"sm_{arch}"] for arch in ARCHS)]  # fmt: skip
        first = (row["kernel"], row["launches"], row["warps"], row["bytes_per_element"])
        table.add_row(*map(str, first), *cells)
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160).print(table)


def print_times(found: dict) -> None:
    """The measured table for people, on stderr."""
    names = [key for key in found["sites"][0] if key.endswith("_ms")]
    table = Table(title="milliseconds forward / backward")
    for name in ("site", "count", *(name[:-3] for name in names), "share of copy"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for row in found["sites"]:
        cells = [" / ".join(f"{ms:.3f}" for ms in row[name]) for name in names]
        share = " / ".join(f"{part:.0%}" for part in row["share_of_copy"])
        site = f"{row['kind']} {'x'.join(map(str, row['shape']))}"
        table.add_row(site, str(row["count"]), *cells, share)
    table.add_section()
    table.add_row("sum over sites", "", *(f"{found['sum_ms'][name]:.2f}" for name in names), "")
    Console(file=sys.stderr, width=None if sys.stderr.isatty() else 160).print(table)


def check(size: str, dtype: torch.dtype) -> None:
    """Run every kernel once; one JSON line, exit code 1 where one is wrong or was left out."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not INTERPRETED:
        refuse("no CUDA device to run kernels on: set TRITON_INTERPRET=1", code=1)
    if device.type == "cpu" and size == "real":
        refuse("--each-once real takes hours in Triton's interpreter: give small", code=1)
    if device.type == "cpu" and dtype == torch.bfloat16:
        print("in float32: Triton's interpreter cuts bfloat16 off", file=sys.stderr)
        dtype = torch.float32
    found = check_each(size, dtype, device)
    for failure in found["failed"]:
        print(failure, file=sys.stderr)
    print(json.dumps(found))
    if found["failed"]:
        raise SystemExit(1)


def main() -> None:
    """Read the flags; compile or measure; print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="Compile or measure the Triton kernels.")
    parser.add_argument("--compile-only", action="store_true", help="no GPU: resources and bytes")
    parser.add_argument("--each-once", choices=("real", "small"), help="shapes of the check")
    parser.add_argument("--n", type=int, default=30, help="timed turns of each site")
    parser.add_argument("--save", type=Path, help="also write the measured JSON to this file")
    parser.add_argument("--images", type=int, default=256, help="images of a step")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.each_once is not None:
        check(arguments.each_once, dtype)
        return
    if not arguments.compile_only:
        if not torch.cuda.is_available():
            refuse("no CUDA device to measure on: give --compile-only", code=1)
        sites, apex = list(resnet50_sites(arguments.images)), apex_batch_norm()
        if apex is None:
            print("apex's batch norm is not measured: no apex built with --bnp", file=sys.stderr)
        found = measure(sites, torch.device("cuda", 0), n=arguments.n, apex=apex)
        found |= {"environment": environment(1, torch.device("cuda", 0))}
        if arguments.save is not None:
            arguments.save.write_text(json.dumps(found, indent=1) + "\n")
        print_times(found)
        print(json.dumps(found))
        return
    rows = compile_table(arguments.images, dtype)
    print_compiled(rows)
    print(json.dumps({"images": arguments.images, "dtype": arguments.dtype, "kernels": rows}))


if __name__ == "__main__":
    main()
