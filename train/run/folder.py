"""The run folder: log, metrics, owner, settings and status. Written by rank 0 alone.

    config.yaml env.json command.txt log.txt metrics.jsonl tb/ checkpoints/ bad_files.jsonl
    status.json curves.png result.json

status.json is for scripts that decide whether to start the command again: its state is "running",
"preempted", "failed" or "finished". Progress and log go to stderr; stdout is for the result.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pipeline.streams import write_error
from train.distributed.agreement import PACKAGES as COMPUTING
from train.run import checkpoint

PACKAGES = (*COMPUTING, "apex", "tensorboard", "safetensors", "opencv-python-headless")
PACKAGES += ("torchvision", "lightly", "solo-learn")

CONFIG = "config.yaml"
SLOW_PRECISION = (
    "this CPU has no bf16 instructions: software emulates them, 17 times slower than "
    "--precision fp32 where that was measured (profiling/LOG.md)"
)


def append(path: Path, lines: str) -> None:
    """Add lines to a file; where the disk is full they go to stderr, and training continues."""
    try:
        with path.open("a") as file:
            file.write(lines)
    except OSError as error:
        print(f"warning: {path} lacks ({error.strerror}): {lines}", end="", file=sys.stderr)


class Log:
    """Lines to stderr and log.txt, above a progress bar where stderr is a terminal."""

    def __init__(self, path: Path | None):
        """path None: nothing is written (every rank but 0)."""
        self.path = path
        self.console = Console(file=sys.stderr)
        self.bar: Progress | None = None
        self._task = None
        self._is_alone = False

    def __call__(self, line: str) -> None:
        """Write one line."""
        if self.path is None:
            return
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        append(self.path, f"{now} {line}\n")
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
        if not self._is_alone and (error := write_error(sys.stderr)) is not None:
            self._is_alone = True
            lost = f"stderr cannot be written ({error.strerror}), the terminal may be gone"
            append(self.path, f"{now} warning: {lost}: messages are in this file alone\n")

    def warn(self, line: str) -> None:
        """Write one line that asks for attention."""
        self(f"warning: {line}")

    def start_bar(self, total: int, step: int) -> None:
        """Show progress with an ETA where stderr is a terminal."""
        if self.path is None or not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self.bar.add_task("training", total=total, completed=step)
        self.bar.start()

    def advance(self, step: int, text: str = "training") -> None:
        """Move the bar."""
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, completed=step, description=text)

    def stop_bar(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Metrics:
    """metrics.jsonl and TensorBoard from `step` on; what a resumed run will repeat is cut off."""

    def __init__(self, folder: Path | None, *, step: int, log: Log):
        """folder None: nothing is written (every rank but 0)."""
        self.path, self.log = folder and folder / "metrics.jsonl", log
        self.writer = None
        if folder is None or self.path is None:
            return
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= step]
            whole = self.path.with_suffix(".tmp")
            whole.write_text("".join(json.dumps(row) + "\n" for row in kept))
            whole.replace(self.path)
        from torch.utils.tensorboard import SummaryWriter  # imports slowly; only rank 0 needs it

        purge_step = step + 1 if step else None
        with self._told_once():
            self.writer = SummaryWriter(str(folder / "tb"), purge_step=purge_step)

    def scalars(self, step: int, values: dict[str, float], **other: Any) -> None:
        """Append one row and the TensorBoard scalars of `values`; `other` is in the row only."""
        if self.path is not None:
            append(self.path, json.dumps({"step": step, **other, **values}) + "\n")
        self._board(lambda board: [board.add_scalar(tag, v, step) for tag, v in values.items()])

    def figure(self, step: int, tag: str, figure: Any) -> None:
        """A matplotlib Figure."""
        self._board(lambda board: board.add_figure(tag, figure, step))

    def view_grid(self, step: int, views: Tensor) -> None:
        """Some images' views, one above the other. views: (V, N, S, S, 3) uint8."""
        grid = np.concatenate([np.concatenate(list(view), axis=1) for view in views.cpu().numpy()])
        self._board(lambda board: board.add_image("views", grid, step, dataformats="HWC"))

    def embedding(self, step: int, features: Tensor, names: list[str], images: Tensor) -> None:
        """Features for the projector, with thumbnails. (N, D), names, (N, S, S, 3) uint8."""
        pictures = images.cpu().permute(0, 3, 1, 2).float() / 255
        options = {"global_step": step, "tag": "features"}
        self._board(lambda b: b.add_embedding(features.cpu(), names, pictures, **options))

    def text(self, tag: str, value: str) -> None:
        """A text, indented so that it is shown verbatim."""
        self._board(lambda board: board.add_text(tag, "    " + value.replace("\n", "\n    ")))

    def hyper_parameters(self, settings: dict[str, str], result: dict) -> None:
        """The run's settings and results, for TensorBoard's HParams tab."""
        figures = {
            f"result/{name}": float(result[name])
            for name in ("knn_top1", "loss", "z_std", "images_per_s")
            if result[name] is not None
        }
        self._board(lambda board: board.add_hparams(dict(settings), figures, run_name="."))

    def _board(self, write) -> None:
        if self.writer is None:
            return
        with self._told_once(), warnings.catch_warnings():
            # deprecations inside tensorboard
            warnings.simplefilter("ignore", DeprecationWarning)
            write(self.writer)
            self.writer.flush()

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        """TensorBoard ends with its first error, of a full disk for one."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.writer = None
            self.log.warn(
                f"TensorBoard stopped: {error}. Training continues; metrics.jsonl is kept"
            )

    def close(self) -> None:
        """Finish the event file."""
        self._board(lambda board: board.close())


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, if there is one; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


class RunFolder:
    """Owns the folder's lock from open to close."""

    def __init__(self, path: str):
        """Create and lock the folder. Raises: ValueError if it cannot be written or is in use."""
        self.path = Path(path)
        self._is_new = not self.path.exists()
        self._has_begun = False
        self.checkpoints = self.path / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0)
            (self.path / "log.txt").open("a").close()
        except Timeout as error:
            owner = self._read("owner.json")
            raise ValueError(
                f"--out {path} is in use by process {owner.get('pid')} on {owner.get('host')} "
                f"since {owner.get('since')}: choose another --out, or stop that process"
            ) from error
        except OSError as error:
            raise ValueError(
                f"--out {path} cannot be written by user {os.getuid()}: {error.strerror}. "
                "Choose a writable folder with --out"
            ) from error
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.write("owner.json", {"pid": os.getpid(), "host": socket.gethostname(), "since": since})

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        self._write(name, json.dumps(value, indent=1) + "\n")

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(self.path / name)

    def _read(self, name: str) -> dict:
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return {}

    def describe(self, config: dict, environment: dict) -> None:
        """Keep what is needed to run this again; not `out`: a folder may be moved or copied."""
        settings = {name: value for name, value in config.items() if name != "out"}
        self._write(CONFIG, yaml.safe_dump(settings, sort_keys=False))
        self._write("command.txt", self.command() + "\n")
        self.write("env.json", environment)

    def command(self) -> str:
        """The command that continues this run, with the same number of processes."""
        words = [sys.executable, *sys.argv]
        size, local = (int(os.environ.get(n, "1")) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if size > 1:
            start = ["torchrun"]
            if size > local:  # on each of the hosts; the ranks are not given HOST:PORT
                start = [sys.executable, "train/launch.py", "--rdzv-endpoint", "HOST:PORT"]
            numbers = ["--nnodes", str(size // local), "--nproc-per-node", str(local)]
            words = [*start, *numbers, *sys.argv]
        if not any(word.startswith("--out") for word in sys.argv):
            words += ["--out", str(self.path)]
        return shlex.join(words)

    def status(self, state: str, step: int) -> None:
        """running, preempted, failed or finished."""
        self._has_begun |= state == "running"
        self.write("status.json", {"state": state, "step": step})

    def add_bad_files(self, entries: list[dict]) -> None:
        """Append images that were replaced: name and reason."""
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        append(self.path / "bad_files.jsonl", lines)

    def fail(self, trace: str) -> None:
        """Append the traceback to log.txt and set the status to failed, if the disk is not full."""
        step = self._read("status.json").get("step", 0)
        with contextlib.suppress(OSError):  # the first error is the one to report
            self.status("failed", step)
            with (self.path / "log.txt").open("a") as file:
                file.write(trace)

    def give_up(self, trace: str) -> None:
        """After bad input: remove a folder in which nothing ran; an ended run keeps its status."""
        state = self._read("status.json").get("state")
        if self._is_new and state is None:
            shutil.rmtree(self.path)
        elif self._has_begun or state not in ("finished", "preempted"):
            self.fail(trace)

    def stop(self) -> None:
        """After a signal outside of training: earlier checkpoints can be continued."""
        status = self._read("status.json")
        if status.get("state") == "running":
            self.status("preempted", status["step"])
        elif not status and self._is_new:
            shutil.rmtree(self.path)

    def close(self) -> None:
        """Release the lock; contextlib.closing does this alone."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        """For a training: status.json states at the end how it ended."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Record the error, if any, and close."""
        text = "".join(traceback.format_exception(error)) if error is not None else ""
        if isinstance(error, (ValueError, OSError, FloatingPointError)):
            self.give_up(text)
        elif isinstance(error, KeyboardInterrupt):
            self.stop()
        elif error is not None:
            self.fail(text)
        self.close()


class RunWriter:
    """Log, metrics and files of a training; on ranks other than 0 nothing is written.

    folder: None on those. facts: what a checkpoint must agree with to be resumed.
    """

    def __init__(self, folder: RunFolder | None, log: Log, facts: dict, *, step: int):
        self.folder, self.log, self.facts = folder, log, facts
        self.metrics = Metrics(None if folder is None else folder.path, step=step, log=log)


def newest_checkpoint(run: Path, *, log: Callable[[str], None]) -> checkpoint.Checkpoint:
    """The newest valid checkpoint of a run folder; `log` is called for rejected ones.

    Raises: ValueError if `run` is no run folder or has none yet; CheckpointError if none is valid.
    """
    if not (run / CONFIG).is_file():
        raise ValueError(f"{run} is not a run folder (no {CONFIG}): give the --out of a training")
    newest = checkpoint.load_newest(run / "checkpoints", log=log)
    if newest is None:
        raise ValueError(f"{run} holds no checkpoint yet: let the training save one")
    return newest


def revision() -> str | None:
    """The commit of this code; None without git, as in a container."""
    words = ["git", "-C", str(Path(__file__).parent.parent.parent), "rev-parse", "HEAD"]
    try:
        head = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return head.stdout.strip() or None


def environment(world_size: int, device: torch.device) -> dict:
    """Versions, machine and revision.

    Of environment variables, which may hold secrets, only what limits the CPU's instructions: other
    instructions sum in another order, which changes the accuracy after training by points.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    is_cuda = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if is_cuda else cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "world": world_size,
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda if is_cuda else None,
        "revision": revision(),
    }


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX-512 BF16, AMX); assumed but on x86-64."""
    flags = Path("/proc/cpuinfo").read_text()
    return platform.machine() != "x86_64" or "avx512_bf16" in flags or "amx_bf16" in flags


def is_slow_precision(precision: str, device: torch.device) -> bool:
    """Whether the device computes this precision in software."""
    return precision == "bf16" and device.type == "cpu" and not has_fast_bf16()


def cpu_name() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
