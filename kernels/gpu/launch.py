"""Triton kernels as torch operators, and their grids over a matrix of rows.

Every kernel of batch norm sees its tensor as (rows, channels), channels dense: NHWC memory and
(N, C) alike. Programs are launched by blocks of channels first, then by tiles of rows, then by
views: so whole rows are read at once, and a pass ends with the last rows of the last view. The pass
after it, in the opposite order, finds them in the L2 cache (profiling/predict/cache_model.py).
Launch kernels inside an operator only: torch.compile would trace into the launcher, but through
`operator` and `wrap_triton` Inductor sees the kernel itself, without a graph break.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch, read at import: kernels run in Python, on CPU tensors."""

TILE = 4096  # elements: 16 for each of 256 threads, two 16-byte loads in bf16
POOL_TILE = 1024  # with max-pool a thread holds four windows' addresses: 2048 took 215 registers
SECOND_TILE = 2048  # two batch norms, 4096: 126 (Triton 3.9) to 136 (3.6) registers, or spills
NUM_WARPS = 8
MAX_BLOCK_C = 64
MAX_TILES = 65535  # of CUDA's second and third axis
PROGRAMS = 1024  # of the statistics: two views of as many as an H200 holds, 4 a multiprocessor
REDUCE_PROGRAMS = 512  # of the backward reduction: 2 a multiprocessor
PRODUCT_PROGRAMS = 264  # of the products: 2 a multiprocessor of an H200
# assumption: these seven; profiling/kernels.py on a GPU settles them. They do not depend on the
# device, so that sums are formed in one order everywhere.


def operator(name: str, *, mutates: tuple[str, ...] = ()) -> Callable:
    """Decorator: a function that allocates and launches becomes torch.ops.twinturbo.<name>.

    The function is also its fake implementation. In Triton's interpreter the operator is opaque to
    Inductor, which could not read the kernel.
    """

    def wrap(function: Callable) -> Callable:
        if not INTERPRETED:
            return torch.library.triton_op(f"twinturbo::{name}", function, mutates_args=mutates)
        opaque = torch.library.custom_op(f"twinturbo::{name}", function, mutates_args=mutates)
        opaque.register_fake(function)
        return opaque

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


def tiles(
    num_rows: int, num_channels: int, num_views: int, *, tile: int = TILE
) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """(folds, grid, launch options) of a kernel with a program for each tile of (V, R, C).

    Blocks are powers of two, channels at least 8 for a byte of mask bits. Axes: blocks of channels,
    tiles of rows, views; an axis has at most 65,535 programs, so that more tiles are folded into
    that of the views. Triton compiles folds of 1 in. Tiles beyond the last row do nothing.
    """
    block_c = min(MAX_BLOCK_C, max(8, 1 << (num_channels - 1).bit_length()))
    block_r = tile // block_c
    num_tiles = cdiv(num_rows, block_r)
    folds = cdiv(num_tiles, MAX_TILES)
    grid = cdiv(num_channels, block_c), cdiv(num_tiles, folds), num_views * folds
    return folds, grid, {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": NUM_WARPS}


def reduction(
    num_rows: int, num_channels: int, num_views: int, *, programs: int, tile: int = TILE
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid and launch options of a reduction over each view's rows; its second axis are parts.

    Part p has the tiles p, p + parts, p + 2 parts, ...: all programs go through the rows together.
    They write partial results, which a second kernel merges in a fixed order.
    """
    _, (blocks, *_), options = tiles(num_rows, num_channels, num_views, tile=tile)
    num_tiles = cdiv(num_rows, options["BLOCK_R"])
    parts = min(max(1, programs // (blocks * num_views)), num_tiles)
    return (blocks, parts, num_views), options


def product(
    num_rows: int, num_channels: int, num_inputs: int, num_views: int, *, widest: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid and launch options of a matrix product that is a reduction too; axes as there.

    num_channels are the result's, num_inputs are summed over. A tile is `widest` channels and 64
    rows, or as many elements with fewer channels; Triton multiplies 16 or more of each.
    """
    block_c = min(widest, max(16, 1 << (num_channels - 1).bit_length()))
    block_k = min(64, max(16, 1 << (num_inputs - 1).bit_length()))
    block_r = min(128, 64 * widest // block_c)
    blocks = cdiv(num_channels, block_c)
    parts = min(max(1, PRODUCT_PROGRAMS // (blocks * num_views)), cdiv(num_rows, block_r))
    options = {"BLOCK_R": block_r, "BLOCK_C": block_c, "BLOCK_K": block_k}
    return (blocks, parts, num_views), options | {"num_warps": widest // 16, "num_stages": 4}


def merge(num_parts: int, num_columns: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid of a kernel that merges a reduction's parts, and its launch options.

    A program has all parts of 8 columns, a sector of fp32. Two sizes of tile up to PROGRAMS / 2
    parts, so that a step has few kernels to compile.
    """
    block_s = 64 if num_parts <= 64 else max(512, 1 << (num_parts - 1).bit_length())
    return (cdiv(num_columns, 8),), {"BLOCK_S": block_s, "BLOCK_C": 8, "num_warps": NUM_WARPS}
