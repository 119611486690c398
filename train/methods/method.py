"""Method and MethodSpec: what the program asks of a self-supervised method; what several share.

A method is one module: backbone (the encoder that is kept), heads, and in `forward` the loss of the
views. What it carries from step to step (a momentum encoder, a queue, targets) are buffers and
parameters, so that checkpoints include it.
A method's file also has the dataclass of its flags, a MethodSpec, which builds the module.
The loss is the mean over this rank's images, not a sum over ranks: DDP averages the gradients.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.augment import AugmentConfig
from train.network.model import ModelConfig, build_backbone, build_projector
from train.network.norm import set_kernels, set_sync_group, set_views

MEMINFO = Path("/proc/meminfo")
OWN_CGROUPS, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


class Method(nn.Module):
    """A backbone and what trains it. Subclasses add heads and `forward`."""

    target_steps = 1
    """Batches whose targets `keep_targets` computes before as many steps; 1: none are kept."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.backbone = build_backbone(model)
        self.group: dist.ProcessGroup | None = None

    def build_projector(self, model: ModelConfig, **options) -> nn.Sequential:
        """A projector of the --model widths; options: as train.network.model.build_projector."""
        features = self.backbone.num_features
        return build_projector(
            features,
            hidden=model.projector_hidden or features,
            outputs=model.projector_dim,
            layers=model.projector_layers,
            **options,
        )

    def finish_init(self, model: ModelConfig, *, num_views: int) -> None:
        """Set the slices and kernels of every batch norm of the finished module."""
        set_views(self, num_views)
        conv_stats = model.conv_stats == "true"
        set_kernels(self, model.kernels, recompute=model.recompute, conv_stats=conv_stats)

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
        """Called before each step, counted from 0. Must not wait for the device."""

    def frozen(self, step: int) -> list[Tensor]:
        """Parameters that the optimizer does not update in this step."""
        return []

    def after_step(self, step: int, total: int) -> None:
        """Called after the optimizer's step, of `total` in the schedule. Must not wait either."""

    def start_target(self) -> None:
        """Called after weights of another run were loaded: resets what follows them."""

    def keep_targets(self, views: Tensor, step: int) -> None:
        """Compute the targets of a later step, where `target_steps` is more than 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class Scale:
    """How large a run is, for methods that keep something of its images."""

    images: int
    """Number of training images."""
    batch_size: int
    """Images a step over all ranks."""
    epochs: int
    device: torch.device
    """Where the module will be moved."""
    tell: Callable[[str], None] = lambda line: None
    """Called with a line for each large buffer, before it is allocated."""

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
    collapse_remedy: str | None = None
    """What to set where a switch is off without which the method collapses."""
    has_learning_predictor: bool = False
    """Whether the optimizer has a predictor to train."""
    least_images: int = 0
    """Fewer cannot fill its queue."""
    is_static: bool = False
    """Whether each step launches the same on the same tensors, so that it can be recorded."""

    def ends_in_norm(self, model: ModelConfig) -> bool:
        """Whether the projector ends in batch norm."""
        return False

    def views(self, augment: AugmentConfig) -> list[AugmentConfig]:
        """How each view of an image is drawn."""
        return [augment] * self.num_views

    def check(self, model: ModelConfig, augment: AugmentConfig, epochs: int) -> None:
        """Refuse settings of the other groups that the method cannot have. Raises: ValueError."""
        if model.head_norm != "default":
            raise ValueError(
                f"--model.head_norm belongs to simsiam, not to {self.title}: leave it out"
            )

    def build(self, model: ModelConfig, scale: Scale) -> Method:
        """The module, on the CPU, its weights drawn from torch's seed.

        Raises: ValueError for settings that these images, or the memory left, do not allow.
        """
        raise NotImplementedError


class MomentumEncoder(nn.Module):
    """Backbone and projector that slowly follow others, of which they start as copies.

        theta' <- m theta' + (1 - m) theta,  after each step

    Only parameters follow: its batch norm has the statistics of its own passes, in training mode.
    It has no gradient, so that neither the optimizer nor DDP sees it; a checkpoint does.
    Source: He et al., CVPR 2020 (MoCo), section 3.2; Grill et al., NeurIPS 2020 (BYOL), equation 1.
    """

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


class RecentImages(nn.Module):
    """The embeddings of the last images: MoCo's negatives, SwAV's additional rows for Sinkhorn.

    A ring in which each step's rows, gathered over ranks, replace the oldest: the same on every
    rank. Where a step writes is a function of the step alone.
    Shapes: rows (images, 2, D) fp32, for the two views.
    """

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Buffer(rows)
        self.slot = nn.Buffer(torch.zeros(1, dtype=torch.long), persistent=False)

    def point(self, images_before: int) -> None:
        """Set how many images were put in before this step's."""
        self.slot.fill_(images_before % len(self.rows))

    @torch.no_grad()
    def put(self, z: Tensor, group: dist.ProcessGroup | None) -> None:
        """Store this rank's z, and those of the other ranks, but no NaN. Shapes: z (2, N, D)."""
        fresh = gather_rows(z.detach().transpose(0, 1), group)
        places = (self.slot + torch.arange(len(fresh), device=fresh.device)) % len(self.rows)
        self.rows.index_copy_(0, places, finite_or_old(fresh, self.rows[places]))


