"""The paper's linear evaluation: a linear classifier on augmented images, trained with LARS.

The backbone is frozen and in evaluation mode; images are cropped at random (8 to 100 % of the area)
and flipped as in training, by the training pipeline. 90 epochs in batches of 4,096, LARS with trust
coefficient 0.001 on weights and biases, momentum 0.9, no weight decay, a cosine schedule set at
each epoch. One classifier for each learning rate: the forward passes dominate the cost. The last
epoch is reported, not the best one on the test images.
A newcomer's mistake: this recipe on a small set. LARS moves a weight by 0.1 % of its size per step
(times lr); ImageNet gives it 28,000 steps. 450 steps on the digits' 1,437 images end at 11 %, where
learning rate 30 ends at 93 and the fast probe at 96 (the demo's encoder, 50 epochs).

Source: SimSiam appendix A and the official main_lincls.py.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.normalize import finish_views
from pipeline.augment import AugmentConfig
from pipeline.loader import Ranks, view_loader
from pipeline.order import PartOrder
from train import distributed
from train.config import Config
from train.distributed import World
from train.evaluation.config import LinearProbeConfig
from train.evaluation.embed import features_of
from train.evaluation.encoded import Encoded
from train.run import checkpoint
from train.run.data import EvalSet
from train.run.folder import Log
from train.run.optim import LARS, lr_at

CROP_SCALE = (0.08, 1.0)  # torchvision's RandomResizedCrop, as the official code has it
TRUST, MOMENTUM = 0.001, 0.9
FEW_STEPS = 2800  # a tenth of ImageNet's


class Head(nn.Module):
    """A linear classifier, initialised as the official one: N(0, 0.01), bias 0."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features).normal_(std=0.01))
        # (1, C), not (C,): our LARS adapts tensors of two dimensions, the official code's all
        self.bias = nn.Parameter(torch.zeros(1, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, D) -> (N, C)."""
        return F.linear(x, self.weight) + self.bias


def build_lars(heads: nn.ModuleList) -> torch.optim.Optimizer:
    """LARS with a parameter group for each classifier, whose learning rate is set later.

    buffer = 0.9 buffer + 0.001 |w| / |g| g (g alone if |w| or |g| is 0); w = w - lr buffer
    """
    groups = [{"params": list(head.parameters())} for head in heads]
    return LARS(groups, lr=0.0, momentum=MOMENTUM, trust=TRUST)


class LinearProbe:
    """The classifiers, their optimizer, the epochs done, and their checkpoints in `folder`.

    A checkpoint is continued only if its `facts` are these.
    """

    def __init__(
        self,
        config: LinearProbeConfig,
        *,
        features: int,
        classes: int,
        facts: dict,
        folder: Path,
        world: World,
        log: Log,
    ):
        self.config, self.facts, self.folder = config, facts, folder
        self.world, self.log = world, log
        self.heads = nn.ModuleList([Head(features, classes) for _ in config.lrs]).to(world.device)
        self.names = {parameter: name for name, parameter in self.heads.named_parameters()}
        self.optimizer = build_lars(self.heads)
        self.epochs_done = 0

    def set_rates(self) -> None:
        """Set the learning rates of the next epoch."""
        for group, lr in zip(self.optimizer.param_groups, self.config.lrs, strict=True):
            base = lr * self.config.batch_size / 256
            group["lr"] = lr_at(self.epochs_done, base=base, total=self.config.epochs)

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """One step of every classifier on this rank's rows of a batch; returns losses (L,)."""
        losses = torch.stack([F.cross_entropy(head(x), labels) for head in self.heads])
        losses.sum().backward()  # the classifiers share no parameter
        for parameter in self.heads.parameters():
            assert parameter.grad is not None
            distributed.mean(self.world, parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.detach()

    @torch.no_grad()
    def guesses(self, x: Tensor, *, top: int) -> list[Tensor]:
        """Each classifier's `top` guesses, best first: (N, D) -> (N, top)."""
        return [head(x).topk(top).indices for head in self.heads]

    def save(self) -> None:
        """Write a checkpoint of the epochs done, on rank 0. Raises: CheckpointError."""
        if not self.world.is_main:
            return
        state, options = checkpoint.flatten_optimizer(self.optimizer, self.names)
        tensors = {"heads": dict(self.heads.state_dict()), "optimizer": state}
        plain = {"optimizer": options}
        checkpoint.save(self.folder, self.epochs_done, tensors, plain, facts=self.facts)

    def restore(self) -> None:
        """Resume from the newest checkpoint, if any. Raises: ValueError for other settings."""
        saved = checkpoint.load_newest(self.folder, log=self.log.warn)
        if saved is None:
            return
        changed = [
            f"{name} was {saved.facts.get(name)} and is {value}"
            for name, value in self.facts.items()
            if saved.facts.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds a linear probe of other settings: {'; '.join(changed)}. "
                "Give the same ones to continue it, or another --out"
            )
        self.heads.load_state_dict(saved.tensors["heads"])
        tensors, plain = saved.tensors["optimizer"], saved.state["optimizer"]
        checkpoint.restore_optimizer(self.optimizer, self.names, tensors, plain)
        self.epochs_done = saved.step
        self.log(f"linear probe: {self.epochs_done} of {self.config.epochs} epochs are done")


def fit_batch(config: LinearProbeConfig, images: int, log: Log) -> LinearProbeConfig:
    """The recipe, with a smaller batch and a warning if there are fewer images than one batch."""
    if images >= config.batch_size:
        return config
    batch = 1 << images.bit_length() - 1
    log.warn(
        f"linear probe: {images} training images do not fill --linear.batch_size "
        f"{config.batch_size}: lowered to {batch}, and the learning rates scaled for it"
    )
    return dataclasses.replace(config, batch_size=batch)


def images_a_pass(config: LinearProbeConfig, *, per_rank: int, world: World) -> int:
    """Images of all ranks in one forward pass: at most `per_rank` each, and a divisor of the batch.

    Raises: ValueError if the ranks do not divide the batch.
    """
    batch = config.batch_size
    if batch % world.size:
        raise ValueError(
            f"{world.size} processes do not divide --linear.batch_size {batch}: change one of them"
        )
    rows = batch // world.size
    return world.size * next(n for n in range(min(rows, per_rank), 0, -1) if rows % n == 0)


def train_probe(
    probe: LinearProbe, backbone: nn.Module, images: EvalSet, test: Encoded, config: Config
) -> None:
    """Train for the remaining epochs, with a checkpoint and a line with the losses after each."""
    first, last, start, log = probe.epochs_done, probe.config.epochs, time.monotonic(), probe.log
    if (steps := last * (len(images.ids) // probe.config.batch_size)) < FEW_STEPS:
        log.warn(
            f"linear probe: {steps} steps in all, but the recipe's learning rates are for "
            "ImageNet's 28,000: try --linear.lrs 0.1,1,10,30, or use the fast probe's figure"
        )
    diverged: set[float] = set()
    log.start_bar(last, first)
    try:
        while probe.epochs_done < last:
            losses = train_epoch(probe, backbone, images, config).tolist()
            diverged = check_losses(probe, losses, diverged)
            probe.epochs_done += 1
            probe.save()
            guesses = probe.guesses(test.features, top=1)
            top1 = [100 * (guess[:, 0] == test.labels).float().mean() for guess in guesses]
            epoch_s = (time.monotonic() - start) / (probe.epochs_done - first)
            log.advance(probe.epochs_done, "linear probe")
            log(
                f"linear probe: epoch {probe.epochs_done}/{last}  "
                f"loss {' '.join(f'{loss:.4f}' for loss in losses)}  "
                f"top-1 {' '.join(f'{value:.2f}' for value in top1)} %  {epoch_s:.1f} s an epoch  "
                f"ETA {epoch_s * (last - probe.epochs_done):.0f} s"
            )
    finally:
        log.stop_bar()


def check_losses(probe: LinearProbe, losses: list[float], before: set[float]) -> set[float]:
    """The learning rates that have diverged; the log names those that had not before.

    Raises: FloatingPointError where all have: the checkpoint of the previous epoch stays.
    """
    diverged = {
        lr for lr, loss in zip(probe.config.lrs, losses, strict=True) if not math.isfinite(loss)
    }
    which = f"in epoch {probe.epochs_done + 1} at --linear.lrs"
    if len(diverged) == len(set(probe.config.lrs)):
        rates = ",".join(map(str, probe.config.lrs))
        raise FloatingPointError(
            f"the linear probe diverged {which} {rates}: lower them, and give another --out or "
            f"remove {probe.folder}"
        )
    if new := sorted(diverged - before):
        probe.log.warn(f"the linear probe diverged {which} {','.join(map(str, new))}")
    return diverged


def train_epoch(probe: LinearProbe, backbone: nn.Module, images: EvalSet, config: Config) -> Tensor:
    """One pass over the images; the mean loss of each classifier (L,)."""
    losses, rows = [], []
    probe.set_rates()
    for passed in augmented_features(probe, backbone, images, config):
        rows.append(passed)
        if sum(len(x) for x, _ in rows) * probe.world.size == probe.config.batch_size:
            losses.append(probe.step(*map(torch.cat, zip(*rows, strict=True))))
            rows = []
    return distributed.mean(probe.world, torch.stack(losses).mean(0))


def augmented_features(
    probe: LinearProbe, backbone: nn.Module, images: EvalSet, config: Config
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of this rank's part of the next epoch, one forward pass at a time.

    Whole batches only; the remainder of an epoch is random, another part in the next one.
    """
    world = probe.world
    labels = torch.from_numpy(images.labels_by_id())
    chunk = images_a_pass(probe.config, per_rank=config.eval.batch_size, world=world)
    order = PartOrder(images.ids, batch_size=chunk, seed=config.seed)
    passes = len(images.ids) // probe.config.batch_size * (probe.config.batch_size // chunk)
    start = probe.epochs_done * order.steps_per_epoch
    view = AugmentConfig(
        size=config.eval.size, scale=CROP_SCALE, flip=config.augment.flip, jitter=0, gray=0, blur=0
    )
    loader = view_loader(
        images.reader,
        order,
        range(start, start + passes),
        views=[view],
        options=config.dali,
        device=world.device,
        ranks=Ranks(world.rank, world.size, world.local_size),
    )
    for batch in loader:
        views = finish_views(batch.images, batch.draws, kernels=config.model.kernels)
        yield features_of(backbone, views, config), labels[batch.ids].to(world.device)
