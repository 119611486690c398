"""The batch norm module of every network here: kernels.batch_norm under torchvision's names.

A newcomer's mistake: setting num_views on one layer. `set_views` and `set_sync_group` walk a model.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.batch_norm import batch_norm_act


class BatchNorm(nn.Module):
    """Batch norm with optional residual and ReLU in the same call; statistics per view.

    Parameters and buffers are named and initialised as nn.BatchNorm2d's, so checkpoints exchange.
    """

    def __init__(self, num_features: int, *, affine: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.running_mean = nn.Buffer(torch.zeros(num_features))
        self.running_var = nn.Buffer(torch.ones(num_features))
        self.num_batches_tracked = nn.Buffer(torch.tensor(0, dtype=torch.long))
        self.num_views = 1
        self.group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor, *, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Shapes: (N, C, H, W) channels_last or (N, C), views as equal slices of N."""
        if self.training:
            self.num_batches_tracked.add_(self.num_views)
        return batch_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            residual=residual,
            relu=relu,
            num_views=self.num_views,
            training=self.training,
            group=self.group,
        )


def set_views(model: nn.Module, num_views: int) -> None:
    """Every BatchNorm of the model takes its batch as this many equal slices."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.num_views = num_views


def set_sync_group(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Every BatchNorm of the model takes statistics over all ranks of the group (None: local)."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.group = group
