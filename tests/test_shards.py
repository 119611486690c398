"""Shards in a folder's place: tar files of other tools, the index, batches, runs, refusals."""

import gzip
import os
import pickle
import resource
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions
from pipeline.loader import view_loader
from pipeline.order import SampleOrder
from pipeline.pack import pack_root
from pipeline.sources import index as shard_index
from pipeline.sources.folder import list_images
from pipeline.sources.header import BadImage
from pipeline.sources.reader import ImageReader
from pipeline.sources.shards import open_source
from tar_files import opened, refusal, write_tar
from train import distributed
from train.main import main, run
from train.run.data import difference
from train.run.folder import Log, RunFolder
from train.run.program import read_config
from train.window import bad_entries

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(cut_pictures) -> Path:
    """48 small real pictures in two class folders."""
    return cut_pictures(48)


@pytest.fixture
def shards(images, tmp_path) -> Path:
    """The pictures in four or five shards."""
    pack_root(str(images), tmp_path / "shards", shard_bytes=30_000)
    return tmp_path / "shards"


def test_tar_files_of_other_tools_are_read_with_their_labels(tmp_path):
    write_tar(
        tmp_path / "a-0.tar",
        [
            ("a/1.cls", b"10\n"), ("a/1.jpg", b"one"), ("a/2.JPEG", b"two"),
            ("a/2.json", b'{"label": 9, "url": "x"}'), ("a/2.txt", b"a caption"),
            ("x" * 120 + ".png", b"long name"), ("x" * 120 + ".cls", b"9"),
            (".hidden.jpg", b"no"), ("a/3.seg.png", b"no"), ("LICENSE", b"no"),
        ],
    )  # fmt: skip
    write_tar(tmp_path / "a-1.tar", [("a/1.webp", b"three"), ("a/1.cls", b"2")])
    (tmp_path / "a-1.tar.md5").write_text("of another tool, as x.idx and x.lst would be")
    found = opened(tmp_path)
    assert found.kind == "tar" and len(found) == 4
    read = [found.read(number).tobytes() for number in range(4)]
    assert read == [b"one", b"two", b"long name", b"three"]
    assert found.class_names == ["2", "9", "10"] and found.labels is not None
    assert found.labels.tolist() == [2, 1, 1, 0]
    assert [found.name(n) for n in (0, 3)] == ["a-0.tar: a/1.jpg", "a-1.tar: a/1.webp"]
    assert found.skipped == {
        "extension .txt": 1, "hidden": 1, "extension .seg.png": 1, "no extension": 1,
    }  # fmt: skip
    again = opened(f"{tmp_path}/a-?.tar")  # from the indices made before
    assert again.fingerprint == found.fingerprint and again.read(2).tobytes() == b"long name"


def test_a_glob_opens_the_shards_it_names_and_the_whole_set_equals_the_folder(shards, images):
    folder, whole = list_images(str(images)), opened(f"{shards}/*.tar")
    assert whole.fingerprint == opened(shards).fingerprint == folder.fingerprint
    assert opened(f"{shards}/images-*").fingerprint == folder.fingerprint  # matches the indices too
    part = opened(f"{shards}/images-00000[12].tar")
    assert 0 < len(part) < len(whole) and part.fingerprint != whole.fingerprint
    assert part.class_names == whole.class_names == folder.class_names
    first = int(whole.starts[1])
    assert part.name(0) == whole.name(first) and (part.read(0) == whole.read(first)).all()


def test_a_folder_with_images_or_class_folders_is_no_folder_of_shards(images, tmp_path):
    (tmp_path / "root/train/cat").mkdir(parents=True)
    (tmp_path / "root/ILSVRC2012_img_train.tar").write_bytes(b"of tar files")
    (tmp_path / "root/train/cat/1.jpg").write_bytes(b"x")
    assert open_source(str(tmp_path / "root")).skipped == {"extension .tar": 1}
    (tmp_path / "flat.jpg").write_bytes(b"x")
    (tmp_path / "x.tfrecord").write_bytes(b"x")
    assert len(open_source(str(tmp_path))) == 2


def test_numbered_shards_beside_a_folder_with_a_picture_are_not_passed_over(shards):
    (shards / "preview").mkdir()
    assert "It has shards: " in refusal(shards)
    (shards / "preview/1.jpg").write_bytes(b"x")
    line = refusal(shards)
    assert "and images, such as" in line and "preview/1.jpg" in line and f"'{shards}/*.tar'" in line


