"""Which folders are trained on and held out, and that what is not used is named."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.sources.folder import list_images
from pipeline.sources.splits import split_root, tell_inner, tell_unused, why_no_labels
from train.config import DataConfig
from train.distributed import start
from train.run.data import RunData, open_data


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), len(name), np.uint8)).save(root / name)


def open_root(root: Path | str, out: Path, val: str | None = None) -> RunData:
    with start("cpu") as world:
        return open_data(DataConfig(root=str(root), val=val), out=out, seed=0, world=world)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["train", "val"], ("train", "val")),
        (["train", "validation", "test"], ("train", "validation")),
        (["train", "test"], ("train", "test")),
        (["Training", "Testing"], ("Training", "Testing")),
        (["TRAIN", "TEST", "VALID"], ("TRAIN", "VALID")),
        (["train2017", "val2017", "test2017"], ("train2017", "val2017")),
        (["training_set", "test_set"], ("training_set", "test_set")),
        (["train-images", "dev"], ("train-images", "dev")),
        (["train"], ("train", None)),
        (["train", "unlabeled"], ("train", None)),
        (["train", "empty"], ("train", None)),
        (["train", "train_224", "val"], ("train", "val")),
        (["val", "test"], ("", None)),
        (["cat", "dog"], ("", None)),
        (["bus", "car", "train"], ("", None)),  # classes
        (["data", "set"], ("", None)),
        (["seg_train", "seg_test", "seg_pred"], ("seg_train", "seg_test")),
        (["images-train", "images-holdout"], ("images-train", "images-holdout")),
        (["train", "hold_out"], ("train", "hold_out")),
        (["steam_train", "bullet_train", "bus"], ("", None)),  # classes
        (["steam_train", "blood_test"], ("", None)),
    ],
)
def test_splits_are_known_by_their_usual_names_in_any_case(tmp_path, folders, expected):
    for name in folders:
        (tmp_path / name).mkdir()
        if name != "empty":
            write(tmp_path, f"{name}/1.png")
    (tmp_path / "val.txt").touch()
    train, held_out = split_root(str(tmp_path))
    assert train == os.path.join(str(tmp_path), expected[0]).rstrip("/")
    assert held_out == (None if expected[1] is None else str(tmp_path / expected[1]))


def test_a_split_may_be_a_link_and_is_no_file(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "train").symlink_to("elsewhere")
    (tmp_path / "val").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert split_root(str(tmp_path)) == (str(tmp_path / "train"), None)
    (tmp_path / "test").mkdir()
    assert split_root(str(tmp_path)) == (str(tmp_path / "train"), str(tmp_path / "test"))


def test_a_split_unpacked_into_a_folder_of_its_own_name_is_the_inner_one(tmp_path):
    write(tmp_path, "seg_train/seg_train/a/1.png", "seg_train/seg_train/b/1.png")
    write(tmp_path, "seg_test/seg_test/a/1.png", "seg_test/seg_test/b/1.png", "seg_pred/1.png")
    train, val = split_root(str(tmp_path))
    assert (train, val) == (f"{tmp_path}/seg_train/seg_train", f"{tmp_path}/seg_test/seg_test")
    (line,) = tell_unused(str(tmp_path), train, val)
    assert line.startswith(f"{tmp_path}/seg_pred (1 images) is not used")
    data = open_root(tmp_path, tmp_path / "out")
    assert data.class_names == ["a", "b"] and data.queries is not None


def test_splits_one_folder_down_that_are_trained_on_are_named(tmp_path):
    write(tmp_path, "archive/train/a/1.png", "archive/test/a/1.png", "archive/test/b/1.png")
    (line,) = tell_inner(list_images(str(tmp_path)))
    inner = f"{tmp_path}/archive"
    assert line.startswith(f"{inner}/test (2 images) is trained on: ")
    assert line.endswith(f"give {inner} as --data.root")
    write(tmp_path, "bottle/train/good/1.png", "bottle/test/bad/1.png", "cable/1.png")
    (line,) = tell_inner(list_images(str(tmp_path)))
    assert "is trained on, as are 1 folders like it" in line and line.endswith("move it out")
    write(tmp_path, "plain/cat/test/1.png", "plain/dog/test/1.png")
    assert tell_inner(list_images(f"{tmp_path}/plain")) == []


@pytest.mark.parametrize(
    ("root", "val"), [("root", "root/cat"), ("root/cat", "root"), ("root", "root")]
)
def test_images_to_validate_on_that_are_trained_on_too_are_refused(tmp_path, root, val):
    write(tmp_path, "root/cat/a/1.png", "root/cat/b/1.png", "root/dog/1.png")
    with pytest.raises(ValueError, match="images that are also in .*: move them apart"):
        open_root(tmp_path / root, tmp_path / "out", val=f"{tmp_path}/{val}")
    write(tmp_path, "root/.held/cat/1.png", "root/.held/dog/1.png")  # hidden, so not trained on
    assert open_root(tmp_path / "root", tmp_path / "out", val=f"{tmp_path}/root/.held").queries


def test_two_splits_to_train_on_are_refused_with_both_names(tmp_path):
    write(tmp_path, "train2014/1.png", "train2017/1.png", "val/1.png")
    with pytest.raises(ValueError, match="train2014 and train2017, all named.*--data.root"):
        split_root(str(tmp_path))


def test_folders_and_images_that_are_not_used_are_named_with_their_number(tmp_path):
    write(tmp_path, "train/a/1.png", "val/a/1.png", "test/a/1.png", "test/b/2.png")
    write(tmp_path, "Unlabeled/1.png", "sample.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "set-0000.tar").touch()
    lines = tell_unused(str(tmp_path), *split_root(str(tmp_path)))
    assert [line.split(":")[0] for line in lines] == [
        f"{tmp_path}/Unlabeled (1 images) is not used",
        f"{tmp_path}/dev (1 shards) is not used",
        f"{tmp_path}/test (2 images) is not used",
        f"1 images in {tmp_path} itself are not used",
    ]
    assert "--data.val" in lines[1] and "--data.val" not in lines[0]
    assert tell_unused(str(tmp_path / "train"), str(tmp_path / "train"), None) == []


def test_a_folder_named_as_held_out_and_trained_on_is_named(tmp_path):
    write(tmp_path, "cat/1.png", "dog/1.png", "Testing/1.png")
    (line,) = tell_unused(str(tmp_path), str(tmp_path), None)
    assert line.startswith(f"{tmp_path}/Testing (1 images) is trained on: if it is held out")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["1.png", "2.png"], "{root} has no folders, whose names would be the classes"),
        (["Images/cat/1.png", "Images/dog/1.png"], "all images are in {root}/Images: if its"),
        (["cat/1.png", "dog/1.png", "x.png"], "1 images, such as x.png, lie beside the folders"),
    ],
)
def test_where_there_are_no_labels_it_is_said_what_would_make_them(tmp_path, names, told):
    root = tmp_path / "root"
    write(root, *names)
    assert why_no_labels(list_images(str(root))).startswith(told.format(root=root))
    (note,) = open_root(root, tmp_path / "out").notes
    assert note.startswith("no class labels, so no kNN check: " + told.format(root=root))


def test_a_held_out_folder_without_labels_is_told_and_training_images_are_the_queries(tmp_path):
    root = tmp_path / "root"
    write(root, *[f"train/{name}/{i}.png" for name in "ab" for i in range(10)], "val/1.png")
    write(root, "unlabeled/1.png")
    data = open_root(root, tmp_path / "out")
    unused, told, knn = data.notes
    assert unused.startswith(f"{root}/unlabeled (1 images) is not used")
    assert told.startswith(f"{root}/val (1 images) has no class labels and is not used: {root}/val")
    assert knn == "kNN: 18 training images vote on 2 others of them"
    assert data.queries is not None and len(data.train.source) == 20
    with pytest.raises(ValueError, match="val has no class labels, which kNN needs: .* no folders"):
        open_root(root, tmp_path / "out", val=f"{root}/val")


def test_a_folder_named_digits_goes_before_the_embedded_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embedded = open_root("digits", tmp_path / "out")
    assert len(embedded.train.source) == 1437 and len(embedded.notes) == 1
    write(tmp_path, "digits/a/1.png", "digits/b/1.png")
    own = open_root("digits", tmp_path / "out")
    assert len(own.train.source) == 2 and "rename it" in own.notes[0]
