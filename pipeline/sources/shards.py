"""A set of shards as a list of images, like the ImageFolder of pipeline/sources/folder.py.

Order, resume and the replacement of bad images are those of a folder: a sample is a number, and its
bytes are one read away; the seed's order is over all images of the set. A folder packed by
pipeline/pack.py has the folder's order and, if no image was left out, its fingerprint: a run begun
on the folder continues on the shards bit for bit, and the reverse.
"""

import glob
import hashlib
import os
import re
import resource
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, fields

import numpy as np
from rich.console import Console
from rich.progress import track

from pipeline.sources.folder import (
    IMAGE_EXTENSIONS,
    Allocate,
    ImageFolder,
    Stamped,
    attempt_all,
    list_images,
    new_bytes,
    printable,
    read_range,
    stamp_of,
)
from pipeline.sources.header import BadImage
from pipeline.sources.index import SUFFIX, ShardIndex, index_path, is_shard, open_index
from pipeline.sources.labels import labels_of
from pipeline.sources.paths import matches
from pipeline.sources.scan import TAR

Place = tuple[int, int, int]
"""The number of a shard, an offset in it, and how many bytes to read there."""
_MAX_DESCRIPTORS = 1 << 16
_SPARE_DESCRIPTORS = 256  # for everything else
_INDEXERS = 16  # threads that make indices: they mostly wait for the disk


