"""SimSiam: one encoder, a predictor, a stop-gradient. Chen & He, CVPR 2021, algorithm 1.

Both views go through the network as one batch of two slices, batch norm taking its statistics per
slice: what the paper's two passes compute, in half the launches.
A newcomer's mistake: calling this once per view.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.cosine import symmetric_neg_cosine
from kernels.launch import Kernels
from train.config import MethodConfig, ModelConfig
from train.heads import build_predictor, build_projector
from train.norm import count_batches, set_kernels, set_sync_group, set_views
from train.resnet import ResNet

NUM_VIEWS = 2


class SimSiam(nn.Module):
    """backbone -> projector -> predictor, and the symmetric loss of the two views."""

    def __init__(self, model: ModelConfig, method: MethodConfig):
        super().__init__()
        self.backbone = ResNet(
            model.arch,
            stem=model.stem,
            width=model.width,
            zero_init_residual=model.zero_init_residual,
        )
        features = self.backbone.num_features
        self.projector = build_projector(
            features,
            hidden=model.projector_hidden or features,
            outputs=model.projector_dim,
            layers=model.projector_layers,
        )
        self.predictor = build_predictor(model.projector_dim, hidden=model.predictor_hidden)
        self.stop_gradient = method.stop_gradient
        self.kernels: Kernels = model.kernels
        set_views(self, NUM_VIEWS)
        set_kernels(self, model.kernels, recompute=model.recompute)

    def sync_over(self, group: dist.ProcessGroup | None) -> None:
        """Batch norm takes its statistics over all ranks of the group; None: this rank's alone."""
        set_sync_group(self, group)

    def forward(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log of it.

        Shapes: views (2 N, 3, H, W) channels_last, all first views and then all second ones.
        z_std is multiplied by sqrt(d): about 1 when features are spread out, 0 after collapse.
        """
        count_batches(self)
        z = self.projector(self.backbone(views))
        p = self.predictor(z)
        dim = z.shape[1]
        p, z = p.view(NUM_VIEWS, -1, dim), z.view(NUM_VIEWS, -1, dim)
        with torch.autocast(views.device.type, enabled=False):
            loss, z_std = symmetric_neg_cosine(
                p, z, stop_gradient=self.stop_gradient, kernels=self.kernels
            )
        return loss, {"z_std": z_std * dim**0.5}
