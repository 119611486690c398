"""What --precision means: the dtype of the forward pass, and whether products may round to TF32.

bf16 and fp16 are autocast: weights, statistics, losses and optimizer stay fp32. tf32 is fp32 whose
convolutions and matrix products read their inputs with 10 bits of mantissa, fp32 has all 23.
A newcomer's mistake: taking PyTorch's default for fp32. It has TF32 in convolutions, and NVIDIA's
image in matrix products too (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["bf16", "fp16", "tf32", "fp32"]
DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32,
}  # fmt: skip


def set_tf32(precision: Precision, device: torch.device) -> None:
    """TF32 in convolutions and matrix products, also those of kNN and probes, or in neither.

    By the flags that all of torch 2.11 to 2.13 reads: after fp32_precision was set, Inductor's
    torch.get_float32_matmul_precision() raises. Raises: ValueError for tf32 on the CPU.
    """
    is_allowed = precision == "tf32"
    if is_allowed and device.type != "cuda":
        raise ValueError("--precision tf32 needs a CUDA device: use --precision fp32 on the CPU")
    torch.backends.cuda.matmul.allow_tf32 = is_allowed
    torch.backends.cudnn.allow_tf32 = is_allowed


@contextmanager
def autocast(precision: Precision, device: torch.device) -> Iterator[None]:
    """The forward pass in this precision; nothing for tf32 and fp32."""
    dtype = DTYPES[precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        yield