@dataclass(frozen=True, eq=False)
class ShardSet:
    """The images of some shards; arrays alone, so that it opens fast and pickles as it is."""

    root: str  # the folder or the glob that was asked for
    shards: list[str]  # absolute paths, sorted bytewise
    kind: str
    starts: np.ndarray  # (shards + 1,) int64: the number of each shard's first image
    listing: np.ndarray  # this and the next three as in ShardIndex
    ends: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray
    labels: np.ndarray | None  # (N,) int64. None unless every image has a class and two differ
    class_names: list[str]
    why_none: str  # why there are no labels
    fingerprint: str  # SHA-256 of names and sizes, as that of a folder
    skipped: dict[str, int]  # how many entries of the shards are no images, by kind
    _descriptors: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Allow this process as many open files as there are shards."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
        if len(self.shards) + _SPARE_DESCRIPTORS > limit:
            raise ValueError(
                f"{self.root} has {len(self.shards)} shards, and this process may open {limit} "
                "files: raise the limit (ulimit -Hn), or make larger shards"
            )
        if soft < limit:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.ends)

    def read(self, index: int) -> np.ndarray:
        """Return the bytes of an image, (num_bytes,) uint8.

        Raises   BadImage when the shard cannot be read there.
        """
        image: Stamped | BadImage = self._read_span(self._places([index])[0], new_bytes)
        if self.kind != TAR:
            (image,) = self._images_of([image])
        if isinstance(image, BadImage):
            raise image
        return image[0]

    def read_many(
        self, indices: Sequence[int], pool: Executor, allocate: Allocate | None = None
    ) -> list[Stamped | BadImage]:
        """Return what `read` returns or raises for each index, in order, with the shard's stamp.

        A call reads the records of TFRecord and RecordIO together: many calls for one are slow.
        """
        memory = allocate if allocate and self.kind == TAR else new_bytes
        places = self._places(indices)
        results = attempt_all(lambda place: self._read_span(place, memory), places, pool)
        return results if self.kind == TAR else self._images_of(results, pool)

    def _images_of(
        self, records: list[Stamped | BadImage], pool: Executor | None = None
    ) -> list[Stamped | BadImage]:
        from pipeline.sources.record_reader import read_records  # imports DALI

        pairs = [(record, 0) if isinstance(record, BadImage) else record for record in records]
        images = read_records(self.kind, [data for data, _ in pairs], pool)
        return [
            image if isinstance(image, BadImage) else (image, stamp)
            for image, (_, stamp) in zip(images, pairs, strict=True)
        ]

    def _places(self, indices: Sequence[int]) -> list[Place]:
        """Where the bytes of the images are; separate calls take 5 us each."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        parts = shards, self.offsets[indices], self.spans[indices]
        return list(zip(*(part.tolist() for part in parts), strict=True))

    def _read_span(self, place: Place, allocate: Allocate) -> Stamped:
        shard, offset, span = place
        try:
            descriptor = self._descriptor(shard)
            stamp = stamp_of(os.fstat(descriptor))
            data = read_range(descriptor, offset, span, allocate)
        except OSError as error:
            raise BadImage(f"unreadable shard ({error.strerror})") from None
        if data.size < span:
            raise BadImage("truncated shard")
        if data.size == 0:
            raise BadImage("empty file")
        return data, stamp

    def name(self, index: int) -> str:
        """Return the shard and the image's name in it as one printable line."""
        start = 0 if index == 0 else int(self.ends[index - 1]) + 1
        entry = self.listing[start : int(self.ends[index])].tobytes()
        shard = os.path.basename(self.shards[self._places([index])[0][0]])
        return printable(os.fsencode(shard) + b": " + entry.rpartition(b"\0")[0])

    def __reduce__(self) -> tuple:
        """Pickle everything but the open files."""
        return ShardSet, tuple(getattr(self, f.name) for f in fields(self) if f.init)

    def __del__(self) -> None:
        """Close the shards."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _descriptor(self, shard: int) -> int:
        if (known := self._descriptors.get(shard)) is not None:
            return known
        opened = os.open(self.shards[shard], os.O_RDONLY)
        kept = self._descriptors.setdefault(shard, opened)
        if kept != opened:  # another thread was first
            os.close(opened)
        return kept


ImageSource = ImageFolder | ShardSet


def open_source(root: str) -> ImageSource:
    """Open a folder of images, a folder of shards, or the shards that a glob names.

    A folder is one of shards if it holds shards and neither images nor folders. Images in folders
    beside one archive or several of different names are taken for its content.

    Raises   ValueError when there is no image, or a shard is missing, cut, stale or of another
             kind than the first.
    """
    if shards := find_shards(root):
        return open_shards(root, shards)
    try:
        return list_images(root)
    except ValueError as error:
        if not root:
            raise
        inside = glob.iglob(os.path.join(glob.escape(root), "**", "*"), recursive=True)
        shard = next((name for name in inside if is_shard(os.path.basename(name))), None)
        if shard is None:
            raise
        folder, extension = os.path.dirname(shard), os.path.splitext(shard)[1]
        raise ValueError(f"{error} It has shards: '{folder}/*{extension}' names them") from None


def find_shards(root: str) -> list[str]:
    """Return the shards of a folder or a glob, sorted; none for a folder that is not of shards.

    Raises   ValueError for a glob without shards, a shard of which only the index is there, and
             a folder with several sets, or with images beside shards.
    """
    if os.path.isdir(root):
        return _shards_of_folder(os.path.abspath(root))
    found = matches(root)
    names = (name for name in found or () if not name.endswith(SUFFIX))
    shards = sorted(os.path.abspath(name) for name in names)
    if not shards and found not in (None, [root]):
        raise ValueError(f"No shards match {root}. Is the glob quoted, and its folder right?")
    return shards


def _shards_of_folder(folder: str) -> list[str]:
    shards, indexed, image, inner = set(), set(), "", []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                extension = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    inner.append(entry.path)
                elif os.fsencode(extension) in IMAGE_EXTENSIONS:
                    image = entry.name
                elif extension == SUFFIX:
                    indexed.add(entry.path.removesuffix(SUFFIX))
                elif is_shard(entry.name):
                    shards.add(entry.path)
    except OSError:  # list_images says what is wrong with the folder
        return []
    sets = sorted({_unnumbered(shard) for shard in shards})
    if inner and (len(shards) < 2 or len(sets) > 1):  # the archive of what was unpacked beside it
        return []
    if not shards and image:
        return []
    image = image or next(filter(None, map(_image_in, inner)), "")
    if inner and not image:
        return []
    if image:
        some, extension = os.path.basename(min(shards)), os.path.splitext(min(shards))[1]
        raise ValueError(
            f"{folder} holds shards, such as {some}, and images, such as {image}: name the shards "
            f"with a glob, '{folder}/*{extension}', or move them out to train on the images"
        )
    if lost := sorted(indexed - shards):
        raise ValueError(
            f"{lost[0]} is missing, though its index is there: restore the shard, or remove "
            f"{index_path(lost[0])} to go without it"
        )
    if len(sets) > 1:
        raise ValueError(
            f"{folder} holds several sets of shards ({sets[0]}, {sets[1]}): name one with a "
            f"glob, such as '{folder}/{sets[0]}', or all with '{folder}/*'"
        )
    return sorted(shards)


def _unnumbered(shard: str) -> str:
    """The name without its numbers: TFDS keeps cifar10-train and cifar10-test in one folder."""
    return re.sub(r"\d+", "*", os.path.basename(shard))


def _image_in(folder: str) -> str:
    """The first image of a folder; "" where there is none."""
    for path, _, names in os.walk(folder):
        for name in names:
            if os.fsencode(os.path.splitext(name)[1].lower()) in IMAGE_EXTENSIONS:
                return os.path.join(path, name)
    return ""


def open_shards(root: str, shards: list[str]) -> ShardSet:
    """Open shards as one set, in the order given; indices that are missing are made and kept."""
    console = Console(stderr=True)
    if num_new := sum(not os.path.exists(index_path(shard)) for shard in shards):
        plural = "s" * (num_new != 1)
        print(f"making the index of {num_new} shard{plural} of {root}, once", file=sys.stderr)
    with ThreadPoolExecutor(_INDEXERS, thread_name_prefix="shard index") as pool:
        opened, hidden = pool.map(open_index, shards), not (console.is_terminal and num_new)
        bar = {"console": console, "transient": True, "disable": hidden}
        opened = track(opened, "opening shards", len(shards), **bar)
        indices, reasons = zip(*opened, strict=True)
    if lost := [reason for reason in reasons if reason is not None]:
        refused = f"{len(lost)} indices could not be written beside the shards of {root}"
        print(f"warning: {refused} ({lost[0]}): they are made again at each start", file=sys.stderr)
    for shard, index in zip(shards, indices, strict=True):
        if index.kind != indices[0].kind:
            raise ValueError(
                f"{shard} is a {index.kind} file and {shards[0]} a {indices[0].kind} file: name "
                "one kind with a glob"
            )
    if os.path.isdir(root) and any(index.packed for index in indices):
        _check_complete(root, shards, indices)
    return _joined(root, shards, indices)


def _check_complete(root: str, shards: list[str], indices: tuple[ShardIndex, ...]) -> None:
    """Raise ValueError unless the shards of pipeline/pack.py are all of one folder's."""
    whole = next(index.packed for index in indices if index.packed is not None)
    position = 0
    for shard, index in zip(shards, indices, strict=True):
        part = index.packed
        if part is None or part.source != whole.source:
            raise ValueError(
                f"{shard} was not packed with the other shards of {root}: remove it, and pack the "
                "folder again if one is missing then"
            )
        if part.first != position:
            raise ValueError(
                f"{root} lacks a shard before {shard}: pack the folder again, only what is missing "
                "is made"
            )
        position = part.end
    if position < whole.num_images:
        raise ValueError(
            f"{root} holds {position} of {whole.num_images} images: packing has not finished, the "
            "same command continues it"
        )


