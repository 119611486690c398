"""Method and MethodSpec: what the program asks of a self-supervised method; what several share.

A method is one module: backbone (the encoder that is kept), heads, and in `forward` the loss of the
views. What it carries from step to step (a momentum encoder, a queue, targets) are its buffers and
parameters, so that checkpoints hold it without knowing it.
A method's file also has the dataclass of its flags, a MethodSpec: it answers what the rest of the
program would ask by name, and builds the module.
A newcomer's mistake: a loss summed over ranks. It is the mean over this rank's images; DDP averages
the gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.augment import AugmentConfig
from train.methods.memory import memory_left
from train.network.model import ModelConfig, build_backbone
from train.network.norm import set_kernels, set_sync_group, set_views


class Method(nn.Module):
    """A backbone and what trains it. Subclasses add heads and `forward`."""

    target_steps = 1
    """Batches whose targets `keep_targets` computes before as many steps; 1: none are kept."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.backbone = build_backbone(model)
        self.group: dist.ProcessGroup | None = None

    def finish_init(self, model: ModelConfig, *, num_views: int) -> None:
        """Tell every batch norm of the finished module its slices and kernels."""
        set_views(self, num_views)
        set_kernels(self, model.kernels, recompute=model.recompute)

    def sync_over(self, group: dist.ProcessGroup | None) -> None:
        """Batch norm takes its statistics over all ranks of the group; None: this rank's alone."""
        self.group = group
        set_sync_group(self, group)

    def forward(
        self, views: Tensor, ids: Tensor | None = None, small: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what to log of it, z_std among it.

        Shapes: views (V N, 3, H, W) channels_last, all first views, then all second ones, ...;
        ids (N,) int64, the samples, for methods that remember something of each;
        small (W N, 3, h, w) the views of a smaller size, for methods with multi-crop.
        z_std is multiplied by sqrt(d): about 1 when features are spread out, 0 after collapse.
        """
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """Called before each step, counted from 0. Nothing here may wait for the device."""

    def frozen(self, step: int) -> list[Tensor]:
        """Parameters that the optimizer leaves as they are in this step."""
        return []

    def after_step(self, step: int, total: int) -> None:
        """Called after the optimizer's step, of `total` in the schedule. May not wait either."""

    def start_target(self) -> None:
        """Called after weights of another run were put in: what follows them starts anew."""

    def keep_targets(self, views: Tensor, step: int) -> None:
        """Compute the targets of a step that comes later, where `target_steps` is more than 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class Scale:
    """How large a run is, for what a method keeps of its images."""

    images: int
    """How many there are to train on."""
    batch_size: int
    """Images a step over all ranks."""
    epochs: int
    device: torch.device
    """Where the module will be moved."""
    tell: Callable[[str], None] = lambda line: None
    """Is given a line for what takes memory, before it is taken."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches an epoch."""
        return self.images // self.batch_size


class MethodSpec:
    """What the program asks of a method; subclasses are the dataclasses of the methods' flags."""

    title: ClassVar[str]
    """The method's name as its authors write it."""
    num_views: int = 2
    """Views of each image in full size that go through the network."""
    num_small_views: int = 0
    """Further ones, of a smaller size."""
    least_loss: float | None = None
    """The least value of the loss, which a collapsed run reaches; None where none is known."""
    collapses_by: str | None = None
    """The switch that is off and without which the method collapses, if there is one."""
    has_learning_predictor: bool = False
    """Whether the optimizer has a predictor to train."""
    least_images: int = 0
    """Fewer cannot fill its queue."""

    def ends_in_norm(self, model: ModelConfig) -> bool:
        """Whether the projector ends in batch norm."""
        return False

    def views(self, augment: AugmentConfig) -> list[AugmentConfig]:
        """How each view of an image is drawn."""
        return [augment] * self.num_views

    def check(self, model: ModelConfig, augment: AugmentConfig, epochs: int) -> None:
        """Refuse what the method cannot have of the other groups. Raises: ValueError."""
        if model.head_norm != "default":
            raise ValueError(
                f"--model.head_norm belongs to simsiam, not to {self.title}: leave it out"
            )

    def build(self, model: ModelConfig, scale: Scale) -> Method:
        """The module, on the CPU, its weights drawn from torch's seed.

        Raises: ValueError for settings that these images, or the memory left, do not allow.
        """
        raise NotImplementedError


def collapse_meter(z: Tensor) -> Tensor:
    """std(z/|z|) sqrt(d), the mean over views and channels of the std over images; a scalar.

    Shapes: z (V, N, D). Source: SimSiam section 4.1.
    """
    unit = F.normalize(z.detach().float(), dim=-1)
    return unit.std(dim=1, correction=0).mean() * z.shape[-1] ** 0.5


def gather_rows(x: Tensor, group: dist.ProcessGroup | None, *, dim: int = 0) -> Tensor:
    """The rows of all ranks, in their order, on every rank; no gradient. dim: that of the rows."""
    if group is None:
        return x
    rows = x.detach().movedim(dim, 0).contiguous()
    return _gather(torch.ops._c10d_functional, rows, group).movedim(0, dim)


def gather_with_gradient(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """gather_rows whose rows get back the sum of the gradients that they have on all ranks."""
    if group is None:
        return x
    return _gather(torch.ops._c10d_functional_autograd, x.contiguous(), group)


def _gather(ops: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """By a functional collective, which torch.compile keeps in its graph."""
    gathered = ops.all_gather_into_tensor(rows, dist.get_world_size(group), group.group_name)
    return torch.ops._c10d_functional.wait_tensor(gathered)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks; `x` is changed in place. No gradient."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def finite_or_old(fresh: Tensor, old: Tensor) -> Tensor:
    """Rows of `fresh` where they are finite, else those of `old`: what is kept would stay NaN.

    The optimizer skips such a step; what it would leave behind is left out with it.
    Shapes: both (N, ...).
    """
    is_finite = fresh.isfinite().flatten(1).all(1)
    return torch.where(is_finite.view(-1, *[1] * (fresh.dim() - 1)), fresh, old)


def own_rows(x: Tensor, group: dist.ProcessGroup | None, *, dim: int = 0) -> Tensor:
    """This rank's part of what `gather_rows` gave."""
    if group is None:
        return x
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def check_memory(what: str, remedy: str, *, count: int, dim: int, device: torch.device) -> str:
    """A line that states what `count` rows of `dim` fp32 numbers take.

    Raises: ValueError where they do not fit into the memory left.
    """
    needed = 4 * count * dim
    left = memory_left(device)
    if needed > left:
        raise ValueError(
            f"{what} takes {needed / 2**30:.1f} GiB ({count} x {dim} fp32) and {device} has "
            f"{left / 2**30:.1f} GiB left: {remedy}"
        )
    return (
        f"{what} takes {needed / 2**20:.1f} MiB ({count} x {dim} fp32) on each rank and in "
        "checkpoints"
    )
