"""How good an encoder is, judged without labels; kNN is measured beside where there are labels.

The score is retrieval: how near an image's other view is among the views of all images, by the
backbone's whitened features, the views drawn for all encoders as a common reference says. An
encoder that begins to collapse still finds other views, so the score is lower where z has a rank
below 6. Chosen by the rank correlation with kNN on two data sets (profiling/LOG.md, 2026-11-29).
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.normalize import finish_views
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

SHRINKAGE = 0.3  # of the mean variance, added to all before features are whitened
FULL_RANK = 6.0  # of z: from it on the score is the retrieval
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
    places = {int(index): place for place, index in enumerate(of_row) if int(index) in rows}
    views = views[:, list(places.values())]  # once each: others stand in for bad images
    clean = clean[[rows[index] for index in places]]
    projector = model.get_submodule("projector")
    z, z_views = projector(clean), torch.stack([projector(drawn) for drawn in views])
    model.train(was_training)
    if len(clean) < 2 or not all(x.isfinite().all() for x in (clean, views, z, z_views)):
        return {"score": 0.0, "collapsed": True, "knn": None}
    rank_z, retrieved = rankme(z), retrieval(*views)
    return {
        "score": scored(retrieved, rank_z),
        "retrieval": retrieved,
        "retrieval_z": retrieval(z, z_views[0]),
        "collapsed": is_partially_collapsed(rank_z, min(z.shape)),
        "rank_features": rankme(clean),
        "rank_z": rank_z,
        "decay": decay(clean),
        "spectrum": spectrum(clean),
        "alignment": alignment(z, z_views[0]),
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
    """The backbone's features of two random views of each image, (2, N, D), and the ids, (N,)."""
    num_batches = math.ceil(len(ids) / config.eval.batch_size)
    order = PartOrder(ids, batch_size=len(ids) // num_batches, seed=0)
    options: dict = {"options": config.dali, "device": world.device, "views": [reference] * 2}
    parts, seen = [], []
    for batch in view_loader(data.train, order, range(order.steps_per_epoch), **options):
        views = finish_views(batch.images, batch.draws, kernels=config.model.kernels)
        parts.append(torch.stack([features_of(model.backbone, x, config) for x in views]))
        seen.append(batch.ids)
    return torch.cat(parts, dim=1), torch.cat(seen)


def scored(retrieved: float, rank_z: float) -> float:
    """The score: `retrieved`, times log rank_z / log FULL_RANK below that rank."""
    return retrieved * min(1.0, max(0.0, math.log(rank_z)) / math.log(FULL_RANK))


def retrieval(first: Tensor, second: Tensor) -> float:
    """100 (1 - mean(log r) / log N), r the place of an image's other view among those of all.

    Shapes: two views' features, (N, D) each, by image; places are by cosine, 1 is the nearest. 100:
    all are the nearest; about 100 / log N by chance. Features are whitened first, or a few
    directions of large variance decide; SHRINKAGE keeps those of hardly any from counting as much.
    """
    together = torch.cat([first, second]).double()
    centred = together - together.mean(0)
    covariance = centred.T @ centred / len(centred)
    values, vectors = torch.linalg.eigh(covariance)
    scale = (values.clamp_min(0) + SHRINKAGE * values.mean()).clamp_min(1e-12).rsqrt()
    a, b = F.normalize(centred @ (vectors * scale), dim=1).chunk(2)
    similarity = a @ b.T
    own = similarity.diag()[:, None]
    ties = (similarity == own).sum(1) - 1  # of a collapsed encoder: all
    place = 1 + (similarity > own).sum(1).double() + ties / 2
    return 100 * (1 - place.log().mean().item() / math.log(len(place)))


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
