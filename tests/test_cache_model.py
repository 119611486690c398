"""The model of the L2 cache: its order is the kernels' own, its bytes those worked out by hand."""

from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from kernels.gpu.launch import INTERPRETED, wrap_triton
from predict import cache_model
from predict.cache_model import Cache, Tile, chain, replayed, tiles_in_order

ROWS, CHANNELS, VIEWS = 300, 130, 2  # a view: 5 tiles of 64 rows; 3 blocks, the last of 2 channels
ELEMENTS = VIEWS * ROWS * CHANNELS
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="reads addresses in Triton's interpreter")


class Launcher:
    """Stands in for wrap_triton's result: keeps the launch and where each program loaded x from.

    An element of x is its own index, so that what a program loads tells where it is from; other
    tensors hold -1.
    """

    launches: ClassVar[dict] = {}
    loaded: ClassVar[dict] = {}

    def __init__(self, kernel):
        self.kernel, self.name = kernel, kernel.fn.__name__

    def __getitem__(self, grid):
        return partial(self.launch, grid)

    def launch(self, grid, *args, **options):
        from triton.runtime.interpreter import InterpreterBuilder

        self.launches[self.name] = SimpleNamespace(
            kernel=SimpleNamespace(__name__=self.name), grid=grid, label=self.name, count=1,
            arguments=dict(zip(self.kernel.arg_names, args, strict=False)) | options,
            code_key=self.name, shape=(VIEWS * ROWS, CHANNELS), elements=ELEMENTS,
        )  # fmt: skip
        self.loaded[self.name] = seen = []
        real = InterpreterBuilder.create_masked_load

        def load(builder, *args):
            out = real(builder, *args)
            if out.data.ndim == 2 and out.data.dtype == "float32" and out.data[0, 0] >= 0:
                seen.append((builder.grid_idx[::-1], int(out.data[0, 0])))
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_masked_load", load)
            wrap_triton(self.kernel)[grid](*args, **options)


@pytest.fixture(scope="module")
def run() -> tuple[dict, dict]:
    """The launches of a block's end, and by kernel what its programs loaded, (program, index)."""
    from kernels.gpu import norm_backward, norm_forward

    with pytest.MonkeyPatch.context() as patch:
        for module in (norm_forward, norm_backward):
            patch.setattr(module, "wrap_triton", Launcher)
        patch.setattr(norm_forward, "PROGRAMS", 12)  # 2 parts for 5 tiles
        patch.setattr(norm_backward, "REDUCE_PROGRAMS", 18)  # 3 parts
        x = torch.arange(ELEMENTS, dtype=torch.float32).view(-1, CHANNELS)
        other = torch.full_like(x, -1.0)
        mean, rstd = norm_forward.statistics(x, None, None, VIEWS, 0.1, 1e-5, False)
        inputs = [x, mean, rstd]
        _, bits = norm_forward.apply(inputs, other, [], True)
        how = {"relu": True, "write_g": True, "size": []}
        g, sums, _ = norm_backward.reduce([other, other.clone()], inputs, [], bits, **how)
        g.fill_(-1.0)
        norm_backward.backward(g, inputs, [], sums, None, 1 / ROWS, False, [])
    return Launcher.launches, Launcher.loaded


@pytest.mark.parametrize("kernel", ["_statistics", "_apply", "_reduce", "_backward"])
def test_the_replayed_order_is_that_of_the_kernels_addresses(run, kernel):
    launches, loaded = run
    launch = launches[kernel]
    rows, columns = launch.arguments["BLOCK_R"], launch.arguments["BLOCK_C"]
    starts = [
        (tile.view * ROWS + tile.number * rows) * CHANNELS + tile.block * columns
        for tile in tiles_in_order(launch, resident=1)
    ]
    in_launch_order = sorted(loaded[kernel], key=lambda load: load[0])  # axis 0 runs fastest
    assert starts == [start for _, start in in_launch_order]
    assert len(set(starts)) == len(starts) == VIEWS * 5 * 3


def test_a_pass_begins_where_the_pass_before_it_ends(run):
    launches, _ = run
    for first, second in (("_statistics", "_apply"), ("_reduce", "_backward")):
        end = list(tiles_in_order(launches[first], resident=1000))[-3:]
        begin = list(tiles_in_order(launches[second], resident=1000))[:3]
        assert {tile.view for tile in end} == {tile.view for tile in begin} == {VIEWS - 1}
        assert begin == [Tile(VIEWS - 1, 4, block) for block in (0, 1, 2)]
        assert {tile.number for tile in end} == {4}


def test_programs_that_are_resident_take_their_tiles_in_step(run):
    launch = run[0]["_statistics"]
    tiles = [(t.view, t.number) for t in tiles_in_order(launch, resident=6) if t.block == 0]
    # part 1 of view 0 has two tiles: part 0 of view 1 begins beside the third of part 0
    view0 = [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]
    assert tiles == [*view0, (1, 0), (1, 2), (1, 1), (1, 4), (1, 3)]


def test_the_least_recently_used_leaves_the_cache():
    cache = Cache(200)
    assert [cache.touch((u,), 100) for u in "abac"] == [False, False, True, False]
    assert [cache.touch((u,), 100) for u in "acb"] == [True, True, False]


def test_without_a_cache_the_formula_comes_out_and_in_a_large_one_only_what_is_written(
    run, monkeypatch
):
    launches, _ = run
    monkeypatch.setattr(cache_model, "CACHES", {"none": 0, "large": 1 << 30})
    resident, elements = dict.fromkeys(launches, 6), ELEMENTS
    bits = VIEWS * ROWS * 17  # 130 channels
    found = replayed(launches["_apply"], list(launches.values()), resident)["mb"]
    formula = [4 * elements, 12 * elements + bits]  # x | x, shortcut, y, bits
    assert found["formula"] == found["none"] == [round(v / 1e6, 2) for v in formula]
    assert found["large"] == [round(v / 1e6, 2) for v in (4 * elements, 8 * elements + bits)]
    found = replayed(launches["_backward"], list(launches.values()), resident)["mb"]
    formula = [16 * elements + bits, 12 * elements]  # dy, dy2, x, bits, g | g, x, dx
    assert found["formula"] == found["none"] == [round(v / 1e6, 2) for v in formula]
    assert found["large"] == [round(v / 1e6, 2) for v in (formula[0], 4 * elements)]
    names = [set(step.tensors) for step in chain(launches["_backward"], list(launches.values()))]
    assert names == [{"dy", "dy2", "x", "bits", "g"}, {"g", "x", "dx"}]
