"""The training loop: batches in, steps, what is logged and saved on the way.

Between two log steps nothing here waits for the device. A newcomer's mistake: .item() in the step.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.normalize import normalize_views
from pipeline.loader import view_loader
from pipeline.order import SampleOrder
from pipeline.runner import ImageReader
from train import distributed, state
from train.checkpoint import CheckpointError
from train.config import Config
from train.data import RunData
from train.distributed import StopSignal, World
from train.embed import DTYPES, autocast, knn_accuracy
from train.metrics import Log, Metrics
from train.optim import set_lr
from train.report import collapse_advice, collapse_threshold
from train.run_folder import RunFolder
from train.state import TrainState

COLLAPSE_PATIENCE = 3  # log steps below the threshold before the warning
PICTURES = 8


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

    @property
    def schedule_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.order.steps_per_epoch * self.config.epochs

    @property
    def last_step(self) -> int:
        """Where this run ends."""
        return min(self.config.max_steps or self.schedule_steps, self.schedule_steps)

    @property
    def collapse_threshold(self) -> float:
        """Below it the collapse meter warns."""
        return collapse_threshold(self.order.batch_size // self.world.size)


def train(session: Session) -> str:
    """Run to the last step or to a signal; returns "finished" or "preempted".

    Raises: ValueError for too many bad images, FloatingPointError for gradients that stay bad.
    """
    config, current, world = session.config, session.state, session.world
    stop = StopSignal(world)
    loader = view_loader(
        session.data.train,
        session.order,
        range(current.step, session.last_step),
        augment=config.augment,
        options=config.dali,
        device=world.device,
        rank=world.rank,
        world=world.size,
        local_world=world.local_size,
    )
    window = Window(session)
    session.log.start_bar(session.last_step, current.step)
    per_epoch = session.order.steps_per_epoch
    save_every = config.checkpoint_every or per_epoch
    ended = "finished"
    try:
        if current.step == 0:
            check_knn(session)
        window.restart()
        for batch in loader:
            window.data_arrived()
            if batch.step == 0 and session.metrics is not None:
                session.metrics.view_pairs(0, batch.images[:, :PICTURES])
            loss, scalars, norm, lr = train_step(session, batch.images)
            current.step += 1
            window.step_done(loss, scalars, norm)
            is_last = current.step == session.last_step
            if current.step % config.log_every == 0 or is_last:
                window.log(lr)
            if current.step % (per_epoch * config.eval.every_epochs) == 0 or is_last:
                window.pause()
                check_knn(session)
            stopping = stop.agreed()
            if current.step % save_every == 0 or is_last or stopping:
                window.pause()
                save(session)
            if stopping and not is_last:
                ended = "preempted"
                break
            window.resume()
    finally:
        session.log.stop_bar()
        stop.close()
    return ended


def train_step(session: Session, images: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor, float]:
    """One step of the optimizer. images: (2, N, S, S, 3) uint8. Nothing waits for the device."""
    config, current = session.config, session.state
    lr = set_lr(
        current.optimizer,
        config.optim,
        current.step,
        lr=config.lr,
        total=session.schedule_steps,
        steps_per_epoch=session.order.steps_per_epoch,
    )
    views = normalize_views(
        images.flatten(0, 1), config.data.mean, config.data.std, DTYPES[config.precision]
    )
    with autocast(config, session.world.device):
        loss, scalars = session.ddp(views)
    norm = current.guard(loss)
    return loss.detach(), scalars, norm, lr


def check_knn(session: Session) -> None:
    """Measure kNN now and write it down."""
    current = session.state
    top1 = knn_accuracy(current.model.backbone, session.data, session.config, session.world)
    if top1 is None:
        return
    current.knn[str(current.step)] = top1
    epoch = current.step / session.order.steps_per_epoch
    session.log(f"epoch {epoch:.2f}  step {current.step}  kNN top-1 {top1:.2f} %")
    if session.metrics is not None:
        session.metrics.scalars(current.step, {"eval/knn_top1": top1}, epoch=epoch)


def save(session: Session) -> None:
    """Checkpoint on rank 0; a full disk is a warning, the run goes on from memory."""
    if session.run is None:
        return
    try:
        state.save(session.state, session.run.checkpoints, session.facts)
        session.run.status("running", session.state.step)
    except CheckpointError as error:
        session.log.warn(f"{error}. Training goes on; the checkpoint before is kept")


class Window:
    """What happened since the last log step: owns the clock and sums that stay on the device."""

    def __init__(self, session: Session):
        self.session = session
        self.reported: set[int] = set()
        self.num_bad = 0
        self.low_std = 0
        self.restart()

    def restart(self) -> None:
        """Begin a window now."""
        self.steps, self.train_s, self.wait_s = 0, 0.0, 0.0
        self.loss: Tensor | None = None
        self.mark = time.perf_counter()

    def resume(self) -> None:
        """Go on after what is not training."""
        self.mark = time.perf_counter()

    def data_arrived(self) -> None:
        """The loader has given a batch."""
        self.wait_s += time.perf_counter() - self.mark

    def step_done(self, loss: Tensor, scalars: dict[str, Tensor], norm: Tensor) -> None:
        """Keep the step's numbers, on the device."""
        self.loss = loss if self.loss is None else self.loss + loss
        self.scalars, self.norm = scalars, norm
        self.steps += 1
        self.pause()

    def pause(self) -> None:
        """Count the time since the mark as training."""
        now = time.perf_counter()
        self.train_s += now - self.mark
        self.mark = now

    def log(self, lr: float) -> None:
        """Read the device, write a row and a line; look for collapse, bad steps and bad images."""
        session, current = self.session, self.session.state
        assert self.loss is not None
        names = sorted(self.scalars)
        stack = [self.loss / self.steps, *(self.scalars[name] for name in names)]
        values = distributed.mean(session.world, torch.stack(stack).float()).tolist()
        skipped = current.guard.check(current.step)
        self.pause()  # reading waited for the device: that was training
        current.train_s += self.train_s
        current.wait_s += self.wait_s
        self.count_bad()
        images = self.steps * session.order.batch_size
        rate = images / self.train_s
        row = {
            "train/loss": values[0],
            **{f"train/{name}": v for name, v in zip(names, values[1:], strict=True)},
            "train/lr": lr,
            "train/grad_norm": self.norm.item(),
            "train/skipped_steps": skipped,
            "throughput/images_per_sec": rate,
            "throughput/views_per_sec": 2 * rate,
            "throughput/device/images_per_sec": rate / session.world.size,
            "time/data_wait_pct": 100 * self.wait_s / self.train_s,
            "memory/max_active_gib": peak_gib(session.world.device),
            "data/bad_samples": self.num_bad,
        }
        current.last = row
        epoch = current.step / session.order.steps_per_epoch
        if session.metrics is not None:
            session.metrics.scalars(current.step, row, epoch=epoch)
        line = (
            f"loss {values[0]:.4f}  z_std {row['train/z_std']:.3f}  {rate:.1f} images/s  "
            f"data wait {row['time/data_wait_pct']:.0f} %"
        )
        session.log.advance(current.step, line)
        if session.log.bar is None:
            left = (session.last_step - current.step) * self.train_s / self.steps
            session.log(
                f"epoch {epoch:.2f}  step {current.step}/{session.last_step}  {line}  "
                f"lr {lr:.4f}  ETA {left:.0f} s"
            )
        self.warn_of_collapse(row["train/z_std"])
        self.restart()

    def warn_of_collapse(self, z_std: float) -> None:
        """One warning once the meter has been low for some time."""
        threshold = self.session.collapse_threshold
        self.low_std = self.low_std + 1 if z_std < threshold else 0
        if self.low_std == COLLAPSE_PATIENCE:
            stop_gradient = self.session.config.method.stop_gradient
            self.session.log.warn(
                collapse_advice(z_std, threshold=threshold, stop_gradient=stop_gradient)
            )

    def count_bad(self) -> None:
        """Share the list of bad images; stop if there are too many."""
        session, reader = self.session, self.session.data.train
        entries = bad_entries(reader, self.reported)
        everywhere = distributed.gather(session.world, entries)
        fresh = {entry["id"]: entry for part in everywhere for entry in part}
        fresh = {index: e for index, e in fresh.items() if index not in self.reported}
        self.reported |= fresh.keys()
        if not fresh:
            return
        self.num_bad = len(self.reported)
        share, limit = self.num_bad / len(reader.source), session.config.data.max_bad_fraction
        if session.run is not None:
            session.run.add_bad_files(
                [{k: e[k] for k in ("file", "reason")} for e in fresh.values()]
            )
            first = next(iter(fresh.values()))
            session.log.warn(
                f"replaced {len(fresh)} unreadable images, {self.num_bad} so far ({share:.2%}), "
                f"such as {first['file']}: {first['reason']}. "
                f"All: {session.run.path}/bad_files.jsonl"
            )
        if share > limit:
            save(session)
            raise ValueError(
                f"{self.num_bad} of {len(reader.source)} images are unreadable, more than "
                f"--data.max_bad_fraction {limit}: mend or remove those in bad_files.jsonl, or "
                "raise the limit"
            )


def bad_entries(reader: ImageReader, known: set[int]) -> list[dict]:
    """Bad images not yet known, with name and reason."""
    return [
        {"id": index, "file": reader.source.name(index), "reason": reason}
        for index, reason in list(reader.bad.items())
        if index not in known
    ]


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: what torch had active on a GPU, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
