"""Shards of which a part could be missed, and images that could lose their labels."""

import json
import subprocess
import sys

import pytest

from forked import ROOT, forked
from tar_files import opened, refusal, write_tar
from test_odd_images import GOOD, REFUSED, RIGHT
from test_train import TINY


def test_without_a_class_for_every_image_there_are_no_labels(tmp_path):
    cases = {
        "some": [
            ("1.jpg", b"x"),
            ("1.cls", b"1"),
            ("2.jpg", b"x"),
            ("2.cls", b"2"),
            ("3.jpg", b"x"),
        ],
        "one class": [("1.jpg", b"x"), ("1.cls", b"1"), ("2.jpg", b"x"), ("2.cls", b"1")],
        "no json label": [("1.jpg", b"x"), ("1.json", b"{}"), ("2.jpg", b"x"), ("2.json", b"no")],
    }
    why = {
        "some": "1 of 3 images have none, such as some.tar: 3.jpg",
        "one class": "all 2 images are of class 1",
        "no json label": "2 of 2 images have none",
    }
    for name, members in cases.items():
        write_tar(tmp_path / f"{name}.tar", members)
        found = opened(tmp_path / f"{name}.tar")
        assert found.labels is None and found.class_names == [], name
        assert found.why_none.startswith(why[name])


def test_shards_that_are_not_taken_are_told_with_the_glob_that_names_them(tmp_path):
    write_tar(tmp_path / "set-0.tar", [("1.jpg", b"x"), ("1.cls", b"1")])
    (tmp_path / "preview.png").write_bytes(b"x")
    told = refusal(tmp_path)
    assert "holds shards, such as set-0.tar, and images, such as preview.png" in told
    assert f"'{tmp_path}/*.tar'" in told and len(opened(f"{tmp_path}/*.tar")) == 1
    write_tar(tmp_path / "below/part/set-0.tar", [("1.jpg", b"x"), ("1.cls", b"1")])
    told = refusal(tmp_path / "below")
    assert told.endswith(f"It has shards: '{tmp_path}/below/part/*.tar' names them")


def test_archives_joined_by_cat_are_read_to_the_last_and_other_bytes_refused(tmp_path):
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", name.encode()), (f"{name}.cls", b"1")])
    parts = [(tmp_path / f"{name}.tar").read_bytes() for name in "abc"]
    (tmp_path / "whole.tar").write_bytes(b"".join(parts) + bytes(3 * 512))
    found = opened(tmp_path / "whole.tar")
    assert [found.read(number).tobytes() for number in range(len(found))] == [b"a", b"b", b"c"]
    (tmp_path / "odd.tar").write_bytes(parts[0] + bytes(100) + b"x" * 600)
    assert f"no tar archive follow its end at byte {len(parts[0])}" in refusal(tmp_path / "odd.tar")
    (tmp_path / "cut.tar").write_bytes(parts[0] + parts[1][:1500])
    assert "is truncated or damaged" in refusal(tmp_path / "cut.tar")


def test_a_key_that_comes_again_is_of_another_sample(tmp_path):
    one, two = [("0.jpg", b"a"), ("0.cls", b"1")], [("0.jpg", b"b"), ("0.cls", b"2")]
    write_tar(tmp_path / "apart.tar", [*one, ("1.jpg", b"c"), ("1.cls", b"1"), *two])
    write_tar(tmp_path / "1.tar", one)
    write_tar(tmp_path / "2.tar", two)
    joined = (tmp_path / "1.tar").read_bytes() + (tmp_path / "2.tar").read_bytes()
    (tmp_path / "joined.tar").write_bytes(joined)
    for name, expected in ("apart", [0, 0, 1]), ("joined", [0, 1]):
        found = opened(tmp_path / f"{name}.tar")
        assert found.labels is not None and found.labels.tolist() == expected, name
        assert found.read(len(found) - 1).tobytes() == b"b" and not found.skipped


def test_shards_numbered_apart_have_the_classes_of_their_folders(tmp_path):
    for number, names in enumerate(("10 9", "9 fox")):
        members = []
        for label, name in enumerate(names.split()):
            members += [(f"{name}/{number}.jpg", b"x"), (f"{name}/{number}.cls", b"%d" % label)]
        write_tar(tmp_path / f"part-{number}.tar", members)
    found = opened(tmp_path)
    assert found.class_names == ["10", "9", "fox"] and found.labels is not None  # bytewise
    assert found.labels.tolist() == [0, 1, 1, 2]


