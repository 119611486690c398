"""pipeline/sources/folder.py on real folders: what is listed, what is skipped, and what is said."""

import os
import pickle
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.sources import folder
from pipeline.sources.folder import (
    EXTENSIONS,
    ImageFolder,
    attempt_all,
    list_images,
)
from pipeline.sources.header import BadImage

KNOWN = ".jpg .jpeg .png .webp .bmp .tif .tiff .ppm .pgm .pnm"


def write(root: Path, *names: str | bytes, content: bytes = b"pixels") -> None:
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def bad_reason(folder: ImageFolder, index: int = 0) -> str:
    """Why read() refuses, from a thread: a read that blocks fails the test, not the run."""
    reasons = []

    def read() -> None:
        with pytest.raises(BadImage) as caught:
            folder.read(index)
        reasons.append(str(caught.value))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert reasons, "read() blocks, or raises something else"
    return reasons[0]


def refusal(root: Path) -> str:
    with pytest.raises(ValueError) as caught:
        list_images(str(root))
    return str(caught.value)


def test_every_extension_in_any_case_is_listed_and_sorted_bytewise(tmp_path):
    cases = (str.lower, str.upper, str.title)
    names = [f"{case.__name__}{case(extension)}" for extension in EXTENSIONS for case in cases]
    write(tmp_path, *names, "b.jpg", "B.jpg", "a/z.jpg", "a-1.jpg", "a.b.c.jpg")
    folder = list_images(str(tmp_path))
    assert len(folder) == len(names) + 5 and folder.skipped == {}
    assert folder.paths == sorted(folder.paths)
    assert set(folder.paths) >= {os.fsencode(name) for name in names}


def test_label_is_the_first_level_folder_at_any_depth(tmp_path):
    write(tmp_path, "cat/2.jpg", "cat/deep/er/1.jpg", "ant/1.jpg", "cat-big/1.jpg", "Zoo/1.jpg")
    (tmp_path / "empty").mkdir()
    folder = list_images(str(tmp_path))
    assert folder.class_names == ["Zoo", "ant", "cat", "cat-big"]  # bytewise: as torchvision
    assert folder.labels is not None and folder.labels.dtype == np.int64
    told = [folder.class_names[label] for label in folder.labels]
    assert told == [path.decode().split("/")[0] for path in folder.paths]


@pytest.mark.parametrize(
    "names",
    [("1.jpg", "2.jpg"), ("cat/1.jpg", "cat/2.jpg"), ("cat/1.jpg", "dog/1.jpg", "stray.jpg")],
    ids=["flat", "one class folder", "an image beside the class folders"],
)
def test_without_two_class_folders_for_every_image_there_are_no_labels(tmp_path, names):
    write(tmp_path, *names)
    folder = list_images(str(tmp_path))
    assert len(folder) == len(names) and folder.labels is None and folder.class_names == []


def test_fingerprint_is_that_of_names_and_sizes_only(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, "a/1.jpg", "b/2.jpg", "b/readme.txt")
    write(two, "b/2.jpg", "a/1.jpg", content=b"sixbyt")  # other order, time, content and place
    os.utime(two / "a/1.jpg", (1, 1))
    before = list_images(str(one)).fingerprint
    assert list_images(str(two)).fingerprint == before

    (two / "b/2.jpg").write_bytes(b"longer")
    assert list_images(str(two)).fingerprint == before
    (two / "b/2.jpg").write_bytes(b"longer!")
    resized = list_images(str(two)).fingerprint
    (one / "b/2.jpg").rename(one / "b/3.jpg")
    renamed = list_images(str(one)).fingerprint
    assert len({before, resized, renamed}) == 3


def test_names_that_are_no_text_are_listed_read_and_printed_on_one_line(tmp_path):
    names = [b"new\nline.jpg", b"latin\xe9.jpg", b"tab\t.jpg", b"x" * 251 + b".jpg"]
    names += ["m\u00fcll.jpg".encode(), b"plain.jpg"]
    for name in names:
        write(tmp_path, name, content=name)
    folder = list_images(str(tmp_path))
    assert folder.paths == sorted(names)
    assert all(folder.read(i).tobytes() == name for i, name in enumerate(folder.paths))
    shown = {folder.name(i) for i in range(len(folder))}
    assert {"new\\nline.jpg", "latin\\xe9.jpg", "tab\\t.jpg", "m\u00fcll.jpg"} <= shown
    assert all(name.isprintable() for name in shown)


