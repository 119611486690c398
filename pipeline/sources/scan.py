"""Finds the images of a tar, TFRecord or RecordIO shard, to make its index.

Headers alone are read, images passed over: 45 us of CPU an image and its label of a tar file, 37 us
a TFRecord of ten features, 4 us a RecordIO record (Python 3.11, a 2-core VM, best of 5).

    tar        WebDataset: members key.jpg and key.cls, or key.json with "label" or "cls". The key
               ends at the first dot: a.b.jpg is the part "b.jpg" of the sample "a", and no image.
               Of several images of a key the first counts. Archives joined by cat are read to the
               last, as by tar --ignore-zeros
    TFRecord   tf.train.Example with image/encoded or image; image/class/label or label
    RecordIO   MXNet's image records: header (flag, label, id, id2), labels, image
"""

import json
import os
import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from pipeline.sources.folder import IMAGE_EXTENSIONS, count_skipped, printable

TAR, TFRECORD, RECORDIO = "tar", "TFRecord", "RecordIO"
_MAX_LABEL_BYTES = 1 << 26
_OTHER_KINDS = (
    (b"\x1f\x8b", "is compressed with gzip: unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it with unzstd"),
    (b"PK\x03\x04", "is a zip archive: unpack it into a folder"),
    (b"PAR1", "is a Parquet file: write its images into a folder"),
)

# Feature names of TensorFlow's build_imagenet_data.py, then those of TFDS.
IMAGE_FEATURES = ("image/encoded", "image")
_LABEL_FEATURES = ("image/class/label", "label")
_NAME_FEATURES = ("image/filename", "file_name", "filename")

# Protobuf's keys, number << 3 | wire type; 2: its length, then its bytes.
_FIRST_FIELD, _SECOND_FIELD, _VARINT = 0x0A, 0x12, 0x08
BYTES, _FLOATS, _INTEGERS = 0x0A, 0x12, 0x1A  # the fields of a Feature
_FIXED_BYTES = {1: 8, 5: 4}  # by wire type

MAGIC = 0xCED7230A  # a record that holds it at a multiple of 4 is cut in parts before it
MAGIC_BYTES = struct.pack("<I", MAGIC)
WHOLE, FIRST, MIDDLE, LAST = range(4)  # parts of a record
HEADER_BYTES = 24

Read = Callable[[int, int], bytes | memoryview]
"""Gives the bytes from a position to another."""
Span = tuple[int, int]
"""Start and end of bytes."""


class Entry(NamedTuple):
    """An image of a shard."""

    name: bytes
    label: str | None  # the class as text, "7" or "cat"
    size: int  # bytes of the image
    offset: int
    span: int  # bytes to read at the offset: the image of a tar file, or the record around it


@dataclass
class Contents:
    """The images of one shard, in the file's order, and counts of what else it has, by kind."""

    kind: str
    images: list[Entry] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def scan_shard(path: str) -> Contents:
    """Find the images of a shard, whose kind is identified by its content.

    Raises   ValueError for a file of another kind, or one that is truncated or damaged.
    """
    with open(path, "rb") as file:
        kind = _kind(path, file.read(512))
        file.seek(0)
        scan = {TAR: _scan_tar, TFRECORD: _scan_tfrecord, RECORDIO: _scan_recordio}[kind]
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
    if _is_tfrecord(head):
        return TFRECORD
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        unknown = f"starts with {head[:8].hex(' ')}"
        what = next((text for start, text in _OTHER_KINDS if head.startswith(start)), unknown)
        raise ValueError(f"{path} is no tar, TFRecord or RecordIO shard: it {what}") from None
    return TAR


def _is_tfrecord(head: bytes) -> bool:
    # an Example is a single field, whose length follows from that of the record
    try:
        length, at = _varint(head, 13)
        return head[12] == _FIRST_FIELD and struct.unpack_from("<Q", head)[0] == at - 12 + length
    except (IndexError, struct.error):
        return False


def _cut(path: str, num_bytes: int, detail: str) -> ValueError:
    return ValueError(
        f"{path} is truncated or damaged: it has {num_bytes} bytes, {detail}. Copy it again"
    )


