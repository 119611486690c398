"""Backbone features of clean images, and the kNN accuracy of the encoder as it stands.

Features are pooled backbone outputs of centre crops, in evaluation mode: in training mode batch
norm would take its statistics from these images, and update them. The k nearest training images by
cosine similarity s vote with weight exp(s / T). Each rank embeds and keeps its share of the bank.

Source: Wu et al., CVPR 2018 (InstDisc), as monitored in SimSiam section 4.1.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.normalize import normalize_views
from pipeline.loader import eval_loader
from train.config import Config
from train.distributed import World, gather
from train.network.model import DTYPES, autocast
from train.network.resnet import ResNet
from train.run.data import EvalSet, RunData

PROGRESS_S = 15  # seconds between two lines about a long evaluation
SIMILARITIES = 1 << 27  # in memory at once: 512 MiB of fp32


@torch.no_grad()
def features_of(backbone: nn.Module, images: Tensor, config: Config) -> Tensor:
    """Outputs of a backbone in evaluation mode: (N, S, S, 3) uint8 -> (N, D) fp32."""
    dtype, data = DTYPES[config.precision], config.data
    x = normalize_views(images, data.mean, data.std, dtype, kernels=config.model.kernels)
    with autocast(config.precision, images.device):
        return backbone(x).float()


class EvaluationStopped(Exception):
    """A signal came while features were computed; raised on every rank in the same round."""


@torch.no_grad()
def embed(
    backbone: ResNet,
    images: EvalSet,
    config: Config,
    world: World,
    *,
    normalized: bool = True,
    tell: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of this rank's share of the set, their labels and ids.

    Shapes: (M, D) fp32, (M,), (M,) int64, on the training device, without unreadable images.
    normalized: of length 1, as kNN takes them. tell: receives lines of progress. stop: called after
    each batch, equally often on all ranks. Raises: EvaluationStopped when it returns true.
    """
    labels, look = torch.from_numpy(images.labels_by_id()), config.eval
    loader = eval_loader(
        images.reader,
        images.ids[world.rank :: world.size],
        resize=look.resize,
        size=look.size,
        batch_size=look.batch_size,
        options=config.dali,
        device=world.device,
        local_world=world.local_size,
    )
    parts, ids = [], []
    last_line = time.monotonic()
    was_training = backbone.training
    backbone.eval()
    try:
        for batch in loader:
            out = features_of(backbone, batch.images, config)
            parts.append(F.normalize(out, dim=1) if normalized else out)
            ids.append(batch.ids)
            if time.monotonic() - last_line > PROGRESS_S:
                last_line = time.monotonic()
                tell(f"features of {len(ids)} of {len(loader)} batches")
            if stop():
                raise EvaluationStopped
    finally:
        backbone.train(was_training)
    rounds = math.ceil(math.ceil(len(images.ids) / world.size) / look.batch_size)
    # a rank may have a batch less than others; a list, so that each call is made
    if any([stop() for _ in range(rounds - len(ids))]):
        raise EvaluationStopped
    if not ids:  # fewer images than ranks
        none = torch.empty(0, dtype=torch.int64, device=world.device)
        return torch.empty(0, backbone.num_features, device=world.device), none, none
    read = torch.cat(ids)
    good = read >= 0
    return (
        join_rows(parts, good),
        labels[read[good]].to(world.device),
        read[good].to(world.device),
    )


def join_rows(parts: list[Tensor], good: Tensor) -> Tensor:
    """The good rows of all parts, which are freed: ImageNet's have 10 GB."""
    rows = torch.cat(parts)
    parts.clear()
    return rows if good.all() else rows[good.to(rows.device)]


def knn_accuracy(
    backbone: ResNet,
    data: RunData,
    config: Config,
    world: World,
    *,
    tell: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """kNN top-1 in percent, or None without labels or usable features; `tell` receives the reason.

    Raises: EvaluationStopped.
    """
    if data.bank is None or data.queries is None:
        return None
    bank, bank_labels, _ = embed(backbone, data.bank, config, world, tell=tell, stop=stop)
    queries, query_labels, _ = embed(backbone, data.queries, config, world, tell=tell, stop=stop)
    finite = bool(bank.sum().isfinite())  # bank.isfinite().all() would copy it twice
    counts = gather(world, (len(bank), len(queries), finite))
    num_bank, num_queries, all_finite = (list(column) for column in zip(*counts, strict=True))
    if not (sum(num_bank) and sum(num_queries)):
        empty = data.queries if sum(num_bank) else data.bank
        tell(f"warning: no kNN: no image of {empty.reader.source.root} can be read")
        return None
    if not all(all_finite):
        tell("warning: no kNN: features are not finite, training diverges. Lower --optim.lr")
        return None
    return knn_top1(
        queries,
        query_labels,
        bank,
        bank_labels,
        k=min(config.eval.k, sum(num_bank)),
        temperature=config.eval.temperature,
        num_classes=len(data.class_names),
        world=world,
    )


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
    """The `top` classes with the largest scores, best first; -1 if fewer have a neighbour.

    Shapes: (Q, k) twice -> (Q, top). A class without a neighbour is no guess: 10 neighbours of two
    classes would otherwise name three more, and hit by chance.
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
    queries, query_labels = gather_rows(world, queries), gather_rows(world, query_labels)
    similarity, index = nearest(queries, bank, k)
    missing = (0, k - similarity.shape[1])  # of a small bank; a similarity of -1e4 has weight 0
    similarity, labels = F.pad(similarity, missing, value=-1e4), F.pad(bank_labels[index], missing)
    if world.size > 1:  # the k nearest overall are among the k nearest of each rank
        similarity, labels = (
            torch.cat(all_gather(world, part.contiguous()), dim=1) for part in (similarity, labels)
        )
        similarity, best = torch.topk(similarity, k, dim=1)
        labels = labels.gather(1, best)
    predicted = vote(similarity, labels, num_classes=num_classes, temperature=temperature)
    return 100 * (predicted == query_labels).float().mean().item()


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
    padded = torch.cat([x, x.new_zeros(int(counts.max()) - len(x), *x.shape[1:])])
    parts = all_gather(world, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
