"""TFRecord and RecordIO shards, written here by hand, against DALI's readers of whole files."""

import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from nvidia.dali import fn, pipeline_def
from nvidia.dali import tfrecord as tfrec
from nvidia.dali.pipeline import Pipeline

from pipeline.sources import record_reader
from pipeline.sources.header import BadImage
from pipeline.sources.reader import ImageReader
from pipeline.sources.record_reader import check_record, read_records
from pipeline.sources.scan import MAGIC_BYTES, scan_shard
from pipeline.sources.shards import ShardSet, open_source


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def message(*fields: tuple[int, bytes]) -> bytes:
    return b"".join(varint(number << 3 | 2) + varint(len(v)) + v for number, v in fields)


def of_bytes(value: bytes) -> bytes:
    return message((1, message((1, value))))


def of_integer(value: int, *, packed: bool = True) -> bytes:
    inner = message((1, varint(value))) if packed else b"\x08" + varint(value)
    return message((3, inner))


def of_float(value: float) -> bytes:
    return message((2, message((1, struct.pack("<f", value)))))


def example(features: dict[str, bytes]) -> bytes:
    entries = [message((1, name.encode()), (2, value)) for name, value in features.items()]
    return message((1, message(*((1, entry) for entry in entries))))


def tfrecord(features: dict[str, bytes]) -> bytes:
    """One record. The checksums are zeros: DALI looks at them neither."""
    body = example(features)
    return struct.pack("<QI", len(body), 0) + body + bytes(4)


def write_tfrecord(path: Path, examples: list[dict[str, bytes]]) -> None:
    """The file and tfrecord2idx's index."""
    data, index = b"", ""
    for features in examples:
        one = tfrecord(features)
        index += f"{len(data)} {len(one)}\n"
        data += one
    path.write_bytes(data)
    path.with_suffix(".idx").write_text(index)


def record(image: bytes, label: float | list[float], number: int) -> bytes:
    """MXNet's record, cut in parts wherever its magic number stands at a multiple of 4."""
    several = label if isinstance(label, list) else []
    header = struct.pack("<IfQQ", len(several), 0.0 if several else label, number, 0)
    payload = header + struct.pack(f"<{len(several)}f", *several) + image
    parts, start = [], 0
    for at in range(0, len(payload) - 3, 4):
        if payload[at : at + 4] == MAGIC_BYTES:
            parts.append(payload[start:at])
            start = at + 4
    parts.append(payload[start:])
    out = b""
    for position, part in enumerate(parts):
        is_first, is_last = position == 0, position + 1 == len(parts)
        kind = {(True, True): 0, (True, False): 1, (False, False): 2, (False, True): 3}
        code = kind[is_first, is_last] << 29 | len(part)
        out += MAGIC_BYTES + struct.pack("<I", code) + part + bytes(-len(part) % 4)
    return out


def write_recordio(path: Path, records: list[bytes]) -> None:
    """The file and MXNet's index, in which the records may stand in any order."""
    starts = np.cumsum([0, *map(len, records)])[:-1]
    lines = [f"{key}\t{start}\n" for key, start in enumerate(starts)]
    path.write_bytes(b"".join(records))
    path.with_suffix(".idx").write_text("".join(reversed(lines)))


@pytest.fixture(scope="module")
def images(jpegs) -> list[bytes]:
    """Real JPEGs; one holds MXNet's magic number three times: twice aligned, once not."""
    files = [jpeg.tobytes() for jpeg in jpegs[2:]]  # the cut ones: 20 to 60 kB
    cut = bytearray(files[1])
    for at in (8000, 8004, 9001):
        cut[at : at + 4] = MAGIC_BYTES
    return [*files, bytes(cut)]


def read_all(opened: ShardSet) -> list[bytes]:
    return [opened.read(number).tobytes() for number in range(len(opened))]


def test_a_tfrecords_images_and_labels_are_those_of_dalis_reader(tmp_path, images):
    examples = []
    for number, image in enumerate(images):
        parts = {
            "image/encoded": of_bytes(image),
            "image/height": of_integer(300),
            "image/object/bbox/xmin": of_float(0.25),
            "image/filename": of_bytes(b"photo%d.JPEG" % number),
            "image/class/label": of_integer(number % 3 + 998, packed=number % 2 == 0),
        }
        order = list(parts) if number % 2 else list(reversed(parts))
        examples.append({name: parts[name] for name in order})
    path = tmp_path / "train-00000-of-00001"
    write_tfrecord(path, examples)

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None)
    def reader():
        features = {
            "image/encoded": tfrec.FixedLenFeature((), tfrec.string, ""),
            "image/class/label": tfrec.FixedLenFeature([1], tfrec.int64, -1),
        }
        read = fn.readers.tfrecord(
            path=[str(path)], index_path=[str(path.with_suffix(".idx"))], features=features
        )
        return read["image/encoded"], read["image/class/label"]

    encoded, labels = reader().run()
    opened = open_source(str(tmp_path))
    assert isinstance(opened, ShardSet) and opened.kind == "TFRecord"
    assert read_all(opened) == [np.array(image).tobytes() for image in encoded] == images
    assert opened.labels is not None
    found = [opened.class_names[label] for label in opened.labels]
    assert found == [str(np.array(label).item()) for label in labels]
    assert opened.class_names == ["998", "999", "1000"]
    assert opened.name(1) == "train-00000-of-00001: photo1.JPEG"


