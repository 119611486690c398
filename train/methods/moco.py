"""MoCo v2: a query must find the key of the other view among a queue of keys of earlier images.

    L = mean -log( exp(q.k / T) / (exp(q.k / T) + sum_{k' in queue} exp(q.k' / T)) )

q comes from the encoder, k from the momentum encoder, all of length 1. Each view is once the query
and once the key, and both keys go into the queue: the symmetric loss of SimSiam's comparison
(table 4, "repro+"); the loss is the mean of both directions.
There is no ShuffleBN: in the official code batch norm is of each GPU, and shuffling keeps a query
and its key from sharing the statistics of few images. Our statistics are over all ranks, and a
shuffled batch has the same.
Source: Chen et al., arXiv:2003.04297; facebookresearch/moco moco/builder.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from train.methods.method import (
    Method,
    MethodSpec,
    MomentumEncoder,
    RecentImages,
    Scale,
    check_queue,
    collapse_meter,
)
from train.network.model import ModelConfig, at_least, positive, share
from train.network.norm import count_batches


@dataclass(frozen=True, kw_only=True)
class MoCoConfig(MethodSpec):
    """A momentum encoder and a queue of its keys."""

    title = "MoCo v2"

    queue: int = 65536
    """Keys that a query is contrasted against; two of each image, over all ranks."""
    momentum: float = 0.999
    """The momentum encoder keeps this share of itself in each step."""
    temperature: float = 0.2
    """Cosines are divided by it."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        at_least("method.moco.queue", self.queue, 2)
        if self.queue % 2:
            raise ValueError(f"method.moco.queue holds pairs of keys: even, got {self.queue}")
        share("method.moco.momentum", self.momentum)
        positive("method.moco.temperature", self.temperature)

    @property
    def least_images(self) -> int:  # type: ignore[override]
        """Two keys are of one image."""
        return self.queue // 2

    def build(self, model: ModelConfig, scale: Scale) -> "MoCo":
        """As MethodSpec.build."""
        flag = f"--method.moco.queue {self.queue}"
        scale.tell(check_queue(flag, self.queue, scale, per_image=2, dim=model.projector_dim))
        return MoCo(model, self, batch_size=scale.batch_size)


class MoCo(Method):
    """backbone -> projector without batch norm, the momentum encoder, and the queue of keys."""

    def __init__(self, model: ModelConfig, moco: MoCoConfig, *, batch_size: int):
        super().__init__(model)
        self.projector = self.build_projector(model, norm="none")
        self.target = MomentumEncoder(self.backbone, self.projector)
        keys = torch.randn(moco.queue // 2, 2, model.projector_dim)
        self.queue = RecentImages(F.normalize(keys, dim=-1))
        self.moco, self.batch_size = moco, batch_size
        self.finish_init(model, num_views=2)

    def forward(
        self, views: Tensor, ids: Tensor | None = None, small: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the collapse meter of q. Shapes: as Method.forward, V = 2."""
        count_batches(self)
        q, k = self.projector(self.backbone(views)), self.target(views)
        shape = 2, -1, q.shape[1]
        with torch.autocast(views.device.type, enabled=False):
            q, k = (F.normalize(x.float(), dim=-1).view(shape) for x in (q, k))
            # a copy: backward reads it after the queue has changed
            negatives = self.queue.rows.flatten(0, 1).clone()
            loss = info_nce(q, k.flip(0), negatives, temperature=self.moco.temperature)
            self.queue.put(k, self.group)
        return loss, {"z_std": collapse_meter(q)}

    def before_step(self, step: int) -> None:
        """Point at the oldest keys."""
        self.queue.point(step * self.batch_size)

    def start_target(self) -> None:
        """The momentum encoder starts as a copy of the encoder."""
        self.target.follow(self.backbone, self.projector, momentum=0.0)

    def after_step(self, step: int, total: int) -> None:
        """The momentum encoder follows the encoder."""
        self.target.follow(self.backbone, self.projector, self.moco.momentum)


def info_nce(q: Tensor, k: Tensor, negatives: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of each query's own key among that and the negatives.

    Shapes: q, k (..., D) of length 1, negatives (K, D).
    """
    own = (q * k).sum(-1, keepdim=True)
    logits = torch.cat([own, q @ negatives.T], dim=-1) / temperature
    return (logits.logsumexp(-1) - logits[..., 0]).mean()
