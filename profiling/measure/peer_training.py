"""Epochs of another program's SimSiam: our initial weights and recipe, its own data path and step.

lightly: examples/pytorch/simsiam.py of lightly-ai/lightly: LightlyDataset and SimSiamTransform
(torchvision's transforms on PIL images) in a DataLoader with a worker for each core, then its heads
and loss, a pass for each view, NCHW, eager.
official: facebookresearch/simsiam's model and step (measure/peers.py) on views of our loader.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from kernels.normalize import finish_views, normalize_views
from measure.peers import Lightly, Official, import_torchvision, missing
from pipeline.augment import AugmentConfig
from pipeline.loader import view_loader
from pipeline.machine import usable_cores
from train.config import Config, MethodConfig
from train.distributed import World
from train.main import build_state
from train.methods import Method
from train.network.model import autocast
from train.run.data import RunData
from train.run.optim import GuardedStep, Schedule, set_lr
from train.run.state import TrainState

PEERS: dict[str, type[Official]] = {"lightly": Lightly, "official": Official}
LIGHTLY = "lightly", "tqdm", "lightning_utilities"
Views = tuple[Tensor, Tensor]
"""(N, 3, S, S) twice, fp32, normalised, on the training device."""


def check_peer(name: str, config: Config) -> None:
    """Raise ValueError where a peer is not installed, or has no such setting."""
    for package in ("torchvision", *(LIGHTLY if name == "lightly" else ())):
        if (reason := missing(package)) is not None:
            raise ValueError(f"{package} is {reason}; or leave {name} out of --programs")
    model, optim, augment = config.model, config.optim, config.augment
    lacks = {
        "--method.*": config.method != MethodConfig(),
        "groups and wider blocks (--model.arch)": not re.fullmatch(r"resnet\d+", model.arch),
        # oneDNN's gradients of a shortcut are wrong there: SlicedConv in train/network/resnet.py
        "--model.width below 16": model.width < 16,
        "--model.head_norm": model.head_norm != "default",
        "--optim.name lars": optim.name != "sgd",
        "--optim.implementation apex": optim.implementation != "torch",
        "--precision fp16": config.precision == "fp16",
    }
    if name == "lightly":
        lacks |= {
            "--model.projector_layers but 3": model.projector_layers != 3,
            "--augment.scale that ends below 1": augment.scale[1] != 1,
            "--augment.ratio": augment.ratio != AugmentConfig.ratio,
            "--augment.solarize": augment.solarize != 0,
        }
    if found := [flag for flag, is_set in lacks.items() if is_set]:
        flags = ", no ".join(found)
        raise ValueError(f"{name} has no {flags}: change it, or leave {name} out of --programs")


def build_peer(name: str, config: Config, world: World, *, images: int) -> TrainState:
    """The peer's network with the weights that ours starts from, and plain SGD, at step 0."""
    ours = build_state(config, world, images).model
    model = PEERS[name](config)
    copy_weights(ours, model)
    model.to(world.device)
    encoder = [*model.trunk.parameters(), *model.projector.parameters()]
    groups = [
        {"name": "encoder", "params": encoder},
        {"name": "predictor", "params": list(model.predictor.parameters())},
    ]
    optim = config.optim
    optimizer = torch.optim.SGD(groups, config.lr, optim.momentum, weight_decay=optim.weight_decay)
    guard = GuardedStep(optimizer, torch.amp.GradScaler(enabled=False), world.device)
    method = cast(Method, model)  # a checkpoint asks for its state_dict alone
    return TrainState(method, model, optimizer, guard)


@torch.no_grad()
def copy_weights(ours: Method, theirs: Official) -> None:
    """Start a peer's network from our weights; its heads have other names in the same order."""
    theirs.trunk.load_state_dict(ours.backbone.state_dict())
    for name in ("projector", "predictor"):
        heads = (cast(nn.Module, getattr(model, name)).parameters() for model in (ours, theirs))
        for weight, copied in zip(*heads, strict=True):
            copied.copy_(weight)


def lightly_transform(config: Config) -> Any:
    """SimSiamTransform with our augmentations' settings."""
    from lightly.transforms.simsiam_transform import SimSiamTransform

    a = config.augment
    return SimSiamTransform(
        input_size=a.size,
        cj_prob=a.jitter,
        cj_bright=a.brightness,
        cj_contrast=a.contrast,
        cj_sat=a.saturation,
        cj_hue=a.hue,
        min_scale=a.scale[0],
        random_gray_scale=a.gray,
        gaussian_blur=a.blur,
        sigmas=a.blur_sigma,
        hf_prob=a.flip,
        normalize={"mean": list(config.data.mean), "std": list(config.data.std)},
    )


def lightly_epochs(
    config: Config, root: str, device: torch.device
) -> Callable[[int], Iterator[Views]]:
    """The batches of an epoch by its number, which with --seed decides order and views."""
    import_torchvision()  # before lightly does, see there
    from lightly.data import LightlyDataset
    from lightly.data.multi_view_collate import MultiViewCollate

    generator = torch.Generator()
    loader = torch.utils.data.DataLoader(
        LightlyDataset(root, transform=lightly_transform(config)),
        batch_size=config.data.batch_size,
        collate_fn=MultiViewCollate(),
        shuffle=True,
        drop_last=True,
        num_workers=usable_cores(),
        generator=generator,
        multiprocessing_context="fork",  # torchvision, once imported, is in the workers too
    )

    def batches(epoch: int) -> Iterator[Views]:
        seed = np.random.SeedSequence((config.seed, epoch)).generate_state(1)
        generator.manual_seed(int(seed[0]))
        for (first, second), _, _ in loader:
            yield first.to(device), second.to(device)

    return batches


def our_epochs(
    config: Config, data: RunData, schedule: Schedule, device: torch.device
) -> Callable[[int], Iterator[Views]]:
    """The same of our loader, views as measure/step_times.py gives them to the peers."""

    def batches(epoch: int) -> Iterator[Views]:
        first, per_epoch = epoch * schedule.steps_per_epoch, schedule.steps_per_epoch
        steps = range(first, first + per_epoch)
        how = {"views": config.views, "options": config.dali, "device": device}
        values = config.data.mean, config.data.std, torch.float32
        for batch in view_loader(data.train, schedule.order, steps, **how):
            views = finish_views(batch.images, batch.draws)
            one, two = (normalize_views(view, *values, kernels="plain") for view in views)
            yield one.contiguous(), two.contiguous()

    return batches


def train_epoch(
    current: TrainState, config: Config, schedule: Schedule, batches: Iterable[Views]
) -> float:
    """Train on the batches, the clock of `current` running; the mean loss."""
    begin, before = time.perf_counter(), current.step
    total = torch.zeros((), device=current.guard.device)
    each = {"total": schedule.total, "steps_per_epoch": schedule.steps_per_epoch}
    for views in batches:
        set_lr(current.optimizer, config.optim, current.step, lr=config.lr, **each)
        with autocast(config.precision, current.guard.device):
            loss = current.ddp(*views)
        current.optimizer.zero_grad()
        loss.backward()
        current.optimizer.step()
        total += loss.detach()
        current.step += 1
    mean = total.item() / (current.step - before)  # waits for the device
    current.train_s += time.perf_counter() - begin
    return mean