def test_what_is_no_image_file_is_skipped_and_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "good.jpg", "._good.jpg", ".cache/x.jpg", "notes.TXT", "b.txt", "README")
    write(tmp_path, "folder.jpg/inside.jpg", "odd.\xe9\n")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")  # a relative name: a socket's path has at most 107 bytes
        folder = list_images(str(tmp_path))
    assert folder.paths == [b"good.jpg"]
    assert folder.skipped == {
        "hidden": 2,
        "extension .txt": 2,
        "no extension": 1,
        "extension .\xe9\\n": 1,
        "folder named .jpg": 1,
        "fifo": 1,
        "socket": 1,
        "device": 1,
        "dangling symlink": 1,
        "symlink loop": 1,
    }


def test_linked_files_and_folders_are_followed(tmp_path):
    write(tmp_path / "store", "disk1/1.jpg", "disk2/sub/2.jpg", "3.jpg")
    root = tmp_path / "root"
    (root / "c").mkdir(parents=True)
    (root / "a").symlink_to(tmp_path / "store/disk1")
    (root / "b").symlink_to("../store/disk2")
    (root / "c/3.jpg").symlink_to(tmp_path / "store/3.jpg")
    folder = list_images(str(root))
    assert folder.paths == [b"a/1.jpg", b"b/sub/2.jpg", b"c/3.jpg"] and folder.skipped == {}
    assert folder.class_names == ["a", "b", "c"]


def test_symlink_loop_ends_and_is_counted(tmp_path):
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    (tmp_path / "a/self").symlink_to(".")
    (tmp_path / "b/up").symlink_to(tmp_path)
    folder = list_images(str(tmp_path))
    assert folder.paths == [b"a/1.jpg", b"b/2.jpg"]
    assert folder.skipped == {"symlink loop": 2}


def test_folder_reached_twice_is_listed_once_under_its_real_or_first_name(tmp_path):
    write(tmp_path / "root", "real/1.jpg")
    write(tmp_path / "store", "2.jpg")
    (tmp_path / "root/alias").symlink_to("real")  # sorts before the real folder
    for name in ("z", "y", "x"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "store")
    folder = list_images(str(tmp_path / "root"))
    assert folder.paths == [b"real/1.jpg", b"x/2.jpg"]
    assert folder.skipped == {"repeated folder": 3}


def test_time_is_linear_in_entries_where_paths_are_exponential(tmp_path, monkeypatch):
    # Two links a level: 2^25 paths lead to the image.
    write(tmp_path, "25/1.jpg")
    for level in range(25):
        (tmp_path / f"{level}").mkdir()
        for name in ("x", "y"):
            (tmp_path / f"{level}" / name).symlink_to(f"../{level + 1}")
    scanned = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scandir(path))
    assert list_images(str(tmp_path)).paths == [b"25/1.jpg"]
    assert len(scanned) == 1 + 1 + 26  # is the root a folder; the root; its folders


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_is_counted_and_an_unreadable_root_refused(tmp_path):
    write(tmp_path, "open/1.jpg", "locked/2.jpg")
    (tmp_path / "locked").chmod(0)
    try:
        assert list_images(str(tmp_path)).skipped == {"unreadable": 1}
        assert "cannot be read (Permission denied)" in refusal(tmp_path / "locked")
    finally:
        (tmp_path / "locked").chmod(0o700)


