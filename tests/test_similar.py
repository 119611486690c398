"""Neighbours, duplicates and the map against the whole matrix; arrays that grow on disk."""

import numpy as np
import pytest
import torch

from train.distributed import World
from train.evaluation import image_map, similar
from train.evaluation.feature_files import RowFile

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)


def spread_rows(count: int, width: int = 6) -> np.ndarray:
    """Rows of different lengths."""
    return np.random.default_rng(0).normal(1, 2, (count, width)).astype(np.float32)


class Rows:
    """An array that notes how many rows are read at once."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.most = rows, 0

    def __getitem__(self, part: slice) -> np.ndarray:
        self.most = max(self.most, len(self.rows[part]))
        return self.rows[part]


@pytest.mark.parametrize(
    ("queries", "chunk", "k"),
    [(7, 5, 3), (50, 50, 3), (4, 3, 8), (16, 64, 36)],  # k above a chunk; all others
)
def test_neighbours_are_those_of_all_pairs_with_only_blocks_in_memory(
    monkeypatch, queries, chunk, k
):
    monkeypatch.setitem(similar.QUERIES, "cpu", queries)
    monkeypatch.setattr(similar, "CHUNK", chunk)
    rows = Rows(spread_rows(37))
    unit = rows.rows / np.linalg.norm(rows.rows, axis=1, keepdims=True)
    plain = unit @ unit.T
    np.fill_diagonal(plain, -np.inf)
    expected = np.argsort(-plain, axis=1)[:, :k]
    for start in (0, 11):
        options = {"shape": rows.rows.shape, "k": k, "start": start, "world": ALONE}
        parts = list(similar.nearest_others(rows, **options))
        found = torch.cat([part for _, part in parts]).numpy()
        cosines = torch.cat([part for part, _ in parts]).numpy()
        assert np.array_equal(found, expected[start:])
        values = np.take_along_axis(plain, expected, axis=1)[start:]
        np.testing.assert_allclose(cosines, values, atol=1e-6)
    assert rows.most == min(max(queries, chunk), 37)


@pytest.mark.parametrize("chunk", [4, 64])
def test_near_duplicates_are_counted_once_and_copies_are_not_among_them(monkeypatch, chunk):
    monkeypatch.setattr(similar, "CHUNK", chunk)
    rows = spread_rows(40, width=3)
    rows[30] = rows[3]  # a copy
    content = np.random.default_rng(1).integers(0, 255, (40, 16)).astype(np.uint8)
    content[30] = content[3]
    options = {"shape": rows.shape, "k": 3, "start": 0, "world": ALONE}
    ((cosines, neighbours),) = similar.nearest_others(rows, **options)
    cosines, neighbours = cosines.numpy(), neighbours.numpy()
    expected = {
        tuple(sorted((row, int(other))))
        for row in range(40) for other, value in zip(neighbours[row], cosines[row], strict=True)
        if value > 0.95
    } - {(3, 30)}  # fmt: skip
    found = similar.near_duplicates(neighbours, cosines, content, above=0.95)
    count, pairs, values = found
    assert count == len(pairs) == len(expected) > 10
    assert {tuple(pair) for pair in pairs.tolist()} == expected
    assert (np.diff(values) <= 0).all()
    monkeypatch.setattr(similar, "MOST_PAIRS", 4)
    fewer = similar.near_duplicates(neighbours, cosines, content, above=0.95)
    assert fewer[0] == count and np.array_equal(fewer[2], values[:4])


def test_groups_of_the_same_bytes_are_found():
    content = np.arange(16 * 9, dtype=np.uint8).reshape(9, 16)
    content[7] = content[2]
    content[[4, 8]] = content[1]
    groups = [group.tolist() for group in similar.exact_duplicates(content)]
    assert groups == [[1, 4, 8], [2, 7]]


def test_an_array_that_was_continued_reads_as_numpys_own(tmp_path):
    rows = spread_rows(1000)
    file = RowFile(tmp_path / "a.npy", (6,), "<f4", rows=0)
    file.append(rows[:100])
    file.append(rows[500:])
    file.close()
    file = RowFile(tmp_path / "a.npy", (6,), "<f4", rows=100)
    file.append(rows[100:])
    file.finish()
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), rows)
    assert (tmp_path / "a.npy").stat().st_size == 128 + rows.nbytes
    (tmp_path / "a.npy").rename(tmp_path / "b.npy.part")
    with pytest.raises(ValueError, match=r"b.npy.part was cut: remove"):
        RowFile(tmp_path / "b.npy", (6,), "<f4", rows=1001)


def test_on_the_map_each_picture_has_a_cell_near_its_place():
    grid = np.stack(np.meshgrid(np.arange(5), np.arange(5)), axis=-1).reshape(-1, 2)
    cells, side = image_map.place_on_grid(3.0 + 7 * grid)
    assert side == 8 and len({tuple(cell) for cell in cells.tolist()}) == 25
    assert np.abs(cells - grid * 7 / 4).max() < 1
    same_place, _ = image_map.place_on_grid(np.ones((30, 2)))
    assert len({tuple(cell) for cell in same_place.tolist()}) == 30


def test_pca_gives_the_two_directions_of_most_variance_whatever_the_length():
    from sklearn.decomposition import PCA

    rows = spread_rows(50)
    found = image_map.lay_out(rows * np.linspace(0.5, 2, 50, dtype=np.float32)[:, None], "pca")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = PCA(2).fit_transform(unit)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-5)


def test_umap_lays_groups_apart():
    pytest.importorskip("umap", reason="umap-learn is not installed")
    rows = spread_rows(60)
    rows[30:] *= -1
    positions = image_map.lay_out(rows, "umap")
    between = np.linalg.norm(positions[:30].mean(0) - positions[30:].mean(0))
    assert between > positions[:30].std(0).max()
