"""pipeline/pack.py: order, resume after a kill, what is left out, what is refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from nvidia.dali import fn, pipeline_def
from PIL import Image

from pipeline import pack
from pipeline.sources.folder import list_images
from pipeline.sources.shards import ShardSet, open_source
from train import distributed
from train.config import DataConfig
from train.run.data import open_data

ROOT = Path(__file__).parent.parent
SHARD = 40_000  # bytes: some 20 images


def write_images(root: Path, photos, count: int = 60) -> Path:
    """Small real pictures in two class folders, every fifth a PNG."""
    rng = np.random.default_rng(0)
    for number in range(count):
        photo, label = photos[number % 2], ("china", "flower")[number % 2]
        y, x = rng.integers(photo.shape[0] - 40), rng.integers(photo.shape[1] - 40)
        (root / label).mkdir(exist_ok=True, parents=True)
        name = f"{number:02d}.{'png' if number % 5 == 0 else 'JPEG'}"
        Image.fromarray(photo[y : y + 40, x : x + 40]).save(root / label / name)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory, photos) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), photos)


def packed(src: Path, dest: Path, shard_bytes: int = SHARD) -> dict:
    return pack.pack_root(str(src), dest, shard_bytes=shard_bytes)


def open_packed(dest: Path) -> ShardSet:
    opened = open_source(str(dest))
    assert isinstance(opened, ShardSet)
    return opened


def content(dest: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in dest.iterdir() if path.name[0] != "."}


def same_images(dest: Path, src: Path) -> bool:
    """Names, bytes, labels, classes and fingerprint are those of the folder, in its order."""
    folder, opened = list_images(str(src)), open_packed(dest)
    assert len(opened) == len(folder)
    for number in range(len(folder)):
        assert opened.name(number).partition(": ")[2] == folder.name(number)
        assert opened.read(number).tobytes() == folder.read(number).tobytes()
    assert opened.fingerprint == folder.fingerprint
    assert opened.class_names == folder.class_names
    if folder.labels is None or opened.labels is None:
        return folder.labels is opened.labels
    return bool((opened.labels == folder.labels).all())


def test_packed_images_have_the_folders_order_bytes_labels_and_fingerprint(images, tmp_path):
    found = packed(images, tmp_path / "a")
    shards = sorted(path.name for path in (tmp_path / "a").glob("*.tar"))
    assert found["images"] == 60 and found["left_out"] == 0
    assert shards == [f"images-{number:06d}.tar" for number in range(found["shards"])]
    assert found["shards"] > 3
    sizes = [(tmp_path / "a" / name).stat().st_size for name in shards]
    assert sum(sizes) == found["bytes"] and max(sizes) < SHARD + 20_000
    assert same_images(tmp_path / "a", images)
    packed(images, tmp_path / "b", 1 << 30)
    assert [path.name for path in (tmp_path / "b").glob("*.tar")] == ["images-000000.tar"]
    assert same_images(tmp_path / "b", images)


def test_an_index_made_anew_from_the_tar_files_is_as_good(images, tmp_path):
    packed(images, tmp_path)
    before = open_packed(tmp_path)
    for path in tmp_path.glob("*.index"):
        path.unlink()
    anew = open_packed(tmp_path)
    assert anew.fingerprint == before.fingerprint and anew.class_names == before.class_names
    assert anew.labels is not None and before.labels is not None
    assert (anew.labels == before.labels).all()
    assert (anew.offsets == before.offsets).all() and (anew.spans == before.spans).all()


def test_dalis_own_reader_finds_every_image_and_label_in_our_shards(images, tmp_path):
    packed(images, tmp_path)
    paths = sorted(str(path) for path in tmp_path.glob("*.tar"))

    @pipeline_def(batch_size=60, num_threads=1, device_id=None)
    def reader():
        return tuple(fn.readers.webdataset(paths=paths, ext=["JPEG;png", "cls"]))

    encoded, labels = reader().run()
    folder = list_images(str(images))
    assert folder.labels is not None
    for number in range(60):
        assert np.array_equal(np.array(encoded[number]), folder.read(number))
        assert np.array(labels[number]).tobytes() == b"%d" % folder.labels[number]


def test_names_that_would_make_no_sample_of_their_own_are_kept_by_the_index(tmp_path, photos):
    src = write_images(tmp_path / "src", photos, 8)
    plain = src / "china/02.JPEG"
    odd = [b"china/a.b.JPEG", b"china/a.c.JPEG", b"china/02.jpg", b"china/new\nline.JPEG"]
    odd += [b"china/latin\xe9.JPEG", b"china/" + b"x" * 120 + b".JPEG", b"__renamed__/1.JPEG"]
    odd += ["china/m\u00fcll und mehr.JPEG".encode()]
    (src / "__renamed__").mkdir()
    for name in odd:
        Path(os.fsdecode(os.path.join(os.fsencode(src), name))).write_bytes(plain.read_bytes())
    packed(src, tmp_path / "dest", 1 << 30)
    assert same_images(tmp_path / "dest", src)
    with tarfile.open(tmp_path / "dest/images-000000.tar") as tar:
        names = tar.getnames()
    keys = [name.partition(".")[0] for name in names[::2]]
    assert len(set(keys)) == len(keys) == 16 and names[1::2] == [f"{key}.cls" for key in keys]
    renamed = [key for key in keys if "renamed-0" in key]
    assert len(renamed) == len(odd) - 1 and not any(key.startswith("__") for key in keys)
    # in their class folders, but for the one that webdataset would pass over
    assert sum(key.startswith("china/") for key in renamed) == len(odd) - 2
    assert "china/02" in keys and "china/m\u00fcll und mehr" in keys
    assert all(len(name) <= 100 for name in names)


def test_train_and_val_are_both_packed_and_found_again(images, tmp_path, photos):
    write_images(tmp_path / "src/train", photos, 8)
    write_images(tmp_path / "src/val", photos, 4)
    assert packed(tmp_path / "src", tmp_path / "dest")["images"] == 12
    assert same_images(tmp_path / "dest/train", tmp_path / "src/train")
    assert same_images(tmp_path / "dest/val", tmp_path / "src/val")


def numbers_in(tar_file: Path) -> set[bytes]:
    numbers = set()
    with tarfile.open(tar_file) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".cls") else None
            numbers |= {file.read()} if file is not None else set()
    return numbers


def test_classes_are_numbered_together_also_where_val_lacks_one(tmp_path, photos):
    for split, names in (("train", ("2", "10", "a")), ("val", ("10", "a"))):
        for name in names:
            write_images(tmp_path / "src" / split / name, photos, 2)
    packed(tmp_path / "src", tmp_path / "dest")
    assert numbers_in(tmp_path / "dest/train/images-000000.tar") == {b"0", b"1", b"2"}
    assert numbers_in(tmp_path / "dest/val/images-000000.tar") == {b"0", b"2"}  # 10 and a

    def labels() -> list[list[int]]:
        config = DataConfig(root=str(tmp_path / "dest"))
        with distributed.start("cpu") as world:
            data = open_data(config, out=tmp_path / "out", seed=0, world=world)
        assert data.bank is not None and data.queries is not None
        assert data.class_names == ["10", "2", "a"]
        return [data.bank.labels.tolist(), data.queries.labels.tolist()]

    before = labels()
    assert before == [[0, 0, 1, 1, 2, 2], [0, 0, 2, 2]]
    for path in tmp_path.glob("dest/*/*.index"):
        path.unlink()
    assert labels() == before


def test_images_edited_to_the_same_size_are_packed_again(images, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(images, src)
    packed(src, tmp_path / "dest")
    before = content(tmp_path / "dest")
    last = sorted(src.rglob("*.*"))[-1]
    data = bytearray(last.read_bytes())
    data[-20] ^= 1
    last.write_bytes(data)
    packed(src, tmp_path / "dest")
    after = content(tmp_path / "dest")
    changed = {name for name in before if after[name] != before[name]}
    assert same_images(tmp_path / "dest", src)
    assert changed and {Path(name).name.split(".")[0] for name in changed} == {
        max(before).split(".")[0]
    }


def test_shards_that_are_left_over_when_more_images_are_bad_are_removed(images, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(images, src)
    before = packed(src, tmp_path / "dest")["shards"]
    for path in sorted(src.rglob("*.*"))[5:40]:
        path.write_bytes(bytes(path.stat().st_size))  # the same size
    found = packed(src, tmp_path / "dest")
    assert found["shards"] < before and found["left_out"] == 35
    assert len(list((tmp_path / "dest").glob("images-*"))) == 2 * found["shards"]
    assert len(open_packed(tmp_path / "dest")) == 25
    after = content(tmp_path / "dest")
    packed(src, tmp_path / "dest")
    assert content(tmp_path / "dest") == after


def test_a_flat_folder_has_no_labels_packed_either(tmp_path, photos):
    write_images(tmp_path, photos, 8)
    packed(tmp_path / "china", tmp_path / "dest")
    assert same_images(tmp_path / "dest", tmp_path / "china")
    with tarfile.open(tmp_path / "dest/images-000000.tar") as tar:
        assert tar.getnames() == ["00.png", "02.JPEG", "04.JPEG", "06.JPEG"]


KILLED = """
import os, signal, sys
from pipeline import pack
def kill(): os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "in a shard":
    check = pack.check
    pack._BLOCK = 1
    pack.check = lambda folder, number: kill() if number == 45 else check(folder, number)
