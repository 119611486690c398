"""Backbone features of clean images, and the kNN accuracy of the encoder as it stands.

A newcomer's mistake: features in training mode. Batch norm would take its statistics from the
images looked at, and update them.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.normalize import normalize_views
from pipeline.loader import eval_loader
from train.config import Config
from train.distributed import World, gather
from train.evaluation.knn import knn_top1
from train.network.model import DTYPES, autocast
from train.network.resnet import ResNet
from train.run.data import EvalSet, RunData

TELL_S = 15  # seconds between two lines about a long evaluation


@torch.no_grad()
def features_of(backbone: nn.Module, images: Tensor, config: Config) -> Tensor:
    """What a backbone in evaluation mode gives: (N, S, S, 3) uint8 -> (N, D) fp32."""
    x = normalize_views(
        images,
        config.data.mean,
        config.data.std,
        DTYPES[config.precision],
        kernels=config.model.kernels,
    )
    with autocast(config.precision, images.device):
        return backbone(x).float()


class EvaluationStopped(Exception):
    """A signal came while features were made; on every rank in the same round."""


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
    """This rank's share of the set: features, their labels and ids.

    Shapes: (M, D) fp32, (M,), (M,) int64, on the training device. Unreadable images are left out.
    `normalized` features have length 1, as kNN takes them; else they are the backbone's own.
    `tell` hears how far it is, now and then. `stop` is asked after each batch, by all ranks equally
    often. Raises: EvaluationStopped when it says so.
    """
    share = slice(world.rank, None, world.size)
    labels = torch.from_numpy(images.labels_by_id())
    loader = eval_loader(
        images.reader,
        images.ids[share],
        resize=config.eval.resize,
        size=config.eval.size,
        batch_size=config.eval.batch_size,
        options=config.dali,
        device=world.device,
        local_world=world.local_size,
    )
    was_training = backbone.training
    backbone.eval()
    features, ids = [], []
    told = time.monotonic()
    rounds = math.ceil(math.ceil(len(images.ids) / world.size) / config.eval.batch_size)
    for batch in loader:
        out = features_of(backbone, batch.images, config)
        features.append(F.normalize(out, dim=1) if normalized else out)
        ids.append(batch.ids)
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            tell(f"features of {len(ids)} of {len(loader)} batches")
        if stop():
            backbone.train(was_training)
            raise EvaluationStopped
    backbone.train(was_training)
    asked = [stop() for _ in range(rounds - len(ids))]  # by a rank with a batch less than others
    if any(asked):
        raise EvaluationStopped
    if not ids:  # a rank without a share: fewer images than ranks
        none = torch.empty(0, dtype=torch.int64, device=world.device)
        return torch.empty(0, backbone.num_features, device=world.device), none, none
    found = torch.cat(ids)
    good = found >= 0
    chosen = torch.cat(features)
    features.clear()  # of ImageNet 10 GB: not once more beside what follows
    if not good.all():
        chosen = chosen[good.to(world.device)]
    return chosen, labels[found[good]].to(world.device), found[good].to(world.device)


def knn_accuracy(
    backbone: ResNet,
    data: RunData,
    config: Config,
    world: World,
    *,
    tell: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """kNN top-1 in percent, or None where there are no labels or no features, which `tell` hears.

    Raises: EvaluationStopped.
    """
    if data.bank is None or data.queries is None:
        return None
    bank, bank_labels, _ = embed(backbone, data.bank, config, world, tell=tell, stop=stop)
    queries, query_labels, _ = embed(backbone, data.queries, config, world, tell=tell, stop=stop)
    finite = bool(bank.sum().isfinite())  # as bank.isfinite().all(), without two copies of it
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