@dataclass
class _TarContents:
    """What was found of a tar file so far; images and labels of the samples that are not closed."""

    done: list[Entry] = field(default_factory=list)
    images: dict[bytes, Entry] = field(default_factory=dict)  # by key
    labels: dict[bytes, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    last_key: bytes = b""

    def close(self) -> None:
        """Give the images so far their labels: a key that comes again is of another sample."""
        entries = self.images.items()
        self.done += [entry._replace(label=self.labels.get(key)) for key, entry in entries]
        self.images, self.labels = {}, {}

    def add(self, member: tarfile.TarInfo, file: BinaryIO) -> None:
        """Take an image or a label; count what is neither."""
        name = member.name.encode(errors="surrogateescape")
        folder, slash, base = name.rpartition(b"/")
        stem, dot, extension = base.partition(b".")
        key, size, offset = folder + slash + stem, member.size, member.offset_data
        is_image = b"." + extension.lower() in IMAGE_EXTENSIONS
        is_label = extension in (b"cls", b"json")
        if not member.isreg() or member.issparse():
            self.skipped["no regular file"] += 1
            return
        if not stem:
            self.skipped["hidden"] += 1
            return
        known = self.images if is_image else self.labels if is_label else ()
        if key != self.last_key and key in known:
            self.close()
        self.last_key = key
        if is_image:
            if key in self.images:
                self.skipped["further image of a key"] += 1
            else:
                self.images[key] = Entry(name, None, size, offset, size)
        elif is_label:
            content = os.pread(file.fileno(), min(size, _MAX_LABEL_BYTES), offset)
            label = content.decode(errors="backslashreplace").strip()
            label = label if extension == b"cls" else _json_label(label)
            if label and (extension == b"cls" or key not in self.labels):
                self.labels[key] = label
        else:
            kind = f"extension .{printable(extension)}" if dot else "no extension"
            count_skipped(self.skipped, kind)


def _scan_tar(path: str, file: BinaryIO, num_bytes: int) -> Contents:
    found, start = _TarContents(), 0
    while start < num_bytes:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isdir():
                        found.add(member, file)
                end = tar.offset
        except tarfile.TarError as error:
            raise _cut(path, num_bytes, str(error)) from None
        # tarfile takes the end of the file, and a damaged header too, for the end of the archive
        if (closing := os.pread(file.fileno(), 1024, end)) != bytes(1024):
            what = "a damaged header" if len(closing) == 1024 else "no end-of-archive mark"
            raise _cut(path, num_bytes, f"{what} at byte {end}")
        found.close()
        start = _next_archive(path, file, end, num_bytes)
    return Contents(TAR, found.done, found.skipped)


def _next_archive(path: str, file: BinaryIO, end: int, num_bytes: int) -> int:
    """Where an archive begins behind the zeros from `end` on; num_bytes where nothing follows."""
    at = end
    while at < num_bytes:
        part = os.pread(file.fileno(), 1 << 20, at)
        if not part:
            break
        zeros = len(part) - len(part.lstrip(b"\0"))
        if zeros < len(part):
            start = end + (at + zeros - end) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
            head = os.pread(file.fileno(), tarfile.BLOCKSIZE, start)
            try:
                tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                what = "bytes that are no tar archive follow its end"
                raise _cut(path, num_bytes, f"{what} at byte {start}") from None
            return start
        at += len(part)
    return num_bytes


def _json_label(text: str) -> str | None:
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    label = fields.get("label", fields.get("cls")) if isinstance(fields, dict) else None
    return str(label) if isinstance(label, int | str) else None


def _scan_tfrecord(path: str, file: BinaryIO, num_bytes: int) -> Contents:
    """Records: uint64 length, uint32 checksum of it, the Example, uint32 checksum of that."""
    contents = Contents(TFRECORD)
    position, number = 0, 0

    def read(start: int, end: int) -> bytes:
        file.seek(start)  # within the buffer mostly: no system call
        return file.read(end - start)

    while position < num_bytes:
        head = read(position, position + 8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else num_bytes
        start, end = position + 12, position + 12 + length
        if end + 4 > num_bytes:
            raise _cut(path, num_bytes, f"record {number} ends at byte {end + 4}")
        try:
            features = example_features(read, start, end)
            kind, images = feature_values(read, features, IMAGE_FEATURES)
            label = _label(read, *feature_values(read, features, _LABEL_FEATURES))
            name_kind, names = feature_values(read, features, _NAME_FEATURES)
        except (LookupError, UnicodeDecodeError):
            raise ValueError(f"{path} is damaged: record {number} at byte {position}") from None
        if kind != BYTES or not images:
            has = printable(", ".join(sorted(features)[:5]).encode()) or "nothing"
            raise ValueError(
                f"{path} is no shard of encoded images: record {number} has the bytes of an image "
                f"neither in image/encoded nor in image, but {has}"
            )
        if len(images) > 1:  # DALI's reader takes the first, too
            contents.skipped["further image of a record"] += len(images) - 1
        name = bytes(read(*names[0])) if name_kind == BYTES and names else b""
        size = images[0][1] - images[0][0]
        name = name or b"record %d" % number
        contents.images.append(Entry(name, label, size, position, length + 16))
        position, number = end + 4, number + 1
    return contents


def _label(read: Read, kind: int, values: list[Span]) -> str | None:
    if len(values) != 1 or kind not in (BYTES, _INTEGERS):
        return None
    ((start, end),) = values
    if kind == BYTES:
        return str(read(start, end), errors="backslashreplace")
    value, num_bytes = _varint(read(start, start + 10), 0)
    is_single = num_bytes == end - start
    return str(value) if is_single and value < 1 << 63 else None  # -1 is TFDS's mark of no label


def example_features(read: Read, start: int, end: int) -> dict[str, Span]:
    """Where each feature of an Example is: Example.features = Features.feature = a map.

    Fields of another number or wire type are passed over, and a name that is no UTF-8 is an error,
    as in protobuf's parser, which would report it on stderr for each record.

    Raises   LookupError or UnicodeDecodeError for what is no Example.
    """
    spans = {}
    for features in _first_fields(read, start, end):
        for entry in _first_fields(read, *features):
            parts = {key: (start, end) for key, start, end in _fields(read, *entry)}
            spans[str(read(*parts[_FIRST_FIELD]), "utf-8")] = parts[_SECOND_FIELD]
    return spans


def feature_values(
    read: Read, features: dict[str, Span], names: tuple[str, ...]
) -> tuple[int, list[Span]]:
    """Return kind and places of the values of the first of the named features that exists.

    A Feature is a list of bytes, floats or integers, values in the list's field 1. Packed integers
    are one value; without a list, and where there is no such feature, the kind is 0.
    """
    kind, values = 0, (0, 0)
    at = next((features[name] for name in names if name in features), (0, 0))
    for key, start, end in _fields(read, *at):
        if key in (BYTES, _FLOATS, _INTEGERS):  # the last one counts
            kind, values = key, (start, end)
    return kind, _first_fields(read, *values, also=_VARINT if kind == _INTEGERS else 0)


def _first_fields(read: Read, start: int, end: int, also: int = 0) -> list[Span]:
    fields = _fields(read, start, end)
    return [(start, end) for key, start, end in fields if key in (_FIRST_FIELD, also)]


def _fields(read: Read, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (key, start, end) of each field of a protobuf message: where its value is."""
    while position < end:
        head = read(position, position + 20)
        key, at = _varint(head, 0)
        if key & 7 == 2:
            length, at = _varint(head, at)
        elif key & 7 == 0:
            length = _varint(head, at)[1] - at
        else:
            length = _FIXED_BYTES[key & 7]
        start = position + at
        position = start + length
        if position > end or key >> 32:
            raise IndexError
        yield key, start, position


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Return a protobuf integer and the position behind it. IndexError where data ends in it."""
    value, shift = 0, 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _scan_recordio(path: str, file: BinaryIO, num_bytes: int) -> Contents:
    """Parts: uint32 magic, uint32 kind of part << 29 | length, that many bytes, padding to 4."""
    contents = Contents(RECORDIO)
    position = start = size = number = 0
    label, part = None, WHOLE
    while position < num_bytes:
        file.seek(position)
        head = file.read(32)
        if len(head) < 8:
            raise _cut(path, num_bytes, f"record {number} begins at byte {position}")
        magic, code = struct.unpack_from("<II", head)
        part, length = code >> 29, code & 0x1FFFFFFF
        if magic != MAGIC:
            raise ValueError(f"{path} is damaged: no record at byte {position}")
        end = position + 8 + (length + 3) // 4 * 4
        if end > num_bytes:
            raise _cut(path, num_bytes, f"record {number} ends at byte {end}")
        if part in (WHOLE, FIRST):
            if length < HEADER_BYTES:
                raise ValueError(f"{path} is no shard of images: record {number} has no header")
            num_labels, value = struct.unpack_from("<If", head, 8)
            # a single label that is a whole number is a class; several, 0.5 or -1 are not
            is_class = num_labels == 0 and value >= 0 and value.is_integer()
            label = str(int(value)) if is_class else None
            start, size = position, length - HEADER_BYTES - 4 * num_labels
        else:
            size += 4 + length  # the magic is left out where the record was cut
        position = end
        if part in (WHOLE, LAST):
            if size > 0:
                entry = Entry(b"record %d" % number, label, size, start, position - start)
                contents.images.append(entry)
            else:  # face recognition sets begin with a record of counts
                contents.skipped["record without image"] += 1
            number += 1
    if part not in (WHOLE, LAST):
        raise _cut(path, num_bytes, f"record {number} continues behind it")
    return contents
