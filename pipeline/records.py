"""TFRecord and RecordIO shards: where each record lies, the size of its image, and its label.

Beside pipeline/shard_scan.py, which reads tar files and tells the kinds apart. Records are walked
by their lengths, images passed over: 67 us of CPU a TFRecord of ten features, 4 us a RecordIO
record (Python 3.11, a 2-core VM, best of 5). That makes the index; in training the image of a
record is what DALI's reader of the kind makes of it (pipeline/record_reader.py).

What a newcomer gets wrong: trusting that a record is still what the index was made of. DALI's
reader reads past the end of a record whose lengths are wrong, and a feature of another kind than
it was told ends the process (DALI 2.4): check_record stands before it.

    TFRecord   tf.train.Example with image/encoded or image; image/class/label or label
    RecordIO   MXNet's image records: header (flag, label, id, id2), labels, image
"""

import io
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from pipeline.header import BadImage
from pipeline.sources import printable

TFRECORD, RECORDIO = "TFRecord", "RecordIO"

# Feature names of TensorFlow's build_imagenet_data.py, then those of TFDS.
_IMAGE_FEATURES = (b"image/encoded", b"image")
_LABEL_FEATURES = (b"image/class/label", b"label")
_NAME_FEATURES = (b"image/filename", b"file_name", b"filename")
_BYTES, _INTEGERS = 1, 3  # the fields of a Feature; 2 is floats

_MAGIC = 0xCED7230A  # a record that holds it at a multiple of 4 is cut in parts there
MAGIC_BYTES = struct.pack("<I", _MAGIC)
_WHOLE, _FIRST, _LAST = 0, 1, 3  # parts of a record; 2 lies between the first and the last
_HEADER_BYTES = 24


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
    while position < num_bytes:
        file.seek(position)
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else num_bytes
        start, end = position + 12, position + 12 + length
        if end + 4 > num_bytes:
            raise ValueError(cut(path, num_bytes, f"record {number} ends at byte {end + 4}"))
        try:
            features = dict(_features(file, start, end))
        except (IndexError, KeyError):
            raise ValueError(f"{path} is damaged: record {number} at byte {position}") from None
        image = features.get(_image_feature(features) or b"")
        if image is None:
            names = b", ".join(sorted(features)[:5])
            raise ValueError(
                f"{path} is no shard of encoded images: record {number} has the bytes of an image "
                f"neither in image/encoded nor in image, but {printable(names) or 'nothing'}"
            )
        label, name = None, b"record %d" % number
        if (value := _first(features, _LABEL_FEATURES)) is not None:
            label = _label(file, *value)
        if (value := _first(features, _NAME_FEATURES)) is not None and value[0] == _BYTES:
            name = _read(file, *value[1:]) or name
        _, start, stop = image
        found.add(name, label, size=stop - start, offset=position, span=length + 16)
        position, number = end + 4, number + 1
    return found


def _image_feature(features: dict[bytes, tuple[int, int, int]]) -> bytes | None:
    """The name of the feature that holds the image; None where it holds no bytes."""
    name = next((name for name in _IMAGE_FEATURES if name in features), None)
    return name if name is not None and features[name][0] == _BYTES else None


def _label(file: BinaryIO, kind: int, start: int, end: int) -> str | None:
    if kind == _BYTES:
        return _read(file, start, end).decode(errors="backslashreplace")
    value = _varint(file, start)[0] if kind == _INTEGERS else -1
    return str(value) if 0 <= value < 1 << 63 else None  # -1 is TFDS's mark of no label


def _first(
    features: dict[bytes, tuple[int, int, int]], names: tuple[bytes, ...]
) -> tuple[int, int, int] | None:
    return next((features[name] for name in names if name in features), None)


def _features(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, tuple[int, int, int]]]:
    """Yield (name, (kind, start, end of its first value)) of an Example's features.

    Example.features = Features.feature = map<string, Feature>; a Feature holds a list of bytes,
    floats or integers, which has its values in its field 1. An empty list has the kind 0.
    """
    for _, *features in _fields(file, start, end):
        for _, *entry in _fields(file, *features):
            parts = {number: at for number, *at in _fields(file, *entry)}
            for kind, *values in _fields(file, *parts[2]):
                first = next(_fields(file, *values), None)
                found = (kind, *first[1:]) if first is not None else (0, 0, 0)
                yield _read(file, *parts[1]), found


def _read(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)  # within the buffer mostly: no system call
    return file.read(end - start)


def _fields(file: BinaryIO, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, start, end) of each field of a protobuf message; end of its value."""
    while position < end:
        key, position = _varint(file, position)
        match key & 7:
            case 0:
                start, position = position, _varint(file, position)[1]
            case 1:
                start, position = position, position + 8
            case 2:
                length, start = _varint(file, position)
                position = start + length
            case 5:
                start, position = position, position + 4
            case _:
                raise IndexError
        if position > end:
            raise IndexError
        yield key >> 3, start, position


def _varint(file: BinaryIO, position: int) -> tuple[int, int]:
    """Return a protobuf integer and the position behind it. Raises IndexError at the file's end."""
    data = _read(file, position, position + 10)
    value = data[0] & 0x7F
    at = 1
    while data[at - 1] >= 0x80:
        value |= (data[at] & 0x7F) << 7 * at
        at += 1
    return value, position + at


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
    try:
        features = dict(_features(io.BytesIO(record.data), 12, record.size - 4))
    except (IndexError, KeyError):
        raise BadImage("damaged TFRecord record") from None
    if (name := _image_feature(features)) is None:
        raise BadImage("TFRecord record without image")
    return name.decode()


def _check_parts(record: np.ndarray) -> None:
    position, part, first = 0, _LAST, 0
    while position < record.size:
        if record.size - position < 8:
            raise BadImage("truncated RecordIO record")
        magic, code = struct.unpack_from("<II", record.data, position)
        if magic != _MAGIC:
            raise BadImage("no RecordIO record where the index has one")
        part, length = code >> 29, code & 0x1FFFFFFF
        first = first if position else length
        position += 8 + (length + 3) // 4 * 4
    if position != record.size or part not in (_WHOLE, _LAST) or first < _HEADER_BYTES:
        raise BadImage("truncated RecordIO record")
    (num_labels,) = struct.unpack_from("<I", record.data, 8)
    if _HEADER_BYTES + 4 * num_labels > first:
        raise BadImage("damaged RecordIO record")
