"""The self-supervised methods, one file each; `build_method` makes the one of a configuration."""

from collections.abc import Callable

import torch

from train.config import Config
from train.methods.byol import BYOL
from train.methods.method import Method, check_memory
from train.methods.moco import MoCo
from train.methods.recent import check_queue
from train.methods.simclr import SimCLR
from train.methods.simsiam import SimSiam
from train.methods.swav import SwAV
from train.methods.targets import Alternation, MovingAverage

__all__ = ["Method", "build_method"]


def build_method(
    config: Config, *, images: int, device: torch.device,
    tell: Callable[[str], None] = lambda line: None,
) -> Method:  # fmt: skip
    """The method that the configuration names, on the CPU, its weights drawn from torch's seed.

    images: how many there are to train on; device: where the module will be moved; tell: is told
    what a queue or kept targets take, before they take it.
    Raises: ValueError for settings that these images, or the memory left, do not allow.
    """
    method, model, batch_size = config.method, config.model, config.data.batch_size
    steps_per_epoch = images // batch_size
    if method.name == "byol":
        return BYOL(model, method.byol)
    if method.name == "simclr":
        return SimCLR(model, method.simclr)
    memory = {
        "batch_size": batch_size, "images": images, "dim": model.projector_dim, "device": device,
    }  # fmt: skip
    if method.name == "swav":
        queue = method.swav.queue
        if queue:
            tell(check_queue(f"--method.swav.queue {queue}", queue, per_image=1, **memory))
            steps = (config.epochs - method.swav.queue_from_epoch) * steps_per_epoch
            if (steps - 1) * batch_size < queue:
                tell(
                    f"warning: --method.swav.queue {queue} is never full, and so never used, in "
                    f"{config.epochs} epochs: it fills from --method.swav.queue_from_epoch "
                    f"{method.swav.queue_from_epoch} on"
                )
        return SwAV(model, method.swav, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
    if method.name == "moco":
        keys = method.moco.queue
        tell(check_queue(f"--method.moco.queue {keys}", keys, per_image=2, **memory))
        return MoCo(model, method.moco, batch_size=batch_size)
    if method.target_steps > steps_per_epoch:
        raise ValueError(
            f"--method.target_steps {method.target_steps} exceeds the {steps_per_epoch} steps of "
            "an epoch: take fewer; 0 takes an epoch's"
        )
    target_steps = method.target_steps or steps_per_epoch
    if target_steps != 1:  # the loop makes no targets for a block of one: that is SimSiam
        tell(check_memory(
            f"keeping the targets of {target_steps} steps (--method.target_steps)",
            "take fewer steps, or a smaller --model.projector_dim",
            count=target_steps * 2 * batch_size, dim=model.projector_dim, device=device,
        ))  # fmt: skip
        return Alternation(model, method, target_steps=target_steps, batch_size=batch_size)
    if method.moving_average:
        tell(check_memory(
            f"a moving average of each of {images} images (--method.moving_average)",
            "take a smaller --model.projector_dim, or fewer images",
            count=images, dim=model.projector_dim, device=device,
        ))  # fmt: skip
        return MovingAverage(model, method, images=images)
    return SimSiam(model, method)
