"""A checkpoint's encoder, its features of training and test images, and how guesses are scored.

With several ranks each computes its share of the features, and all of them receive the whole: what
follows is the same on every rank.
"""

import dataclasses
import hashlib
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from train import distributed
from train.config import Config
from train.distributed import World
from train.evaluation.config import EvaluateConfig, FeaturesConfig, run_config
from train.evaluation.embed import embed, gather_rows
from train.evaluation.health import rankme
from train.methods.method import collapse_meter
from train.network.resnet import ResNet
from train.run.checkpoint import Checkpoint
from train.run.data import EvalSet, RunData, split_bank
from train.run.folder import Log, newest_checkpoint
from train.run.program import tell_ranks
from train.run.report import COLLAPSED
from train.run.state import build_method, check_fits

TOP = 5
NOT_FINITE = (
    "the encoder's features are not finite: its training diverged. Give the folder of another run"
)
MANY_IMAGES = 2**40  # more than any queue of a method holds
PARTS = ("backbone", "projector")  # the encoder; what else a checkpoint holds is for training
RANKME_IMAGES = 25600  # as in the paper; more change nothing (its appendix G)


@contextmanager
def open_run(
    run: Path, options: EvaluateConfig | FeaturesConfig
) -> Iterator[tuple[Checkpoint, Config, World]]:
    """The newest checkpoint of a run, its configuration with the options, and the joined ranks.

    Raises: ValueError, on all ranks, where one finds no checkpoint, or another than rank 0.
    """
    try:
        saved = newest_checkpoint(run, log=partial(print, "warning:", file=sys.stderr))
        config = run_config(run, options)
    except (ValueError, OSError) as error:
        tell_ranks(str(error))
        raise
    with distributed.start(config.device, config, options=options) as world:
        steps = distributed.gather(world, (saved.step, socket.gethostname()))
        for step, host in steps:
            if step != steps[0][0]:
                raise ValueError(
                    f"the newest checkpoint of {run} is of step {step} on host {host} and of step "
                    f"{steps[0][0]} on host {steps[0][1]}: give all hosts the same run folder"
                )
        yield saved, config, world


class Encoded(NamedTuple):
    """A set through the backbone, in the order of the ids.

    Shapes: features (N, D) fp32, labels (N,) int64 (-1 for none), ids (N,) int64.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor


def load_encoder(
    saved: Checkpoint, config: Config, *, device: torch.device
) -> tuple[ResNet, nn.Module | None]:
    """Backbone and projector in evaluation mode; an imported checkpoint may have no projector.

    Raises: ValueError if the weights are of another network than the configuration's.
    """
    # the targets that a run may keep, one per image, are not part of its encoder
    method = dataclasses.replace(config.method, target_steps=1, moving_average=0.0)
    config = dataclasses.replace(config, method=method)
    model = build_method(config, images=MANY_IMAGES, device=device)
    weights = {
        name: tensor
        for name, tensor in saved.tensors["model"].items()
        if name.split(".")[0] in PARTS
    }
    try:
        check_fits(model.state_dict(), weights)
    except ValueError as error:
        raise ValueError(
            f"{saved.path} holds another network than the run's config.yaml names: {error}. "
            "Give the run that the checkpoint is of, or restore its config.yaml"
        ) from error
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert not any(name.startswith("backbone.") for name in missing)
    model = model.to(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload] - missing in torch's stub
    model.eval()
    has_projector = any(name.startswith("projector.") for name in weights)
    return model.backbone, model.get_submodule("projector") if has_projector else None


def fingerprint(backbone: ResNet) -> str:
    """SHA-256 of all weights and statistics."""
    digest = hashlib.sha256()
    for tensor in backbone.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_sets(data: RunData, options: EvaluateConfig, *, seed: int) -> tuple[EvalSet, EvalSet]:
    """Training and test images. Raises: ValueError for missing labels and for a k too large."""
    source = data.train.source
    if data.bank is not None and data.queries is not None:
        train, test = data.bank, data.queries
    elif options.needs_labels:
        raise ValueError(
            f"{source.root} has no class folders, and kNN and probes need labels: give "
            "--data.root a folder with class folders, or --k [] --probe none for the rest"
        )
    else:
        none = np.full(len(source), -1)
        train, test = (EvalSet(data.train, ids, none[ids]) for ids in split_bank(none, seed=seed))
    if not len(train.ids):
        raise ValueError(f"{source.root} has one image, which is held out: give --data.root more")
    check_k(options.k, len(train.ids))
    return train, test


def check_k(ks: tuple[int, ...], images: int) -> None:
    """Raise ValueError if a number of neighbours exceeds the training images."""
    if too_large := [k for k in ks if k > images]:
        fitting = [k for k in ks if k <= images] or [images]
        raise ValueError(
            f"--k {too_large[0]} exceeds the {images} training images: leave it out, as in "
            f"--k {','.join(map(str, fitting))}"
        )


def encode(backbone: ResNet, images: EvalSet, config: Config, world: World, log: Log) -> Encoded:
    """The whole set, on every rank. Raises: ValueError if nothing can be read, or for NaN."""
    parts = embed(backbone, images, config, world, normalized=False, tell=log)
    features, labels, ids = (gather_rows(world, part) for part in parts)
    reader = images.reader
    bad = [item for part in distributed.gather(world, reader.bad) for item in part.items()]
    if bad:
        index, reason = bad[0]
        log.warn(
            f"{len(bad)} unreadable images of {reader.source.root} are left out, such as "
            f"{reader.source.name(index)}: {reason}"
        )
    if not len(ids):
        raise ValueError(f"no image under {reader.source.root} can be read: give another folder")
    if not features.isfinite().all():
        raise ValueError(NOT_FINITE)
    if world.size > 1:  # each rank took every size-th image
        order = ids.argsort()
        features, labels, ids = features[order], labels[order], ids[order]
    return Encoded(features, labels, ids)


def accuracy(guesses: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Top-1 and top-5 in percent; top-5 is None with fewer than five guesses.

    Shapes: guesses (N, G), best first; labels (N,).
    """
    hits = (guesses == labels[:, None]).float().mean(0).cumsum(0) * 100
    return {"top1": hits[0].item(), "top5": hits[TOP - 1].item() if len(hits) >= TOP else None}


def confusion(guesses: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (C, C) of the first guesses: true class by row, guess by column."""
    cells = labels * classes + guesses[:, 0]
    return cells.bincount(minlength=classes**2).view(classes, classes)


@torch.no_grad()
def measure_spread(projector: nn.Module | None, features: Tensor) -> dict[str, float | None]:
    """RankMe of projector and backbone, and the collapse meter with its verdict; without labels.

    Without a projector (an imported backbone) there is the backbone's RankMe; the rest is None.

    Shapes: features (N, D) fp32, of the backbone; the projector is in evaluation mode. Statistics
    of these images in its last batch norm would hide a collapse, since they scale any remainder to
    1: on the digits without stop-gradient the meter read 0.98 with them and 0.023 with running
    statistics, where a healthy run has 0.98 either way.
    """
    features = features[:: -(-len(features) // RANKME_IMAGES)]
    spread: dict = dict.fromkeys(("rankme", "collapse_meter", "collapsed"))
    if projector is not None:
        z = projector(features)
        meter = collapse_meter(z[None]).item()
        spread = {"rankme": rankme(z), "collapse_meter": meter, "collapsed": meter < COLLAPSED}
    return spread | {"rankme_features": rankme(features)}
