"""The Triton kernels of a training step: what would be launched, and what it compiles to.

A step of ResNet-50 is traced on fake tensors, and every launch is kept with its arguments. Each
kernel is compiled ahead of time, for a GPU that is not there.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.uint16: "*u16",
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
    grid: tuple[int, ...]
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
    def code_key(self) -> str:
        """Equal for launches of the same machine code."""
        return f"{self.kernel.__name__} {self.signature} {self.constants} {self.aligned}"

    @property
    def key(self) -> str:
        """Equal for launches of the same machine code on tensors of the same shapes."""
        return f"{self.code_key} {self.grid} {[tuple(t.shape) for t in self.tensors]}"

    @property
    def bytes(self) -> int:
        """Moved by one launch: every tensor once."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def elements(self) -> int:
        """Of its largest tensor."""
        return max(t.numel() for t in self.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its largest tensor."""
        return tuple(max(self.tensors, key=Tensor.numel).shape)

    @property
    def label(self) -> str:
        """The kernel's name and its switches that are on."""
        parts = [self.kernel.__name__.lstrip("_")]
        for name, value in self.constants.items():
            if name.isupper() and value and not name.startswith("BLOCK"):
                parts.append(name.lower() if value is True else f"{name.lower()}={value}")
        return f"{' '.join(parts)} ({str(self.tensors[0].dtype).removeprefix('torch.')})"


def launches_of_a_step(images: int, dtype: torch.dtype) -> list[Launch]:
    """The distinct launches of a ResNet-50 SimSiam step: views, forward, loss, backward.

    And those of --model.stem_channels 4 and 8, and of its 1x1 convolutions with --model.conv_stats
    true, which replace others.
    """
    import torch._dynamo  # keeps a table of torch's functions: before one is replaced

    from kernels.normalize import normalize_views

    launches: dict[str, Launch] = {}
    channels = 3
    conv_stats: Literal["false", "true"] = "false"

    class Recording:
        """Stands in for what torch.library.wrap_triton returns: keeps launches, makes none."""

        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return partial(self.keep, grid)

        def keep(self, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
            if conv_stats == "true" and not self.kernel.__name__.startswith("_conv"):
                return
            names = self.kernel.arg_names
            values = dict(zip(names, args, strict=False)) | kwargs
            options = {k: v for k, v in kwargs.items() if k not in names}
            arguments = {name: values[name] for name in names}
            launch = Launch(self.kernel, arguments, options, grid)
            if channels != 3 and launch.key in launches:
                return
            launches.setdefault(launch.key, launch).count += 1

    real = torch.library.wrap_triton
    torch.library.wrap_triton = Recording  # type: ignore[assignment]
    try:
        with FakeTensorMode():
            raw = torch.empty(2 * images, 224, 224, 3, dtype=torch.uint8)
            draws = torch.empty(2 * images, 26)  # of a blur's radius of at most 6 pixels
            views = {}
            for channels in (3, 4, 8):
                how = {"draws": draws, "channels": channels, "kernels": "triton"}
                views[channels] = normalize_views(raw, (0.5,) * 3, (0.5,) * 3, dtype, **how)
            channels = 3
            for conv_stats in ("false", "true"):
                config = ModelConfig(kernels="triton", conv_stats=conv_stats)
                model = SimSiam(config, MethodConfig())
                with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                    loss, _ = model(views[3])
                loss.backward()
    finally:
        torch.library.wrap_triton = real
    return list(launches.values())


class Compiled(NamedTuple):
    """A kernel's machine code on one architecture."""

    resources: dict[str, int]
    """Registers a thread, spilled bytes, shared memory in bytes."""
    sass: str
    ttgir: str


def compile_for(launch: Launch, arch: int) -> Compiled:
    """Compile for sm_<arch>. Registers and stack are cuobjdump's: a spill is on the stack."""
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

        def told_by(*command: str) -> str:
            command = (*command, file.name)
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        used = told_by(knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
        sass = told_by(knobs.nvidia.nvdisasm.path, "-c")
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
    spills = used["STACK"] + used["LOCAL"]
    resources = {"registers": used["REG"], "spills": spills, "shared": made.metadata.shared}
    return Compiled(resources, sass, made.asm["ttgir"])
