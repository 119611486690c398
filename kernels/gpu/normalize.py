"""Triton kernel of the first op on the training device: out = scale * uint8 + shift, per channel.

Bytes: 1 read and sizeof(dtype) written an element, in one pass. Three channels are no power of two,
so the images are one row of bytes, whose channel is the index modulo 3.
"""

# Triton compiles these functions: its types are not those that pyright sees.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import TILE, cdiv, operator, wrap_triton


@triton.jit
def _normalize(x_ptr, scale_ptr, shift_ptr, out_ptr, num_bytes, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    inside = start + index < num_bytes
    channel = (start % 3).to(tl.int32) + index
    channel = channel % 3
    x = tl.load(x_ptr + start + index, mask=inside, other=0).to(tl.float32)
    out = x * tl.load(scale_ptr + channel) + tl.load(shift_ptr + channel)
    tl.store(out_ptr + start + index, out.to(out_ptr.dtype.element_ty), mask=inside)


@operator("normalize_views")
def normalize(views_NHWC: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, H, W, 3) of dtype; scale and shift (3,) fp32."""
    out = torch.empty(views_NHWC.shape, dtype=dtype, device=views_NHWC.device)
    num_bytes = views_NHWC.numel()
    wrap_triton(_normalize)[(cdiv(num_bytes, TILE),)](
        views_NHWC, scale, shift, out, num_bytes, BLOCK=TILE, num_warps=8
    )
    return out
