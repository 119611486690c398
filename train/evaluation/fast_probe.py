"""The fast probe: linear classifiers on cached features, one for each learning rate of a sweep.

Features of the training images' centre crops are computed once and standardised by their mean and
standard deviation (SimSiam's features are of tiny scale: plain SGD crawls on them). All learning
rates train at once, from zero, with SGD of momentum 0.9, a cosine schedule and no weight decay, on
nine tenths of the training images. The rest, at most 5,000, picks the learning rate; the test
images are seen once, by the classifier that was picked.
The paper's figures are those of train/evaluation/linear_probe.py, which trains on augmented images.
With few labels the same classifiers are trained on the same share of each class.
"""

import statistics
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from train.evaluation.config import FastProbeConfig
from train.evaluation.encoded import Encoded, accuracy
from train.run.data import split_bank
from train.run.optim import lr_at

MOMENTUM = 0.9
ROWS = 8192  # per product in evaluation


class Heads(NamedTuple):
    """L classifiers, and the statistics by which their inputs are standardised.

    Shapes: mean (D,), std (D,), weight (D, L, C), bias (L, C).
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Logits of all classifiers in one product: (N, D) -> (N, L, C)."""
        x = (x - self.mean) / self.std
        return (x @ self.weight.flatten(1)).view(len(x), *self.bias.shape) + self.bias


def fast_probe(
    train: Encoded,
    test: Encoded,
    *,
    config: FastProbeConfig,
    num_classes: int,
    top: int,
    seed: int,
    labelled: Tensor | None = None,
) -> tuple[dict, Tensor]:
    """The learning rate picked, the accuracy of all, and the guesses (M, top) for M test images.

    labelled: rows of the training images to train on; None: all that are not held out.
    Raises: FloatingPointError where every learning rate diverges.
    """
    features, labels, rates = train.features, train.labels, ",".join(map(str, config.lrs))
    fit, held = (torch.from_numpy(rows).to(features.device) for rows in split(train, seed))
    if labelled is not None:
        fit = labelled.to(features.device)
    heads = train_heads(train, fit, config=config, num_classes=num_classes, seed=seed)
    correct = torch.zeros(len(config.lrs), device=features.device)
    for rows in held.split(ROWS):
        correct += (heads.logits(features[rows]).argmax(2) == labels[rows, None]).sum(0)
    top1 = 100 * correct / len(held)
    is_finite = heads.weight.isfinite().all(0).all(1) & heads.bias.isfinite().all(1)
    if not is_finite.any():
        raise FloatingPointError(
            f"the fast probe diverged at all of --fast.lrs {rates}: lower them"
        )
    best = int(top1.where(is_finite, -1).argmax())
    picked = heads._replace(weight=heads.weight[:, best, None], bias=heads.bias[best, None])
    guesses = [picked.logits(x)[:, 0].topk(top).indices for x in test.features.split(ROWS)]
    by_lr = dict(zip(map(str, config.lrs), top1.tolist(), strict=True))
    result = {"lr": config.lrs[best], "held_out_images": len(held), "held_out_top1_by_lr": by_lr}
    return result, torch.cat(guesses)


def split(train: Encoded, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The training images' rows to train on, and those that pick the learning rate."""
    return split_bank(train.labels.cpu().numpy(), seed=seed)


def draw_labelled(train: Encoded, share: float, *, seed: int, draw: int) -> np.ndarray:
    """Sorted rows of the images whose labels are used: a share of each class, at least one.

    The share is of all training images; what is held out is not drawn. 1: all others.
    """
    labels = train.labels.cpu().numpy()
    fit, _ = split(train, seed)
    wanted = np.maximum(1, np.round(share * np.bincount(labels)).astype(np.int64))
    order = np.random.default_rng((seed, draw)).permutation(fit)
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, each shuffled
    counts = np.bincount(labels[order], minlength=len(wanted))
    place = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
    return np.sort(order[place < wanted[labels[order]]])


def few_labels(
    train: Encoded, test: Encoded, *, config: FastProbeConfig, num_classes: int, top: int, seed: int
) -> list[dict]:
    """Accuracy with each share of the labels: mean, standard deviation and values over draws."""
    results = []
    options: dict = {"config": config, "num_classes": num_classes, "top": top, "seed": seed}
    for share in config.label_fractions:
        found, drawn = [], np.empty(0, np.int64)
        for draw in range(config.label_draws):
            drawn = draw_labelled(train, share, seed=seed, draw=draw)
            _, guesses = fast_probe(train, test, **options, labelled=torch.from_numpy(drawn))
            found.append(accuracy(guesses, test.labels))
        counts = np.bincount(train.labels.cpu().numpy()[drawn])
        row = {"fraction": share, "labels": len(drawn), "draws": len(found)}
        row["labels_per_class"] = [int(counts[counts > 0].min()), int(counts.max())]
        results.append(row | {key: spread([a[key] for a in found]) for key in ("top1", "top5")})
    return results


def spread(values: list) -> dict | None:
    """Mean, sample standard deviation (None of one value) and values; None without values."""
    if values[0] is None:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def train_heads(
    train: Encoded, rows: Tensor, *, config: FastProbeConfig, num_classes: int, seed: int
) -> Heads:
    """A classifier for each learning rate, trained together on these rows of the features."""
    features, labels, device = train.features, train.labels, train.features.device
    std, mean = torch.std_mean(features, dim=0, correction=0)
    # a nearly constant feature is not scaled up to the size of the others
    std = std.clamp_min(max(1e-3 * std.mean().item(), torch.finfo(std.dtype).tiny))
    num_heads, rates = len(config.lrs), torch.tensor(config.lrs, device=device)
    weight = torch.zeros(features.shape[1], num_heads, num_classes, device=device)
    bias = torch.zeros(num_heads, num_classes, device=device)
    heads = Heads(mean, std, weight.requires_grad_(), bias.requires_grad_())
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = lr_at(epoch, base=1.0, total=config.epochs)
        order = rows[torch.randperm(len(rows), generator=generator).to(device)]
        for batch in order.split(config.batch_size):
            target = labels[batch, None].expand(-1, num_heads)
            logits = heads.logits(features[batch]).flatten(0, 1)
            losses = F.cross_entropy(logits, target.flatten(), reduction="none")
            # momentum SGD is linear in the gradient and heads share no parameter: a head's
            # learning rate is the factor of its loss
            (losses.view_as(target).mean(0) @ rates).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Heads(mean, std, weight.detach(), bias.detach())
