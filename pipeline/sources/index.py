"""The index of one shard: where its images lie, kept in the file SHARD.index beside it.

Made once, by pipeline/pack.py or at the first use, and read at every start. It says of which bytes
it was made: a shard that was cut, exchanged or left behind by its index is refused by name.

What a newcomer gets wrong: looking for DALI's index (wds2idx, tfrecord2idx, rec2idx). Those hold
offsets as text, and neither labels nor anything to tell a stale one by; this one is safetensors,
opened in 0.2 ms (5,000 images, a 2-core VM). DALI's tools still make theirs from the same shards.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from json import JSONDecodeError

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.sources.records import RECORDIO, TFRECORD, Contents
from pipeline.sources.scan import TAR, scan_shard

SUFFIX = ".index"
_VERSION = {TAR: 1, TFRECORD: 2, RECORDIO: 1}  # 1 had the place of a TFRecord's image
_PROBE_BYTES = 1 << 16
_ARRAYS = ("listing", "ends", "offsets", "spans", "labels")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Which part of which folder a shard of pipeline/pack.py holds."""

    source: str
    """The folder's fingerprint."""
    num_images: int
    """Images of the whole folder."""
    shard_bytes: int
    """What a shard may hold."""
    first: int
    """Its first image in the folder's order."""
    end: int
    """One behind its last image."""
    left_out: list[list[str]]
    """Name and reason of each image among these that is not in the shard."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """The N images of a shard, in the order in which a run counts them."""

    kind: str
    num_bytes: int
    """Of the shard."""
    digest: str
    """SHA-256 of the shard's first and last 64 KiB: found anew at every start, true for a copy."""
    listing: np.ndarray
    """uint8: name NUL size, joined by NUL, as the fingerprint of a folder takes them."""
    ends: np.ndarray
    """(N,) int64: where in the listing an image's entry ends."""
    offsets: np.ndarray
    """(N,) int64: where in the shard its bytes, or those of the record around it, begin."""
    spans: np.ndarray
    """(N,) int64: how many bytes to read there."""
    labels: np.ndarray
    """(N,) int64, indices into class_names; -1 for none."""
    class_names: list[str]
    skipped: dict[str, int]
    """How many entries of the shard are no images, by kind."""
    packed: Packed | None = None
    """None for a shard made by another tool."""


def index_path(shard: str) -> str:
    """Return where the index of a shard lies."""
    return shard + SUFFIX


def open_index(shard: str) -> tuple[ShardIndex, str | None]:
    """Return the index of a shard, made and kept if there is none yet, and why it was not kept.

    Raises   ValueError for a shard that is cut, damaged, of another kind or not that of its index.
    """
    try:
        if os.path.exists(index_path(shard)):
            return load_index(shard), None
        index = build_index(shard, scan_shard(shard))
    except OSError as error:
        raise ValueError(f"{shard} cannot be read ({error.strerror})") from None
    try:
        save_index(shard, index)
    except OSError as error:
        return index, error.strerror
    return index, None


def build_index(
    shard: str,
    contents: Contents,
    *,
    class_names: list[str] | None = None,
    packed: Packed | None = None,
) -> ShardIndex:
    """Return the index of a shard with these contents; class_names None: those that occur."""
    num_bytes, digest = _identity(shard)
    if class_names is None:
        class_names = sorted_classes(label for label in contents.labels if label is not None)
    numbers = {name: number for number, name in enumerate(class_names)}
    entries = [b"%b\0%d" % entry for entry in zip(contents.names, contents.sizes, strict=True)]
    lengths = np.fromiter(map(len, entries), np.int64, len(entries))
    labels = [-1 if label is None else numbers[label] for label in contents.labels]
    return ShardIndex(
        kind=contents.kind,
        num_bytes=num_bytes,
        digest=digest,
        listing=np.frombuffer(b"\0".join(entries), np.uint8),
        ends=np.cumsum(lengths + 1) - 1,
        offsets=np.array(contents.offsets, np.int64),
        spans=np.array(contents.spans, np.int64),
        labels=np.array(labels, np.int64),
        class_names=class_names,
        skipped=dict(contents.skipped),
        packed=packed,
    )


def sorted_classes(names: Iterable[str]) -> list[str]:
    """Return each class once: by number where all are numbers, else by name."""
    distinct = set(names)
    is_number = all(name.isascii() and name.isdecimal() for name in distinct)
    return sorted(distinct, key=(lambda name: (int(name), name)) if is_number else None)


def save_index(shard: str, index: ShardIndex) -> None:
    """Write the index beside its shard, complete or not at all."""
    path = index_path(shard)
    facts = dataclasses.asdict(index)
    arrays = {name: np.ascontiguousarray(facts.pop(name)) for name in _ARRAYS}
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}")
    about = {"index": json.dumps({"version": _VERSION[index.kind], **facts})}
    try:
        with open(temporary, "wb") as file:
            file.write(
                save(arrays, metadata=about)
            )  # save_file's are readable by their owner alone
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def load_index(shard: str) -> ShardIndex:
    """Return the index beside a shard, made of the very bytes that the shard has now.

    Raises   ValueError where it was not; OSError where a file cannot be read.
    """
    index = read_index(shard)
    num_bytes, digest = _identity(shard)
    if num_bytes < index.num_bytes:
        raise ValueError(
            f"{shard} is truncated: it has {num_bytes} of {index.num_bytes} bytes. Copy it again"
        )
    if (num_bytes, digest) != (index.num_bytes, index.digest):
        remedy = "remove the index to have it made anew"
        if index.packed is not None:
            remedy = "pack the folder again: only this shard is made"
        raise ValueError(
            f"{index_path(shard)} is stale: the shard has changed since. Restore it, or {remedy}"
        )
    return index


def read_index(shard: str) -> ShardIndex:
    """Return what the index beside a shard says, true or stale."""
    path = index_path(shard)
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["index"])
            if facts.pop("version") != _VERSION.get(facts["kind"]):
                raise ValueError(f"{path} is of another version: remove it to have it made anew")
            facts["packed"] = Packed(**facts["packed"]) if facts["packed"] else None
            index = ShardIndex(**facts, **{name: file.get_tensor(name) for name in _ARRAYS})
            if _agrees(index):
                return index
            reason = "its parts contradict each other"
    except (SafetensorError, JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    raise ValueError(
        f"{path} is damaged ({reason}): if pipeline/pack.py made it, pack the folder again, else "
        "remove it to have it made anew"
    )


def _agrees(index: ShardIndex) -> bool:
    """Whether every image of an index has a name, a label and a place within the shard."""
    arrays = (index.ends, index.offsets, index.spans, index.labels)
    fits = [array.shape == index.ends.shape and array.dtype == np.int64 for array in arrays]
    return all(fits) and all(
        checked.all()
        for checked in (
            np.diff(index.ends, prepend=-1, append=index.listing.size + 1) > 0,
            (index.labels >= -1) & (index.labels < len(index.class_names)),
            (index.offsets >= 0) & (index.spans >= 0),
            index.spans <= index.num_bytes - index.offsets,
        )
    )


def _identity(shard: str) -> tuple[int, str]:
    with open(shard, "rb", buffering=0) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        head = os.pread(file.fileno(), _PROBE_BYTES, 0)
        tail = os.pread(file.fileno(), _PROBE_BYTES, max(0, num_bytes - _PROBE_BYTES))
    return num_bytes, hashlib.sha256(head + tail).hexdigest()
