"""TFRecord and RecordIO shards: where each record lies, the size of its image, and its label.

Beside pipeline/sources/scan.py, which reads tar files and tells the kinds apart. Records are walked
by their lengths, images passed over: 37 us of CPU a TFRecord of ten features, 4 us a RecordIO
record (Python 3.11, a 2-core VM, best of 5). That makes the index; in training the image of a
record is what DALI's reader of the kind makes of it (pipeline/sources/record_reader.py).

What a newcomer gets wrong: trusting that a record is still what the index was made of. DALI's
reader reads past the end of a record whose lengths are wrong, and a feature of another kind than
it was told ends the process (DALI 2.4): check_record stands before it.

    TFRecord   tf.train.Example with image/encoded or image; image/class/label or label
    RecordIO   MXNet's image records: header (flag, label, id, id2), labels, image
"""

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from pipeline.sources.folder import printable
from pipeline.sources.header import BadImage

TFRECORD, RECORDIO = "TFRecord", "RecordIO"

# Feature names of TensorFlow's build_imagenet_data.py, then those of TFDS.
_IMAGE_FEATURES = ("image/encoded", "image")
_LABEL_FEATURES = ("image/class/label", "label")
_NAME_FEATURES = ("image/filename", "file_name", "filename")

# Protobuf's keys, number << 3 | how the value is written; 2: its length, then its bytes.
_FIRST_FIELD, _SECOND_FIELD, _VARINT = 0x0A, 0x12, 0x08
_BYTES, _FLOATS, _INTEGERS = 0x0A, 0x12, 0x1A  # the fields of a Feature

_MAGIC = 0xCED7230A  # a record that holds it at a multiple of 4 is cut in parts there
MAGIC_BYTES = struct.pack("<I", _MAGIC)
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)  # parts of a record
_HEADER_BYTES = 24

Read = Callable[[int, int], bytes | memoryview]


@dataclass
class Contents:
    """The images of one shard, in the file's order."""

    kind: str
    names: list[bytes] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    """The class as text, "7" or "cat"."""
    sizes: list[int] = field(default_factory=list)
    """Bytes of the image."""
    offsets: list[int] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    """Bytes to read at the offset: the image of a tar file, or the record around it."""
    skipped: Counter[str] = field(default_factory=Counter)

    def add(
        self, name: bytes, label: str | None, *, size: int, offset: int, span: int | None = None
    ) -> None:
        """Append one image."""
        self.names.append(name)
        self.labels.append(label)
        self.sizes.append(size)
        self.offsets.append(offset)
        self.spans.append(size if span is None else span)


def cut(path: str, num_bytes: int, detail: str) -> str:
    """Return what to say of a shard that ends too early."""
    return f"{path} is truncated or damaged: it has {num_bytes} bytes, {detail}. Copy it again"


def is_tfrecord(head: bytes) -> bool:
    """Whether a file begins as one: an Example is a single field, and tells its length again."""
    length = 0
    for at in range(13, min(len(head), 23)):
        length |= (head[at] & 0x7F) << 7 * (at - 13)
        if head[at] < 0x80:
            return head[12] == 0x0A and struct.unpack_from("<Q", head)[0] == at - 11 + length
    return False


