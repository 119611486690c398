"""SimCLR: each view must find the other view of its image among all views of the global batch.

    L = 2 mean_i -log( exp(cos(z_i, z_j) / T) / sum_{k != i} exp(cos(z_i, z_k) / T) )

i runs over the views of this rank, j is the other view of the same image, k runs over those of all
ranks: rows gathered from other ranks have gradients. Both views go through the network in one
slice, batch norm over both, as in the official code. More negatives mean a higher loss.
Source: Chen et al., ICML 2020; google-research/simclr tf2/objective.py, which sums both directions.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from train.methods.method import Method, MethodSpec, Scale, collapse_meter, gather_with_gradient
from train.network.model import ModelConfig, build_predictor, positive
from train.network.norm import count_batches


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(MethodSpec):
    """NT-Xent, and what SimSiam's section 6.2 adds to it."""

    title = "SimCLR"

    temperature: float = 0.1
    """Cosines are divided by it; 0.5 for CIFAR."""
    predictor: bool = False
    """true: queries go through SimSiam's prediction MLP (model.predictor_hidden wide)."""
    stop_gradient: bool = False
    """true: what a query is compared with has no gradient."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        positive("method.simclr.temperature", self.temperature)

    @property
    def has_learning_predictor(self) -> bool:  # type: ignore[override]
        """By the predictor's switch."""
        return self.predictor

    def ends_in_norm(self, model: ModelConfig) -> bool:
        """It always does."""
        return True

    def build(self, model: ModelConfig, scale: Scale) -> "SimCLR":
        """As MethodSpec.build."""
        return SimCLR(model, self)


class SimCLR(Method):
    """backbone -> projector, batch norm in all of its layers, and NT-Xent."""

    def __init__(self, model: ModelConfig, simclr: SimCLRConfig):
        super().__init__(model)
        self.projector = self.build_projector(model, affine=True)
        # the official code's last batch norm has a scale and no shift
        self.projector[-1].get_parameter("norm.bias").requires_grad_(False)
        self.predictor: nn.Module = nn.Identity()
        if simclr.predictor:
            self.predictor = build_predictor(model.projector_dim, hidden=model.predictor_hidden)
        self.simclr = simclr
        self.finish_init(model, num_views=1)

    def forward(
        self, views: Tensor, ids: Tensor | None = None, small: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the collapse meter of z. Shapes: as Method.forward, V = 2."""
        count_batches(self)
        z = self.projector(self.backbone(views))
        p = self.predictor(z)
        shape = 2, -1, z.shape[1]
        with torch.autocast(views.device.type, enabled=False):
            keys = z.detach() if self.simclr.stop_gradient else z
            queries, temperature = p.view(shape), self.simclr.temperature
            loss = nt_xent(queries, keys.view(shape), temperature=temperature, group=self.group)
        return loss, {"z_std": collapse_meter(z.view(shape))}


def nt_xent(
    queries: Tensor, keys: Tensor, *, temperature: float, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The loss of this rank's queries against the keys of all ranks, summed over both directions.

    Shapes: queries and keys (2, N, D), view first, both of the same images.
    """
    q = F.normalize(queries.float(), dim=-1).flatten(0, 1)
    k = F.normalize(keys.float(), dim=-1)
    everywhere = gather_with_gradient(k.transpose(0, 1), group).transpose(0, 1)
    rows, total = k.shape[1], everywhere.shape[1]
    first = rows * dist.get_rank(group) if group is not None else 0
    mine = first + torch.arange(rows, device=q.device)
    logits = q @ everywhere.flatten(0, 1).T / temperature
    itself, other = torch.cat([mine, total + mine]), torch.cat([total + mine, mine])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return 2 * F.cross_entropy(logits, other)
