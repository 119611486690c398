"""What is alike among the rows of features on disk: nearest neighbours and duplicates.

Neither all features nor all similarities are in memory at once: a block of queries meets one chunk
of rows after the other. Rank 0 reads them and sends them to the other ranks, which need not see its
disk; each rank searches for its share of the queries.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from train.distributed import World
from train.evaluation.embed import gather_rows

CHUNK = 8192  # rows that the queries meet at once
QUERIES = {"cpu": 4096, "cuda": 32768}
"""Per rank; their similarities to a chunk take 128 MiB or 1 GiB. Each block of queries reads all
rows once more: 10 GB for ImageNet's."""
MOST_PAIRS = 100_000  # near duplicates listed


@torch.no_grad()
def nearest_others(
    rows: np.ndarray | None, *, shape: tuple[int, int], k: int, start: int, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """The k nearest other rows of each row from `start` on, block by block, on every rank.

    Shapes: rows (N, D), of any length, needed on rank 0 alone; `shape` is (N, D), k < N. Yields
    cosines (B, k) fp32, the largest first, and their rows (B, k) int64.
    """
    num_rows, width = shape
    block = QUERIES[world.device.type] * world.size

    def read(begin: int, end: int) -> Tensor:
        part = torch.empty(end - begin, width, device=world.device)
        if rows is not None:
            part.copy_(torch.from_numpy(np.array(rows[begin:end])))
        if world.size > 1:
            dist.broadcast(part, src=0, group=world.group)
        return F.normalize(part, dim=1)

    for begin in range(start, num_rows, block):
        end = min(begin + block, num_rows)
        mine = torch.arange(begin, end, device=world.device)[world.rank :: world.size]
        queries = read(begin, end)[world.rank :: world.size]
        best = queries.new_empty(len(queries), 0), mine.new_empty(len(queries), 0)
        for first in range(0, num_rows, CHUNK):
            chunk = read(first, min(first + CHUNK, num_rows))
            best = merge(best, queries @ chunk.T, mine, first=first, k=k)
        cosines, found, order = (gather_rows(world, part) for part in (*best, mine))
        order = order.argsort()
        yield cosines[order], found[order]


def merge(
    best: tuple[Tensor, Tensor], cosines: Tensor, mine: Tensor, *, first: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest of the best so far and of a chunk's cosines (Q, C), whose first row is `first`.

    mine (Q,): the queries' own rows, which are no neighbours of themselves.
    """
    itself = mine - first
    is_inside = (itself >= 0) & (itself < cosines.shape[1])
    cosines[is_inside.nonzero()[:, 0], itself[is_inside]] = -torch.inf
    values, found = cosines.topk(min(k, cosines.shape[1]), dim=1)
    values, found = torch.cat([best[0], values], dim=1), torch.cat([best[1], found + first], dim=1)
    values, order = values.topk(min(k, values.shape[1]), dim=1)
    return values, found.gather(1, order)


def exact_duplicates(content: np.ndarray) -> list[np.ndarray]:
    """Groups of rows whose images have the same bytes, each in order. content (N, 16) uint8."""
    keys = np.ascontiguousarray(content).view("V16")[:, 0]
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.append(True, keys[order][1:] != keys[order][:-1]))
    sizes = np.diff(starts, append=len(keys))
    several = sizes > 1
    pairs = zip(starts[several].tolist(), sizes[several].tolist(), strict=True)
    groups = [order[start : start + size] for start, size in pairs]
    return sorted(groups, key=lambda group: group[0])


def near_duplicates(
    neighbours: np.ndarray, cosines: np.ndarray, content: np.ndarray, *, above: float
) -> tuple[int, np.ndarray, np.ndarray]:
    """How many pairs are more alike than `above` and of other bytes, and the MOST_PAIRS closest.

    Shapes: neighbours, cosines (N, k), content (N, 16); returns pairs (P, 2) and their cosines
    (P,), the closest first. A pair counts if one is among the other's k nearest.
    """
    count, pairs, values = 0, np.empty((0, 2), np.int64), np.empty(0, np.float32)
    for begin in range(0, len(neighbours), CHUNK):
        alike = cosines[begin : begin + CHUNK] > above
        place, column = np.nonzero(alike)
        row = place + begin
        other = np.asarray(neighbours[begin : begin + CHUNK])[place, column]
        back = (neighbours[other] == row[:, None]) & (cosines[other] > above)
        is_new = (row < other) | ~back.any(1)  # else the other row has counted the pair
        is_new &= (content[row] != content[other]).any(1)
        count += int(is_new.sum())
        pairs = np.concatenate([pairs, np.sort(np.stack([row, other], 1)[is_new], axis=1)])
        found = np.asarray(cosines[begin : begin + CHUNK])[place, column]
        values = np.concatenate([values, found[is_new]])
        closest = np.argsort(-values, kind="stable")[:MOST_PAIRS]
        pairs, values = pairs[closest], values[closest]
    return count, pairs, values
