"""BYOL: the predictor of one view meets a momentum encoder's projection of the other.

    L = |p1/|p1| - z2'/|z2'||^2 + |p2/|p2| - z1'/|z1'||^2 = 4 - 2 cos(p1, z2') - 2 cos(p2, z1')

The second view is augmented differently from the first (less blur, solarize); both go through both
networks. Heads have batch norm in the hidden layer alone. The loss is summed over both directions:
0 is the least, unrelated vectors have 4.
Source: Grill et al., NeurIPS 2020; deepmind-research byol/byol_experiment.py.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.choose import Kernels
from kernels.cosine import symmetric_neg_cosine
from pipeline.augment import AugmentConfig
from train.methods.method import Method, MethodSpec, MomentumEncoder, Scale
from train.network.model import ModelConfig, build_projector, share
from train.network.norm import count_batches


@dataclass(frozen=True, kw_only=True)
class BYOLConfig(MethodSpec):
    """A momentum encoder as the target."""

    title = "BYOL"
    least_loss = 0.0

    momentum: float = 0.99
    """tau at the start; it rises to 1 by a cosine. The recipe: 0.97 for 40 epochs, 0.99 for 100 to
    300, 0.996 for 1000."""
    predictor: bool = True
    """false: the projection itself is compared with the momentum encoder's."""
    second_blur: float = 0.1
    """Probability of blur in the second view, as a share of augment.blur (1.0 in the recipe)."""
    second_solarize: float = 0.2
    """Probability of solarize in the second view; augment.solarize is the first one's."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("momentum", "second_blur", "second_solarize"):
            share(f"method.byol.{name}", getattr(self, name))

    @property
    def collapse_remedy(self) -> str | None:  # type: ignore[override]
        """The predictor's switch, where it is off."""
        return None if self.predictor else "set --method.byol.predictor true"

    @property
    def has_learning_predictor(self) -> bool:  # type: ignore[override]
        """By the predictor's switch."""
        return self.predictor

    def views(self, augment: AugmentConfig) -> list[AugmentConfig]:
        """The second view has less blur, and solarize."""
        blur = augment.blur * self.second_blur
        return [augment, replace(augment, blur=blur, solarize=self.second_solarize)]

    def check(self, model: ModelConfig, augment: AugmentConfig, epochs: int) -> None:
        """Refuse a share of a blur that is off."""
        super().check(model, augment, epochs)
        if self.second_blur != BYOLConfig.second_blur and not augment.blur:
            raise ValueError(
                "--method.byol.second_blur is a share of --augment.blur, which is 0: leave it out, "
                "or set --augment.blur"
            )

    def build(self, model: ModelConfig, scale: Scale) -> "BYOL":
        """As MethodSpec.build."""
        return BYOL(model, self)


class BYOL(Method):
    """backbone -> projector -> predictor, and the momentum encoder that is its target."""

    def __init__(self, model: ModelConfig, byol: BYOLConfig):
        super().__init__(model)
        self.projector = self.build_projector(model, norm="hidden", bias=False)
        self.predictor: nn.Module = nn.Identity()
        if byol.predictor:
            dim, hidden = model.projector_dim, model.predictor_hidden
            self.predictor = build_projector(
                dim, hidden=hidden, outputs=dim, layers=2, norm="hidden", bias=False
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
