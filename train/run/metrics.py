"""metrics.jsonl, TensorBoard, log lines and a progress bar, written by rank 0.

Progress and log go to stderr; stdout is for the result.
"""

import contextlib
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


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

    def __call__(self, line: str) -> None:
        """Write one line."""
        if self.path is None:
            return
        append(self.path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        if self.bar is not None:
            self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            with contextlib.suppress(OSError):  # the terminal was closed; log.txt has the line
                print(line, file=sys.stderr, flush=True)

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
        self.writer = SummaryWriter(str(folder / "tb"), purge_step=purge_step)

    def scalars(self, step: int, values: dict[str, float], **other: float) -> None:
        """Append one row and the TensorBoard scalars of `values`; `other` is in the row only."""
        if self.path is not None:
            append(self.path, json.dumps({"step": step, **other, **values}) + "\n")
        self._board(lambda board: [board.add_scalar(tag, v, step) for tag, v in values.items()])

    def view_pairs(self, step: int, views: Tensor) -> None:
        """Some images' two views, one above the other. views: (2, N, S, S, 3) uint8."""
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
        try:
            with warnings.catch_warnings():
                # deprecations inside tensorboard
                warnings.simplefilter("ignore", DeprecationWarning)
                write(self.writer)
                self.writer.flush()
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
