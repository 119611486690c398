"""How Triton kernels are made into torch operators, and laid over a matrix of rows.

Every kernel of batch norm sees its tensor as (rows, channels), channels dense: NHWC memory and
(N, C) alike. A grid has three axes: runs of rows, blocks of channels, views.
A newcomer's mistake: launching a kernel outside an operator. torch.compile would then trace into
the launcher; through `operator` and `wrap_triton` Inductor sees the kernel itself, no graph break.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch, read when it is imported: kernels run in Python, on CPU tensors."""

TILE = 4096  # elements: 16 for each of 256 threads, two 16-byte loads in bf16
POOL_TILE = 1024  # with max-pool a thread holds four windows' addresses: 2048 took 215 registers
SECOND_TILE = 2048  # two batch norms, 4096: 126 (Triton 3.9) to 136 (3.6) registers, or spills
NUM_WARPS = 8
MAX_BLOCK_C = 64
PROGRAMS = 1024  # of a reduction: about 8 for each multiprocessor of an H200.
# assumption: these five; profiling/kernels.py on a GPU settles them. They do not depend on the
# device, so that sums are formed in one order everywhere.


def operator(name: str, *, mutates: tuple[str, ...] = ()) -> Callable:
    """Decorator: a function that allocates and launches becomes torch.ops.twinturbo.<name>.

    The function is its own fake implementation too. In Triton's interpreter there is nothing that
    Inductor could read, so the operator stays opaque to it and its code still runs.
    """

    def wrap(function: Callable) -> Callable:
        if not INTERPRETED:
            return torch.library.triton_op(f"twinturbo::{name}", function, mutates_args=mutates)
        made = torch.library.custom_op(f"twinturbo::{name}", function, mutates_args=mutates)
        made.register_fake(function)
        return made

    return wrap


class _Interpreted:
    """An interpreted kernel that is not run on fake tensors."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def run(*args: Any, **options: Any) -> None:
            if not any(isinstance(arg, FakeTensor) for arg in args):
                self.kernel[grid](*args, **options)

        return run


def wrap_triton(kernel: Any) -> Any:
    """torch.library.wrap_triton, also for kernels of Triton's interpreter."""
    return _Interpreted(kernel) if INTERPRETED else torch.library.wrap_triton(kernel)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def block_sizes(num_channels: int, *, tile: int = TILE) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_C) of a tile: powers of two, channels at least 8 for a byte of mask bits."""
    block_c = min(MAX_BLOCK_C, max(8, 1 << (num_channels - 1).bit_length()))
    return tile // block_c, block_c


def reduction_grid(
    rows_per_view: int, num_channels: int, num_views: int, *, tile: int = TILE
) -> tuple[int, int]:
    """(rows of a program, programs along the rows) of a reduction over each view's rows.

    Programs write partial results, which a second kernel merges in a fixed order.
    """
    block_r, block_c = block_sizes(num_channels, tile=tile)
    wanted = max(1, PROGRAMS // (cdiv(num_channels, block_c) * num_views))
    tiles = cdiv(rows_per_view, block_r)
    per_program = cdiv(tiles, min(wanted, tiles)) * block_r
    return per_program, cdiv(rows_per_view, per_program)
