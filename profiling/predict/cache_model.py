"""Bytes that reach memory when one pass of batch norm follows another: a model of the L2 cache.

The addresses of the kernels are replayed in launch order through a cache with LRU replacement. Its
unit is a tile, of 2 to 8 KiB, and not a sector: programs read and write whole tiles, whose rows are
whole sectors, so counting sectors gives the same bytes. Sizes are the real ones; nothing is scaled
down. Programs run in step: each of the resident ones takes a tile, then each its next; one that
has ended makes room for the next of the launch. What is written stays in the cache and is counted
once. The cache is empty at first: what the convolution before leaves in it is not known.

`tiles_in_order` has the order of kernels/gpu/launch.py once more; a test compares it with the
addresses of the kernels in Triton's interpreter. Left out: max-pool's windows, the sets and the two
halves of a real cache, programs that are faster than others.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from predict.kernel_code import Launch

CACHES = {"50 MB": 50 << 20, "60 MB": 60 << 20}
"""The L2 cache of an H100, and what is reported of an H200 (assumption)."""
OUTPUTS = {
    "_apply": ("y_ptr", "bits_ptr"),
    "_reduce": ("g_ptr",),
    "_backward": ("dx_ptr", "dx2_ptr"),
}
TILED = ("_statistics", "_apply", "_reduce", "_backward")


class Tile(NamedTuple):
    """Rows of a block of channels in a view."""

    view: int
    number: int
    block: int


class Cache:
    """LRU over units of any size."""

    def __init__(self, capacity: int):
        self.capacity, self.used = capacity, 0
        self.units: OrderedDict[tuple, int] = OrderedDict()

    def touch(self, unit: tuple, num_bytes: int) -> bool:
        """Whether it was there; it is there afterwards, as the newest."""
        if unit in self.units:
            self.units.move_to_end(unit)
            return True
        self.units[unit] = num_bytes
        self.used += num_bytes
        while self.used > self.capacity:
            self.used -= self.units.popitem(last=False)[1]
        return False


def tiles_in_order(launch: Launch, resident: int) -> Iterator[Tile]:
    """The tiles of a launch in the order in which `resident` programs at a time take them."""
    values, (blocks, axis, views) = launch.arguments, launch.grid
    num_tiles = -(-values["num_rows"] // values["BLOCK_R"])
    if launch.kernel.__name__ not in ("_statistics", "_reduce"):  # a tile each, the last one first
        folds = values["folds"]
        for view in reversed(range(views // folds)):
            for tile in reversed(range(axis * folds)):
                if tile < num_tiles:
                    yield from (Tile(view, tile, block) for block in range(blocks))
        return
    parts, programs = axis, axis * blocks
    waiting = programs * views
    started, running = 0, []
    while running or started < waiting:
        while len(running) < resident and started < waiting:
            view, program = divmod(started, programs)
            running.append([view, program // blocks, program % blocks])
            started += 1
        for place in running:
            yield Tile(*place)
            place[1] += parts
        running = [place for place in running if place[1] < num_tiles]


class Pass(NamedTuple):
    """A launch, and the tensors that it goes through: bytes an element, and whether it writes."""

    launch: Launch
    tensors: dict[str, tuple[float, bool]]

    @property
    def bytes(self) -> float:
        """By the formula: every tensor once."""
        return self.launch.elements * sum(size for size, _ in self.tensors.values())


def pass_of(launch: Launch, names: dict[str, str]) -> Pass:
    """`names` are those of tensors that the pass before it calls otherwise."""
    outputs, tensors, seen = OUTPUTS.get(launch.kernel.__name__, ()), {}, set()
    for name, value in launch.arguments.items():
        is_rows = isinstance(value, Tensor) and value.shape[0] == launch.shape[0]
        if is_rows and id(value) not in seen:  # an argument that is not used is another's tensor
            seen.add(id(value))
            called = names.get(name, name.removesuffix("_ptr"))
            tensors[called] = value.nbytes / launch.elements, name in outputs
    return Pass(launch, tensors)


def chain(second: Launch, launches: list[Launch]) -> list[Pass]:
    """The passes over the same tensors: those that sum, then `second`, which uses the sums."""
    values = second.arguments
    is_apply = second.kernel.__name__ == "_apply"

    def fits(first: Launch) -> bool:
        if first.shape != second.shape:
            return False
        if is_apply:
            return first.kernel.__name__ == "_statistics"
        given = first.arguments
        return first.kernel.__name__ == "_reduce" and all(
            (given[name] == 2) == (values[name] == 2)
            if name == "MASK"
            else given[name] == values[name]
            for name in ("SECOND", "POOLED", "AFFINE", "MASK")
        )

    first = max(filter(fits, launches), key=lambda launch: launch.count)
    if is_apply:
        names = [{}, {"x_ptr": "shortcut"}] if values["SHORTCUT"] == 2 else [{}]
        return [*(pass_of(first, renamed) for renamed in names), pass_of(second, {})]
    gradient = {"g_ptr": "g" if first.arguments["WRITE_G"] else "dy"}
    return [pass_of(first, {}), pass_of(second, gradient)]


def replay(step: Pass, cache: Cache, resident: int, unit_rows: int) -> float:
    """Bytes that a pass moves from and to memory."""
    values, moved = step.launch.arguments, 0.0
    channels, rows = values["num_channels"], values["num_rows"]
    units = values["BLOCK_R"] // unit_rows
    for tile in tiles_in_order(step.launch, resident):
        width = min(values["BLOCK_C"], channels - tile.block * values["BLOCK_C"])
        for index in range(tile.number * units, (tile.number + 1) * units):
            elements = width * min(unit_rows, rows - index * unit_rows)
            if elements <= 0:
                break
            for name, (size, is_written) in step.tensors.items():
                unit = name, tile.view, index, tile.block
                if not cache.touch(unit, elements * size) or is_written:
                    moved += elements * size
    return moved


def replayed(second: Launch, launches: list[Launch], resident: dict[str, int]) -> dict:
    """MB of the summing passes and of `second`, by formula and by cache; `resident` by code_key."""
    passes = chain(second, launches)
    unit_rows = min(step.launch.arguments["BLOCK_R"] for step in passes)
    found: dict = {"kernel": second.label, "shape": list(second.shape), "launches": second.count}
    sums = sum(step.bytes for step in passes[:-1])
    found["mb"] = {"formula": [round(sums / 1e6, 2), round(passes[-1].bytes / 1e6, 2)]}
    for name, capacity in CACHES.items():
        cache = Cache(capacity)
        moved = [replay(step, cache, resident[step.launch.code_key], unit_rows) for step in passes]
        found["mb"][name] = [round(sum(moved[:-1]) / 1e6, 2), round(moved[-1] / 1e6, 2)]
    return found
