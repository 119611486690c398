"""The batch norm module of every network here: kernels.batch_norm under torchvision's names.

A newcomer's mistake: setting num_views on one layer. `set_views` and `set_sync_group` walk a model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.batch_norm import (
    Norm,
    batch_norm_act,
    batch_norm_act_conv,
    batch_norm_act_pool,
    block_end,
)
from kernels.choose import Kernels, use_triton


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
        self.kernels: Kernels = "auto"
        self.recompute = False
        self.tracks = True

    @property
    def norm(self) -> Norm:
        """Parameters and running statistics as the operators take them."""
        if self.training and not self.tracks:
            return Norm(self.weight, self.bias, None, None)
        return Norm(self.weight, self.bias, self.running_mean, self.running_var)

    def forward(self, x: Tensor, *, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Shapes: (N, C, H, W) channels_last or (N, C), views as equal slices of N."""
        return batch_norm_act(
            x,
            *self.norm,
            residual=residual,
            relu=relu,
            num_views=self.num_views,
            training=self.training,
            group=self.group,
            kernels=self.kernels,
        )

    def then_conv(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """conv(relu(norm(x))); with `recompute` the normalised map is not kept for backward."""
        if not (self.recompute and self.training and use_triton(self.kernels, x)):
            return conv(self(x, relu=True))
        assert not isinstance(conv.padding, str) and conv.bias is None and conv.groups == 1
        assert conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        return batch_norm_act_conv(
            x,
            self.norm,
            conv.weight,
            stride=(conv.stride[0], conv.stride[1]),
            padding=(conv.padding[0], conv.padding[1]),
            num_views=self.num_views,
            group=self.group,
        )

    def pool(self, x: Tensor) -> Tensor:
        """relu(norm(x)), then max-pool 3x3 of stride 2 (kernels.batch_norm_act_pool)."""
        return batch_norm_act_pool(
            x,
            self.norm,
            num_views=self.num_views,
            training=self.training,
            group=self.group,
            kernels=self.kernels,
        )

    def end_block(
        self, x: Tensor, shortcut: Tensor, downsample: "BatchNorm | None" = None
    ) -> tuple[Tensor, Tensor]:
        """relu(norm(x) + shortcut) for the main branch and the next shortcut (kernels.block_end).

        Shapes: (N, C, H, W) channels_last; with `downsample` the shortcut is normalised by it.
        """
        assert downsample is None or downsample.training == self.training
        return block_end(
            x,
            self.norm,
            shortcut,
            downsample.norm if downsample is not None else None,
            num_views=self.num_views,
            training=self.training,
            group=self.group,
            kernels=self.kernels,
        )


def set_views(model: nn.Module, num_views: int) -> None:
    """Every BatchNorm of the model takes its batch as this many equal slices."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.num_views = num_views


def set_kernels(model: nn.Module, kernels: Kernels, *, recompute: bool = False) -> None:
    """Every BatchNorm of the model runs these kernels, and recomputes what a convolution read."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.kernels, module.recompute = kernels, recompute


def count_batches(model: nn.Module) -> None:
    """One more batch for each view in every num_batches_tracked, in one operation.

    A model calls it once a training step: an addition in each of 57 layers is 57 launches.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    if norms and norms[0].training:
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], norms[0].num_views)


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """In training mode the batch's statistics normalise, and the running ones stay as they are."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.tracks = False
    try:
        yield
    finally:
        for norm in norms:
            norm.tracks = True


def set_sync_group(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Every BatchNorm of the model takes statistics over all ranks of the group (None: local)."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.group = group
