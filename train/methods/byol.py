"""BYOL: the predictor of one view meets a momentum encoder's projection of the other.

    L = |p1/|p1| - z2'/|z2'||^2 + |p2/|p2| - z1'/|z1'||^2 = 4 - 2 cos(p1, z2') - 2 cos(p2, z1')

The second view is drawn otherwise than the first (less blur, solarize); both go through both
networks. Heads have batch norm in the hidden layer alone.
A newcomer's mistake: reading the loss as SimSiam's. It is summed over both directions: 0 is the
least, 4 is what unrelated vectors have.
Source: Grill et al., NeurIPS 2020; deepmind-research byol/byol_experiment.py.
"""

import math

import torch
from torch import Tensor, nn

from kernels.choose import Kernels
from kernels.cosine import symmetric_neg_cosine
from train.config import ModelConfig
from train.heads import build_projector
from train.method_config import BYOLConfig
from train.methods.method import Method
from train.methods.momentum import MomentumEncoder
from train.norm import count_batches


class BYOL(Method):
    """backbone -> projector -> predictor, and the momentum encoder that is its target."""

    def __init__(self, model: ModelConfig, byol: BYOLConfig):
        super().__init__(model)
        features, dim = self.backbone.num_features, model.projector_dim
        self.projector = build_projector(
            features, hidden=model.projector_hidden or features, outputs=dim,
            layers=model.projector_layers, norm="hidden", bias=False,
        )  # fmt: skip
        self.predictor: nn.Module = nn.Identity()
        if byol.predictor:
            self.predictor = build_projector(
                dim, hidden=model.predictor_hidden, outputs=dim, layers=2, norm="hidden", bias=False
            )
        self.target = MomentumEncoder(self.backbone, self.projector)
        self.momentum = byol.momentum
        self.kernels: Kernels = model.kernels
        self.finish_init(model, num_views=2)

    def forward(
        self, views: Tensor, ids: Tensor | None = None, small: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the collapse meter of the target's z'. Shapes: as Method.forward, V = 2."""
        count_batches(self)
        target = self.target(views)
        p = self.predictor(self.projector(self.backbone(views)))
        shape = 2, -1, p.shape[1]
        with torch.autocast(views.device.type, enabled=False):
            loss, z_std = symmetric_neg_cosine(
                p.view(shape), target.view(shape), kernels=self.kernels
            )
        return 4 + 4 * loss, {"z_std": z_std * p.shape[1] ** 0.5}

    def start_target(self) -> None:
        """The momentum encoder starts as a copy of the encoder."""
        self.target.follow(self.backbone, self.projector, momentum=0.0)

    def after_step(self, step: int, total: int) -> None:
        """The target follows the encoder."""
        self.target.follow(self.backbone, self.projector, momentum_at(step, total, self.momentum))


def momentum_at(step: int, total: int, start: float) -> float:
    """tau of a step counted from 0: from `start` to 1 at `total` by a cosine. Source: BYOL 3.2."""
    return 1 - (1 - start) * 0.5 * (math.cos(math.pi * min(1.0, step / total)) + 1)
