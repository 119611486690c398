"""SwAV: views are assigned to prototypes, evenly, and each view predicts the others' assignment.

    L = - mean over pairs of views (a, v), a of full size, v != a, of sum q_a log softmax(s_v / T)

s = z . c are cosines of a view's z and the prototypes c. The assignment q is made by Sinkhorn's
iterations from the s of all ranks, and of recent images where there is a queue: each prototype gets
the same share of the images, each image shares sum to 1. No gradient goes through q. Small views
(multi-crop) predict and assign nothing. Batch norm takes all views of one size, and in the head all
views, as one slice, as in the official code. A loss that stays at log(prototypes) has learned
nothing.
Source: Caron et al., NeurIPS 2020; recipes of facebookresearch/swav.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.augment import AugmentConfig
from train.methods.method import (
    Method,
    MethodSpec,
    RecentImages,
    Scale,
    check_queue,
    collapse_meter,
    own_rows,
    sum_over_ranks,
)
from train.network.model import ModelConfig, at_least, positive
from train.network.norm import count_batches


@dataclass(frozen=True, kw_only=True)
class SwAVConfig(MethodSpec):
    """Prototypes, Sinkhorn's iterations, and the optional queue and small views."""

    title = "SwAV"

    prototypes: int = 3000
    """How many; ten times the classes of ImageNet, rounded."""
    temperature: float = 0.1
    """Of the predictions: cosines are divided by it."""
    epsilon: float = 0.05
    """Of the assignments: smaller is sharper."""
    sinkhorn_iterations: int = 3
    """Each normalises over prototypes, then over images."""
    frozen_epochs: float = 1.0
    """Epochs in which the prototypes are frozen: 313 steps of 4096 images, or 5005 of 256."""
    queue: int = 0
    """Earlier images whose embeddings are assigned too, over all ranks; the recipe: 3840 for a
    batch of 256, none for 4096."""
    queue_from_epoch: int = 15
    """The queue fills from here on and is used once it is full."""
    small_views: int = 0
    """Small views of each image (multi-crop); 6 in the recipe, which counts on them."""
    small_size: int = 96
    """Side of a small view, pixels."""
    small_scale: tuple[float, float] = (0.05, 0.14)
    """Range of a small view's share of the image's area."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("queue", "queue_from_epoch", "frozen_epochs"):
            at_least(f"method.swav.{name}", getattr(self, name), 0)
        at_least("method.swav.small_views", self.small_views, 0, most=100)
        at_least("method.swav.sinkhorn_iterations", self.sinkhorn_iterations, 1, most=1000)
        at_least("method.swav.small_size", self.small_size, 1)
        at_least("method.swav.prototypes", self.prototypes, 2)
        low, high = self.small_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"method.swav.small_scale is a range of shares, got {low} {high}")
        positive("method.swav.temperature", self.temperature)
        if not 0.025 <= self.epsilon < float("inf"):
            raise ValueError(
                f"method.swav.epsilon must be at least 0.025, got {self.epsilon}: below it "
                "exp(-2 / epsilon) is 0 in fp32 and an assignment may be 0 / 0"
            )

    @property
    def num_small_views(self) -> int:  # type: ignore[override]
        """By the flag."""
        return self.small_views

    @property
    def least_images(self) -> int:  # type: ignore[override]
        """The length of the queue."""
        return self.queue

    def views(self, augment: AugmentConfig) -> list[AugmentConfig]:
        """Two of full size, then the small ones."""
        small = replace(augment, size=self.small_size, scale=self.small_scale)
        return [augment] * self.num_views + [small] * self.small_views

    def check(self, model: ModelConfig, augment: AugmentConfig, epochs: int) -> None:
        """Refuse flags without effect, and sizes and epochs that exclude each other."""
        super().check(model, augment, epochs)
        if self.small_views and self.small_size == augment.size:
            raise ValueError(
                f"--method.swav.small_size {augment.size} is that of the other views "
                "(--augment.size): take a smaller one"
            )
        for name, owner in (
            ("queue_from_epoch", "queue"),
            ("small_size", "small_views"),
            ("small_scale", "small_views"),
        ):
            if not getattr(self, owner) and getattr(self, name) != getattr(SwAVConfig, name):
                raise ValueError(
                    f"--method.swav.{name} has no effect with --method.swav.{owner} 0: leave it "
                    f"out, or set --method.swav.{owner}"
                )
        if self.queue and self.queue_from_epoch >= epochs:
            raise ValueError(
                f"--method.swav.queue {self.queue} would fill from epoch {self.queue_from_epoch} "
                f"of {epochs}: take a smaller --method.swav.queue_from_epoch, or no queue"
            )

    def build(self, model: ModelConfig, scale: Scale) -> "SwAV":
        """As MethodSpec.build."""
        if self.queue:
            flag = f"--method.swav.queue {self.queue}"
            scale.tell(check_queue(flag, self.queue, scale, per_image=1, dim=model.projector_dim))
            steps = (scale.epochs - self.queue_from_epoch) * scale.steps_per_epoch
            if (steps - 1) * scale.batch_size < self.queue:
                scale.tell(
                    f"warning: {flag} is never full, and so never used, in {scale.epochs} epochs: "
                    f"it fills from --method.swav.queue_from_epoch {self.queue_from_epoch} on"
                )
        return SwAV(model, self, batch_size=scale.batch_size, steps_per_epoch=scale.steps_per_epoch)


class SwAV(Method):
    """backbone -> projector -> prototypes."""

    def __init__(
        self, model: ModelConfig, swav: SwAVConfig, *, batch_size: int, steps_per_epoch: int
    ):
        super().__init__(model)
        self.projector, dim = self.build_projector(model, norm="hidden"), model.projector_dim
        self.prototypes = nn.Linear(dim, swav.prototypes, bias=False)
        self.queue = RecentImages(torch.zeros(swav.queue, 2, dim)) if swav.queue else None
        self.queue_from = swav.queue_from_epoch * steps_per_epoch
        self.frozen_steps = round(swav.frozen_epochs * steps_per_epoch)
        self.fills = self.assigns_recent = False
        self.swav, self.batch_size = swav, batch_size
        self.finish_init(model, num_views=1)

    def sync_over(self, group: dist.ProcessGroup | None) -> None:
        """As Method.sync_over. Raises: ValueError if the ranks cannot divide the queue equally."""
        super().sync_over(group)
        if group is not None and self.swav.queue % dist.get_world_size(group):
            raise ValueError(
                f"{dist.get_world_size(group)} processes do not divide --method.swav.queue "
                f"{self.swav.queue}: change one of them"
            )

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Normalise the prototypes to length 1; decide whether the queue fills or is full."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        if self.queue is None:
            return
        images = (step - self.queue_from) * self.batch_size
        self.fills, self.assigns_recent = images >= 0, images >= self.swav.queue
        self.queue.point(max(images, 0))

    def frozen(self, step: int) -> list[Tensor]:
        """The prototypes are frozen in the first steps."""
        return [self.prototypes.weight] if step < self.frozen_steps else []

    def forward(
        self, views: Tensor, ids: Tensor | None = None, small: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the collapse meter of z. Shapes: as Method.forward, V = 2."""
        count_batches(self)
        features, num_views = self.backbone(views), 2 + self.swav.small_views
        if small is not None:
            features = torch.cat([features, self.backbone(small)])
        z = self.projector(features)
        with torch.autocast(views.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1).view(num_views, -1, z.shape[1])
            scores = z @ self.prototypes.weight.T
            loss = swapped(scores, self.assign(z[:2].detach()), self.swav.temperature)
            if self.queue is not None and self.fills:
                self.queue.put(z[:2], self.group)
        return loss, {"z_std": collapse_meter(z[:2])}

    @torch.no_grad()
    def assign(self, z: Tensor) -> Tensor:
        """q of this rank's views of full size. Shapes: (2, N, D) -> (2, N, K)."""
        rows = z
        if self.queue is not None and self.assigns_recent:
            rows = torch.cat([own_rows(self.queue.rows, self.group).transpose(0, 1), z], dim=1)
        scores, swav = rows @ self.prototypes.weight.T, self.swav
        iterations = swav.sinkhorn_iterations
        q = sinkhorn(scores, epsilon=swav.epsilon, iterations=iterations, group=self.group)
        return q[:, -z.shape[1] :]


def swapped(scores: Tensor, q: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each assignment and every other view's prediction, the mean over pairs.

    Shapes: scores (V, N, K), q (A, N, K) of the first A views.
    """
    log_p = F.log_softmax(scores / temperature, dim=-1)
    pairs = torch.einsum("ank,vnk->av", q, log_p) / q.shape[1]
    return -(pairs.sum() - pairs.diagonal().sum()) / (len(q) * (len(scores) - 1))


def sinkhorn(
    scores: Tensor, *, epsilon: float, iterations: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Assignments of the rows of all ranks in which every prototype has the same share.

    Shapes: scores (V, R, K), this rank's rows of each view, cosines -> (V, R, K), rows sum to 1.
    """
    q = torch.exp((scores - 1) / epsilon)  # of a cosine at most 1: no overflow
    for _ in range(iterations):
        q = q / sum_over_ranks(q.sum(1, keepdim=True), group)
        q = q / q.sum(2, keepdim=True)
    return q
