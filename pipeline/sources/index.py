"""The index of one shard: where its images are, kept in the file SHARD.index beside it.

Made once, by pipeline/pack.py or at the first use, and read at every start. It identifies the bytes
it was made of: a shard that is truncated or was exchanged is refused by name. A safetensors file,
opened in 0.2 ms (5,000 images, a 2-core VM); the text files of DALI's tools (wds2idx, tfrecord2idx,
rec2idx) hold neither labels nor anything to detect a stale one by.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from json import JSONDecodeError

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.sources.scan import RECORDIO, TAR, TFRECORD, Contents, scan_shard

# Compressed ones too, which scan_shard refuses by name.
_SHARD = re.compile(
    r".*(\.(tar|tgz|tfrec(ords?)?|rec)|-\d{5}-of-\d{5})(\.(gz|zst|xz|bz2))?", re.IGNORECASE
)
SUFFIX = ".index"
# 1 had the place of a TFRecord's image, and all images of a key of a tar file
_VERSION = {TAR: 2, TFRECORD: 2, RECORDIO: 1}
_PROBE_BYTES = 1 << 16
_ARRAYS = ("listing", "ends", "offsets", "spans", "labels")


class Outdated(ValueError):
    """An index of an earlier version, of a shard that pipeline/pack.py did not make."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Which part of which folder a shard of pipeline/pack.py holds."""

    source: str  # the folder's fingerprint
    num_images: int  # of the whole folder
    shard_bytes: int  # the most that a shard may hold
    first: int  # its first image in the folder's order
    end: int  # one behind its last image
    left_out: list[list[str]]  # name and reason of each image among these that is not in the shard
    content: str  # SHA-256 of the bytes of all these, those left out too


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """The N images of a shard, in the order in which a run counts them."""

    kind: str
    num_bytes: int  # of the shard
    digest: str  # SHA-256 of its first and last 64 KiB: read at every start, true for a copy
    listing: np.ndarray  # uint8: name NUL size of each image, joined by NUL, as in a fingerprint
    ends: np.ndarray  # (N,) int64: where in the listing an image's entry ends
    offsets: np.ndarray  # (N,) int64: where in the shard its bytes, or its record's, begin
    spans: np.ndarray  # (N,) int64: how many bytes to read there
    labels: np.ndarray  # (N,) int64, indices into class_names; -1 for none
    class_names: list[str]
    skipped: dict[str, int]  # how many entries of the shard are no images, by kind
    packed: Packed | None = None  # None for a shard made by another tool


def is_shard(name: str) -> bool:
    """Whether a file has the name of a shard."""
    return not name.startswith(".") and _SHARD.fullmatch(name) is not None


def index_path(shard: str) -> str:
    """Return the path of a shard's index."""
    return shard + SUFFIX


def open_index(shard: str) -> tuple[ShardIndex, str | None]:
    """Return the index of a shard, made and kept if there is none yet, and why it was not kept.

    Raises   ValueError for a shard that is truncated, damaged, of another kind or not that of its
             index.
    """
    try:
        if os.path.exists(index_path(shard)):
            with suppress(Outdated):  # made anew
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
    images = contents.images
    num_bytes, digest = _identity(shard)
    if class_names is None:
        class_names = sorted_classes(image.label for image in images if image.label is not None)
    numbers = {name: number for number, name in enumerate(class_names)} | {None: -1}
    entries = [b"%b\0%d" % (image.name, image.size) for image in images]
    return ShardIndex(
        kind=contents.kind,
        num_bytes=num_bytes,
        digest=digest,
        listing=np.frombuffer(b"\0".join(entries), np.uint8),
        ends=np.cumsum([len(entry) + 1 for entry in entries], dtype=np.int64) - 1,
        offsets=np.array([image.offset for image in images], np.int64),
        spans=np.array([image.span for image in images], np.int64),
        labels=np.array([numbers[image.label] for image in images], np.int64),
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
    folder, name = os.path.split(index_path(shard))
    fields = dataclasses.asdict(index)
    arrays = {array: np.ascontiguousarray(fields.pop(array)) for array in _ARRAYS}
    temporary = os.path.join(folder, f".{name}.{os.getpid()}")
    metadata = {"index": json.dumps({"version": _VERSION[index.kind], **fields})}
    try:
        with open(temporary, "wb") as file:  # save_file's are readable by their owner alone
            file.write(save(arrays, metadata=metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, index_path(shard))
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def load_index(shard: str) -> ShardIndex:
    """Return the index beside a shard, if it was made of the bytes that the shard has now.

    Raises   ValueError where it was not; OSError where a file cannot be read.
    """
    index = read_index(shard)
    num_bytes, digest = _identity(shard)
    if num_bytes < index.num_bytes:
        raise ValueError(
            f"{shard} is truncated: it has {num_bytes} of {index.num_bytes} bytes. Copy it again"
        )
    if (num_bytes, digest) != (index.num_bytes, index.digest):
        remedy = "pack the folder again: only this shard is made"
        if index.packed is None:
            remedy = "remove the index to have it made again"
        raise ValueError(
            f"{index_path(shard)} is stale: the shard has changed since. Restore it, or {remedy}"
        )
    return index


def read_index(shard: str) -> ShardIndex:
    """Return the contents of the index beside a shard, stale or not.

    Raises   ValueError for one that is damaged or of another version.
    """
    path = index_path(shard)
    try:
        with safe_open(path, framework="numpy") as file:
            fields = json.loads(file.metadata()["index"])
            if fields.pop("version") != _VERSION.get(fields["kind"]):
                if fields["packed"]:
                    raise ValueError(f"{path} is of another version: pack the folder again")
                raise Outdated(f"{path} is of another version: remove it to have it made again")
            fields["packed"] = Packed(**fields["packed"]) if fields["packed"] else None
            index = ShardIndex(**fields, **{name: file.get_tensor(name) for name in _ARRAYS})
            if _agrees(index):
                return index
            reason = "its parts contradict each other"
    except (SafetensorError, JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    raise ValueError(
        f"{path} is damaged ({reason}): if pipeline/pack.py made it, pack the folder again, else "
        "remove it to have it made again"
    )


def _agrees(index: ShardIndex) -> bool:
    """Whether every image of an index has a name, a label and a place within the shard."""
    arrays = (index.ends, index.offsets, index.spans, index.labels)
    if any(array.shape != index.ends.shape or array.dtype != np.int64 for array in arrays):
        return False
    holds = (
        np.diff(index.ends, prepend=-1, append=index.listing.size + 1) > 0,
        (index.labels >= -1) & (index.labels < len(index.class_names)),
        (index.offsets >= 0) & (index.spans >= 0),
        index.spans <= index.num_bytes - index.offsets,
    )
    return all(condition.all() for condition in holds)


def _identity(shard: str) -> tuple[int, str]:
    with open(shard, "rb", buffering=0) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        head = os.pread(file.fileno(), _PROBE_BYTES, 0)
        tail = os.pread(file.fileno(), _PROBE_BYTES, max(0, num_bytes - _PROBE_BYTES))
    return num_bytes, hashlib.sha256(head + tail).hexdigest()
