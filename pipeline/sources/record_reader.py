"""The images of TFRecord and RecordIO records, read out of them by DALI's readers of the two.

After pipeline/sources/shards.py, which has a record's bytes from where the index says; before
pipeline/sources/header.py. DALI's readers go through whole files in their order, mixed within a
buffer, and fail a whole batch for one record; ours wants any sample at any step, the same after a
resume and on another number of ranks. So the records of one request are laid into a file in memory,
in the order of the request, with the index that the reader takes (tfrecord2idx's, rec2idx's), and a
pipeline is built over it: 1 ms, and 0.2 ms of CPU a photo of 110 kB (DALI 2.4, a 2-core VM, 256
photos, n=6).

A newcomer's mistake: dont_use_mmap=False. DALI keeps mappings by the file's path, and the next file
in memory may have the path of the last.
"""

# DALI makes its operators at import, where pyright cannot see them:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

import numpy as np

from pipeline.sources.header import BadImage
from pipeline.sources.records import RECORDIO, check_record

# DALI's other errors say nothing of a record
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
    found = list(records)
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(found):
        if isinstance(record, BadImage):
            continue
        try:
            groups.setdefault(check_record(kind, record), []).append(number)
        except BadImage as error:
            found[number] = error
    parts = [(name, part) for name, numbers in groups.items() for part in _parts(numbers, found)]

    def read(part: tuple[str, list[int]]) -> list[np.ndarray | BadImage]:
        feature, numbers = part
        return _read(kind, feature, [found[number] for number in numbers])

    images = map(read, parts) if pool is None else pool.map(read, parts)
    for (_, numbers), of_part in zip(parts, images, strict=True):
        for number, image in zip(numbers, of_part, strict=True):
            found[number] = image
    return found


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
    # the batch is lost for one record: each alone
    return [image for record in records for image in _read(kind, feature, [record])]


def _run(kind: str, feature: str, records: list[np.ndarray]) -> list[np.ndarray | BadImage]:
    from nvidia.dali import fn
    from nvidia.dali import tfrecord as tfrec
    from nvidia.dali.pipeline import Pipeline

    starts = np.cumsum([0, *(record.size for record in records)])[:-1]
    if kind == RECORDIO:
        lines = [f"{key}\t{start}\n" for key, start in enumerate(starts)]
    else:
        lines = [f"{start} {r.size}\n" for start, r in zip(starts, records, strict=True)]
    with _in_memory(r.data for r in records) as path, _in_memory(map(str.encode, lines)) as index:
        pipeline = Pipeline(
            batch_size=len(records), num_threads=1, device_id=None, prefetch_queue_depth=1
        )
        files = {"path": [path], "index_path": [index], "dont_use_mmap": True}
        with pipeline:
            if kind == RECORDIO:
                image, _ = fn.readers.mxnet(**files)
            else:
                features = {feature: tfrec.FixedLenFeature((), tfrec.string, "")}
                image = fn.readers.tfrecord(**files, features=features)[feature]
            pipeline.set_outputs(image)
        pipeline.build()
        (images,) = pipeline.run()
        found = [np.array(image) for image in images]
        return [image if image.size else BadImage("empty file") for image in found]


@contextmanager
def _in_memory(parts: Iterable[memoryview | bytes]) -> Iterator[str]:
    """The path of a file in memory that holds the parts, one behind the other."""
    with os.fdopen(os.memfd_create("records"), "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
