"""The embeddings of the images last seen: MoCo's negatives, SwAV's additional rows for Sinkhorn.

A ring in which each step's rows, gathered over ranks, take the place of the oldest. It is the same
on every rank and a buffer, so that a checkpoint of rank 0 holds it.
A newcomer's mistake: keeping a pointer. Where a step writes is a function of the step alone.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.methods.method import Scale, check_memory, finite_or_old, gather_rows


class RecentImages(nn.Module):
    """Rows of the last images. Shapes: rows (images, 2, D) fp32, for the two views."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = nn.Buffer(rows)
        self.slot = nn.Buffer(torch.zeros(1, dtype=torch.long), persistent=False)

    def point(self, images_before: int) -> None:
        """Say how many images were put in before this step's."""
        self.slot.fill_(images_before % len(self.rows))

    @torch.no_grad()
    def put(self, z: Tensor, group: dist.ProcessGroup | None) -> None:
        """Take in this rank's z, and those of the other ranks, but no NaN. Shapes: z (2, N, D)."""
        fresh = gather_rows(z.detach().transpose(0, 1), group)
        places = (self.slot + torch.arange(len(fresh), device=fresh.device)) % len(self.rows)
        self.rows.index_copy_(0, places, finite_or_old(fresh, self.rows[places]))


def check_queue(flag: str, length: int, scale: Scale, *, per_image: int, dim: int) -> str:
    """A line that states what a queue takes. Raises ValueError for one shorter than a step, longer
    than the data or the memory left.

    flag: with its value, the length, of which an image takes per_image.
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