def test_folders_inside_tars_that_are_splits_are_no_classes_and_a_leading_dot_is_none(tmp_path):
    for name, folders in ("split", ("train", "test")), ("dotted", ("./cat", "./dog")):
        (tmp_path / name).mkdir()
        members = [(f"{folder}/{n}.jpg", b"x") for folder in folders for n in range(2)]
        write_tar(tmp_path / name / "a.tar", members)
    split, dotted = opened(tmp_path / "split"), opened(tmp_path / "dotted")
    assert split.labels is None and "are splits (test, train), all of which" in split.why_none
    assert dotted.class_names == ["cat", "dog"] and dotted.labels is not None
    assert dotted.labels.tolist() == [0, 0, 1, 1]


def test_shards_survive_pickling_and_are_closed_with_their_set(shards):
    found = opened(shards)
    expected = [found.read(number).tobytes() for number in range(len(found))]
    copy = pickle.loads(pickle.dumps(found))
    assert [copy.read(number).tobytes() for number in range(len(copy))] == expected
    assert copy.fingerprint == found.fingerprint and (copy.labels == found.labels).all()
    num_open = len(os.listdir("/proc/self/fd"))
    num_shards = len(found.shards)
    del copy, found
    assert len(os.listdir("/proc/self/fd")) == num_open - 2 * num_shards


def test_more_shards_than_a_process_may_open_are_refused(shards, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 258))
    assert "and this process may open 258 files" in refusal(shards)


def test_an_index_that_cannot_be_kept_is_warned_of(tmp_path, monkeypatch, capfd):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(shard_index, "save_index", refuse)
    for _ in range(2):
        assert opened(tmp_path).read(0).tobytes() == b"x"
        told = capfd.readouterr().err
        assert "making the index of 1 shard of" in told and "(Read-only file system)" in told


# ---- the same batches, the same runs ----


def batches(reader: ImageReader) -> list:
    order = SampleOrder(len(reader.source), batch_size=8, seed=0)
    views = [AugmentConfig(size=24)] * 2
    loader = view_loader(reader, order, range(8), views=views, options=DecodeOptions(), device=CPU)
    return list(loader)


