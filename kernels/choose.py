"""Whether an operation runs its Triton kernels: --model.kernels, the device, what is installed.

Without Triton nothing of kernels/gpu but launch.py can be imported.
"""

import importlib.util
from typing import Literal

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from kernels.gpu.launch import INTERPRETED

Kernels = Literal["auto", "triton", "plain"]

HAS_TRITON = importlib.util.find_spec("triton") is not None


def use_triton(kernels: Kernels, x: Tensor) -> bool:
    """Whether an operation on x runs its Triton kernels.

    auto: on CUDA tensors, except float64, as the kernels compute in float32. "triton" also takes
    CPU tensors in Triton's interpreter, and fake ones (a trace that is never run).
    Raises: ValueError for other tensors with "triton".
    """
    if kernels == "auto":
        return x.is_cuda and HAS_TRITON and x.dtype != torch.float64
    if kernels == "plain":
        return False
    if not HAS_TRITON:
        raise ValueError("--model.kernels triton: the package triton is not installed; use plain")
    if x.dtype == torch.float64:
        raise ValueError("the Triton kernels compute in float32: use float32, or kernels='plain'")
    traced = torch.compiler.is_compiling() or detect_fake_mode(x) is not None
    if not (x.is_cuda or INTERPRETED or traced):
        raise ValueError(
            "--model.kernels triton needs a CUDA device: use plain, or set TRITON_INTERPRET=1 to "
            "run the kernels, slowly, in Triton's interpreter"
        )
    return True
