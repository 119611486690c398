"""The momentum encoder of BYOL and MoCo: a copy of the encoder that follows it slowly.

    theta' <- m theta' + (1 - m) theta,  after each step

It has batch norm of its own, whose statistics are those of its own passes; only parameters follow.
It has no gradient, so that neither the optimizer nor DDP sees it; a checkpoint does.
A newcomer's mistake: eval mode. The target is computed as in training, from the batch's statistics.
Source: He et al., CVPR 2020 (MoCo), section 3.2; Grill et al., NeurIPS 2020 (BYOL), equation 1.
"""

import copy

import torch
from torch import Tensor, nn


class MomentumEncoder(nn.Module):
    """Backbone and projector that follow others, of which they start as copies."""

    def __init__(self, backbone: nn.Module, projector: nn.Module):
        super().__init__()
        self.backbone = copy.deepcopy(backbone).requires_grad_(False)
        self.projector = copy.deepcopy(projector).requires_grad_(False)

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """z' of the views. Shapes: (V N, 3, H, W) -> (V N, D)."""
        return self.projector(self.backbone(views))

    @torch.no_grad()
    def follow(self, backbone: nn.Module, projector: nn.Module, momentum: float) -> None:
        """Move towards the parameters of the two by the share 1 - momentum."""
        theirs = *backbone.parameters(), *projector.parameters()
        torch._foreach_lerp_(tuple(self.parameters()), theirs, 1 - momentum)
