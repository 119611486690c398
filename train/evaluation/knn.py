"""The kNN check: how well do neighbours in feature space share a class?

Weighted vote of the k nearest training images by cosine similarity, weight exp(s / T), on the
backbone's pooled features of centre crops. Each rank embeds and keeps its share of the bank.
A newcomer's mistake: taking projector outputs, or augmented images for the bank.

Source: Wu et al., CVPR 2018 (InstDisc), as monitored in SimSiam section 4.1.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed import World

SIMILARITIES = 1 << 27  # held at once: 512 MiB of fp32


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest similarities and their rows in the bank, chunked over the queries.

    Shapes: queries (Q, D), bank (M, D), both of length 1; returns (Q, min(k, M)) twice.
    """
    k = min(k, len(bank))
    chunks = queries.split(max(1, SIMILARITIES // max(1, len(bank))))
    parts = [torch.topk(chunk @ bank.T, k, dim=1) for chunk in chunks]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def class_scores(
    similarity: Tensor, labels: Tensor, *, num_classes: int, temperature: float
) -> Tensor:
    """Each class's sum of exp(similarity / temperature). (Q, k) twice -> (Q, num_classes)."""
    scores = similarity.new_zeros(len(similarity), num_classes)
    return scores.scatter_add_(1, labels, (similarity / temperature).exp())


def vote(similarity: Tensor, labels: Tensor, *, num_classes: int, temperature: float) -> Tensor:
    """The class with the largest score. (Q, k) twice -> (Q,)."""
    scores = class_scores(similarity, labels, num_classes=num_classes, temperature=temperature)
    return scores.argmax(1)


def ranked(
    similarity: Tensor, labels: Tensor, *, num_classes: int, temperature: float, top: int
) -> Tensor:
    """The `top` classes with the largest scores, best first; -1 where fewer have a neighbour.

    Shapes: (Q, k) twice -> (Q, top). A class that no neighbour has is no guess: 10 neighbours of
    two classes would else name three more, and hit by chance.
    """
    rows = max(1, SIMILARITIES // num_classes)
    parts = []
    for chunk, names in zip(similarity.split(rows), labels.split(rows), strict=True):
        scores = class_scores(chunk, names, num_classes=num_classes, temperature=temperature)
        best = scores.topk(top, dim=1)
        parts.append(best.indices.where(best.values > 0, -1))
    return torch.cat(parts)


def knn_top1(
    queries: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
    world: World,
) -> float:
    """Top-1 accuracy in percent; every rank gives its share of queries and bank.

    Shapes: queries (Q, D), bank (M, D), fp32 of length 1; labels (Q,), (M,) int64.
    """
    queries = gather_rows(world, queries)
    query_labels = gather_rows(world, query_labels)
    similarity, index = nearest(queries, bank, k)
    similarity, labels = pad_columns(similarity, k, -1e4), pad_columns(bank_labels[index], k, 0)
    if world.size > 1:
        # each rank has its own k nearest: the k nearest of all are among them
        similarity, labels = (
            torch.cat(list(all_gather(world, part.contiguous())), dim=1)
            for part in (similarity, labels)
        )
        similarity, best = torch.topk(similarity, k, dim=1)
        labels = labels.gather(1, best)
    predicted = vote(similarity, labels, num_classes=num_classes, temperature=temperature)
    return 100 * (predicted == query_labels).float().mean().item()


def pad_columns(x: Tensor, columns: int, value: float) -> Tensor:
    """Fill up to `columns` on the right; a similarity of -1e4 has the weight 0."""
    return torch.nn.functional.pad(x, (0, columns - x.shape[1]), value=value)


def all_gather(world: World, x: Tensor) -> list[Tensor]:
    """The tensors of all ranks, which must have one shape."""
    parts = [torch.empty_like(x) for _ in range(world.size)]
    dist.all_gather(parts, x, group=world.group)
    return parts


def gather_rows(world: World, x: Tensor) -> Tensor:
    """Rows of all ranks, concatenated; the number of rows may differ."""
    if world.size == 1:
        return x
    counts = torch.zeros(world.size, dtype=torch.int64, device=x.device)
    counts[world.rank] = len(x)
    dist.all_reduce(counts, group=world.group)
    rows = int(counts.max())
    padded = torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
    parts = all_gather(world, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