def test_a_recordios_images_and_labels_are_those_of_dalis_reader(tmp_path, images):
    records = [record(image, number % 3, 7 * number) for number, image in enumerate(images)]
    assert records[-1].count(MAGIC_BYTES) == 4  # its own, two of the parts, the one not aligned
    path = tmp_path / "train.rec"
    write_recordio(path, records)

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None)
    def reader():
        index = str(path.with_suffix(".idx"))
        return tuple(fn.readers.mxnet(path=[str(path)], index_path=[index]))

    encoded, labels = reader().run()
    opened = open_source(str(tmp_path))
    assert isinstance(opened, ShardSet) and opened.kind == "RecordIO"
    assert read_all(opened) == [np.array(image).tobytes() for image in encoded] == images
    assert opened.labels is not None
    assert opened.labels.tolist() == [int(np.array(label).item()) for label in labels]
    assert opened.class_names == ["0", "1", "2"] and opened.name(3) == "train.rec: record 3"


def test_names_of_tfds_are_read_and_records_without_a_class_make_no_labels(tmp_path):
    label = {"image": of_bytes(b"pixels"), "label": of_bytes(b"cat")}
    several = message((3, message((1, b"\1\2"))))
    others = [of_bytes(b"dog"), of_integer(-1), of_float(0.5), several]
    for number, other in enumerate([*others, None]):
        last = {"image": of_bytes(b"more"), "file_name": of_bytes(b"2.png")}
        last |= {} if other is None else {"label": other}
        write_tfrecord(tmp_path / f"{number}.tfrecord", [label, last])
        opened = open_source(str(tmp_path / f"{number}.tfrecord"))
        assert [opened.name(i).split(": ")[1] for i in range(2)] == ["record 0", "2.png"]
        assert opened.class_names == (["cat", "dog"] if number == 0 else [])


def test_a_record_of_several_labels_has_no_class_and_one_of_counts_is_no_image(tmp_path):
    records = [record(b"", [5.0, 2.0], 0), record(b"one", 1, 1), record(b"two", [1.0, 2.5], 2)]
    (tmp_path / "faces.rec").write_bytes(b"".join(records))
    opened = open_source(str(tmp_path))
    assert isinstance(opened, ShardSet)
    assert read_all(opened) == [b"one", b"two"] and opened.labels is None
    assert opened.skipped == {"record without image": 1}


@pytest.mark.parametrize(
    ("features", "told"),
    [
        ({"image_raw": of_bytes(b"x"), "height": of_integer(3)}, "but height, image_raw"),
        ({"image": of_float(0.5)}, "but image"),
        ({"a": of_bytes(b"")}, "but a"),
    ],
    ids=["other names", "floats", "an empty one"],
)
def test_a_tfrecord_without_encoded_images_is_refused_with_what_it_has(tmp_path, features, told):
    write_tfrecord(tmp_path / "x.tfrecord", [features])
    with pytest.raises(ValueError, match="x.tfrecord is no shard of encoded images: record 0") as e:
        open_source(str(tmp_path))
    assert told in str(e.value)


def write_small(path: Path) -> bytes:
    """Three records, the middle one of RecordIO in two parts."""
    small = [b"abc", b"12" + MAGIC_BYTES + b"3456" + MAGIC_BYTES, b"xy"]
    small[1] = small[1].rjust(16, b"_")
    if path.suffix == ".rec":
        write_recordio(path, [record(image, n, n) for n, image in enumerate(small)])
    else:
        write_tfrecord(
            path, [{"image": of_bytes(s), "label": of_integer(n)} for n, s in enumerate(small)]
        )
    return path.read_bytes()


@pytest.mark.parametrize("name", ["x.rec", "x.tfrecord"])
def test_a_shard_cut_anywhere_is_refused_unless_whole_records_are_left(tmp_path, name):
    path = tmp_path / name
    whole = write_small(path)
    lengths = []
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        try:
            lengths.append(len(scan_shard(str(path)).images))
        except ValueError as error:
            assert str(path) in str(error)
    assert lengths == [1, 2]


