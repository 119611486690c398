"""The self-supervised methods, one file each; `build_method` makes the one of a configuration."""

import torch

from train.config import Config
from train.methods.byol import BYOL
from train.methods.method import Method
from train.methods.moco import MoCo
from train.methods.recent import check_queue
from train.methods.simclr import SimCLR
from train.methods.simsiam import SimSiam
from train.methods.swav import SwAV
from train.methods.targets import Alternation, MovingAverage

__all__ = ["Method", "build_method"]


def build_method(config: Config, *, images: int, device: torch.device) -> Method:
    """The method that the configuration names, on the CPU, its weights drawn from torch's seed.

    images: how many there are to train on; device: where the module will be moved.
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
            check_queue(f"--method.swav.queue {queue}", queue, **memory)
        return SwAV(model, method.swav, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
    if method.name == "moco":
        keys = method.moco.queue
        check_queue(f"--method.moco.queue {keys}", keys // 2, **memory)
        return MoCo(model, method.moco, batch_size=batch_size)
    if method.target_steps > steps_per_epoch:
        raise ValueError(
            f"--method.target_steps {method.target_steps} exceeds the {steps_per_epoch} steps of "
            "an epoch: take fewer; 0 takes an epoch's"
        )
    target_steps = method.target_steps or steps_per_epoch
    if target_steps != 1:  # the loop makes no targets for a block of one: that is SimSiam
        return Alternation(
            model, method, target_steps=target_steps, batch_size=batch_size, device=device
        )
    if method.moving_average:
        return MovingAverage(model, method, images=images, device=device)
    return SimSiam(model, method)