def test_views_and_replacements_of_bad_images_are_those_of_the_folder(
    images, tmp_path, monkeypatch
):
    root = tmp_path / "images"
    for path in images.rglob("*.jpg"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(shard_index, "_PROBE_BYTES", 100)  # or the damage below would be seen
    pack_root(str(root), tmp_path / "shards", shard_bytes=30_000)
    shard = tmp_path / "shards/images-000001.tar"
    clean = opened(tmp_path / "shards")
    victim = int(clean.starts[1]) + 2
    name = clean.name(victim).partition(": ")[2]
    bad = (root / name).read_bytes()[:-2] + b"\0\0"  # without its end marker
    (root / name).write_bytes(bad)
    with open(shard, "r+b") as file:
        file.seek(int(clean.offsets[victim]))
        file.write(bad)
    ours, reference = ImageReader(opened(tmp_path / "shards")), ImageReader(list_images(str(root)))
    pairs = zip(batches(ours), batches(reference), strict=True)
    for one, other in pairs:
        assert torch.equal(one.ids, other.ids) and torch.equal(one.images, other.images)
    assert ours.bad == reference.bad == {victim: "truncated JPEG: no end-of-image marker"}
    assert [entry["file"] for entry in bad_entries(ours, set())] == [f"images-000001.tar: {name}"]


TINY = [
    "--model.arch=resnet18", "--model.stem=cifar", "--model.width=8", "--model.projector_layers=2",
    "--model.projector_dim=32", "--model.projector_hidden=32", "--model.predictor_hidden=8",
    "--augment.size=16", "--eval.size=16", "--eval.resize=16", "--eval.k=5", "--precision=fp32",
    "--data.batch_size=16", "--epochs=2", "--log_every=1", "--device=cpu",
]  # fmt: skip


def train(root: Path, out: Path, *flags: str) -> dict:
    config = read_config([*TINY, f"--data.root={root}", f"--out={out}", *flags])
    folder = RunFolder(str(out))
    try:
        with distributed.start("cpu") as world:
            return run(config, world, out, folder, Log(None))
    finally:
        folder.close()


def weights(out: Path) -> dict[str, torch.Tensor]:
    newest = max((out / "checkpoints").glob("step-*"))
    return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


def test_a_run_begun_on_the_folder_goes_on_from_its_shards_bit_for_bit(images, shards, tmp_path):
    straight = train(images, tmp_path / "straight")
    train(images, tmp_path / "run", "--max_steps=2")
    found = train(shards, tmp_path / "run")
    assert found["steps"] == straight["steps"] == 6
    assert found["knn_top1"] == straight["knn_top1"]
    ours, reference = weights(tmp_path / "run"), weights(tmp_path / "straight")
    assert all(torch.equal(ours[name], value) for name, value in reference.items())


# ---- what is refused ----


def test_shards_that_were_cut_exchanged_or_lost_are_named(shards):
    first, second, third = sorted(shards.glob("*.tar"))[:3]
    whole = second.read_bytes()
    os.truncate(second, len(whole) - 1)
    assert refusal(shards) == (
        f"{second} is truncated: it has {len(whole) - 1} of {len(whole)} bytes. Copy it again"
    )
    second.write_bytes(first.read_bytes().ljust(len(whole), b"\0")[: len(whole)])
    assert refusal(shards).startswith(f"{second}.index is stale: the shard has changed since")
    second.write_bytes(whole)
    opened(shards)
    os.utime(second, (1, 1))  # a copy has another time
    opened(shards)
    second.unlink()
    assert refusal(shards).startswith(f"{second} is missing, though its index is there")
    Path(f"{second}.index").unlink()
    assert refusal(shards).startswith(f"{shards} lacks a shard before {third}")
    second.write_bytes(whole)  # without its index it could be another tool's
    assert refusal(shards).startswith(f"{second} was not packed with the other shards")


def test_an_unfinished_packing_is_refused_and_a_damaged_index(shards):
    last = max(shards.glob("*.tar"))
    for path in (last, Path(f"{last}.index")):
        path.unlink()
    assert "of 48 images: packing has not finished" in refusal(shards)
    index = shards / "images-000000.tar.index"
    data = index.read_bytes()
    for damaged in (b"", data[:100], data[:-1], b"\xff" * 200):
        index.write_bytes(damaged)
        assert refusal(shards).startswith(f"{index} is damaged")
    for part, other in ((b'\\"num', b"\\ num"), (b'\\"kind', b'\\"sort')):
        assert part in data
        index.write_bytes(data.replace(part, other))
        assert refusal(shards).startswith(f"{index} is damaged")
    index.write_bytes(data)
    arrays, num_images = (
        8 + int.from_bytes(data[:8], "little"),
        int(opened(str(shards / "*000.tar")).starts[1]),
    )
    for number in range(4):  # the highest byte of the first end, label, offset and span
        at = arrays + 8 * num_images * number + 7
        index.write_bytes(data[:at] + b"\x40" + data[at + 1 :])
        assert refusal(shards).startswith(f"{index} is damaged (its parts contradict each other)")
    index.write_bytes(data.replace(b'\\"version\\": 2', b'\\"version\\": 0'))
    assert refusal(shards).startswith(f"{index} is of another version")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tfrec.gz", "train-00000-of-00004.gz"])
def test_a_compressed_shard_of_any_kind_is_refused_as_one(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"shard"))
    message = refusal(tmp_path)
    assert f"{tmp_path}/{name}" in message and "is compressed with gzip: unpack it" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"PK\x03\x04" + bytes(600), "is a zip archive"),
        (b"PAR1" + bytes(600), "is a Parquet file"),
        (b"no shard at all", "starts with 6e 6f 20 73"),
        (bytes(10240), "begins with zeros: a tar file without members"),
        (b"", "x.tar is empty"),
    ],
    ids=["zip", "parquet", "text", "zeros", "empty"],
)
def test_a_file_of_another_kind_is_named_and_refused(tmp_path, content, told):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    message = refusal(tmp_path)
    assert str(path) in message and told in message


