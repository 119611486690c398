"""The files of train/features.py as they grow: rows are appended, and a killed run continues.

An array is NAME.npy.part until it has all rows, then NAME.npy. progress.json says how many rows are
complete on the disk, and of which encoder and images they are. Written by rank 0 alone.
"""

import io
import json
import os
import time
from pathlib import Path

import numpy as np

from train.run.folder import Log, RunFolder

PROGRESS = "progress.json"
SAVE_S = 10.0  # at most so much work is lost when the process is killed
ARRAYS = ("features", "content", "ids")
NEAREST = ("neighbours", "cosines")


class RowFile:
    """One array (rows, *shape) on disk, open for appending."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: str, *, rows: int):
        """Continue behind the first `rows` rows; others, written before a kill, are cut off.

        Raises: ValueError if there are fewer.
        """
        self.path, self.rows = path, rows
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._part = path.with_name(f"{path.name}.part")
        if path.exists():  # killed while others got their names
            path.replace(self._part)
        start, row_bytes = len(self._header()), self._dtype.itemsize * int(np.prod(shape))
        size = self._part.stat().st_size if self._part.exists() else 0
        if rows and size < start + rows * row_bytes:
            raise ValueError(f"{self._part} was cut: remove {path.parent} to begin again")
        self._file = self._part.open("r+b" if rows else "w+b")
        if not rows:
            self._file.write(self._header())
        self._file.truncate(start + rows * row_bytes)
        self._file.seek(0, os.SEEK_END)

    def _header(self) -> bytes:
        """Of the .npy format; its length does not depend on the number of rows."""
        header = io.BytesIO()
        facts = {"descr": self._dtype.str, "fortran_order": False}
        np.lib.format.write_array_header_1_0(header, facts | {"shape": (self.rows, *self._shape)})
        return header.getvalue()

    def append(self, rows: np.ndarray) -> None:
        """Add rows (n, *shape), in memory until sync()."""
        assert rows.shape[1:] == self._shape
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)
        self.rows += len(rows)

    def sync(self) -> None:
        """Have all rows on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, which the next call continues."""
        self._file.close()

    def finish(self) -> None:
        """Write the number of rows and give the file its name."""
        before = self._file.seek(0)
        self._file.write(self._header())
        assert self._file.tell() - before == len(self._header())
        self.sync()
        self._file.close()
        self._part.replace(self.path)


class FeatureFiles:
    """features.npy, content.npy and ids.npy, then neighbours.npy and cosines.npy.

    Shapes: features (N, D) fp32; content (N, 16) uint8, the start of the SHA-256 of an image's
    bytes; ids (N,) int64, its number in the source; neighbours (N, k) int64 rows, the nearest
    first, and their cosines (N, k) fp32. Unreadable images have no row.
    """

    def __init__(self, folder: RunFolder, facts: dict, *, width: int):
        """Continue what the folder has. Raises: ValueError if that is of other facts."""
        self.folder, self.width = folder, width
        self.done: dict = {"images": 0, "rows": 0, "bad": 0, "k": 0, "neighbours": 0}
        path = folder.path / PROGRESS
        if path.exists():
            self.done = json.loads(path.read_text())
            check_same(self.done.pop("facts"), facts, folder.path)
        elif (folder.path / "features.npy").exists():
            raise ValueError(
                f"--out {folder.path} has a features.npy of another program: give another folder"
            )
        self.facts = facts
        bad, kept = folder.path / "bad_files.jsonl", self.done["bad"]
        if bad.exists():  # those that a killed process has read again are listed once
            lines = bad.read_text().splitlines(keepends=True)
            bad.write_text("".join(lines[:kept]))
        self._open: list[RowFile] = []
        self._saved_s = time.monotonic()

    def path(self, name: str) -> Path:
        """The file of an array."""
        return self.folder.path / f"{name}.npy"

    def load(self, name: str) -> np.ndarray:
        """A finished array, mapped into memory."""
        return np.load(self.path(name), mmap_mode="r")

    @property
    def has_features(self) -> bool:
        """Whether all images have been read."""
        return all(self.path(name).exists() for name in ARRAYS)

    def open_features(self) -> None:
        """Open the arrays that append() adds to."""
        kinds = zip(ARRAYS, ((self.width,), (16,), ()), ("<f4", "u1", "<i8"), strict=True)
        rows = self.done["rows"]
        self._open = [RowFile(self.path(name), row, kind, rows=rows) for name, row, kind in kinds]

    def open_neighbours(self, k: int) -> bool:
        """Whether any neighbours are missing, and their arrays open. Those of another k go."""
        if self.done["k"] != k:
            self.done |= {"k": k, "neighbours": 0}
            for name in NEAREST:
                self.path(name).unlink(missing_ok=True)
            self._save()
        if not k or all(self.path(name).exists() for name in NEAREST):
            return False
        kinds, rows = zip(NEAREST, ("<i8", "<f4"), strict=True), self.done["neighbours"]
        self._open = [RowFile(self.path(name), (k,), dtype, rows=rows) for name, dtype in kinds]
        return True

    def append(self, *rows: np.ndarray, **done: int) -> None:
        """Add rows to each open array; `done` is what progress.json counts."""
        for file, part in zip(self._open, rows, strict=True):
            file.append(part)
        self.done |= done
        if time.monotonic() - self._saved_s > SAVE_S:
            self.save()

    def save(self) -> None:
        """Have all rows on the disk, then count them."""
        for file in self._open:
            file.sync()
        self._save()

    def _save(self) -> None:
        self.folder.write(PROGRESS, self.done | {"facts": self.facts})
        self._saved_s = time.monotonic()

    def finish(self) -> None:
        """All rows are there: give the open arrays their names."""
        self.save()
        for file in self._open:
            file.finish()
        self._open = []

    def close(self) -> None:
        """Close what an error or a signal left open."""
        for file in self._open:
            file.close()


def check_same(saved: dict, facts: dict, out: Path) -> None:
    """Raise ValueError if a folder's features are of other facts than those asked for."""
    changed = [
        f"{name} was {saved.get(name)} and is {value}"
        for name, value in facts.items()
        if saved.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"--out {out} holds features of something else: {'; '.join(changed)}. Give another "
            "folder, or remove it"
        )


class Countdown:
    """A line with rate and ETA now and then, and the bar of a terminal."""

    def __init__(self, log: Log, what: str, *, total: int, done: int, every_s: float):
        self.log, self.what, self.total, self.every_s = log, what, total, every_s
        self._first, self._start = done, time.monotonic()
        self._last = self._start
        log.start_bar(total, done)

    def show(self, done: int) -> None:
        """So many are done."""
        self.log.advance(done, self.what)
        now = time.monotonic()
        if now - self._last > self.every_s:
            self._last = now
            rate = (done - self._first) / (now - self._start)
            eta_s = (self.total - done) / max(rate, 1e-9)
            self.log(f"{self.what}: {done} of {self.total}, {rate:.1f}/s, ETA {eta_s:.0f} s")
