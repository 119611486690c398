"""Session: what the training loop works with, put together once by train/main.py.

A newcomer's mistake: reading the position here. It is TrainState's, which is all that a checkpoint
holds; this is everything around it.
"""

from dataclasses import dataclass

from torch import nn

from pipeline.order import SampleOrder
from train.config import Config
from train.distributed import World
from train.distributed.world import Stacks
from train.run import state
from train.run.data import RunData
from train.run.folder import RunFolder
from train.run.metrics import Log, Metrics
from train.run.report import collapse_threshold
from train.run.state import TrainState


@dataclass
class Session:
    """What the loop works with; `metrics` and `run` write on rank 0 only."""

    config: Config
    world: World
    data: RunData
    order: SampleOrder
    state: TrainState
    ddp: nn.Module
    """The model as it is called: DDP around it where there are several ranks."""
    facts: dict
    log: Log
    run: RunFolder | None
    metrics: Metrics | None
    stacks: Stacks | None = None
    """Writes down where this rank stands when it takes too long."""

    @property
    def schedule_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.order.steps_per_epoch * self.config.epochs

    @property
    def last_step(self) -> int:
        """Where this run ends."""
        return min(self.config.max_steps or self.schedule_steps, self.schedule_steps)

    def allow(self, seconds: float | None = None) -> None:
        """Start the clock of what takes too long again, for a step or for so many seconds."""
        if self.stacks is not None:
            self.stacks.allow(seconds)

    @property
    def collapse_threshold(self) -> float:
        """Below it the collapse meter warns."""
        config, rows = self.config, self.order.batch_size // self.world.size
        return collapse_threshold(rows, ends_in_norm=config.method.spec.ends_in_norm(config.model))


def save(session: Session, *, is_last: bool = False) -> None:
    """Checkpoint on rank 0; a full disk is a warning, the run goes on from memory.

    Raises: CheckpointError if it was the last chance: there is nothing to go on from.
    """
    if session.run is None:
        return
    try:
        state.save(session.state, session.run.checkpoints, session.facts)
        session.run.status("running", session.state.step)
    except OSError as error:
        if is_last:
            raise
        session.log.warn(f"{error}. Training goes on; the checkpoint before, if any, is kept")