def scan_tfrecord(path: str, file: BinaryIO, num_bytes: int) -> Contents:
    """Records: uint64 length, uint32 checksum of it, the Example, uint32 checksum of that."""
    found = Contents(TFRECORD)
    position, number = 0, 0

    def read(start: int, end: int) -> bytes:
        file.seek(start)  # within the buffer mostly: no system call
        return file.read(end - start)

    while position < num_bytes:
        file.seek(position)
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else num_bytes
        start, end = position + 12, position + 12 + length
        if end + 4 > num_bytes:
            raise ValueError(cut(path, num_bytes, f"record {number} ends at byte {end + 4}"))
        try:
            features = _features(read, start, end)
            kind, images = _values(read, features, _IMAGE_FEATURES)
            label = _label(read, *_values(read, features, _LABEL_FEATURES))
            name_kind, names = _values(read, features, _NAME_FEATURES)
        except (IndexError, KeyError, UnicodeDecodeError):
            raise ValueError(f"{path} is damaged: record {number} at byte {position}") from None
        if kind != _BYTES or not images:
            has = printable(", ".join(sorted(features)[:5]).encode()) or "nothing"
            raise ValueError(
                f"{path} is no shard of encoded images: record {number} has the bytes of an image "
                f"neither in image/encoded nor in image, but {has}"
            )
        if len(images) > 1:  # DALI's reader takes the first, too
            found.skipped["further image of a record"] += len(images) - 1
        name = bytes(read(*names[0])) if name_kind == _BYTES and names else b""
        size = images[0][1] - images[0][0]
        found.add(
            name or b"record %d" % number, label, size=size, offset=position, span=length + 16
        )
        position, number = end + 4, number + 1
    return found


def _label(read: Read, kind: int, values: list[tuple[int, int]]) -> str | None:
    if len(values) != 1 or kind not in (_BYTES, _INTEGERS):
        return None
    ((start, end),) = values
    if kind == _BYTES:
        return str(read(start, end), errors="backslashreplace")
    value, num_bytes = _varint(read(start, start + 10), 0)
    is_one = num_bytes == end - start  # and no list of several
    return str(value) if is_one and value < 1 << 63 else None  # -1 is TFDS's mark of no label


def _features(read: Read, start: int, end: int) -> dict[str, tuple[int, int]]:
    """Where each feature of an Example lies: Example.features = Features.feature = a map.

    Fields of another number or way of writing are passed over, and a name that is no UTF-8 is an
    error, as in protobuf's parser, which would tell of it on stderr for each record.
    """
    found = {}
    for features in _first_fields(read, start, end):
        for entry in _first_fields(read, *features):
            parts = {key: (start, end) for key, start, end in _fields(read, *entry)}
            found[str(read(*parts[_FIRST_FIELD]), "utf-8")] = parts[_SECOND_FIELD]
    return found


def _values(
    read: Read, features: dict[str, tuple[int, int]], names: tuple[str, ...]
) -> tuple[int, list[tuple[int, int]]]:
    """Return kind and places of the values of the first of these features that is there.

    A Feature is a list of bytes, floats or integers, values in the list's field 1. Packed integers
    are one value; without a list, and where there is no such feature, the kind is 0.
    """
    kind, values = 0, (0, 0)
    at = next((features[name] for name in names if name in features), (0, 0))
    for key, start, end in _fields(read, *at):
        if key in (_BYTES, _FLOATS, _INTEGERS):  # the last one stands
            kind, values = key, (start, end)
    return kind, _first_fields(read, *values, also=_VARINT if kind == _INTEGERS else 0)


def _first_fields(read: Read, start: int, end: int, also: int = 0) -> list[tuple[int, int]]:
    fields = _fields(read, start, end)
    return [(start, end) for key, start, end in fields if key in (_FIRST_FIELD, also)]


