"""TrainState: all that a run needs to go on where it was, and its way to disk and back.

A newcomer's mistake: adding something random without a key. Order and views are functions of
(seed, step), so that the position is one integer; what else changes from step to step belongs here.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from train import checkpoint
from train.config import Config
from train.distributed import World
from train.methods import Method
from train.optim import GuardedStep

# what may differ between two starts of one run: it changes neither the weights nor the batches
FREE = {"out", "max_steps", "log_every", "checkpoint_every", "device", "compile", "eval", "dali"}
FREE_PARTS = {"data.root", "data.val", "data.max_bad_fraction", "model.recompute"}
# the fingerprint stands for the images; recomputing gives the same bits


@dataclass
class TrainState:
    """Model, optimizer, position, clock."""

    model: Method
    """The method without DDP around it: its names are those in the checkpoint."""
    optimizer: torch.optim.Optimizer
    guard: GuardedStep
    step: int = 0
    """Steps done."""
    train_s: float = 0.0
    """Seconds spent in training steps, evaluation and checkpoints left out."""
    wait_s: float = 0.0
    """Seconds of those spent waiting for data."""
    knn: dict[str, float] = field(default_factory=dict)
    """kNN top-1 by step (as text, for JSON)."""
    last: dict[str, float] = field(default_factory=dict)
    """The last logged scalars."""

    @property
    def names(self) -> dict[nn.Parameter, str]:
        """Parameter names, by which the optimizer's state is kept."""
        return {parameter: name for name, parameter in self.model.named_parameters()}


def about(config: Config, fingerprint: str, world: World) -> dict:
    """What a checkpoint must agree with to be continued."""
    return {"config": comparable(config), "data": fingerprint, "world": world.size}


def comparable(config: Config) -> dict[str, str]:
    """The settings that change the result, by flag name, as text."""
    settings = {}
    for name, value in dataclasses.asdict(config).items():
        if name in FREE:
            continue
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, inner in parts:
            if f"{name}.{part}" not in FREE_PARTS:
                settings[f"{name}.{part}".rstrip(".")] = str(inner)
    return settings


def save(state: TrainState, folder: Path, facts: dict) -> Path:
    """Write a checkpoint of the state; on rank 0 only. Raises: CheckpointError."""
    optimizer, options = checkpoint.flatten_optimizer(state.optimizer, state.names)
    tensors = {
        "model": dict(state.model.state_dict()),
        "optimizer": optimizer,
        "rng": checkpoint.rng_state(),
    }
    values = {
        "optimizer": options,
        "scaler": state.guard.scaler.state_dict(),
        "train_s": state.train_s,
        "wait_s": state.wait_s,
        "knn": state.knn,
        "last": state.last,
    }
    return checkpoint.save(folder, state.step, tensors, values, about=facts)


def check_same_run(found: dict, facts: dict, run: Path) -> None:
    """Raise ValueError if a checkpoint is of another configuration or other images."""
    before, now = found["config"], facts["config"]
    changed = [
        f"{name} was {before.get(name)} and is {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{run} holds a run with other settings: {'; '.join(changed)}. "
            "Use the same settings to continue it, or another --out for a new run"
        )
    if found["data"] != facts["data"]:
        raise ValueError(
            f"{run} was trained on other images (files were added, removed or changed under "
            "--data.root). Restore them to continue, or use another --out for a new run"
        )


def restore(state: TrainState, found: checkpoint.Checkpoint) -> None:
    """Put a verified checkpoint into the state, in place."""
    state.model.load_state_dict(found.tensors["model"])
    checkpoint.restore_optimizer(
        state.optimizer, state.names, found.tensors["optimizer"], found.state["optimizer"]
    )
    checkpoint.restore_rng(found.tensors["rng"])
    state.guard.scaler.load_state_dict(found.state["scaler"])
    state.step = found.step
    for name in ("train_s", "wait_s", "knn", "last"):
        setattr(state, name, found.state[name])