@pytest.mark.parametrize("name", ["x.rec", "x.tfrecord"])
def test_damaged_records_raise_nothing_but_one_line_that_names_the_shard(tmp_path, name):
    path = tmp_path / name
    whole = write_small(path)
    draw = random.Random(0)
    num_refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 3)):
            data[draw.randrange(len(data))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        path.write_bytes(data)
        try:
            found = scan_shard(str(path))
        except ValueError as error:
            assert str(path) in str(error) and str(error).isprintable()
            num_refused += 1
            continue
        for *_, offset, span in found.images:
            assert 0 <= offset <= offset + span <= len(data)
            spans = np.frombuffer(data, np.uint8)[offset : offset + span]
            (image,) = read_records(found.kind, [spans])
            assert isinstance(image, np.ndarray) or str(image).isprintable()
    assert 50 < num_refused < 250


def test_what_dalis_reader_must_not_be_given_is_a_bad_image(capfd):
    """Wrong lengths are read beyond, other kinds of features end the process, and names that are no
    UTF-8 fill stderr (DALI 2.4)."""
    two = tfrecord({"image": of_bytes(b"image"), "label": of_integer(1)})
    encoded = {"image/encoded": of_bytes(b"pixels"), "image": of_float(0.5)}
    rec = record(b"image", 1, 1)
    flagged = rec[:8] + struct.pack("<I", 1000) + rec[12:]
    cases = [
        ("TFRecord", two, b"image"),
        ("TFRecord", tfrecord(encoded), b"pixels"),
        ("TFRecord", two[:10], "no TFRecord record"),
        ("TFRecord", two[:-1], "no TFRecord record"),
        ("TFRecord", bytes([two[0] + 1]) + two[1:], "no TFRecord record"),
        ("TFRecord", two[:13] + b"\x7f" + two[14:], "damaged TFRecord"),
        ("TFRecord", tfrecord({"image/encoded": of_integer(3)}), "without image"),
        ("TFRecord", tfrecord({"image/encoded": message((1, b""))}), "without image"),
        ("TFRecord", tfrecord({"image": of_bytes(b"x") + message((3, b""))}), "without image"),
        ("TFRecord", tfrecord({"label": of_integer(3)}), "without image"),
        (
            "TFRecord",
            tfrecord({"image": of_bytes(b"x"), "label": b""}).replace(b"label", b"\xffabel"),
            "damaged TFRecord",
        ),
        ("RecordIO", rec, b"image"),
        ("RecordIO", rec[:4], "truncated RecordIO"),
        ("RecordIO", rec[:20], "truncated RecordIO"),
        ("RecordIO", rec[1:], "no RecordIO record"),
        ("RecordIO", flagged, "damaged RecordIO"),
        ("RecordIO", rec[:7] + bytes([rec[7] | 1 << 5]) + rec[8:], "truncated RecordIO"),
        ("RecordIO", rec[:7] + bytes([rec[7] | 3 << 5]) + rec[8:], "damaged RecordIO"),
        ("RecordIO", rec + rec, "damaged RecordIO"),
    ]
    for kind, data, expected in cases:
        (found,) = read_records(kind, [np.frombuffer(data, np.uint8)])
        if isinstance(expected, bytes):
            assert isinstance(found, np.ndarray) and found.tobytes() == expected
        else:
            assert isinstance(found, BadImage) and expected in str(found)
    assert capfd.readouterr().err == ""


def test_fields_that_a_protobuf_parser_passes_over_hold_no_image():
    """One bit flipped in a field's key makes them. DALI's reader dies of the list it finds empty
    (segmentation fault, DALI 2.4), so the check alone is called."""
    whole = tfrecord({"image/encoded": of_bytes(b"pixels")})
    in_list, is_kind = whole.index(b"\x0a\6p"), whole.index(b"\x0a\x08")
    assert check_record("TFRecord", np.frombuffer(whole, np.uint8)) == "image/encoded"
    for at, key in ((in_list, 0x1A), (in_list, 0x0D), (is_kind, 0x22), (12, 0x12), (14, 0x12)):
        assert whole[at] == 0x0A
        damaged = whole[:at] + bytes([key]) + whole[at + 1 :]
        with pytest.raises(BadImage, match="without image|damaged"):
            check_record("TFRecord", np.frombuffer(damaged, np.uint8))
    unknown = tfrecord({"image/encoded": of_bytes(b"pixels") + message((9, b"x"))})
    assert check_record("TFRecord", np.frombuffer(unknown, np.uint8)) == "image/encoded"


def test_small_records_share_a_pipeline_and_large_ones_are_spread_over_threads(
    tmp_path, monkeypatch
):
    sizes = [100] * 64 + [5 << 20] * 2 + [3 << 20] * 3
    write_tfrecord(tmp_path / "x.tfrecord", [{"image": of_bytes(bytes(size))} for size in sizes])
    opened = open_source(str(tmp_path))
    calls, run = [], record_reader._run

    def counted(kind: str, feature: str, records: list) -> list:
        calls.append(len(records))
        return run(kind, feature, records)

    monkeypatch.setattr(record_reader, "_run", counted)
    ImageReader(opened).read_all(np.arange(len(sizes)))
    assert sorted(calls) == [1, 1, 1, 2, 64]


def test_an_empty_image_is_bad_in_every_way_of_reading(tmp_path):
    write_tfrecord(tmp_path / "x.tfrecord", [{"image": of_bytes(b"")}, {"image": of_bytes(b"x")}])
    opened = open_source(str(tmp_path))
    assert isinstance(opened, ShardSet)
    with pytest.raises(BadImage, match="empty file"):
        opened.read(0)
    reader = ImageReader(opened)
    assert reader.read(0) is None and reader.bad == {0: "empty file"}


def test_of_several_images_in_a_record_the_first_is_taken_and_the_others_are_counted(tmp_path):
    several = message((1, message((1, b"one"), (1, b"two"), (1, b"three"))))
    write_tfrecord(tmp_path / "x.tfrecord", [{"image": several}, {"image": of_bytes(b"four")}])
    opened = open_source(str(tmp_path))
    assert isinstance(opened, ShardSet) and read_all(opened) == [b"one", b"four"]
    assert opened.skipped == {"further image of a record": 2}


def test_a_record_that_dali_refuses_is_bad_alone_and_its_neighbours_are_read():
    """It has a field 0: a protobuf parser refuses that, our walk does not."""
    good = [tfrecord({"image/encoded": of_bytes(b"image %d" % n)}) for n in range(3)]
    body = example({"image/encoded": of_bytes(b"x")}) + message((0, b""))
    refused = struct.pack("<QI", len(body), 0) + body + bytes(4)
    data = [*good[:2], refused, good[2]]
    unread = BadImage("unreadable shard")
    found = read_records("TFRecord", [*(np.frombuffer(d, np.uint8) for d in data), unread])
    images = [image.tobytes() for image in found if isinstance(image, np.ndarray)]
    assert images == [b"image 0", b"image 1", b"image 2"] and found[4] is unread
    assert isinstance(found[2], BadImage) and "that DALI cannot read" in str(found[2])


@pytest.mark.parametrize("kind", ["RecordIO", "TFRecord"])
def test_want_of_memory_ends_the_reading_and_makes_no_image_bad(kind, monkeypatch):
    example = {"image": of_bytes(b"image")}
    whole = tfrecord(example) if kind == "TFRecord" else record(b"image", 1, 1)

    def fail(pipeline: Pipeline) -> None:  # as DALI 2.4 says it
        raise RuntimeError("Critical error in pipeline:\nencountered:\n\nstd::bad_alloc\n")

    monkeypatch.setattr(Pipeline, "run", fail)
    with pytest.raises(OSError, match=f"{kind} records cannot be read.*bad_alloc.*ulimit -v"):
        read_records(kind, [np.frombuffer(whole, np.uint8)])


@pytest.mark.parametrize("name", ["x%d.rec", "x%d.tfrecord"])
def test_images_are_read_by_number_across_shards_in_the_order_asked_for(tmp_path, images, name):
    for shard in range(2):
        path, part = tmp_path / (name % shard), images[shard::2]
        if path.suffix == ".rec":
            write_recordio(path, [record(image, n, n) for n, image in enumerate(part)])
        else:  # names of the feature may differ within a set
            feature = ("image", "image/encoded")[shard]
            write_tfrecord(path, [{feature: of_bytes(image)} for image in part])
    opened = open_source(str(tmp_path))
    numbers = [*range(len(images)), 1] * 60  # more than one pipeline takes
    random.Random(0).shuffle(numbers)
    expected = [*images[0::2], *images[1::2]]
    with ThreadPoolExecutor(2) as pool:
        found = opened.read_many(numbers, pool)
    assert [one[0].tobytes() for one in found if isinstance(one, tuple)] == [
        expected[number] for number in numbers
    ]
    reader = ImageReader(opened)
    placed = reader.read_all(np.array(numbers[:50]))
    assert [p[0].tobytes() for p in placed if p] == [expected[n] for n in numbers[:50]]
    assert not reader.bad


def test_an_index_that_has_the_images_places_and_not_the_records_is_made_again(tmp_path):
    path = tmp_path / "x.tfrecord"
    write_small(path)
    open_source(str(path))
    index = Path(f"{path}.index")
    data = index.read_bytes()
    assert data.count(b'\\"version\\": 2') == 1
    index.write_bytes(data.replace(b'\\"version\\": 2', b'\\"version\\": 1'))
    open_source(str(path))
    assert index.read_bytes() == data
