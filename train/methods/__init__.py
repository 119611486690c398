"""The self-supervised methods, one file each; `build_method` makes the one of a configuration."""

import torch

from train.config import Config
from train.methods.method import Method
from train.methods.simsiam import SimSiam
from train.methods.targets import Alternation, MovingAverage

__all__ = ["Method", "build_method"]


def build_method(config: Config, *, images: int, device: torch.device) -> Method:
    """The method that the configuration names, on the CPU, its weights drawn from torch's seed.

    images: how many there are to train on; device: where the module will be moved.
    Raises: ValueError for settings that these images, or the memory left, do not allow.
    """
    method, model = config.method, config.model
    steps_per_epoch = images // config.data.batch_size
    if method.target_steps > steps_per_epoch:
        raise ValueError(
            f"--method.target_steps {method.target_steps} exceeds the {steps_per_epoch} steps of "
            "an epoch: take fewer; 0 takes an epoch's"
        )
    if method.target_steps != 1:
        return Alternation(
            model,
            method,
            target_steps=method.target_steps or steps_per_epoch,
            batch_size=config.data.batch_size,
            device=device,
        )
    if method.moving_average:
        return MovingAverage(model, method, images=images, device=device)
    return SimSiam(model, method)
