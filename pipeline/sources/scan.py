"""What lies where in one shard; here the kinds are told apart and tar files (WebDataset) read.

Before pipeline/sources/index.py, which keeps what is found; pipeline/sources/records.py reads the
other kinds. Headers alone are read, images passed over: 45 us of CPU an image and its label (Python
3.11, a 2-core VM, best of 5).

What a newcomer gets wrong: a dot in a name. WebDataset ends the key at the first one, so that
a.b.jpg is the part "b.jpg" of the sample "a" and no image; what is left out so is counted.

    tar        members key.jpg and key.cls, or key.json with "label" or "cls"
"""

import json
import os
import tarfile
from typing import BinaryIO

from pipeline.sources.folder import IMAGE_EXTENSIONS, count_skipped, printable
from pipeline.sources.records import (
    MAGIC_BYTES,
    RECORDIO,
    TFRECORD,
    Contents,
    cut,
    is_tfrecord,
    scan_recordio,
    scan_tfrecord,
)

TAR = "tar"
_MAX_LABEL_BYTES = 1 << 16

_OTHER_KINDS = (
    (b"\x1f\x8b", "is compressed with gzip: unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it with unzstd"),
    (b"PK\x03\x04", "is a zip archive: unpack it into a folder"),
    (b"PAR1", "is a Parquet file: write its images into a folder"),
)


def scan_shard(path: str) -> Contents:
    """Find the images of a shard, whose kind is told by its content.

    Raises   ValueError for a file of another kind, or one that is cut short or damaged.
    """
    with open(path, "rb") as file:
        kind = _kind(path, file.read(512))
        file.seek(0)
        scan = {TAR: _scan_tar, TFRECORD: scan_tfrecord, RECORDIO: scan_recordio}[kind]
        return scan(path, file, os.fstat(file.fileno()).st_size)


def _kind(path: str, head: bytes) -> str:
    if len(head) == 0:
        raise ValueError(f"{path} is empty: copy it again")
    if head == bytes(512):  # what a tar file ends with
        raise ValueError(
            f"{path} begins with zeros: a tar file without members, or a copy that did not finish. "
            "Copy it again, or remove it"
        )
    if head.startswith(MAGIC_BYTES):
        return RECORDIO
    if is_tfrecord(head):
        return TFRECORD
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        found = f"starts with {head[:8].hex(' ')}"
        what = next((text for start, text in _OTHER_KINDS if head.startswith(start)), found)
        raise ValueError(f"{path} is no tar, TFRecord or RecordIO shard: it {what}") from None
    return TAR


def _scan_tar(path: str, file: BinaryIO, num_bytes: int) -> Contents:
    found = Contents(TAR)
    keys: list[bytes] = []
    labels: dict[bytes, str] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = member.name.encode(errors="surrogateescape")
                folder, slash, base = name.rpartition(b"/")
                stem, dot, extension = base.partition(b".")
                key = folder + slash + stem
                if not member.isreg() or member.issparse():
                    found.skipped["no regular file"] += 1
                elif not stem:
                    found.skipped["hidden"] += 1
                elif b"." + extension.lower() in IMAGE_EXTENSIONS:
                    found.add(name, None, size=member.size, offset=member.offset_data)
                    keys.append(key)
                elif extension in (b"cls", b"json"):
                    text = os.pread(file.fileno(), min(member.size, _MAX_LABEL_BYTES),
                                    member.offset_data)  # fmt: skip
                    label = text.decode(errors="backslashreplace").strip()
                    label = label if extension == b"cls" else _json_label(label)
                    if label and (extension == b"cls" or key not in labels):
                        labels[key] = label
                else:
                    kind = f"extension .{printable(extension)}" if dot else "no extension"
                    count_skipped(found.skipped, kind)
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(cut(path, num_bytes, str(error))) from None
    # A tar file ends in two blocks of zeros. tarfile takes the end of the file for the end of the
    # archive, and a damaged header too.
    if (closing := os.pread(file.fileno(), 1024, end)) != bytes(1024):
        what = "a damaged header" if len(closing) == 1024 else "no end-of-archive mark"
        raise ValueError(cut(path, num_bytes, f"{what} at byte {end}"))
    found.labels = [labels.get(key) for key in keys]
    return found


def _json_label(text: str) -> str | None:
    try:
        facts = json.loads(text)
    except ValueError:
        return None
    label = facts.get("label", facts.get("cls")) if isinstance(facts, dict) else None
    return str(label) if isinstance(label, int | str) else None
