"""The fast probe: linear classifiers on cached features, one for each learning rate of a sweep.

Features of the training images' centre crops are made once and standardised by their mean and
standard deviation (the features of SimSiam are of tiny scale: plain SGD crawls on them). All
learning rates train at once, from zero, with SGD of momentum 0.9, a cosine schedule and no weight
decay, on nine tenths of the training images. The rest, at most 5,000, picks the learning rate; the
test images are looked at once, by the classifier that was picked.
A newcomer's mistake: comparing with the paper's figures. Theirs are of
train/evaluation/linear_probe.py, which trains on augmented images.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from train.evaluation.config import FastProbeConfig
from train.run.data import split_bank
from train.run.optim import lr_at

MOMENTUM = 0.9
ROWS = 8192  # looked at together where nothing is learned


def fast_probe(
    features: Tensor,
    labels: Tensor,
    test_features: Tensor,
    *,
    config: FastProbeConfig,
    num_classes: int,
    top: int,
    seed: int,
) -> tuple[dict, Tensor]:
    """Which learning rate was picked and how all did, and the `top` guesses for the test rows.

    Shapes: features (N, D) fp32, labels (N,) int64, test_features (M, D); guesses (M, top).
    """
    fit, held = (
        torch.from_numpy(rows).to(features.device)
        for rows in split_bank(labels.cpu().numpy(), seed=seed)
    )
    std, mean = torch.std_mean(features, dim=0, correction=0)
    # a feature that hardly moves is not blown up to the size of the others
    std = std.clamp_min(max(1e-3 * std.mean().item(), torch.finfo(std.dtype).tiny))
    weight, bias = train_heads(
        features, labels, fit, mean, std, config=config, num_classes=num_classes, seed=seed
    )
    correct = torch.zeros(len(config.lrs), device=features.device)
    for rows in held.split(ROWS):
        logits = apply_heads((features[rows] - mean) / std, weight, bias)
        correct += (logits.argmax(2) == labels[rows, None]).sum(0)
    accuracy = 100 * correct / len(held)
    best = int(accuracy.argmax())
    guesses = [
        apply_heads((x - mean) / std, weight[:, best, None], bias[best, None])[:, 0]
        .topk(top)
        .indices
        for x in test_features.split(ROWS)
    ]
    result = {
        "lr": config.lrs[best],
        "held_out_images": len(held),
        "held_out_top1_by_lr": dict(zip(map(str, config.lrs), accuracy.tolist(), strict=True)),
    }
    return result, torch.cat(guesses)


def train_heads(
    features: Tensor, labels: Tensor, rows: Tensor, mean: Tensor, std: Tensor,
    *, config: FastProbeConfig, num_classes: int, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights (D, L, C) and biases (L, C) of L classifiers, trained together on the rows."""
    device, num_heads = features.device, len(config.lrs)
    weight = torch.zeros(features.shape[1], num_heads, num_classes, device=device)
    bias = torch.zeros(num_heads, num_classes, device=device)
    rates = torch.tensor(config.lrs, device=device)
    optimizer = torch.optim.SGD(
        [weight.requires_grad_(), bias.requires_grad_()], lr=1.0, momentum=MOMENTUM
    )
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = lr_at(epoch, base=1.0, total=config.epochs)
        order = rows[torch.randperm(len(rows), generator=generator).to(device)]
        for batch in order.split(config.batch_size):
            logits = apply_heads((features[batch] - mean) / std, weight, bias)
            target = labels[batch, None].expand(-1, num_heads)
            losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
            # momentum SGD is linear in the gradient and heads share nothing: the factor of a
            # head's loss is its learning rate
            (losses.view_as(target).mean(0) @ rates).backward()
            optimizer.step()
            optimizer.zero_grad()
    return weight.detach(), bias.detach()


def apply_heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Logits of all classifiers in one product: (N, D), (D, L, C), (L, C) -> (N, L, C)."""
    return (x @ weight.flatten(1)).view(len(x), *bias.shape) + bias
