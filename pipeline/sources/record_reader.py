"""The images of TFRecord and RecordIO records, checked, then read by DALI's readers of the two.

DALI's readers go through whole files in their order, mixed within a buffer, and fail a whole batch
for one record; a run needs any sample at any step, the same after a resume and on any number of
ranks. So the records of one request are written to a file in memory, with the index that the reader
takes, and a pipeline is built over it: 1 ms, and 0.2 ms of CPU a photo of 110 kB (DALI 2.4, a
2-core VM, 256 photos, n=6).
"""

# DALI makes its operators at import, where pyright cannot see them:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

import numpy as np

from pipeline.sources import scan
from pipeline.sources.header import BadImage

# DALI's other errors are not about a record
_OF_A_RECORD = ("Error while parsing TFRecord", "Invalid RecordIO")
_AT_ONCE = 64  # records a pipeline: 64 of 1 kB in eight pipelines took 3.6 times as long as in one
_BYTES_AT_ONCE = 1 << 22  # or this: some 40 photos, for all cores, and little is held twice


def read_records(
    kind: str, records: Sequence[np.ndarray | BadImage], pool: Executor | None = None
) -> list[np.ndarray | BadImage]:
    """Return the image of each record, (num_bytes,) uint8, or why there is none, in order.

    Shapes   records: (num_bytes,) uint8 each, from the first to the last byte of one record; what
             could not be read is handed on. They are read in the pool's threads.
    """
    images = list(records)
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(images):
        if isinstance(record, BadImage):
            continue
        try:
            groups.setdefault(check_record(kind, record), []).append(number)
        except BadImage as error:
            images[number] = error
    parts = [(name, part) for name, numbers in groups.items() for part in _parts(numbers, images)]

    def read(part: tuple[str, list[int]]) -> list[np.ndarray | BadImage]:
        feature, numbers = part
        return _read(kind, feature, [images[number] for number in numbers])

    results = map(read, parts) if pool is None else pool.map(read, parts)
    for (_, numbers), of_part in zip(parts, results, strict=True):
        for number, image in zip(numbers, of_part, strict=True):
            images[number] = image
    return images


def check_record(kind: str, record: np.ndarray) -> str:
    """Return the name of the feature that holds a TFRecord's image; "" for RecordIO.

    DALI's reader reads past the end of a record whose lengths are wrong, and a feature of another
    type than declared ends the process (DALI 2.4).

    Shapes   record: (num_bytes,) uint8, from the first to the last byte of one record.
    Raises   BadImage for bytes that DALI's reader must not be given.
    """
    if kind == scan.RECORDIO:
        _check_parts(record)
        return ""
    if record.size < 16 or struct.unpack_from("<Q", record.data)[0] != record.size - 16:
        raise BadImage("no TFRecord record where the index has one")

    def read(start: int, end: int) -> memoryview:
        return record.data[start:end]

    try:
        features = scan.example_features(read, 12, record.size - 4)
        feature_kind, images = scan.feature_values(read, features, scan.IMAGE_FEATURES)
    except (LookupError, UnicodeDecodeError):
        raise BadImage("damaged TFRecord record") from None
    if feature_kind != scan.BYTES or not images:
        raise BadImage("TFRecord record without image")
    return next(name for name in scan.IMAGE_FEATURES if name in features)


def _check_parts(record: np.ndarray) -> None:
    position, first, part = 0, 0, None
    while position < record.size:
        if record.size - position < 8:
            raise BadImage("truncated RecordIO record")
        magic, code = struct.unpack_from("<II", record.data, position)
        if magic != scan.MAGIC:
            raise BadImage("no RecordIO record where the index has one")
        before, part, length = part, code >> 29, code & 0x1FFFFFFF
        if part not in ((scan.WHOLE, scan.FIRST) if before is None else (scan.MIDDLE, scan.LAST)):
            raise BadImage("damaged RecordIO record")
        first = first if position else length
        position += 8 + (length + 3) // 4 * 4
    if position != record.size or part not in (scan.WHOLE, scan.LAST) or first < scan.HEADER_BYTES:
        raise BadImage("truncated RecordIO record")
    (num_labels,) = struct.unpack_from("<I", record.data, 8)
    if scan.HEADER_BYTES + 4 * num_labels > first:
        raise BadImage("damaged RecordIO record")


def _parts(numbers: list[int], records: list) -> Iterator[list[int]]:
    """As many numbers at a time as one pipeline reads the records of."""
    part, num_bytes = [], 0
    for number in numbers:
        part.append(number)
        num_bytes += records[number].size
        if len(part) == _AT_ONCE or num_bytes >= _BYTES_AT_ONCE:
            yield part
            part, num_bytes = [], 0
    if part:
        yield part


def _read(kind: str, feature: str, records: list) -> list[np.ndarray | BadImage]:
    try:
        return _run(kind, feature, records)
    except (RuntimeError, OSError, MemoryError) as error:
        if not any(mark in str(error) for mark in _OF_A_RECORD):
            reason = str(error).partition("encountered:")[2].strip() or str(error)
            raise OSError(
                f"{kind} records cannot be read, which is no fault of theirs: "
                f"{reason.splitlines()[0]}. Give this process more memory, threads and open files "
                "(ulimit -v, -u and -n; the container's limits)"
            ) from error
        if len(records) == 1:
            return [BadImage(f"{kind} record that DALI cannot read")]
    # one record has failed the batch: read each alone
    return [image for record in records for image in _read(kind, feature, [record])]


def _run(kind: str, feature: str, records: list[np.ndarray]) -> list[np.ndarray | BadImage]:
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import tfrecord as tfrec

    starts = np.cumsum([0, *(record.size for record in records)])[:-1]
    if kind == scan.RECORDIO:  # as rec2idx writes it, else as tfrecord2idx
        lines = [f"{key}\t{start}\n" for key, start in enumerate(starts)]
    else:
        lines = [f"{start} {r.size}\n" for start, r in zip(starts, records, strict=True)]
    with _in_memory(r.data for r in records) as path, _in_memory(map(str.encode, lines)) as index:
        # DALI keeps mappings by path, and the next file in memory may have the path of the last
        files = {"path": [path], "index_path": [index], "dont_use_mmap": True}

        @pipeline_def(
            batch_size=len(records), num_threads=1, device_id=None, prefetch_queue_depth=1
        )
        def reader():
            if kind == scan.RECORDIO:
                return fn.readers.mxnet(**files)[0]
            features = {feature: tfrec.FixedLenFeature((), tfrec.string, "")}
            return fn.readers.tfrecord(**files, features=features)[feature]

        (outputs,) = reader().run()
        images = [np.array(image) for image in outputs]
        return [image if image.size else BadImage("empty file") for image in images]


@contextmanager
def _in_memory(parts: Iterable[memoryview | bytes]) -> Iterator[str]:
    """The path of a file in memory that holds the parts, one behind the other."""
    with os.fdopen(os.memfd_create("records"), "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
