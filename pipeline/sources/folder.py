"""A folder of images: the list of its files, and the bytes of each.

Rank 0 lists and sends the list to the others (torch.distributed.broadcast_object_list): network
storage is slow when 16 ranks each stat a million files. File names are bytes on Linux, not always
UTF-8, and stay bytes; name() makes text of them for people to read.
"""

import hashlib
import heapq
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from pipeline.sources.header import BadImage

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
IMAGE_EXTENSIONS = frozenset(extension.encode() for extension in EXTENSIONS)
READERS = 8  # threads that read files: hides the latency of network storage
MOST_WAIT_S = 1e-4  # an image, and at least for 8: below it threads cost more than they save
K = TypeVar("K")
T = TypeVar("T")
Allocate = Callable[[int], np.ndarray]
"""Gives (num_bytes,) uint8 to read into; called from several threads."""
Stamped = tuple[np.ndarray, int]
"""The bytes of an image, and a number that changes when its file is written to."""
_FILE_KINDS = {stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket"}
_MAX_FILE_BYTES = 1 << 31
_MAX_KINDS = 50  # keeps the report readable where each file has another extension


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """The images under one folder, in an order that depends on their names alone.

    It has classes if every image is in a first-level folder and there are at least two of these.
    Pickles as one string: for ImageNet's 1,281,167 images 51 MB with the labels, 0.2 s to write and
    0.1 s to read (2-core VM, n=4).
    """

    root: str  # absolute path of the folder
    paths: list[bytes]  # relative to root, sorted bytewise
    labels: np.ndarray | None  # (N,) int64, indices into class_names; None without classes
    class_names: list[str]  # the first-level folders, sorted bytewise, if all images are in these
    fingerprint: str  # SHA-256 of the relative names and the file sizes: equal for a copy elsewhere
    skipped: dict[str, int]  # entries left out, by kind: "extension .txt", "fifo", "unreadable" ...
    newest: tuple[float, bytes]  # when the image that was written to last was, and its path

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
        try:
            # O_NONBLOCK: opening a FIFO would wait for its writer for ever
            descriptor = os.open(self._prefix + self.paths[index], os.O_RDONLY | os.O_NONBLOCK)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise BadImage("not a regular file")
                if (size := status.st_size) > _MAX_FILE_BYTES:
                    raise BadImage(f"file of {size} bytes exceeds the limit of {_MAX_FILE_BYTES}")
                data = read_range(descriptor, 0, size, allocate)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise BadImage("missing file") from None
        except OSError as error:
            raise BadImage(f"unreadable file ({error.strerror})") from None
        if data.size == 0:
            raise BadImage("empty file")
        return data, stamp_of(status)

    def read_many(
        self, indices: Sequence[int], pool: Executor, allocate: Allocate | None = None
    ) -> list[Stamped | BadImage]:
        """Return what `read` returns or raises for each index, in order, with its stamp."""
        memory = allocate or new_bytes
        return attempt_all(lambda index: self._read(index, memory), indices, pool)

    def name(self, index: int) -> str:
        """Return the relative path as one printable line."""
        return printable(self.paths[index])

    def __reduce__(self) -> tuple:
        """Pickle the paths as one string; NUL is the one byte that no file name can hold."""
        joined = b"\0".join(self.paths)
        facts = (self.labels, self.class_names, self.fingerprint, self.skipped, self.newest)
        return _unpickled, (self.root, joined, *facts)


def _unpickled(root: str, joined: bytes, *facts) -> ImageFolder:
    return ImageFolder(root, joined.split(b"\0"), *facts)


def attempt_all(read: Callable[[K], T], items: Sequence[K], pool: Executor) -> list[T | BadImage]:
    """What `read` returns or raises for each item, in order.

    In this thread while the files are in memory: eight threads then take 1.8 times the CPU time,
    for Python's lock. As soon as reading waits the pool reads the rest.
    """

    def read_part(part: Sequence[K]) -> list[T | BadImage]:
        results: list[T | BadImage] = []
        for item in part:
            try:
                results.append(read(item))
            except BadImage as error:
                results.append(error)
        return results

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


def new_bytes(num_bytes: int) -> np.ndarray:
    """The Allocate of memory that nothing else uses."""
    return np.empty(num_bytes, np.uint8)


def stamp_of(status: os.stat_result) -> int:
    """A number that changes when the file is written to or replaced; never 0."""
    return hash((status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)) or 1


def read_range(descriptor: int, offset: int, num_bytes: int, allocate: Allocate) -> np.ndarray:
    """Return (num_bytes,) uint8 of an open file from offset on; fewer where the file ends."""
    data = allocate(num_bytes)
    num_read = 0
    while num_read < num_bytes:  # a read may return less than was asked for
        num_new = os.preadv(descriptor, [data[num_read:].data], offset + num_read)
        if num_new == 0:  # truncated since it was listed: header.py judges the bytes
            break
        num_read += num_new
    return data[:num_read]


def printable(path: bytes) -> str:
    """Return a file name as one line of text, with what is not printable escaped."""
    text = path.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def list_images(root: str) -> ImageFolder:
    """List the images under root: root/<class>/**/<image> or root/<image>.

    One scan of each folder and one stat of each image: 5 us an image on a warm local disk. Links
    are followed, and each folder is listed once. Hidden entries (macOS writes ._x.jpg) are skipped.
    An empty file is listed and fails in read(), so that a failed copy counts as bad images.

    Raises   ValueError when there is no image, or root is missing, no folder, or unreadable.
    """
    if not root:  # abspath would make it the current folder
        raise ValueError("No images: the folder's name is empty. Is a shell variable unset?")
    root = os.path.abspath(root)
    images, skipped, newest, reason = [], Counter(), (0.0, b""), ""
    try:
        os.scandir(root).close()
        images, skipped, newest = _scan(os.fsencode(root))
    except FileNotFoundError:
        reason = "no such folder"
    except NotADirectoryError:
        reason = "it is a file, not a folder"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    if not images:
        shown, reason = printable(os.fsencode(root)), reason or _contents(skipped)
        expected = f"{shown}/<class>/<image>.jpg or {shown}/<image>.jpg"
        raise ValueError(f"No images under {shown}: {reason}. Expected {expected}.")
    images.sort()
    digest = hashlib.sha256(b"\0".join([b"%b\0%d" % image for image in images]))
    paths = [path for path, _ in images]
    labels, class_names = _classes(paths)
    fingerprint = digest.hexdigest()
    return ImageFolder(root, paths, labels, class_names, fingerprint, dict(skipped), newest)


def _contents(skipped: Counter[str]) -> str:
    """The three most frequent kinds of files in a folder without images."""
    parts = []
    for kind, count in skipped.most_common(3):
        files = f"{count} file{'s' * (count != 1)}"
        if kind.startswith("extension "):
            parts.append(f"{files} ending {kind.removeprefix('extension ')}")
        elif kind == "no extension":
            parts.append(f"{files} without extension")
        else:
            parts.append(f"{count} skipped as {kind}")
    others = f"but {', '.join(parts)}" if parts else "and no other file"
    return f"found 0 of {' '.join(EXTENSIONS)}, {others}"


def _scan(root: bytes) -> tuple[list[tuple[bytes, int]], Counter[str], tuple[float, bytes]]:
    """Return (relative path, num_bytes) of each image, in no order, counts of the rest, newest."""
    newest = 0.0, b""
    images: list[tuple[bytes, int]] = []
    skipped: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    # Linked folders come after all real ones, sorted by name: so an image that can be reached twice
    # is listed once, under a path that does not depend on the disk's order, and loops end.
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
            with os.scandir(path) as entries:
                for entry in entries:
                    kind, num_bytes = _kind_of(entry)
                    if kind == "image":
                        images.append((prefix + entry.name, num_bytes))
                        newest = max(newest, (entry.stat().st_mtime, prefix + entry.name))
                    elif kind == "folder":
                        folders.append(prefix + entry.name)
                    elif kind == "linked folder":
                        heapq.heappush(linked, prefix + entry.name)
                    else:
                        count_skipped(skipped, kind)
        except OSError:
            skipped["unreadable"] += 1
    return images, skipped, newest


def count_skipped(skipped: Counter[str], kind: str) -> None:
    """Count one entry that was left out; the kinds stay few enough to read."""
    known = kind in skipped or len(skipped) < _MAX_KINDS
    skipped[kind if known else "other extensions"] += 1


def _kind_of(entry: os.DirEntry[bytes]) -> tuple[str, int]:
    """(kind, num_bytes): an image, a folder to list, or the kind to skip it as."""
    if entry.name.startswith(b"."):
        return "hidden", 0
    _, dot, extension = entry.name.rpartition(b".")
    extension = (dot + extension).lower() if dot else b""
    is_image = extension in IMAGE_EXTENSIONS
    try:
        if entry.is_dir():  # the type comes with the scan: no stat, unless it is a link
            if is_image:
                return f"folder named {extension.decode()}", 0
            return "linked folder" if entry.is_symlink() else "folder", 0
        if not is_image:
            return f"extension {printable(extension)}" if extension else "no extension", 0
        status = entry.stat()
    except OSError as error:
        if not entry.is_symlink():
            return "unreadable", 0
        is_dangling = isinstance(error, FileNotFoundError)
        return "dangling symlink" if is_dangling else "symlink loop", 0
    if not stat.S_ISREG(status.st_mode):
        return _FILE_KINDS.get(stat.S_IFMT(status.st_mode), "device"), 0
    return "image", status.st_size


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