else:
    class Between:
        def __getattr__(self, name):
            return getattr(os, name)
        def replace(self, source, target):
            if target.name == "images-000001.tar":
                kill()
            os.replace(source, target)
    pack.os = Between()
print(pack.pack_root(sys.argv[2], pack.Path(sys.argv[3]), shard_bytes=int(sys.argv[4])))
"""


@pytest.mark.parametrize("where", ["in a shard", "between an index and its shard"])
def test_packing_killed_with_sigkill_and_started_again_makes_the_same_bytes(
    images, tmp_path, where, monkeypatch
):
    packed(images, tmp_path / "straight")
    straight = content(tmp_path / "straight")
    dest = tmp_path / "dest"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, where, str(images), str(dest), str(SHARD)], cwd=ROOT,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    whole = {name for name in content(dest) if name.endswith(".tar")}
    assert 0 < len(whole) < sum(name.endswith(".tar") for name in straight)
    with pytest.raises(ValueError, match="packing has not finished|is missing, though its index"):
        open_source(str(dest))
    seen: list[int] = []
    check = pack.check
    monkeypatch.setattr(pack, "check", lambda f, number: seen.append(number) or check(f, number))
    packed(images, dest)
    assert content(dest) == straight
    assert min(seen) > 10  # what was whole was not packed again
    seen.clear()
    packed(images, dest)
    assert seen == [] and content(dest) == straight
    assert same_images(dest, images)


def test_a_damaged_shard_is_packed_again_and_the_others_are_left_alone(images, tmp_path):
    packed(images, tmp_path)
    before = content(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    victim = tmp_path / "images-000001.tar"
    os.truncate(victim, 5000)
    packed(images, tmp_path)
    assert content(tmp_path) == before
    changed = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {victim}
    Path(f"{victim}.index").unlink()
    open_source(str(victim))  # makes an index that is not pack's
    victim.unlink()
    packed(images, tmp_path)
    assert content(tmp_path) == before


def without_huffman_codes(jpeg: bytes) -> bytes:
    """A JPEG with a good header, whose table of codes is impossible."""
    at = jpeg.index(b"\xff\xc4") + 5
    return jpeg[:at] + b"\xff" * 4 + jpeg[at + 4 :]


def test_bad_images_are_left_out_told_and_listed_and_the_others_keep_their_order(
    tmp_path, photos, capfd
):
    src = write_images(tmp_path / "src", photos, 20)
    (src / "china/02.JPEG").write_bytes(b"")
    (src / "china/04.JPEG").write_bytes(b"<html><body>404 not found</body></html>")
    cut = src / "flower/07.JPEG"
    cut.write_bytes(cut.read_bytes()[:500])
    codes = src / "flower/19.JPEG"  # the last of all
    codes.write_bytes(without_huffman_codes(codes.read_bytes()))
    (src / "notes.txt").touch()
    found = packed(src, tmp_path / "dest", 10_000)
    assert (found["images"], found["left_out"]) == (16, 4)
    lines = (tmp_path / "dest/left_out.jsonl").read_text().splitlines()
    reasons = {entry["file"]: entry["reason"] for entry in map(json.loads, lines)}
    assert list(reasons) == ["china/02.JPEG", "china/04.JPEG", "flower/07.JPEG", "flower/19.JPEG"]
    told = capfd.readouterr().err
    parts = ("empty file", "HTML", "truncated JPEG", "does not decode")
    assert all(part in reason for part, reason in zip(parts, reasons.values(), strict=True))
    assert "left out, such as china/02.JPEG: empty file" in told
    assert "1 x extension .txt" in told
    opened = open_packed(tmp_path / "dest")
    folder = list_images(str(src))
    kept = [folder.name(n) for n in range(20) if folder.name(n) not in reasons]
    assert [opened.name(n).partition(": ")[2] for n in range(16)] == kept
    assert opened.skipped == {"left out when packed": 4}
    assert opened.fingerprint != folder.fingerprint
    packed(src, tmp_path / "dest", 10_000)  # the same again: it is known what was left out
    assert (tmp_path / "dest/left_out.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "1e305"])
def test_a_shard_of_no_size_is_refused(size, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pack.py", "SRC", str(tmp_path), f"--shard-mib={size}"])
    with pytest.raises(SystemExit):
        pack.main()
    assert "--shard-mib must be > 0" in capsys.readouterr().err


def test_an_empty_dest_is_not_the_current_folder(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pack.py", "SRC", ""])
    with pytest.raises(SystemExit) as stopped:
        pack.main()
    assert stopped.value.code == 2 and "dest: an empty name" in capsys.readouterr().err


def test_what_cannot_be_packed_is_refused_in_one_line(tmp_path, photos, monkeypatch):
    src = write_images(tmp_path / "src", photos, 8)
    dest = tmp_path / "dest"
    packed(src, dest, 4000)
    before, notes = content(dest), tmp_path / "notes"
    notes.touch()

    def refusal(root: Path, target: Path, shard_bytes: int = 4000) -> str:
        with pytest.raises(ValueError) as caught:
            packed(root, target, shard_bytes)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    told = re.search(r"packed with --shard-mib (\S+): use the same", refusal(src, dest, 5000))
    assert told and round(float(told[1]) * 2**20) == 4000  # what is told works
    assert f"{src / 'china'} holds the images" in refusal(src / "china", src / "china")
    other = write_images(tmp_path / "other", photos, 6)
    assert "images-000000.tar holds other images than" in refusal(other, dest)
    with FileLock(dest / ".lock"):
        assert "is being packed by another process" in refusal(src, dest)
    assert content(dest) == before
    assert "notes cannot be written (File exists): name a folder" in refusal(src, notes)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "images-000000.tar").write_bytes(b"precious")
    assert "exists without an index" in refusal(src, foreign)
    assert content(foreign) == {"images-000000.tar": b"precious"}
    for path in other.rglob("*.*"):
        path.write_bytes(b"")
    assert "None of the 6 images" in refusal(other, tmp_path / "new")
    (src / "china/02.JPEG").unlink()
    (src / "china/02.JPEG").symlink_to(src / "china/04.JPEG")
    listed = list_images(str(src))
    monkeypatch.setattr(pack, "list_images", lambda root: listed)
    (src / "china/02.JPEG").unlink()  # after it was listed
    assert "china/02.JPEG: missing file. Fix or remove it" in refusal(src, tmp_path / "new")


def test_a_full_disk_is_told_and_the_same_command_goes_on(images, tmp_path, monkeypatch, capsys):
    flags = [str(images), str(tmp_path / "dest"), "--shard-mib", str(SHARD / 2**20)]
    command = [sys.executable, str(ROOT / "pipeline/pack.py"), *flags]
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "-", *command]  # KiB; a shard has 40
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = f"error: {tmp_path}/dest/images-000000.tar cannot be written (File too large): the same"
    assert error in done.stderr
    assert content(tmp_path / "dest") == {}
    monkeypatch.setattr(sys, "argv", ["pack.py", *flags])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    pack.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 60
    assert same_images(tmp_path / "dest", images)
