"""BatchNorm: kernels.batch_norm as a module with torchvision's names; what sets a whole model's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.batch_norm import (
    Norm,
    NormOptions,
    Part,
    batch_norm_act,
    batch_norm_act_conv,
    batch_norm_act_pool,
    block_end,
    conv_statistics,
)
from kernels.choose import Kernels, use_triton
from kernels.norm_autograd import ConvOptions


class Conv(nn.Conv2d):
    """A convolution whose kernels may also sum for the batch norms before and after it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        assert not isinstance(self.padding, str) and self.bias is None
        assert self.dilation == (1, 1) and self.padding_mode == "zeros"
        self.options = ConvOptions(self.stride, self.padding, self.groups)

    @property
    def can_sum(self) -> bool:
        """Whether it is a matrix product of the rows of its input; a subclass slices it first."""
        is_whole = type(self) is Conv and self.groups == 1
        return is_whole and self.kernel_size == self.stride == (1, 1)


class Convolved(NamedTuple):
    """A convolution's output, and what its kernel summed for the batch norm that follows."""

    x: Tensor
    part: Part = None


class BatchNorm(nn.Module):
    """Batch norm with ReLU, and what follows it, in one call; statistics per view.

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
            return Norm(self.weight, self.bias)
        return Norm(self.weight, self.bias, self.running_mean, self.running_var)

    @property
    def options(self) -> NormOptions:
        """What set_views, set_kernels and set_sync_group have set."""
        return NormOptions(self.num_views, self.training, self.group, self.kernels)

    def forward(self, x: Tensor, *, relu: bool = False, part: Part = None) -> Tensor:
        """Shapes: (N, C, H, W) channels_last or (N, C), views as equal slices of N."""
        return batch_norm_act(x, self.norm, self.options._replace(relu=relu), part=part)

    def runs_triton(self, x: Tensor) -> bool:
        """Whether this call runs the Triton kernels of training."""
        return self.training and use_triton(self.kernels, x)

    def convolve(self, x: Tensor, conv: Conv) -> Convolved:
        """conv(x), before or after this batch norm."""
        if conv.options.statistics and self.runs_triton(x):
            return Convolved(*conv_statistics(x, conv.weight, self.options))
        return Convolved(conv(x))

    def then_conv(self, x: Convolved, conv: Conv) -> Convolved:
        """conv(relu(norm(x)))."""
        how = conv.options._replace(recompute=self.recompute)
        if not ((how.recompute or how.reduce) and self.runs_triton(x.x)):
            return self.convolve(self(x.x, relu=True, part=x.part), conv)
        parts = x.part, None
        z, part, _ = batch_norm_act_conv(
            x.x, self.norm, conv.weight, self.options, conv=how, parts=parts
        )
        return Convolved(z, part)

    def pool(self, x: Tensor) -> Tensor:
        """relu(norm(x)), then max-pool 3x3 of stride 2 (kernels.batch_norm_act_pool)."""
        return batch_norm_act_pool(x, self.norm, self.options)

    def end_block(
        self, x: Convolved, shortcut: Convolved, downsample: "BatchNorm | None" = None
    ) -> tuple[Tensor, Tensor]:
        """relu(norm(x) + shortcut) for the main branch and the next shortcut (kernels.block_end).

        Shapes: (N, C, H, W) channels_last; with `downsample` the shortcut is normalised by it.
        """
        assert downsample is None or downsample.training == self.training
        norm2 = downsample.norm if downsample is not None else None
        parts = x.part, shortcut.part
        return block_end(x.x, self.norm, shortcut.x, norm2, self.options, parts=parts)

    def end_block_then_conv(
        self, x: Convolved, shortcut: Convolved, downsample: "BatchNorm | None", conv: Conv
    ) -> tuple[Convolved, Tensor]:
        """conv(y) and y, the next shortcut, with y that of end_block."""
        if not (conv.options.reduce and self.runs_triton(x.x)):
            main, skip = self.end_block(x, shortcut, downsample)
            return self.convolve(main, conv), skip
        z, part, skip = batch_norm_act_conv(
            x.x,
            self.norm,
            conv.weight,
            self.options,
            conv=conv.options,
            shortcut=shortcut.x,
            shortcut_norm=downsample.norm if downsample is not None else None,
            parts=(x.part, shortcut.part),
        )
        assert skip is not None
        return Convolved(z, part), skip


def norms_of(model: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm of the model."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def set_views(model: nn.Module, num_views: int) -> None:
    """Every BatchNorm of the model takes its batch as this many equal slices."""
    for norm in norms_of(model):
        norm.num_views = num_views


def set_kernels(
    model: nn.Module, kernels: Kernels, *, recompute: bool = False, conv_stats: bool = False
) -> None:
    """Every BatchNorm of the model runs these kernels, and recomputes what a convolution read.

    conv_stats: every convolution that can sums for the batch norms beside it, in both directions.
    """
    for norm in norms_of(model):
        norm.kernels, norm.recompute = kernels, recompute
    for conv in model.modules():
        if isinstance(conv, Conv) and conv.can_sum:
            conv.options = conv.options._replace(statistics=conv_stats, reduce=conv_stats)


def set_sync_group(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Every BatchNorm of the model takes statistics over all ranks of the group (None: local)."""
    for norm in norms_of(model):
        norm.group = group


def count_batches(model: nn.Module) -> None:
    """Add a batch for each view to every num_batches_tracked, in one operation.

    A model calls it once a training step: an addition in each of 57 layers is 57 launches.
    """
    norms = norms_of(model)
    if norms and norms[0].training:
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], norms[0].num_views)


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """In training mode the batch's statistics normalise, and the running ones stay as they are."""
    norms = norms_of(model)
    for norm in norms:
        norm.tracks = False
    try:
        yield
    finally:
        for norm in norms:
            norm.tracks = True
