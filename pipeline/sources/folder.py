"""Where the images of a run come from: the list of a folder, and the bytes of each file.

First in the data's way: folder -> ImageFolder -> bytes -> pipeline/sources/header.py -> DALI, with
pipeline/sources/shards.py in the folder's place where the images lie packed in shards. Rank 0 lists
and sends the list to the others (torch.distributed.broadcast_object_list): 16 ranks that each stat
a million files are what network storage dislikes most.

What a newcomer gets wrong: file names are bytes on Linux. Names that are no UTF-8, or hold a
newline, are kept as bytes here and only name() turns one into text, for people to read.
"""

import argparse
import hashlib
import heapq
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.sources.header import BadImage

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
IMAGE_EXTENSIONS = frozenset(extension.encode() for extension in EXTENSIONS)
READERS = 8  # threads that read files: hides the latency of network storage
MOST_WAIT_S = 1e-4  # an image, of the first 8 all together: less is the price of the threads
K = TypeVar("K")
T = TypeVar("T")
Allocate = Callable[[int], np.ndarray]
"""Gives (num_bytes,) uint8 to read into; called from several threads."""
Stamped = tuple[np.ndarray, int]
"""The bytes of an image, and a number that is another one once its file has been written to."""
_SPLITS = ("val", "valid", "validation", "test")
_FILE_KINDS = {stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}
_MAX_FILE_BYTES = 1 << 31
_MAX_KINDS = 50  # where each file has an extension of its own, the report must stay readable


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images under one folder, in an order that depends on their names alone.

    Can be broadcast as it is: the names pickle as one string. For ImageNet's 1,281,167 images that
    is 51 MB with the labels, 0.2 s to write and 0.1 s to read (2-core VM, n=4; a plain list takes
    twice the time to write, and pickle's memo of every name).
    """

    root: str
    """Absolute path of the folder."""
    paths: list[bytes]
    """Relative to root, sorted bytewise."""
    labels: np.ndarray | None
    """(N,) int64, indices into class_names. None unless every image lies in a first-level
    sub-folder and there are at least two of these."""
    class_names: list[str]
    """The first-level sub-folders that hold images, sorted bytewise; empty without labels."""
    fingerprint: str
    """SHA-256 of the relative names and the file sizes: equal for a copy elsewhere."""
    skipped: dict[str, int]
    """How many entries were left out, by kind: "extension .txt", "fifo", "unreadable" ..."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        """Return the bytes of a file, (num_bytes,) uint8. Never waits for another process.

        Raises   BadImage when the file is missing, unreadable, empty, or no regular file.
        """
        return self._read(index, new_bytes)[0]

    @cached_property
    def _prefix(self) -> bytes:
        return os.path.join(os.fsencode(self.root), b"")

    def _read(self, index: int, allocate: Allocate) -> Stamped:
        path = self._prefix + self.paths[index]
        try:
            # O_NONBLOCK: a FIFO under an image's name would wait for its writer for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                data, stamp = _read_all(descriptor, allocate)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise BadImage("missing file") from None
        except OSError as error:
            raise BadImage(f"unreadable file ({error.strerror})") from None
        if data.size == 0:
            raise BadImage("empty file")
        return data, stamp

    def read_many(
        self, indices: Sequence[int], pool: Executor, allocate: Allocate | None = None
    ) -> list[Stamped | BadImage]:
        """Return what `read` returns or raises for each index, in order, with its stamp."""
        allocate = allocate or new_bytes
        return attempt_all(lambda index: self._read(index, allocate), indices, pool)

    def name(self, index: int) -> str:
        """Return the relative path as one printable line, with what is not printable escaped."""
        return printable(self.paths[index])

    def __reduce__(self) -> tuple:
        """Pickle the paths as one string; NUL is the one byte that no file name can hold."""
        joined = b"\0".join(self.paths)
        facts = (self.labels, self.class_names, self.fingerprint, self.skipped)
        return _unpickled, (self.root, joined, *facts)


def attempt_all(read: Callable[[K], T], items: Sequence[K], pool: Executor) -> list[T | BadImage]:
    """What `read` returns or raises for each item, in order.

    In this thread while the files are in memory: eight threads then take 1.8 times the CPU time,
    for Python's lock. As soon as reading waits the pool reads the rest.
    """

    def read_part(part: Sequence[K]) -> list[T | BadImage]:
        found: list[T | BadImage] = []
        for item in part:
            try:
                found.append(read(item))
            except BadImage as error:
                found.append(error)
        return found

    done: list[T | BadImage] = []
    begin, worked = time.perf_counter(), time.thread_time()
    for item in items:
        done += read_part([item])
        most, passed = MOST_WAIT_S * max(8, len(done)), time.perf_counter() - begin
        # the second clock is a system call: it is read where so much time has passed at all
        if passed > most and passed - (time.thread_time() - worked) > most:
            break
    left = items[len(done) :]
    per_thread = max(1, -(-len(left) // READERS))
    parts = [left[start : start + per_thread] for start in range(0, len(left), per_thread)]
    return done + [image for part in pool.map(read_part, parts) for image in part]


def list_images(root: str) -> ImageFolder:
    """List the images under root: root/<class>/**/<image> or root/<image>.

    One scan of each folder and one stat of each image: 5 us an image on a warm local disk. Links
    are followed, and each folder is listed once. Hidden entries (macOS writes ._x.jpg) are skipped.
    An empty file is listed: its read() raises, so that a failed copy counts as bad images.

    Raises   ValueError when there is no image, or root is missing, no folder, or unreadable.
    """
    if not root:  # abspath would make it the current folder
        raise ValueError("No images: the folder's name is empty. Is a shell variable unset?")
    root = os.path.abspath(root)
    try:
        os.scandir(root).close()
    except FileNotFoundError:
        raise ValueError(_no_images(root, "no such folder")) from None
    except NotADirectoryError:
        raise ValueError(_no_images(root, "it is a file, not a folder")) from None
    except OSError as error:
        raise ValueError(_no_images(root, f"cannot be read ({error.strerror})")) from None
    images, skipped = _scan(os.fsencode(root))
    if not images:
        raise ValueError(_no_images(root, _what_was_found(skipped)))
    images.sort()
    digest = hashlib.sha256(b"\0".join([b"%b\0%d" % image for image in images]))
    paths = [path for path, _ in images]
    labels, class_names = _classes(paths)
    return ImageFolder(root, paths, labels, class_names, digest.hexdigest(), dict(skipped))


def named_path(word: str) -> Path:
    """A path of a command line; "", which would be the current folder, is refused."""
    if not word:
        raise argparse.ArgumentTypeError("an empty name: is a shell variable unset?")
    return Path(word)


def split_root(root: str) -> tuple[str, str | None]:
    """Return the folders (to train on, to validate on) of a data set.

    root/train and the first that exists of root/val, valid, validation, test; else root and None.
    """
    train = os.path.join(root, "train")
    if os.path.isdir(train):
        for name in _SPLITS:
            if os.path.isdir(held_out := os.path.join(root, name)):
                return train, held_out
    return root, None


def _scan(root: bytes) -> tuple[list[tuple[bytes, int]], Counter[str]]:
    """Return (relative path, num_bytes) of each image, in no order, and counts of the rest."""
    images: list[tuple[bytes, int]] = []
    skipped: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    # Linked folders wait until all real ones are done, the first by name before the others: so an
    # image that can be reached twice is listed once, under a path that the disk's order of
    # entries cannot change, and a loop ends.
    folders, linked = [b""], []
    while folders or linked:
        folder = folders.pop() if folders else heapq.heappop(linked)
        path = os.path.join(root, folder)
        prefix = os.path.join(folder, b"")
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                skipped[_repeated(path)] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            for name, kind, num_bytes in _entries(path):
                if kind == "image":
                    images.append((prefix + name, num_bytes))
                elif kind == "folder":
                    folders.append(prefix + name)
                elif kind == "linked folder":
                    heapq.heappush(linked, prefix + name)
                else:
                    count_skipped(skipped, kind)
        except OSError:
            skipped["unreadable"] += 1
    return images, skipped


def count_skipped(skipped: Counter[str], kind: str) -> None:
    """Count one entry that was left out; the kinds stay few enough to read."""
    known = kind in skipped or len(skipped) < _MAX_KINDS
    skipped[kind if known else "other extensions"] += 1


def _entries(path: bytes) -> Iterator[tuple[bytes, str, int]]:
    """Yield (name, kind, num_bytes): an image, a folder to list, or the kind to skip it as."""
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                kind, num_bytes = _look_at(entry)
            except OSError as error:
                kind, num_bytes = _unreachable(entry, error), 0
            yield entry.name, kind, num_bytes


def _look_at(entry: os.DirEntry[bytes]) -> tuple[str, int]:
    name = entry.name
    if name.startswith(b"."):
        return "hidden", 0
    _, dot, extension = name.rpartition(b".")
    extension = (dot + extension).lower() if dot else b""
    if entry.is_dir():  # the type comes with the scan: no stat, unless it is a link
        if extension in IMAGE_EXTENSIONS:
            return f"folder named {extension.decode()}", 0
        return "linked folder" if entry.is_symlink() else "folder", 0
    if extension not in IMAGE_EXTENSIONS:
        return f"extension {printable(extension)}" if extension else "no extension", 0
    status = entry.stat()
    if not stat.S_ISREG(status.st_mode):
        return _FILE_KINDS.get(stat.S_IFMT(status.st_mode), "device"), 0
    return "image", status.st_size


def _unreachable(entry: os.DirEntry[bytes], error: OSError) -> str:
    if not entry.is_symlink():
        return "unreadable"
    return "dangling symlink" if isinstance(error, FileNotFoundError) else "symlink loop"


def _repeated(path: bytes) -> str:
    parent = os.path.realpath(os.path.dirname(path))
    is_loop = os.path.commonpath([parent, target := os.path.realpath(path)]) == target
    return "symlink loop" if is_loop else "repeated folder"


def _classes(paths: list[bytes]) -> tuple[np.ndarray | None, list[str]]:
    folders = sorted({path.partition(b"/")[0] for path in paths})
    if len(folders) < 2 or not all(b"/" in path for path in paths):
        return None, []
    numbers = {folder: number for number, folder in enumerate(folders)}
    labels = (numbers[path.partition(b"/")[0]] for path in paths)
    return np.fromiter(labels, np.int64, len(paths)), [printable(name) for name in folders]


def _unpickled(root: str, joined: bytes, *facts) -> ImageFolder:
    return ImageFolder(root, joined.split(b"\0"), *facts)


def new_bytes(num_bytes: int) -> np.ndarray:
    """Memory of its own for an image."""
    return np.empty(num_bytes, np.uint8)


def stamp_of(status: os.stat_result) -> int:
    """A number that is another one once the file has been written to or replaced; never 0."""
    return hash((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)) or 1


def _read_all(descriptor: int, allocate: Allocate) -> Stamped:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("not a regular file")
    if status.st_size > _MAX_FILE_BYTES:
        raise BadImage(f"file of {status.st_size} bytes exceeds the limit of {_MAX_FILE_BYTES}")
    return read_range(descriptor, 0, status.st_size, allocate), stamp_of(status)


def read_range(
    descriptor: int, offset: int, num_bytes: int, allocate: Allocate = new_bytes
) -> np.ndarray:
    """Return (num_bytes,) uint8 of an open file from offset on; fewer where the file ends."""
    data = allocate(num_bytes)
    num_read = 0
    while num_read < num_bytes:  # one read may return less than was asked for
        num_new = os.preadv(descriptor, [data[num_read:].data], offset + num_read)
        if num_new == 0:  # cut short since it was listed: header.py judges what there is
            break
        num_read += num_new
    return data[:num_read]


def printable(path: bytes) -> str:
    """Return a file name as one line of text, with what is not printable escaped."""
    text = path.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _what_was_found(skipped: Counter[str]) -> str:
    parts = []
    for kind, count in skipped.most_common(3):
        files = f"{count} file{'s' * (count != 1)}"
        if kind.startswith("extension "):
            parts.append(f"{files} ending {kind.removeprefix('extension ')}")
        else:
            parts.append(
                f"{files} without extension"
                if kind == "no extension"
                else f"{count} skipped as {kind}"
            )
    others = f"but {', '.join(parts)}" if parts else "and no other file"
    return f"found 0 of {' '.join(EXTENSIONS)}, {others}"


def _no_images(root: str, reason: str) -> str:
    root = printable(os.fsencode(root))
    expected = f"{root}/<class>/<image>.jpg or {root}/<image>.jpg"
    return f"No images under {root}: {reason}. Expected {expected}."