def _fields(read: Read, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (key, start, end) of each field of a protobuf message: where its value lies.

    Raises   IndexError for what is no message.
    """
    while position < end:
        head = read(position, position + 20)
        key, at = _varint(head, 0)
        length = 0
        match key & 7:
            case 0:
                length = _varint(head, at)[1] - at
            case 1:
                length = 8
            case 2:
                length, at = _varint(head, at)
            case 5:
                length = 4
            case _:
                raise IndexError
        start = position + at
        position = start + length
        if position > end or key >> 32:
            raise IndexError
        yield key, start, position


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """Return a protobuf integer and the position behind it. IndexError where data ends in it."""
    value = data[at]
    at += 1
    if value < 0x80:
        return value, at
    value, shift = value & 0x7F, 7
    while (byte := data[at]) >= 0x80:
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | byte << shift, at + 1


def scan_recordio(path: str, file: BinaryIO, num_bytes: int) -> Contents:
    """Parts: uint32 magic, uint32 kind of part << 29 | length, that many bytes, padding to 4."""
    found = Contents(RECORDIO)
    position = start = size = number = 0
    label, part = None, _WHOLE
    while position < num_bytes:
        file.seek(position)
        head = file.read(32)
        if len(head) < 8:
            raise ValueError(cut(path, num_bytes, f"record {number} begins at byte {position}"))
        magic, code = struct.unpack_from("<II", head)
        part, length = code >> 29, code & 0x1FFFFFFF
        if magic != _MAGIC:
            raise ValueError(f"{path} is damaged: no record at byte {position}")
        end = position + 8 + (length + 3) // 4 * 4
        if end > num_bytes:
            raise ValueError(cut(path, num_bytes, f"record {number} ends at byte {end}"))
        if part in (_WHOLE, _FIRST):
            if length < _HEADER_BYTES:
                raise ValueError(f"{path} is no shard of images: record {number} has no header")
            num_labels, value = struct.unpack_from("<If", head, 8)
            # one label that is a whole number is a class; several, 0.5 or -1 are something else
            is_class = num_labels == 0 and value >= 0 and value.is_integer()
            label = str(int(value)) if is_class else None
            start, size = position, length - _HEADER_BYTES - 4 * num_labels
        else:
            size += 4 + length  # the magic is left out where the record was cut
        position = end
        if part in (_WHOLE, _LAST):
            if size > 0:
                name = b"record %d" % number
                found.add(name, label, size=size, offset=start, span=position - start)
            else:  # face recognition sets begin with a record of counts
                found.skipped["record without image"] += 1
            number += 1
    if part not in (_WHOLE, _LAST):
        raise ValueError(cut(path, num_bytes, f"record {number} goes on behind it"))
    return found


def check_record(kind: str, record: np.ndarray) -> str:
    """Return the name of the feature that holds a TFRecord's image; "" for RecordIO.

    Shapes   record: (num_bytes,) uint8, from the first to the last byte of one record.
    Raises   BadImage for bytes that DALI's reader must not be given.
    """
    if kind == RECORDIO:
        _check_parts(record)
        return ""
    if record.size < 16 or struct.unpack_from("<Q", record.data)[0] != record.size - 16:
        raise BadImage("no TFRecord record where the index has one")
    data = record.data

    def read(start: int, end: int) -> memoryview:
        return data[start:end]

    try:
        features = _features(read, 12, record.size - 4)
        feature_kind, images = _values(read, features, _IMAGE_FEATURES)
    except (IndexError, KeyError, UnicodeDecodeError):
        raise BadImage("damaged TFRecord record") from None
    if feature_kind != _BYTES or not images:
        raise BadImage("TFRecord record without image")
    return next(name for name in _IMAGE_FEATURES if name in features)


def _check_parts(record: np.ndarray) -> None:
    position, first, part = 0, 0, None
    while position < record.size:
        if record.size - position < 8:
            raise BadImage("truncated RecordIO record")
        magic, code = struct.unpack_from("<II", record.data, position)
        if magic != _MAGIC:
            raise BadImage("no RecordIO record where the index has one")
        before, part, length = part, code >> 29, code & 0x1FFFFFFF
        if part not in ((_WHOLE, _FIRST) if before is None else (_MIDDLE, _LAST)):
            raise BadImage("damaged RecordIO record")
        first = first if position else length
        position += 8 + (length + 3) // 4 * 4
    if position != record.size or part not in (_WHOLE, _LAST) or first < _HEADER_BYTES:
        raise BadImage("truncated RecordIO record")
    (num_labels,) = struct.unpack_from("<I", record.data, 8)
    if _HEADER_BYTES + 4 * num_labels > first:
        raise BadImage("damaged RecordIO record")
