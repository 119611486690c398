"""Which process this is among all of them, and the few collectives outside the model.

One process without torchrun is a world of one rank and has no process group.
A newcomer's mistake: a collective on one rank only. Every function here is called by all ranks.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from train.distributed.watch import Watch


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    host_group: Any
    """A gloo group of all ranks, for what the host decides; None in a world of one."""
    watch: Watch | None = None
    """Knows which rank is gone; None in a world of one."""
    sums: Any = None
    """The group of synchronised batch norm: all ranks, a communicator of its own; None for one."""

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and talks to the user."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks, or None where there is one."""
        return dist.group.WORLD if self.size > 1 else None

    def alone(self) -> "World":
        """This process as a world of one on the same device, which waits for no other rank."""
        return World(0, 1, 0, 1, self.device, None)


def from_main(world: World, value: Any) -> Any:
    """rank 0's value on every rank (pickled: only between processes of one run)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.host_group)
    return box[0]


def gather(world: World, value: Any) -> list:
    """The values of all ranks, in order, on every rank."""
    if world.size == 1:
        return [value]
    values: list = [None] * world.size
    dist.all_gather_object(values, value, group=world.host_group)
    return values


def mean(world: World, value: Tensor) -> Tensor:
    """The mean over ranks; `value` is changed in place."""
    if world.size > 1:
        dist.all_reduce(value, group=world.group)
        value /= world.size
    return value


def own_buffers() -> dict[str, Any]:
    """DistributedDataParallel's flag to broadcast no buffers, which torch 2.13 renamed."""
    names = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"
    return {new if new in names else old: False}