def test_folder_that_the_system_refuses_is_counted(tmp_path, monkeypatch):
    write(tmp_path, "open/1.jpg", "locked/2.jpg")
    scandir = os.scandir

    def deny(path):
        if path == os.fsencode(tmp_path / "locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    folder = list_images(str(tmp_path))
    assert folder.paths == [b"open/1.jpg"] and folder.skipped == {"unreadable": 1}


def test_read_gives_the_bytes_of_the_file(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8)
    write(tmp_path, "1.jpg", content=content.tobytes())
    data = list_images(str(tmp_path)).read(0)
    assert data.dtype == np.uint8 and np.array_equal(data, content)


def test_read_refuses_what_became_of_a_file_and_never_blocks(tmp_path, monkeypatch):
    path = tmp_path / "1.jpg"
    write(tmp_path, "1.jpg")
    folder = list_images(str(tmp_path))
    path.write_bytes(b"")
    assert bad_reason(folder) == "empty file"
    os.truncate(path, 3 << 30)  # sparse: no disk is used
    assert bad_reason(folder) == "file of 3221225472 bytes exceeds the limit of 2147483648"
    path.unlink()
    assert bad_reason(folder) == "missing file"
    path.symlink_to("1.jpg")
    assert bad_reason(folder) == "unreadable file (Too many levels of symbolic links)"
    path.unlink()
    path.mkdir()
    assert bad_reason(folder) == "not a regular file"
    path.rmdir()
    os.mkfifo(path)
    assert bad_reason(folder) == "not a regular file"
    path.unlink()
    path.symlink_to("/dev/zero")
    assert bad_reason(folder) == "not a regular file"
    path.unlink()
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("1.jpg")
        assert bad_reason(folder) == "unreadable file (No such device or address)"


def test_empty_file_is_listed_so_that_a_failed_copy_counts_as_bad(tmp_path):
    write(tmp_path, "1.jpg", content=b"")
    assert bad_reason(list_images(str(tmp_path))) == "empty file"


def test_folder_of_other_files_is_refused_with_what_was_found(tmp_path):
    write(tmp_path, *(f"c/{i}.bak" for i in range(12)))
    assert refusal(tmp_path) == (
        f"No images under {tmp_path}: found 0 of {KNOWN}, but 12 files ending .bak. "
        f"Expected {tmp_path}/<class>/<image>.jpg or {tmp_path}/<image>.jpg."
    )
    write(tmp_path, "._1.jpg", "._2.jpg", "._3.jpg", "Makefile", "COPYING", "1.txt")
    found = "but 12 files ending .bak, 3 skipped as hidden, 2 files without extension. Expected"
    assert found in refusal(tmp_path)


def test_folder_of_a_thousand_extensions_is_refused_in_one_readable_line(tmp_path):
    write(tmp_path, *(f"frame.{i:04d}" for i in range(1000)))
    message = refusal(tmp_path)
    assert "but 950 skipped as other extensions, 1 file ending ." in message
    assert len(message) < 300 + 4 * len(str(tmp_path))


def test_empty_missing_and_wrong_roots_are_refused_in_one_line(tmp_path):
    write(tmp_path, "train.tar")
    (tmp_path / "empty/class").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "new\nline").mkdir()
    with pytest.raises(ValueError, match="name is empty"):
        list_images("")
    start = f"No images under {tmp_path}"
    assert refusal(tmp_path / "empty").startswith(
        f"{start}/empty: found 0 of {KNOWN}, and no other"
    )
    assert refusal(tmp_path / "missing").startswith(
        f"{start}/missing: no such folder. Expected {tmp_path}"
    )
    assert refusal(tmp_path / "train.tar").startswith(f"{start}/train.tar: it is a file, not a ")
    assert "cannot be read (Too many levels of symbolic links)" in refusal(tmp_path / "loop")
    assert refusal(tmp_path / "new\nline").startswith(f"{start}/new\\nline: found 0")
    assert refusal(tmp_path / "new\nline").isprintable()


def test_list_survives_pickling_as_little_more_than_its_names(tmp_path, monkeypatch):
    write(tmp_path, *(f"n{i % 9:08d}/n{i % 9:08d}_{i}.JPEG" for i in range(2000)), b"n1/\xff\n.jpg")
    write(tmp_path, "notes.txt")
    monkeypatch.chdir(tmp_path)
    folder = list_images(".")
    pickled = pickle.dumps(folder)
    monkeypatch.chdir("/")  # another process may stand elsewhere
    copy = pickle.loads(pickled)
    for name in ("root", "paths", "class_names", "fingerprint", "skipped"):
        assert getattr(copy, name) == getattr(folder, name)
    assert folder.labels is not None and np.array_equal(copy.labels, folder.labels)
    assert copy.read(0).tobytes() == b"pixels"
    num_bytes = sum(len(path) + 1 for path in folder.paths) + folder.labels.nbytes
    assert len(pickled) < num_bytes + 1500


def test_flat_list_survives_pickling(tmp_path):
    write(tmp_path, "1.jpg")
    copy = pickle.loads(pickle.dumps(list_images(str(tmp_path))))
    assert copy.paths == [b"1.jpg"] and copy.labels is None


@pytest.mark.parametrize("waits", [False, True])
def test_other_threads_read_only_where_reading_waits(waits, monkeypatch):
    names = []
    if not waits:  # that other programs have the cores is waiting too
        monkeypatch.setattr(folder, "MOST_WAIT_S", 60.0)

    def read(index: int) -> int:
        names.append(threading.current_thread().name)
        time.sleep(0.002 * waits)  # as network storage does
        return index

    with ThreadPoolExecutor(4, thread_name_prefix="reader") as pool:
        assert attempt_all(read, range(64), pool) == list(range(64))
    here = names.count(threading.current_thread().name)
    assert here == (1 if waits else 64)


def test_the_first_file_that_is_not_in_memory_hands_the_rest_to_the_other_threads():
    here = []

    def read(index: int) -> int:
        if threading.current_thread() is threading.main_thread():
            here.append(index)
        time.sleep(0.02 * (index >= 64))
        return index

    with ThreadPoolExecutor(4) as pool:
        assert attempt_all(read, range(80), pool) == list(range(80))
    assert len(here) <= 65  # fewer where other programs had the cores
