"""TrainState: all that a run needs to resume, saved to disk and restored.

Order and views are functions of (seed, step), so that the position is one integer; whatever else
changes from step to step belongs into TrainState.
"""

import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from pipeline.sources.folder import ImageFolder, printable
from pipeline.sources.shards import ImageSource
from train.config import Config, DataConfig, MethodConfig, flat
from train.distributed import World, gather
from train.methods import Method, Scale
from train.run import checkpoint
from train.run.folder import RunWriter
from train.run.optim import GuardedStep
from train.run.step_graph import StepGraph

# may differ between two starts of one run: they change neither the weights nor the batches; images
# are compared by fingerprint, recomputing gives the same bits
FREE = {"out", "max_steps", "log_every", "checkpoint_every", "timeout_s", "device", "compile"}
FREE |= {"eval", "dali", "data.root", "data.val", "data.max_bad_fraction"}
FREE |= {"data.verify", "model.recompute", "cuda_graph"}
CLOCKS = ("train_s", "wait_s", "knn", "last", "health")  # fields that are saved as JSON
NOT_INHERITED = {"target", "queue"}  # parts of a method that a new run does not start from


@dataclass
class TrainState:
    """Model, optimizer, position, clock."""

    model: Method
    """The method without DDP around it: its names are those in the checkpoint."""
    ddp: nn.Module
    """The model as it is called: with DDP around it where there are several ranks."""
    optimizer: torch.optim.Optimizer
    guard: GuardedStep
    graph: StepGraph | None = None
    """Records and replays the steps; None: each is launched kernel by kernel."""
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
    health: dict = field(default_factory=dict)
    """The last measurement of rank and spectrum (evaluation/health.measure_health)."""

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
    """What a checkpoint must agree with to be resumed."""
    return {"config": comparable(config), "data": fingerprint, "world": world.size}


def comparable(config: Config) -> dict[str, str]:
    """The settings that change the result as text by flag name, other methods' left out."""
    others = {flag for owner, flag in config.method.switches() if owner != config.method.name}
    left_out = FREE | others
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
    values = {"optimizer": options, "scaler": state.guard.scaler.state_dict()}
    values |= {name: getattr(state, name) for name in CLOCKS}
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


def warn_of_differing_ranks(state: TrainState, world: World, warn: Callable[[str], None]) -> None:
    """Warn of ranks whose weights are not those of most ranks, bit for bit. Called by all ranks.

    Averaged gradients keep equal ranks equal, and no loss shows that one is not. Each weight is
    read once: sums of its bits are compared.
    """
    if world.size == 1:
        return
    parameters = [parameter.detach() for parameter in state.model.parameters()]
    sums = torch.stack([p.view(torch.int32).sum() for p in parameters]).tolist()
    everywhere = gather(world, (socket.gethostname(), tuple(sums)))
    usual, _ = Counter(theirs for _, theirs in everywhere).most_common(1)[0]
    others = [
        f"rank {rank} on host {host}"
        for rank, (host, theirs) in enumerate(everywhere)
        if theirs != usual
    ]
    if others:
        warn(
            f"the weights of {', '.join(others)} are not those of the other ranks: a GPU, memory "
            "or a link is faulty. Start the same command again: all ranks then load rank 0's "
            "checkpoint"
        )


def check_same_run(saved: dict, facts: dict, run: Path) -> None:
    """Raise ValueError if a checkpoint is of another configuration or of other images."""
    if "imported" in saved:
        raise ValueError(
            f"{run} holds imported weights of {saved['imported']['file']}, not a run: start from "
            f"them with --init {run} and another --out"
        )
    now = facts["config"]
    was, is_now = saved["config"].get("method.name", MethodConfig().name), now["method.name"]
    if was != is_now:
        raise ValueError(
            f"{run} holds a checkpoint of {was}, this run is of {is_now}: set --method.name {was} "
            "to continue it, or another --out for a new run"
        )
    # a setting that did not exist when the checkpoint was saved had today's default
    default = Config(data=DataConfig(root=""), method=MethodConfig(name=is_now))
    before = comparable(default) | saved["config"]
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
    is_known = "content" in saved and "content" in facts
    if saved["data"] != facts["data"] or (is_known and saved["content"] != facts["content"]):
        raise ValueError(
            f"{run} was trained on other images (files were added, removed or changed under "
            "--data.root). Restore them to continue, or use another --out for a new run"
        )


