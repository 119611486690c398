"""What happened between two log steps: clocks, sums on the device, and what to warn of.

Only `Window.log` reads the device.
"""

import resource
import time

import torch
from torch import Tensor

from pipeline.sources.reader import ImageReader
from train import distributed
from train.config import Config
from train.distributed import World
from train.run import state
from train.run.data import RunData
from train.run.folder import Log, RunWriter
from train.run.optim import Schedule
from train.run.report import collapse_advice, collapse_threshold
from train.run.state import TrainState

COLLAPSE_PATIENCE = 3  # log steps below the threshold before the warning


class WaitClock:
    """Seconds in which the device had nothing to do because the loader had no batch.

    On a CPU that is the time in the loader. On a GPU the host runs ahead, and DALI, which shares
    the device, may wait for the step: the host's clock around next(loader) would count that. So an
    event is recorded behind each step, and where the stream has reached it when a batch arrives,
    another one; the time between the two is read at the next log step, where the host waits for the
    device anyway. It includes the copy of the batch, which the query keeps out of the steps that
    did not wait.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._host_s = 0.0
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.work_queued()

    def work_queued(self) -> None:
        """All work of a step is queued: once it is done, the device waits."""
        self._mark = time.perf_counter()
        self._end = self._record()

    def data_arrived(self) -> None:
        """The loader has returned a batch."""
        if self._end is None:
            self._host_s += time.perf_counter() - self._mark
        elif self._end.query():
            arrived = self._record()
            assert arrived is not None
            self._idle.append((self._end, arrived))

    def take(self) -> float:
        """Seconds waited since the last call, after a synchronisation with the device."""
        seconds = self._host_s + sum(end.elapsed_time(at) for end, at in self._idle) / 1e3
        self._host_s = 0.0
        self._idle.clear()
        return seconds

    def _record(self) -> torch.cuda.Event | None:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Window:
    """The steps since the last log step: owns the clocks and the sums that stay on the device."""

    def __init__(
        self,
        config: Config,
        world: World,
        reader: ImageReader,
        current: TrainState,
        schedule: Schedule,
        run: RunWriter,
    ):
        self.config, self.world, self.reader = config, world, reader
        self.state, self.schedule, self.run = current, schedule, run
        self.reported: set[int] = set()
        self.pages_reported = False
        self.low_std = 0
        self.waiting = WaitClock(world.device)
        self.restart()

    def restart(self) -> None:
        """Begin a window."""
        self.steps, self.train_s, self.wait_s = 0, 0.0, 0.0
        self.loss: Tensor | None = None
        self.resume()

    def resume(self) -> None:
        """Start the clock, after what is not training."""
        self.mark: float | None = time.perf_counter()
        self.waiting.work_queued()

    def pause(self) -> None:
        """Stop the clock once the device has done its work."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.count()
        self.mark = None

    def count(self) -> None:
        """Count the time since the mark as training, if the clock runs, and what was waited.

        The host must have waited for the device.
        """
        self._count_host()
        waited = self.waiting.take()
        self.wait_s += waited
        self.state.wait_s += waited

    def _count_host(self) -> None:
        if self.mark is not None:
            now = time.perf_counter()
            passed, self.mark = now - self.mark, now
            self.train_s += passed
            self.state.train_s += passed

    def data_arrived(self) -> None:
        """The loader has returned a batch."""
        self._count_host()
        self.waiting.data_arrived()

    def work_queued(self) -> None:
        """All work on a batch is queued on the device, or done on a CPU."""
        self._count_host()
        self.waiting.work_queued()

    def step_done(self, loss: Tensor, scalars: dict[str, Tensor], norm: Tensor, lr: float) -> None:
        """Keep the step's numbers, on the device."""
        self.loss = loss if self.loss is None else self.loss + loss
        self.scalars, self.norm, self.lr = scalars, norm, lr
        self.steps += 1
        self.work_queued()

    def log(self) -> None:
        """Read the device, write a row and a line; look for collapse, bad steps and bad images."""
        current, log = self.state, self.run.log
        assert self.loss is not None
        names = sorted(self.scalars)
        stack = [self.loss / self.steps, *(self.scalars[name] for name in names)]
        values = distributed.mean(self.world, torch.stack(stack).float()).tolist()
        skipped = current.guard.check(current.step)
        self.count()
        self.count_bad()
        rate = self.steps * self.config.data.batch_size / self.train_s
        row = {
            "train/loss": values[0],
            **{f"train/{name}": v for name, v in zip(names, values[1:], strict=True)},
            "train/lr": self.lr,
            "train/grad_norm": self.norm.item(),
            "train/skipped_steps": skipped,
            "throughput/images_per_sec": rate,
            "throughput/views_per_sec": len(self.config.views) * rate,
            "throughput/device/images_per_sec": rate / self.world.size,
            "time/data_wait_pct": 100 * self.wait_s / self.train_s,
            "memory/max_active_gib": peak_gib(self.world.device),
            "data/bad_samples": len(self.reported),
        }
        current.last = row
        epoch = current.step / self.schedule.steps_per_epoch
        self.run.metrics.scalars(current.step, row, epoch=epoch)
        line = (
            f"loss {values[0]:.4f}  z_std {row['train/z_std']:.3f}  {rate:.1f} images/s  "
            f"data wait {row['time/data_wait_pct']:.0f} %"
        )
        log.advance(current.step, line)
        if log.bar is None:
            last = self.schedule.last
            left_s = (last - current.step) * self.train_s / self.steps
            log(
                f"epoch {epoch:.2f}  step {current.step}/{last}  {line}  lr {self.lr:.4f}  "
                f"ETA {left_s:.0f} s"
            )
        self.warn_of_collapse(row["train/z_std"])
        self.restart()

    def warn_of_collapse(self, z_std: float) -> None:
        """Warn once the meter has been low for COLLAPSE_PATIENCE log steps."""
        threshold = collapse_threshold(self.config, self.world.size)
        self.low_std = self.low_std + 1 if z_std < threshold else 0
        if self.low_std == COLLAPSE_PATIENCE:
            method = self.config.method.spec
            self.run.log.warn(collapse_advice(z_std, threshold=threshold, method=method))

    def count_bad(self) -> None:
        """Share the list of bad images; stop if there are too many. Warn once of several pages."""
        source, limit = self.reader.source, self.config.data.max_bad_fraction
        known = bad_entries(self.reader, self.reported), self.reader.several
        bad, several = zip(*distributed.gather(self.world, known), strict=True)
        if (num_several := sum(number for number, _ in several)) and not self.pages_reported:
            self.pages_reported = True
            self.run.log.warn(
                f"{num_several} of the images read so far have several pages, such as "
                f"{source.name(max(index for _, index in several))}: the first is used"
            )
        new = {entry["id"]: entry for part in bad for entry in part}
        new = {index: entry for index, entry in new.items() if index not in self.reported}
        if not new:
            return
        self.reported |= new.keys()
        num_bad, first = len(self.reported), next(iter(new.values()))
        share = num_bad / len(source)
        if self.run.folder is not None:
            self.run.folder.add_bad_files(
                [{name: entry[name] for name in ("file", "reason")} for entry in new.values()]
            )
            self.run.log.warn(
                f"replaced {len(new)} unreadable images, {num_bad} so far ({share:.2%}), "
                f"such as {first['file']}: {first['reason']}. "
                f"All: {self.run.folder.path}/bad_files.jsonl"
            )
        if share > limit:
            state.save_checkpoint(self.state, self.run)
            raise ValueError(
                f"{num_bad} of {len(source)} images are unreadable, more than "
                f"--data.max_bad_fraction {limit}: fix or remove the files listed in "
                "bad_files.jsonl, or raise the limit"
            )


def bad_entries(reader: ImageReader, known: set[int]) -> list[dict]:
    """Bad images not yet known, with name and reason."""
    return [
        {"id": index, "file": reader.source.name(index), "reason": reason}
        for index, reason in list(reader.bad.items())
        if index not in known
    ]


def warn_of_bad_queries(data: RunData, world: World, log: Log) -> None:
    """Log which held-out images the kNN check leaves out."""
    assert data.queries is not None
    reader = data.queries.reader
    if reader is data.train:
        return  # counted and listed with the training images
    entries = sum(distributed.gather(world, bad_entries(reader, set())), [])
    if entries:
        log.warn(
            f"{len(entries)} unreadable images of {reader.source.root} are left out of kNN, "
            f"such as {entries[0]['file']}: {entries[0]['reason']}"
        )


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: what torch had active on a GPU, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
