"""Triton kernels of SimSiam's loss: two launches for both directions, the gradient of p included.

    loss = - 1/(2N) sum_v sum_n  p_vn / |p_vn| . z_wn / |z_wn|,   w the other view
    dp_vn = - 1/(2N) (zhat_wn - cos_vn phat_vn) / |p_vn|
    z_std = mean over views and channels of std_n(z_vn / |z_vn|)

Bytes: the first reads p and z once and writes dp, and for each program the mean and M2 of its
normalised rows; the second merges those. Not sums of squares: after a collapse all rows are one
vector, and no digit of the variance would be left.

N rows of a view, D channels.
"""

# Triton compiles these functions: its types are not those that pyright sees.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import cdiv, operator, wrap_triton

PROGRAMS = 128  # assumption: about one for each multiprocessor; each holds a row of both views
BLOCK_D = 16
EPS = 1e-12  # F.normalize's


@triton.jit
def _losses(
    p_ptr,  # (2, N, D)
    z_ptr,  # (2, N, D)
    dp_ptr,  # (2, N, D) fp32
    loss_ptr,  # (programs,) fp32
    part_ptr,  # (programs, 4, D) fp32
    done_ptr,  # (1,) int32, set to 0
    num_rows,  # N
    dim,  # D
    rows_per_program,
    scale,  # -1 / (2 N)
    BLOCK: tl.constexpr,  # D or more
):
    """dp of the program's rows, their loss, and (mean, M2) of zhat for each view: part[program]."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(done_ptr, 0)
    column = tl.arange(0, BLOCK)
    inside = column < dim
    loss = 0.0
    mean0 = tl.zeros([BLOCK], tl.float32)
    mean1 = tl.zeros([BLOCK], tl.float32)
    m2_0 = tl.zeros([BLOCK], tl.float32)
    m2_1 = tl.zeros([BLOCK], tl.float32)
    first = program * rows_per_program
    count = tl.minimum(rows_per_program, num_rows - first)
    for done in range(0, count):
        at0 = (first + done).to(tl.int64) * dim + column
        at1 = at0 + num_rows * dim
        z0 = tl.load(z_ptr + at0, mask=inside, other=0.0).to(tl.float32)
        z1 = tl.load(z_ptr + at1, mask=inside, other=0.0).to(tl.float32)
        z0 /= tl.maximum(tl.sqrt(tl.sum(z0 * z0)), 1e-12)
        z1 /= tl.maximum(tl.sqrt(tl.sum(z1 * z1)), 1e-12)
        p0 = tl.load(p_ptr + at0, mask=inside, other=0.0).to(tl.float32)
        norm0 = tl.maximum(tl.sqrt(tl.sum(p0 * p0)), 1e-12)
        cos0 = tl.sum(p0 * z1) / norm0
        tl.store(dp_ptr + at0, (z1 - cos0 * (p0 / norm0)) * (scale / norm0), mask=inside)
        p1 = tl.load(p_ptr + at1, mask=inside, other=0.0).to(tl.float32)
        norm1 = tl.maximum(tl.sqrt(tl.sum(p1 * p1)), 1e-12)
        cos1 = tl.sum(p1 * z0) / norm1
        tl.store(dp_ptr + at1, (z0 - cos1 * (p1 / norm1)) * (scale / norm1), mask=inside)
        loss += cos0 + cos1
        delta0, delta1 = z0 - mean0, z1 - mean1
        mean0 += delta0 / (done + 1)
        mean1 += delta1 / (done + 1)
        m2_0 += delta0 * (z0 - mean0)
        m2_1 += delta1 * (z1 - mean1)
    tl.store(loss_ptr + program, loss * scale)
    out = part_ptr + program * 4 * dim + column
    tl.store(out, mean0, mask=inside)
    tl.store(out + dim, mean1, mask=inside)
    tl.store(out + 2 * dim, m2_0, mask=inside)
    tl.store(out + 3 * dim, m2_1, mask=inside)


@triton.jit
def _merge_losses(
    loss_ptr,  # (parts,) fp32
    part_ptr,  # (parts, 4, D) fp32
    done_ptr,  # (1,) int32: programs that have finished
    std_ptr,  # (programs,) fp32
    loss_out_ptr,  # () fp32, as std_out
    std_out_ptr,
    num_rows,  # N
    dim,  # D
    num_parts,
    rows_per_program,  # of _losses
    BLOCK_S: tl.constexpr,  # all parts
    BLOCK_D: tl.constexpr,  # of columns
    BLOCK_P: tl.constexpr,  # parts or programs, or more
):
    """z_std and the loss. Each program sums some columns; the last one to finish adds up."""
    columns = 2 * dim  # of both views
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.arange(0, BLOCK_S)
    inside = (part < num_parts)[:, None] & (column < columns)[None, :]
    at = part[:, None] * 2 * columns + column[None, :]
    count = tl.minimum(num_rows - part * rows_per_program, rows_per_program)
    mean = tl.load(part_ptr + at, mask=inside, other=0.0)
    m2 = tl.load(part_ptr + at + columns, mask=inside, other=0.0)
    whole = tl.sum(tl.where(inside, mean * count[:, None], 0.0), 0) / num_rows
    delta = mean - whole[None, :]
    square = tl.where(inside, m2 + delta * delta * count[:, None], 0.0)
    std = tl.where(column < columns, tl.sqrt(tl.sum(square, 0) / num_rows), 0.0)
    tl.store(std_ptr + tl.program_id(0), tl.sum(std))
    tl.debug_barrier()
    # acquire and release: the last program sees what all others have stored
    if tl.atomic_add(done_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        index = tl.arange(0, BLOCK_P)
        stds = tl.load(
            std_ptr + index, mask=index < tl.num_programs(0), other=0.0, cache_modifier=".cg"
        )
        tl.store(std_out_ptr, tl.sum(stds) / columns)
        losses = tl.load(loss_ptr + index, mask=index < num_parts, other=0.0)
        tl.store(loss_out_ptr, tl.sum(losses))


@operator("symmetric_neg_cosine")
def loss_and_gradient(p: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss and z_std, fp32 scalars, and dp (2, N, D) in fp32; p, z (2, N, D) contiguous."""
    _, num_rows, dim = p.shape
    rows_per_program = cdiv(num_rows, PROGRAMS)
    num_parts = cdiv(num_rows, rows_per_program)
    merges = cdiv(2 * dim, BLOCK_D)
    fp32 = {"dtype": torch.float32, "device": p.device}
    dp = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    losses, part = (torch.empty(shape, **fp32) for shape in ((num_parts,), (num_parts, 4, dim)))
    stds = torch.empty(merges, **fp32)
    loss, z_std = (torch.empty((), **fp32) for _ in range(2))
    done = torch.empty(1, dtype=torch.int32, device=p.device)
    tensors, sizes = (p, z, dp, losses, part, done), (num_rows, dim, rows_per_program)
    block = max(16, 1 << (dim - 1).bit_length())
    wrap_triton(_losses)[(num_parts,)](*tensors, *sizes, -0.5 / num_rows, BLOCK=block, num_warps=16)
    tensors, sizes = (losses, part, done, stds, loss, z_std), (num_rows, dim, num_parts)
    block = {"BLOCK_S": PROGRAMS, "BLOCK_D": BLOCK_D}
    block["BLOCK_P"] = max(PROGRAMS, 1 << (merges - 1).bit_length())
    wrap_triton(_merge_losses)[(merges,)](*tensors, *sizes, rows_per_program, **block, num_warps=4)
    return loss, z_std, dp
