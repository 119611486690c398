"""VICReg: views of an image agree; each dimension keeps its variance; no two dimensions correlate.

    L = 25 mean (z1 - z2)^2 + 25 mean_d relu(1 - std_d) + 1 / D sum_{i != j} cov_ij^2

The middle term is the mean of both views', the last one their sum. Standard deviations and
covariances are those of the images of all ranks. The projector is wider than the features and ends
in a linear layer. z is not normalised: its length is part of the variance.
Source: Bardes et al., ICLR 2022, algorithm 1; facebookresearch/vicreg main_vicreg.py.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from train.methods.method import Method, MethodSpec, Scale, collapse_meter, gather_with_gradient
from train.network.model import ModelConfig, at_least
from train.network.norm import count_batches


@dataclass(frozen=True, kw_only=True)
class VICRegConfig(MethodSpec):
    """The weights of its three terms; 0 leaves one out."""

    title = "VICReg"

    invariance: float = 25.0
    """Of the mean squared difference of the two views."""
    variance: float = 25.0
    """Of max(0, 1 - std), of each dimension's standard deviation."""
    covariance: float = 1.0
    """Of the squared covariances of different dimensions."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("invariance", "variance", "covariance"):
            at_least(f"method.vicreg.{name}", getattr(self, name), 0)

    def build(self, model: ModelConfig, scale: Scale) -> "VICReg":
        """As MethodSpec.build."""
        return VICReg(model, self)


class VICReg(Method):
    """backbone -> projector, and the three terms."""

    def __init__(self, model: ModelConfig, vicreg: VICRegConfig):
        super().__init__(model)
        self.projector = self.build_projector(model, norm="hidden", bias=False)
        self.vicreg = vicreg
        self.finish_init(model, num_views=2)

    def forward(
        self, views: Tensor, ids: Tensor | None = None, small: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the collapse meter of z. Shapes: as Method.forward, V = 2."""
        count_batches(self)
        z = self.projector(self.backbone(views))
        with torch.autocast(views.device.type, enabled=False):
            z = z.float().view(2, -1, z.shape[1])
            invariance, variance, covariance = terms(z, self.group)
            loss = (
                self.vicreg.invariance * invariance
                + self.vicreg.variance * variance
                + self.vicreg.covariance * covariance
            )
        return loss, {"z_std": collapse_meter(z)}


def terms(z: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms, not weighted; the first of this rank's rows, the others of all ranks'.

    Shapes: z (2, N, D) fp32.
    """
    everywhere = gather_with_gradient(z.transpose(0, 1), group).transpose(0, 1)
    centred = everywhere - everywhere.mean(1, keepdim=True)
    num_rows, dim = centred.shape[1:]
    cov = centred.transpose(1, 2) @ centred / (num_rows - 1)
    variances = cov.diagonal(dim1=1, dim2=2)
    lacking = F.relu(1 - (variances + 1e-4).sqrt()).mean()
    others = (cov.square().sum() - variances.square().sum()) / dim
    return F.mse_loss(z[0], z[1]), lacking, others
