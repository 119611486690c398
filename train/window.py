"""What happened between two log steps: clock, sums on the device, and what to warn of.

A newcomer's mistake: reading a number in step_done. Only `log` reads the device.
"""

import resource
import time

import torch
from torch import Tensor

from pipeline.sources.reader import ImageReader
from train import distributed
from train.run.report import collapse_advice
from train.session import Session, save
from train.wait_clock import WaitClock

COLLAPSE_PATIENCE = 3  # log steps below the threshold before the warning


class Window:
    """What happened since the last log step: owns the clock and sums that stay on the device."""

    def __init__(self, session: Session):
        self.session = session
        self.reported: set[int] = set()
        self.num_bad = 0
        self.low_std = 0
        self.waiting = WaitClock(session.world.device)
        self.restart()

    def restart(self) -> None:
        """Begin a window now."""
        self.steps, self.train_s, self.wait_s = 0, 0.0, 0.0
        self.loss: Tensor | None = None
        self.resume()

    def resume(self) -> None:
        """Start the clock, after what is not training."""
        self.mark: float | None = time.perf_counter()
        self.waiting.work_queued()

    def pause(self) -> None:
        """Stop the clock, the work that the device still has included."""
        if self.session.world.device.type == "cuda":
            torch.cuda.synchronize(self.session.world.device)
        self.count()
        self.take_wait()
        self.mark = None

    def count(self) -> float:
        """Count the time since the mark as training, if the clock runs; returns it."""
        if self.mark is None:
            return 0.0
        now = time.perf_counter()
        passed, self.mark = now - self.mark, now
        self.train_s += passed
        self.session.state.train_s += passed
        return passed

    def data_arrived(self) -> None:
        """The loader has given a batch: what the device stood idle before it was waiting."""
        self.count()
        self.waiting.data_arrived()

    def work_queued(self) -> None:
        """All work on a batch is queued on the device, or done on a CPU."""
        self.count()
        self.waiting.work_queued()

    def take_wait(self) -> None:
        """Add what was waited, once the host has waited for the device."""
        waited = self.waiting.take()
        self.wait_s += waited
        self.session.state.wait_s += waited

    def step_done(self, loss: Tensor, scalars: dict[str, Tensor], norm: Tensor) -> None:
        """Keep the step's numbers, on the device."""
        self.loss = loss if self.loss is None else self.loss + loss
        self.scalars, self.norm = scalars, norm
        self.steps += 1
        self.work_queued()

    def log(self, lr: float) -> None:
        """Read the device, write a row and a line; look for collapse, bad steps and bad images."""
        session, current = self.session, self.session.state
        assert self.loss is not None
        names = sorted(self.scalars)
        stack = [self.loss / self.steps, *(self.scalars[name] for name in names)]
        values = distributed.mean(session.world, torch.stack(stack).float()).tolist()
        skipped = current.guard.check(current.step)
        self.count()  # reading waited for the device: that was training
        self.take_wait()
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
            "throughput/views_per_sec": len(session.config.views) * rate,
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
            method = self.session.config.method.spec
            self.session.log.warn(collapse_advice(z_std, threshold=threshold, method=method))

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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
