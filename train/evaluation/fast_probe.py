"""The fast probe: linear classifiers on cached features, one for each learning rate of a sweep.

Features of the training images' centre crops are computed once and standardised by their mean and
standard deviation (SimSiam's features are of tiny scale: plain SGD crawls on them). All learning
rates train at once, from zero, with SGD of momentum 0.9, a cosine schedule and no weight decay, on
nine tenths of the training images. The rest, at most 5,000, picks the learning rate; the test
images are seen once, by the classifier that was picked.
The paper's figures are those of train/evaluation/linear_probe.py, which trains on augmented images.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from train.evaluation.config import FastProbeConfig
from train.evaluation.encoded import Encoded
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
    train: Encoded, test: Encoded, *, config: FastProbeConfig, num_classes: int, top: int, seed: int
) -> tuple[dict, Tensor]:
    """The learning rate picked, the accuracy of all, and the guesses (M, top) for M test images."""
    features, labels = train.features, train.labels
    fit, held = (
        torch.from_numpy(rows).to(features.device)
        for rows in split_bank(labels.cpu().numpy(), seed=seed)
    )
    heads = train_heads(train, fit, config=config, num_classes=num_classes, seed=seed)
    correct = torch.zeros(len(config.lrs), device=features.device)
    for rows in held.split(ROWS):
        correct += (heads.logits(features[rows]).argmax(2) == labels[rows, None]).sum(0)
    accuracy = 100 * correct / len(held)
    best = int(accuracy.argmax())
    picked = heads._replace(weight=heads.weight[:, best, None], bias=heads.bias[best, None])
    guesses = [picked.logits(x)[:, 0].topk(top).indices for x in test.features.split(ROWS)]
    by_lr = dict(zip(map(str, config.lrs), accuracy.tolist(), strict=True))
    result = {"lr": config.lrs[best], "held_out_images": len(held), "held_out_top1_by_lr": by_lr}
    return result, torch.cat(guesses)


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
