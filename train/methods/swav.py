"""SwAV: views are assigned to prototypes, evenly, and each view predicts the others' assignment.

    L = - mean over pairs of views (a, v), a of full size, v != a, of sum q_a log softmax(s_v / T)

s = z . c are cosines of a view's z and the prototypes c. The assignment q is made by Sinkhorn's
iterations from the s of all ranks, and of recent images where there is a queue: each prototype gets
the same share of the images, each image shares sum to 1. No gradient goes through q. Small views
(multi-crop) predict and assign nothing. Batch norm takes all views of one size, and in the head all
views, as one slice, as in the official code.
A newcomer's mistake: a loss at log(prototypes). Nothing has been learned there.
Source: Caron et al., NeurIPS 2020; recipes of facebookresearch/swav.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from train.config import ModelConfig
from train.heads import build_projector
from train.method_config import SwAVConfig
from train.methods.method import Method, collapse_meter, own_rows, sum_over_ranks
from train.methods.recent import RecentImages
from train.norm import count_batches


class SwAV(Method):
    """backbone -> projector -> prototypes."""

    def __init__(
        self, model: ModelConfig, swav: SwAVConfig, *, batch_size: int, steps_per_epoch: int
    ):
        super().__init__(model)
        features, dim = self.backbone.num_features, model.projector_dim
        self.projector = build_projector(
            features, hidden=model.projector_hidden or features, outputs=dim,
            layers=model.projector_layers, norm="hidden",
        )  # fmt: skip
        self.prototypes = nn.Linear(dim, swav.prototypes, bias=False)
        self.queue = RecentImages(torch.zeros(swav.queue, 2, dim)) if swav.queue else None
        self.queue_from = swav.queue_from_epoch * steps_per_epoch
        self.frozen_steps = round(swav.frozen_epochs * steps_per_epoch)
        self.fills = self.assigns_recent = False
        self.swav, self.batch_size = swav, batch_size
        self.finish_init(model, num_views=1)

    def sync_over(self, group: dist.ProcessGroup | None) -> None:
        """As Method.sync_over. Raises: ValueError if the ranks cannot share the queue out."""
        super().sync_over(group)
        if group is not None and self.swav.queue % dist.get_world_size(group):
            raise ValueError(
                f"{dist.get_world_size(group)} processes do not divide --method.swav.queue "
                f"{self.swav.queue}: change one of them"
            )

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Bring the prototypes back to length 1, and see whether the queue fills or is full."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        if self.queue is None:
            return
        images = (step - self.queue_from) * self.batch_size
        self.fills, self.assigns_recent = images >= 0, images >= self.swav.queue
        self.queue.point(max(images, 0))

    def frozen(self, step: int) -> list[Tensor]:
        """The prototypes stand still in the first steps."""
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
        q = sinkhorn(
            rows @ self.prototypes.weight.T, epsilon=self.swav.epsilon,
            iterations=self.swav.sinkhorn_iterations, group=self.group,
        )  # fmt: skip
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
