"""The images of a run: what to train on, and the labelled bank and queries of the kNN check.

Rank 0 lists the files, the others receive the list: on network storage a million stat calls on
each rank would take minutes.
"""

import hashlib
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.order import Purpose, keyed_rng
from pipeline.sources.digits import write_digits
from pipeline.sources.folder import READERS, ImageFolder
from pipeline.sources.reader import ImageReader, hash_images
from pipeline.sources.shards import ImageSource, ShardSet, open_source
from pipeline.sources.splits import split_root, tell_inner, tell_unused, why_no_labels
from train.config import DataConfig
from train.distributed import World, from_main, gather

DIGITS = "digits"
PART = 4096  # images that a rank hashes at once
PROGRESS_S = 15  # between two lines of progress


@dataclass(frozen=True)
class EvalSet:
    """Images with labels: ids (N,), their numbers; labels (N,) int64."""

    reader: ImageReader
    ids: np.ndarray
    labels: np.ndarray

    def labels_by_id(self) -> np.ndarray:
        """(max(ids) + 1,) int64: the label of each image of the set, -1 for others."""
        labels = np.full(int(self.ids.max()) + 1, -1)
        labels[self.ids] = self.labels
        return labels


@dataclass(frozen=True)
class RunData:
    """The training images, and bank and queries where there are labels."""

    train: ImageReader
    bank: EvalSet | None
    queries: EvalSet | None
    class_names: list[str]
    notes: list[str]
    """Images that are there and not used, on rank 0; then the source of the labels, or why there is
    no kNN check."""


def open_data(config: DataConfig, *, out: Path, seed: int, world: World) -> RunData:
    """List folders or open shards on rank 0 and share the lists.

    Raises: ValueError for a folder without images, a shard that cannot be used, held-out images of
    classes without training images, or hosts with different images.
    """
    train, val = list_on_main(lambda: _list(config, out), world)
    notes = unused(config) if world.is_main else []
    if world.is_main and isinstance(train, ImageFolder):
        notes += tell_inner(train)
    reader = ImageReader(train, config.max_pixels)
    if train.labels is None:
        if config.val is not None:
            raise ValueError(
                f"--data.val {config.val} is for kNN, and {train.root} has no class labels to vote "
                "with: give --data.root class folders, or leave --data.val out"
            )
        return RunData(
            reader, None, None, [], [*notes, f"no class labels, so no kNN check: {why_none(train)}"]
        )
    labels, names = train.labels, train.class_names
    if val is not None and val.labels is None:
        notes.append(
            f"{val.root} ({len(val)} images) has no class labels and is not used: {why_none(val)}"
        )
        val = None
    if val is None:
        ids, held_ids = split_bank(labels, seed=seed)
        notes.append(f"kNN: {len(ids)} training images vote on {len(held_ids)} others of them")
        held_out = EvalSet(reader, held_ids, labels[held_ids])
        return RunData(reader, EvalSet(reader, ids, labels[ids]), held_out, names, notes)
    assert val.labels is not None
    occurring = {val.class_names[label] for label in np.unique(val.labels)}
    if unknown := sorted(occurring - {names[label] for label in np.unique(labels)}):
        raise ValueError(
            f"{val.root} has classes that {train.root} lacks, such as {unknown[0]}: "
            "give --data.val images of the same classes"
        )
    index = np.array([names.index(name) if name in names else -1 for name in val.class_names])
    held_out = EvalSet(ImageReader(val, config.max_pixels), np.arange(len(val)), index[val.labels])
    notes.append(f"kNN: {len(train)} training images vote on {len(val)} of {val.root}")
    return RunData(reader, EvalSet(reader, np.arange(len(train)), labels), held_out, names, notes)


def why_none(source: ImageSource) -> str:
    """Why a source has no class labels."""
    if isinstance(source, ShardSet):
        return source.why_none
    return why_no_labels(source)


def unused(config: DataConfig) -> list[str]:
    """A line for each part of --data.root that is not used, or not as its name says."""
    notes = []
    if config.root == DIGITS:
        if not os.path.isdir(DIGITS):
            return []
        notes = [
            "the images are those of the folder digits; to train on the embedded ones rename it"
        ]
    train, val = split_root(config.root)
    return notes + tell_unused(config.root, train, config.val or val)


def list_on_main(
    list_images: Callable[[], tuple[ImageSource, ImageSource | None]], world: World
) -> tuple[ImageSource, ImageSource | None]:
    """What rank 0 lists, on every rank. Raises: what it raised, and ValueError for other images."""
    lists: tuple[ImageSource, ImageSource | None] | Exception | None = None
    if world.is_main:
        try:
            lists = list_images()
        except (ValueError, OSError) as error:
            lists = error
    lists = from_main(world, lists)
    if isinstance(lists, Exception):
        raise lists
    assert lists is not None
    check_same_images(lists, world)
    return lists


def check_same_images(sources: tuple[ImageSource | None, ...], world: World) -> None:
    """Raise ValueError on all ranks if a host has other images than rank 0, whose list is used.

    The first process of each host compares. Storage that hosts share, recognised by the inode of
    the folder or first shard, is not listed again.
    """
    if world.size == 1:
        return
    lists = [source for source in sources if source is not None]
    identities = from_main(world, [identity(source) for source in lists])
    differences = []
    if world.local_rank == 0 and not world.is_main:
        pairs = zip(lists, identities, strict=True)
        differences = [difference(source) for source, same in pairs if identity(source) != same]
    for text in sum(gather(world, differences), []):
        if text is not None:
            raise ValueError(text)