def _joined(root: str, shards: list[str], indices: tuple[ShardIndex, ...]) -> ShardSet:
    skipped = sum((Counter(index.skipped) for index in indices), Counter())
    filled = [index for index in indices if len(index.ends)]
    if not filled:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in skipped.most_common(3))
        raise ValueError(f"No images in {len(shards)} shards of {root}: found {kinds or 'nothing'}")
    nul = np.zeros(1, np.uint8)
    listing = np.concatenate([part for index in filled for part in (index.listing, nul)])[:-1]
    positions = np.cumsum([0, *(index.listing.size + 1 for index in filled)])
    ends = [index.ends + at for index, at in zip(filled, positions[:-1], strict=True)]
    named = [shard for shard, index in zip(shards, indices, strict=True) if len(index.ends)]
    labels, class_names, why_none = labels_of(named, filled)
    return ShardSet(
        root=root,
        shards=shards,
        kind=indices[0].kind,
        starts=np.cumsum([0, *(len(index.ends) for index in indices)]),
        listing=listing,
        ends=np.concatenate(ends),
        offsets=np.concatenate([index.offsets for index in filled]),
        spans=np.concatenate([index.spans for index in filled]),
        labels=labels,
        class_names=class_names,
        why_none=why_none,
        fingerprint=hashlib.sha256(listing.data).hexdigest(),
        skipped=dict(skipped),
    )
