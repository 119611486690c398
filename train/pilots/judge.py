"""How good an encoder is, judged without labels; kNN is measured beside where there are labels.

The score is retrieval: the share of clean images whose own random view, drawn as a common reference
says, is the nearest of all images' views by the backbone's features. A trained encoder
that has collapsed, fully or partially, scores below the untrained one.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.augment import AugmentConfig
from pipeline.loader import view_loader
from pipeline.order import PartOrder
from train.config import Config
from train.distributed import World
from train.evaluation.embed import embed, features_of, knn_accuracy
from train.evaluation.health import decay, is_partially_collapsed, rankme, spectrum
from train.methods import Method
from train.methods.method import collapse_meter
from train.pilots.look import evenly
from train.run.data import EvalSet, RunData

VIEW_SEED = 12  # of the views that all trials are judged on
BANK, QUERIES = 4096, 1024  # images at most of the kNN that stands beside the score


def sampled(data: RunData) -> RunData:
    """The data with a part of the labelled images: kNN takes no longer for a million images."""
    if data.bank is None or data.queries is None:
        return data
    return replace(data, bank=part(data.bank, BANK), queries=part(data.queries, QUERIES))


def part(images: EvalSet, most: int) -> EvalSet:
    """At most `most` images, evenly over the set, so over its classes."""
    rows = evenly(len(images.ids), most)
    return replace(images, ids=images.ids[rows], labels=images.labels[rows])


@torch.no_grad()
def judge(
    model: Method,
    data: RunData,
    ids: np.ndarray,
    reference: AugmentConfig,
    config: Config,
    world: World,
) -> dict:
    """The score and what stands beside it, on the images `ids` of the training set.

    Not finite features give a score of 0 and None for the rest.
    """
    images = EvalSet(data.train, ids, np.zeros(len(ids), dtype=np.int64))
    clean, _, seen = embed(model.backbone, images, config, world, normalized=False)
    was_training = model.training
    model.eval()
    rows = {int(index): row for row, index in enumerate(seen.tolist())}
    views, of_row = views_of(model, data, ids, reference, config, world)
    known = torch.tensor([int(index) in rows for index in of_row])
    views = views[known.to(views.device)]
    clean = clean[[rows[index] for index in of_row[known].tolist()]]
    z, z_views = (model.get_submodule("projector")(x) for x in (clean, views))
    model.train(was_training)
    if len(clean) < 2 or not all(x.isfinite().all() for x in (clean, views, z, z_views)):
        return {"score": 0.0, "collapsed": True, "knn": None}
    rank_z = rankme(z)
    return {
        "score": retrieval(clean, views),
        "collapsed": is_partially_collapsed(rank_z, min(z.shape)),
        "rank_features": rankme(clean),
        "rank_z": rank_z,
        "decay": decay(clean),
        "spectrum": spectrum(clean),
        "alignment": alignment(z, z_views),
        "uniformity": finite(uniformity(z)),
        "collapse_meter": collapse_meter(z[None]).item(),
        "knn": knn_accuracy(model.backbone, data, config, world),
    }


def views_of(
    model: Method,
    data: RunData,
    ids: np.ndarray,
    reference: AugmentConfig,
    config: Config,
    world: World,
) -> tuple[Tensor, Tensor]:
    """The backbone's features of one random view of each image, and the images' ids."""
    order = PartOrder(ids, batch_size=min(config.eval.batch_size, len(ids)), seed=VIEW_SEED)
    options: dict = {"options": config.dali, "device": world.device, "views": [reference]}
    parts, seen = [], []
    for batch in view_loader(data.train, order, range(order.steps_per_epoch), **options):
        parts.append(features_of(model.backbone, batch.images, config))
        seen.append(batch.ids)
    return torch.cat(parts), torch.cat(seen)


def retrieval(first: Tensor, second: Tensor) -> float:
    """Share of images in percent whose other view is the nearest by cosine among all images'.

    Shapes: two views' features, (N, D) each, by image. Centred: what all images share says nothing.
    """
    mean = torch.cat([first, second]).mean(0)
    a, b = (F.normalize((x - mean).double(), dim=1) for x in (first, second))
    hits = (a @ b.T).argmax(1) == torch.arange(len(a), device=a.device)
    return 100 * hits.double().mean().item()


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of the two views of an image on the unit sphere, 0 to 4.

    Shapes: (N, D) each. Source: Wang & Isola, ICML 2020, section 4.1.1.
    """
    a, b = (F.normalize(x.double(), dim=1) for x in (first, second))
    return (a - b).square().sum(1).mean().item()


def uniformity(outputs: Tensor) -> float:
    """log of the mean of exp(-2 |a - b|^2) over pairs of rows on the unit sphere; 0 for a collapse.

    Shapes: (N, D). Source: Wang & Isola, ICML 2020, section 4.1.2, t = 2.
    """
    a = F.normalize(outputs.double(), dim=1)
    squared = (2 - 2 * (a @ a.T)).clamp_min(0)
    off_diagonal = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    return (-2 * squared[off_diagonal]).exp().mean().log().item()


def finite(value: float) -> float | None:
    """None for minus infinity, of features that are too far apart for exp."""
    return value if math.isfinite(value) else None