def test_shards_of_two_kinds_or_two_sets_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])
    record = b"\x0a\x23\xd7\xce\x1c\0\0\0" + bytes(24) + b"jpeg"
    (tmp_path / "b.rec").write_bytes(record)
    assert refusal(tmp_path) == (
        f"{tmp_path} holds several sets of shards (a.tar, b.rec): name one with a glob, such as "
        f"'{tmp_path}/a.tar', or all with '{tmp_path}/*'"
    )
    assert refusal(f"{tmp_path}/*") == (
        f"{tmp_path}/b.rec is a RecordIO file and {tmp_path}/a.tar a tar file: name one kind with "
        "a glob"
    )
    assert refusal(f"{tmp_path}/*.tfrecord").startswith(f"No shards match {tmp_path}/*.tfrecord")
    write_tar(tmp_path / "a.tar", [("1.txt", b"x")])
    (tmp_path / "a.tar.index").unlink()
    assert refusal(f"{tmp_path}/a.tar") == (
        f"No images in 1 shards of {tmp_path}/a.tar: found 1 x extension .txt"
    )


def test_the_splits_of_a_tfds_folder_are_two_sets_and_an_archives_parts_are_one(tmp_path):
    for number in range(2):
        for split in ("train", "test"):
            name = f"cifar10-{split}.tfrecord-0000{number}-of-00002"
            write_tar(tmp_path / "tfds/3.0.2" / name, [("1.jpg", b"x")])
        name = f"part-0000{number}-3f-c000.tar"  # Spark's: more than one number
        write_tar(tmp_path / "spark" / name, [(f"{number}.jpg", b"x")])
    folder = tmp_path / "tfds/3.0.2"
    assert refusal(folder) == (
        f"{folder} holds several sets of shards (cifar*-test.tfrecord-*-of-*, "
        "cifar*-train.tfrecord-*-of-*): name one with a glob, such as "
        f"'{folder}/cifar*-test.tfrecord-*-of-*', or all with '{folder}/*'"
    )
    assert len(opened(f"{folder}/cifar*-train.tfrecord-*-of-*")) == 2
    assert len(opened(tmp_path / "spark")) == 2


def test_a_tar_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, [("1.jpg", b"x" * 600), ("1.cls", b"1"), ("2.jpg", b"y" * 300)])
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    for length in (*range(1, end, 37), *range(512, end + 1, 512), end + 1023):
        path.write_bytes(whole[:length])
        message = refusal(path)
        assert str(path) in message and ("truncated or damaged" in message or length < 512)
    path.write_bytes(whole[: end + 1024])
    assert len(opened(path)) == 2
    with tarfile.open(path) as tar:
        at = tar.getmembers()[1].offset
    path.write_bytes(whole[:at] + b"\x01" * 512 + whole[at + 512 :])
    path.with_name("x.tar.index").unlink()
    assert "truncated or damaged" in refusal(path)


def test_a_shard_cut_under_a_running_training_gives_bad_images_not_garbage(shards):
    found = opened(shards)
    os.truncate(found.shards[0], int(found.offsets[1]) + 10)
    assert found.read(0).size > 0
    with pytest.raises(BadImage, match="truncated shard"):
        found.read(1)
    fresh = opened(f"{shards}/images-000001.tar")
    os.unlink(fresh.shards[0])
    with pytest.raises(BadImage, match="unreadable shard .No such file"):
        fresh.read(0)


def test_a_host_with_the_same_images_in_other_shards_is_named(images, shards, tmp_path):
    found = opened(shards)  # rank 0's, sent to a host that has something else there
    assert difference(found) is None
    shards.rename(tmp_path / "as-sent")
    pack_root(str(images), shards, shard_bytes=50_000)
    assert opened(shards).fingerprint == found.fingerprint
    for _ in range(2):
        told = difference(found)
        assert told is not None and "\n" not in told and "copy them again" in told
        assert f"other images under {shards} than" in told and "same, in other shards" in told
        shutil.rmtree(shards)
        shutil.copytree(images, shards)


def test_a_training_on_a_truncated_shard_ends_in_one_line(shards, tmp_path, monkeypatch, capfd):
    shard = shards / "images-000002.tar"
    os.truncate(shard, 100)
    flags = [*TINY, f"--data.root={shards}", f"--out={tmp_path}/run"]
    monkeypatch.setattr(sys, "argv", ["train/main.py", *flags])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert capfd.readouterr().err.startswith(f"error: {shard} is truncated: it has 100 of")