def tell_changes(
    saved: checkpoint.Checkpoint, source: ImageSource, facts: dict, warn: Callable[[str], None]
) -> None:
    """Warn of images that may be others than the run's, of the same names and sizes. On rank 0."""
    if "content" in facts and "content" not in saved.facts:
        warn("the run was begun without --data.verify: the images' content is not compared")
    if not isinstance(source, ImageFolder) or "content" in facts:
        return
    written, path = source.newest
    if written > saved.path.stat().st_mtime:
        warn(
            f"images of {source.root} were written to after the checkpoint, such as "
            f"{printable(path)}: the run continues with them as they are now"
        )


def restore(state: TrainState, saved: checkpoint.Checkpoint) -> None:
    """Load a verified checkpoint into the state, in place."""
    tensors, values = saved.tensors, saved.state
    state.model.load_state_dict(tensors["model"])
    options = tensors["optimizer"], values["optimizer"]
    checkpoint.restore_optimizer(state.optimizer, state.names, *options)
    checkpoint.restore_rng(tensors["rng"])
    state.guard.scaler.load_state_dict(values["scaler"])
    state.step = saved.step
    for name in CLOCKS:
        setattr(state, name, values.get(name, getattr(state, name)))  # older ones have fewer


def check_fits(expected: checkpoint.Tensors, given: checkpoint.Tensors) -> None:
    """Raise ValueError if `given` has a part of a network (backbone, ...) with other shapes.

    A part that is missing as a whole is no error: there may be no heads.
    """
    parts = {name.split(".")[0] for name in given}
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    needed = {n: tuple(tensor.shape) for n, tensor in expected.items() if n.split(".")[0] in parts}
    wrong = [
        f"{name} is {shapes.get(name, 'missing')} and must be {needed.get(name, 'absent')}"
        for name in dict.fromkeys([*needed, *shapes])
        if needed.get(name) != shapes.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{'; '.join(wrong[:3])}{more}")


def start_from(model: Method, run: Path, *, log: Callable[[str], None]) -> None:
    """Load the weights of another run's newest checkpoint into the model, part by part.

    What the method keeps of images or of earlier weights (targets, a queue, a momentum encoder) is
    not loaded. Raises: ValueError if there is no checkpoint, or a part has other shapes.
    """
    saved = checkpoint.load_newest(run / "checkpoints", log=log)
    if saved is None:
        raise ValueError(
            f"--init {run} holds no checkpoint: give the --out of a training, or what "
            "train/import_checkpoint.py wrote"
        )
    expected = model.state_dict()
    parts = dict.fromkeys(name.split(".")[0] for name in expected if "." in name)
    parts = [part for part in parts if part not in NOT_INHERITED]
    loaded = saved.tensors["model"].items()
    weights = {name: value for name, value in loaded if name.split(".")[0] in parts}
    try:
        check_fits(expected, weights)
    except ValueError as error:
        theirs = saved.facts.get("config", {}).get("method.name", "another tool")
        raise ValueError(
            f"--init {run} (of {theirs}) has another network: {error}. Use its settings: "
            f"--config {run / 'config.yaml'}, with another --out"
        ) from error
    model.load_state_dict(weights, strict=False)
    model.start_target()
    given = {name.split(".")[0] for name in weights}
    taken = ", ".join(part for part in parts if part in given)
    drawn = ", ".join(part for part in parts if part not in given)
    log(f"{taken} from {saved.path}" + f"; random: {drawn}" * bool(drawn))