def identity(source: ImageSource) -> tuple[int, int] | None:
    """Inode and time of change, equal on hosts that share the storage; None if it is missing."""
    try:
        status = os.stat(source.shards[0] if isinstance(source, ShardSet) else source.root)
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def difference(source: ImageSource) -> str | None:
    """How the images of this host differ from rank 0's list; None where they do not."""
    host = socket.gethostname()
    try:
        local = open_source(source.root)
    except ValueError as error:
        return f"host {host}: {error}"
    is_same = local.fingerprint == source.fingerprint
    if is_same and are_places_same(local, source):
        return None
    what = "the same, in other shards" if is_same else "same names, other sizes"
    names, expected = (set(map(s.name, range(len(s)))) for s in (local, source))
    if not is_same and (odd := names ^ expected):
        what = f"{min(odd)} is {'only' if min(odd) in names else 'missing'} there"
    return (
        f"host {host} has other images under {source.root} than rank 0's host ({len(local)} "
        f"against {len(source)}; {what}): copy them again, or use storage that all hosts share"
    )


def are_places_same(local: ImageSource, source: ImageSource) -> bool:
    """Whether both have the images at the same places in shards, which no fingerprint contains."""
    if isinstance(local, ShardSet) and isinstance(source, ShardSet):
        return local.shards == source.shards and all(
            np.array_equal(getattr(local, name), getattr(source, name))
            for name in ("starts", "offsets", "spans")
        )
    return isinstance(local, ShardSet) == isinstance(source, ShardSet)


def check_apart(out: Path, *folders: str | None) -> None:
    """Raise ValueError if `out` is inside a folder of images."""
    for folder in folders:
        if folder is not None and out.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"--out {out} is in the images' folder {folder}: its pictures would be read as "
                "images. Choose another folder"
            )


def image_root(root: str, parent: Path) -> str:
    """The folder that --data.root names. Writes the embedded digits into a folder of `parent`.

    A folder of the user's own that is called digits goes before them.
    """
    if root == DIGITS and not os.path.isdir(DIGITS):
        return str(write_digits(parent / "digits-jpeg"))
    return root


def _list(config: DataConfig, out: Path) -> tuple[ImageSource, ImageSource | None]:
    train_root, val_root = split_root(image_root(config.root, out.parent))
    val_root = config.val or val_root
    check_apart(out, train_root, val_root)
    val = open_source(val_root) if val_root is not None else None
    train = open_source(train_root)
    if val is not None:
        check_held_out(train, val)
    if config.val is not None and val is not None and val.labels is None:
        raise ValueError(
            f"--data.val {config.val} has no class labels, which kNN needs: {why_none(val)}"
        )
    return train, val


def check_held_out(train: ImageSource, val: ImageSource) -> None:
    """Raise ValueError where images to validate on are among those to train on, by their files."""
    if isinstance(train, ShardSet) and isinstance(val, ShardSet):
        inside = bool({*map(os.path.realpath, train.shards)} & {*map(os.path.realpath, val.shards)})
    elif isinstance(train, ImageFolder) and isinstance(val, ImageFolder):
        pairs = (train, val), (val, train)
        inside = any(_holds(outer, Path(inner.root).resolve()) for outer, inner in pairs)
    else:
        return
    if inside:
        raise ValueError(
            f"{val.root} has images that are also in {train.root}, which is trained on: move them "
            "apart, or leave --data.val out, and a tenth of the images is held out of the vote"
        )


def _holds(folder: ImageFolder, inner: Path) -> bool:
    root = Path(folder.root).resolve()
    if not inner.is_relative_to(root):
        return False
    part = os.fsencode(inner.relative_to(root))
    return part == b"." or any(path.startswith(part + b"/") for path in folder.paths)


def content_hash(source: ImageSource, world: World, log: Callable[[str], None]) -> str:
    """SHA-256 of all images, the same for any number of ranks, which share the reading."""
    ends = [*range(PART, len(source), PART), len(source)]
    parts = [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    mine, hashes, told = parts[world.rank :: world.size], [], time.monotonic()
    with ThreadPoolExecutor(READERS) as pool:
        for part in mine:
            hashes.append(hash_images(source, part, pool))
            if time.monotonic() - told > PROGRESS_S:
                log(f"--data.verify has read {len(hashes)} of {len(mine)} parts of the images")
                told = time.monotonic()
    of_rank = gather(world, hashes)
    in_order = [of_rank[n % world.size][n // world.size] for n in range(len(parts))]
    return hashlib.sha256("".join(in_order).encode()).hexdigest()


def split_bank(labels: np.ndarray, *, seed: int, share: float = 0.1, most: int = 5000):
    """(bank ids, query ids) of one labelled folder: a tenth, at most 5000, are the queries.

    For a data set without a validation folder: all are trained on, without labels.
    """
    order = keyed_rng(seed, Purpose.KNN_SPLIT).permutation(len(labels))
    num_queries = min(most, max(1, int(share * len(labels))))
    return np.sort(order[num_queries:]), np.sort(order[:num_queries])
