"""SimSiam: one encoder, a predictor, a stop-gradient. Chen & He, CVPR 2021, algorithm 1.

Both views go through the network as one batch of two slices, batch norm taking its statistics per
slice: what the paper's two passes compute, in half the launches. SimSiamConfig's switches take out
what the paper takes out (sections 4.1 to 4.6). train/methods/targets.py has its EM reading.
A newcomer's mistake: calling this once per view.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.choose import Kernels
from kernels.cosine import symmetric_neg_cosine
from train.methods.method import Method, collapse_meter
from train.network.model import ModelConfig, at_least, build_predictor, build_projector
from train.network.norm import count_batches


@dataclass(frozen=True, kw_only=True)
class SimSiamConfig:
    """SimSiam's switches, at method.* themselves."""

    stop_gradient: bool = True
    """false is figure 2 of the paper: the representation collapses."""
    predictor: Literal["mlp", "none", "fixed"] = "mlp"
    """none collapses; fixed at its random start does not converge (table 1)."""
    symmetry: Literal["symmetric", "asymmetric", "asymmetric_2x"] = "symmetric"
    """asymmetric: one view alone is predicted; asymmetric_2x: so with two pairs of views (4.6)."""
    similarity: Literal["cosine", "cross_entropy"] = "cosine"
    """cross_entropy: -softmax(z) log softmax(p) over channels (section 4.5)."""
    target_steps: int = 1
    """Batches whose targets are computed before as many SGD steps on them (section 5.2); 0: an
    epoch's; 1 is SimSiam."""
    moving_average: float = 0.0
    """Momentum of a target kept for each image (section 5.2: 0.8, with --method.predictor none);
    0: none is kept."""

    def __post_init__(self) -> None:
        """Refuse impossible values and switches that exclude each other."""
        at_least("method.target_steps", self.target_steps, 0)
        if not 0 <= self.moving_average < 1:
            raise ValueError(f"method.moving_average must lie in 0 .. 1, got {self.moving_average}")
        kept = [
            f"method.{name}"
            for name, is_on in (
                ("target_steps", self.target_steps != 1),
                ("moving_average", self.moving_average > 0),
            )
            if is_on
        ]
        if len(kept) > 1:
            raise ValueError(f"{' and '.join(kept)} exclude each other: use one of them")
        if kept and not self.stop_gradient:
            raise ValueError(
                f"{kept[0]} keeps targets, which have no gradient: "
                "leave --method.stop_gradient true"
            )
        if kept and self.symmetry != "symmetric":
            raise ValueError(f"{kept[0]} goes with --method.symmetry symmetric only")

    @property
    def num_views(self) -> int:
        """Views of each image that go through the network."""
        return 4 if self.symmetry == "asymmetric_2x" else 2


class SimSiam(Method):
    """backbone -> projector -> predictor, and the symmetric loss of the views."""

    def __init__(self, model: ModelConfig, method: SimSiamConfig):
        super().__init__(model)
        features = self.backbone.num_features
        self.projector = build_projector(
            features,
            hidden=model.projector_hidden or features,
            outputs=model.projector_dim,
            layers=model.projector_layers,
            norm=model.head_norm,
        )
        self.predictor: nn.Module = nn.Identity()
        if method.predictor != "none":
            self.predictor = build_predictor(
                model.projector_dim, hidden=model.predictor_hidden, norm=model.head_norm
            )
        if method.predictor == "fixed":
            self.predictor.requires_grad_(False)
        self.method = method
        self.kernels: Kernels = model.kernels
        self.finish_init(model, num_views=method.num_views)

    def forward(
        self, views: Tensor, ids: Tensor | None = None, small: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the collapse meter of z. Shapes: as Method.forward."""
        p, z = self.encode(views)
        with torch.autocast(views.device.type, enabled=False):
            loss, z_std = self.loss(p, z)
        return loss, {"z_std": z_std}

    def encode(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """p and z of the views. Shapes: (V N, 3, H, W) -> twice (V, N, D)."""
        count_batches(self)
        z = self.projector(self.backbone(views))
        p = self.predictor(z)
        shape = self.method.num_views, -1, z.shape[1]
        return p.view(shape), z.view(shape)

    def loss(self, p: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of predictions and targets, and the meter of z. Shapes: p, z (V, N, D)."""
        method = self.method
        if method.similarity == "cosine" and method.symmetry == "symmetric":
            loss, z_std = symmetric_neg_cosine(
                p, z, stop_gradient=method.stop_gradient, kernels=self.kernels
            )
            return loss, z_std * z.shape[-1] ** 0.5
        target = z.detach() if method.stop_gradient else z
        compare = neg_cosine if method.similarity == "cosine" else cross_entropy
        if method.symmetry == "symmetric":
            loss = (compare(p[0], target[1]) + compare(p[1], target[0])) / 2
        else:  # the first view of each pair looks at the second
            loss = compare(p[::2], target[1::2])
        return loss, collapse_meter(z)


def neg_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-cos(p, z), the mean over all but the last dimension. Source: SimSiam equation 1."""
    return -F.cosine_similarity(p.float(), z.float(), dim=-1).mean()


def cross_entropy(p: Tensor, z: Tensor) -> Tensor:
    """-softmax(z) . log softmax(p) over channels, the mean over the rest. Source: section 4.5."""
    return -(F.softmax(z.float(), dim=-1) * F.log_softmax(p.float(), dim=-1)).sum(-1).mean()
