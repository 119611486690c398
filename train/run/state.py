"""TrainState: all that a run needs to go on where it was, and its way to disk and back.

A newcomer's mistake: adding something random without a key. Order and views are functions of
(seed, step), so that the position is one integer; what else changes from step to step belongs here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from train.config import Config, DataConfig, MethodConfig, flat
from train.distributed import World
from train.methods import Method, Scale
from train.run import checkpoint
from train.run.folder import RunWriter
from train.run.optim import GuardedStep

# what may differ between two starts of one run: it changes neither the weights nor the batches
FREE = {"out", "max_steps", "log_every", "checkpoint_every", "timeout_s", "device", "compile",
        "eval", "dali"}  # fmt: skip
FREE_PARTS = {"data.root", "data.val", "data.max_bad_fraction", "model.recompute"}
# the fingerprint stands for the images; recomputing gives the same bits
STAYING = {"target", "queue"}  # parts of a method that a new run does not start from


@dataclass
class TrainState:
    """Model, optimizer, position, clock."""

    model: Method
    """The method without DDP around it: its names are those in the checkpoint."""
    ddp: nn.Module
    """The model as it is called: with DDP around it where there are several ranks."""
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


def build_method(
    config: Config,
    *,
    images: int,
    device: torch.device,
    tell: Callable[[str], None] = lambda line: None,
) -> Method:
    """The method that the configuration names, as MethodSpec.build; parameters as Scale's."""
    scale = Scale(images, config.data.batch_size, config.epochs, device, tell)
    return config.method.spec.build(config.model, scale)


def run_facts(config: Config, fingerprint: str, world: World) -> dict:
    """What a checkpoint must agree with to be continued."""
    return {"config": comparable(config), "data": fingerprint, "world": world.size}


def comparable(config: Config) -> dict[str, str]:
    """The settings that change the result, by flag name, as text; of one method, the one named."""
    others = {flag for owner, flag in config.method.switches() if owner != config.method.name}
    left_out = FREE | FREE_PARTS | others
    return {
        flag: value
        for flag, value in flat(config).items()
        if not {flag, flag.split(".")[0]} & left_out
    }


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
    return checkpoint.save(folder, state.step, tensors, values, facts=facts)


def save_checkpoint(state: TrainState, run: RunWriter, *, is_last: bool = False) -> None:
    """Save in the run folder on rank 0; a full disk is a warning, training continues.

    Raises: CheckpointError where this `is_last`: no later step can be saved.
    """
    if run.folder is None:
        return
    try:
        save(state, run.folder.checkpoints, run.facts)
        run.folder.status("running", state.step)
    except OSError as error:
        if is_last:
            raise
        run.log.warn(f"{error}. Training continues; the checkpoint before, if any, is kept")


def check_same_run(found: dict, facts: dict, run: Path) -> None:
    """Raise ValueError if a checkpoint is of another configuration or other images."""
    if "imported" in found:
        raise ValueError(
            f"{run} holds weights of {found['imported']['file']}, not a run of its own: train on "
            f"from them with --init {run} and another --out"
        )
    now = facts["config"]
    was, is_now = found["config"].get("method.name", MethodConfig().name), now["method.name"]
    if was != is_now:
        raise ValueError(
            f"{run} holds a checkpoint of {was}, this run is of {is_now}: take --method.name {was} "
            "to continue it, or another --out for a new run"
        )
    # a setting that is younger than the checkpoint had then what is its default now
    default = Config(data=DataConfig(root=""), method=MethodConfig(name=is_now))
    before = comparable(default) | found["config"]
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


def check_fits(expected: checkpoint.Tensors, given: checkpoint.Tensors) -> None:
    """Raise ValueError if `given` has a part of a network (backbone, ...) that is not as expected.

    A part that it lacks whole is no error: the heads may be missing.
    """
    parts = {name.split(".")[0] for name in given}
    there = {name: tuple(tensor.shape) for name, tensor in given.items()}
    here = {n: tuple(tensor.shape) for n, tensor in expected.items() if n.split(".")[0] in parts}
    wrong = [
        f"{name} is {there.get(name, 'missing')} and must be {here.get(name, 'absent')}"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{'; '.join(wrong[:3])}{more}")


def start_from(model: Method, run: Path, *, log: Callable[[str], None]) -> None:
    """Give the model the weights of another run's newest checkpoint, part by part.

    What the method keeps of images or of earlier weights (targets, a queue, a momentum encoder) is
    that run's and stays behind.
    Raises: ValueError if there is no checkpoint, or a part has other shapes.
    """
    found = checkpoint.load_newest(run / "checkpoints", log=log)
    if found is None:
        raise ValueError(
            f"--init {run} holds no checkpoint: give the --out of a training, or what "
            "train/import_checkpoint.py wrote"
        )
    expected = model.state_dict()
    parts = list(dict.fromkeys(name.split(".")[0] for name in expected if "." in name))
    parts = [part for part in parts if part not in STAYING]
    weights = {
        name: value for name, value in found.tensors["model"].items() if name.split(".")[0] in parts
    }
    try:
        check_fits(expected, weights)
    except ValueError as error:
        theirs = found.facts.get("config", {}).get("method.name", "another tool")
        raise ValueError(
            f"--init {run} (of {theirs}) has another network: {error}. Take its settings: "
            f"--config {run / 'config.yaml'}"
        ) from error
    model.load_state_dict(weights, strict=False)
    model.start_target()
    given = {name.split(".")[0] for name in weights}
    taken = ", ".join(part for part in parts if part in given)
    drawn = ", ".join(part for part in parts if part not in given)
    log(f"{taken} from {found.path}" + f"; random: {drawn}" * bool(drawn))