def test_of_several_images_of_a_key_the_first_is_taken_and_the_others_counted(tmp_path):
    members = [("1.jpg", b"image"), ("1.png", b"mask"), ("2.png", b"second"), ("2.webp", b"no")]
    write_tar(tmp_path / "x.tar", members)
    found = opened(tmp_path / "x.tar")
    assert [found.read(number).tobytes() for number in range(2)] == [b"image", b"second"]
    assert found.skipped == {"further image of a key": 2}


def test_class_folders_in_a_tar_file_are_labels_unless_the_labels_tell_others_apart(tmp_path):
    images = [(f"{name}/{i}.jpg", b"x") for i in range(2) for name in ("dog", "cat")]
    write_tar(tmp_path / "folders.tar", images)
    found = opened(tmp_path / "folders.tar")
    assert found.class_names == ["cat", "dog"] and found.labels is not None
    assert found.labels.tolist() == [1, 0, 1, 0]
    for name, texts, names in (
        ("same", ["3", "7", "3", "7"], ["cat", "dog"]),
        ("other", ["3", "3", "7", "7"], ["3", "7"]),
    ):
        labels = [(image.replace("jpg", "cls"), text.encode())
                  for (image, _), text in zip(images, texts, strict=True)]  # fmt: skip
        write_tar(tmp_path / f"{name}.tar", images + labels)
        assert opened(tmp_path / f"{name}.tar").class_names == names
    write_tar(tmp_path / "one.tar", [("train/1.jpg", b"x"), ("train/2.jpg", b"x")])
    assert opened(tmp_path / "one.tar").why_none.startswith("2 of 2 images have none")


def test_a_large_json_has_its_label_read(tmp_path):
    big = b'{"boxes": [' + b"1, " * 50_000 + b'1], "label": 2}'
    write_tar(
        tmp_path / "x.tar", [("1.jpg", b"x"), ("1.json", big), ("2.jpg", b"x"), ("2.cls", b"1")]
    )
    assert opened(tmp_path / "x.tar").class_names == ["1", "2"]


def test_shards_that_name_their_classes_and_shards_that_number_them_are_refused(tmp_path):
    write_tar(tmp_path / "a-0.tar", [("1.jpg", b"x"), ("1.cls", b"cat")])
    write_tar(tmp_path / "a-1.tar", [("2.jpg", b"x"), ("2.cls", b"1")])
    told = refusal(tmp_path)
    assert (
        f"{tmp_path}/a-0.tar has names of classes such as cat, and {tmp_path}/a-1.tar num" in told
    )


def test_the_index_of_an_earlier_version_is_made_again(tmp_path):
    write_tar(tmp_path / "x.tar", [("1.jpg", b"x"), ("1.cls", b"1"), ("2.jpg", b"x")])
    opened(tmp_path)
    path = tmp_path / "x.tar.index"
    anew = path.read_bytes()
    path.write_bytes(anew.replace(b'\\"version\\": 2', b'\\"version\\": 1'))
    assert path.read_bytes() != anew and len(opened(tmp_path)) == 2
    assert path.read_bytes() == anew


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_make_of_odd_images_in_odd_shards_what_one_makes(tmp_path):
    kinds = [GOOD["tiff two pages"], RIGHT["tiff gray and alpha"][0], GOOD["jpeg"]]
    images = [*kinds * 11, REFUSED["float"][0]]
    for part in range(2):
        members = []
        for number, image in enumerate(images[part::2]):
            key = f"{part}/{number:02d}"
            members += [(f"{key}.tif", image), (f"{key}.cls", b"%d" % (number % 2))]
            members += [(f"{key}.png", GOOD["png"])] * (number == 3)  # the mask of an image
        write_tar(tmp_path / f"{part}.tar", members)
    joined = tmp_path / "shards" / "joined.tar"  # as by cat
    joined.parent.mkdir()
    joined.write_bytes(b"".join((tmp_path / f"{part}.tar").read_bytes() for part in range(2)))
    flags = ["train/main.py", *TINY, f"--data.root={joined.parent}", "--data.max_bad_fraction=0.1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    runs = {
        1: forked([*flags, f"--out={tmp_path}/1"]),
        2: subprocess.run(
            [sys.executable, *torchrun, *flags, f"--out={tmp_path}/2"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        ),
    }  # fmt: skip
    results = []
    for ranks, done in runs.items():
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(done.stdout.splitlines()[-1]))
        log = (tmp_path / str(ranks) / "log.txt").read_text()
        assert "34 images" in log and "2 x further image of a key" in log
        assert log.count(" have several pages, such as joined.tar: ") == 1
        bad = (tmp_path / str(ranks) / "bad_files.jsonl").read_text().splitlines()
        assert len(bad) == 1 and "TIFF of 32-bit floats: convert" in bad[0]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-4)