def collapse_meter(z: Tensor) -> Tensor:
    """std(z/|z|) sqrt(d), the mean over views and channels of the std over images; a scalar.

    Shapes: z (V, N, D). Source: SimSiam section 4.1.
    """
    unit = F.normalize(z.detach().float(), dim=-1)
    return unit.std(dim=1, correction=0).mean() * z.shape[-1] ** 0.5


def gather_rows(x: Tensor, group: dist.ProcessGroup | None, *, dim: int = 0) -> Tensor:
    """The rows of all ranks, in rank order, on every rank; no gradient. dim: that of the rows."""
    if group is None:
        return x
    rows = x.detach().movedim(dim, 0).contiguous()
    return _gather(torch.ops._c10d_functional, rows, group).movedim(0, dim)


def gather_with_gradient(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """gather_rows whose backward pass returns the sum of the gradients of all ranks."""
    if group is None:
        return x
    return _gather(torch.ops._c10d_functional_autograd, x.contiguous(), group)


def _gather(ops: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """By a functional collective, which torch.compile keeps in its graph."""
    gathered = ops.all_gather_into_tensor(rows, dist.get_world_size(group), group.group_name)
    return torch.ops._c10d_functional.wait_tensor(gathered)


def own_rows(x: Tensor, group: dist.ProcessGroup | None, *, dim: int = 0) -> Tensor:
    """This rank's part of the result of `gather_rows`."""
    return x if group is None else x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks; `x` is changed in place. No gradient."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def finite_or_old(fresh: Tensor, old: Tensor) -> Tensor:
    """Rows of `fresh` where they are finite, else those of `old`: a stored NaN would stay.

    The optimizer skips such a step too. Shapes: both (N, ...).
    """
    is_finite = fresh.isfinite().flatten(1).all(1)
    return torch.where(is_finite.view(-1, *[1] * (fresh.dim() - 1)), fresh, old)


def check_memory(what: str, remedy: str, *, count: int, dim: int, device: torch.device) -> str:
    """A line that states what `count` rows of `dim` fp32 numbers take.

    Raises: ValueError where they do not fit into the memory left.
    """
    needed, left = 4 * count * dim, memory_left(device)
    if needed > left:
        raise ValueError(
            f"{what} takes {needed / 2**30:.1f} GiB ({count} x {dim} fp32) and {device} has "
            f"{left / 2**30:.1f} GiB left: {remedy}"
        )
    rows = f"{needed / 2**20:.1f} MiB ({count} x {dim} fp32)"
    return f"{what} takes {rows} on each rank and in checkpoints"


def check_queue(flag: str, length: int, scale: Scale, *, per_image: int, dim: int) -> str:
    """A line that states what a queue takes; flag: with its value, the length in rows.

    Raises: ValueError for one shorter than a step, longer than the data or the memory left.
    """
    batch_size, images = scale.batch_size, scale.images
    kept = length // per_image
    if kept < batch_size:
        raise ValueError(
            f"{flag} holds the rows of {kept} images, a step has {batch_size}: take at "
            f"least {per_image * batch_size}"
        )
    if kept > images:
        raise ValueError(
            f"{flag} holds the rows of {kept} images, there are {images}: take at most "
            f"{per_image * images}"
        )
    return check_memory(flag, "take a shorter one", count=2 * kept, dim=dim, device=scale.device)


def memory_left(device: torch.device) -> int:
    """Bytes that this process can allocate: of a GPU, or of the machine and its control groups.

    In a container or a Slurm job the group's limit counts, at which the kernel ends the process
    without a word. File caches count as free: images that were read stay in memory until it is
    needed.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    rows = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    return min([int(rows["MemAvailable"].split()[0]) << 10, *left_in_cgroups()])


def left_in_cgroups() -> Iterator[int]:
    """Bytes left in each limited control group that this process is in, versions 1 and 2."""
    lines = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            top, limit, usage, prefix = CGROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, prefix = CGROUPS / "memory", "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container `group` may be the host's name
            if not folder.is_relative_to(top) or not (folder / limit).exists():
                continue
            if (most := (folder / limit).read_text().strip()) != "max":
                stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                files = (f"{prefix}{kind}_file" for kind in ("active", "inactive"))
                cached = sum(int(stat.get(name, 0)) for name in files)
                yield int(most) - int((folder / usage).read_text()) + cached
