"""A folder of good and bad files of every kind: which are used, replaced and not listed."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions
from pipeline.loader import view_loader
from pipeline.order import SampleOrder
from pipeline.sources.folder import list_images
from pipeline.sources.reader import ImageReader
from test_header import GOOD, JPEG, REFUSED, SOS, encode, patched, rotated_by_exif

BATCH = 16


def bad(name: str) -> bytes:
    return REFUSED[name][0]


USED = {
    b"good.jpg": JPEG,
    b"progressive.jpg": GOOD["jpeg progressive"],
    b"gray.jpg": GOOD["jpeg gray"],
    b"cmyk.jpg": GOOD["jpeg cmyk"],
    b"png.JPEG": GOOD["png"],
    b"rgba.png": GOOD["png RGBA"],
    b"palette.png": GOOD["png P"],
    b"16-bit.png": GOOD["png 16 bit"],
    b"a.bmp": GOOD["bmp"],
    b"a.tiff": GOOD["tiff"],
    b"webp.jpg": GOOD["webp"],
    b"1x1.jpg": GOOD["jpeg 1x1"],
    b"2x500.jpg": GOOD["jpeg 2x500"],
    b"bytes-behind.jpg": JPEG + b"junk" * 100,
    "m\u00fcll \u4e2d.jpg".encode(): JPEG,
    b"new\nline.jpg": JPEG,
    b"latin\xe9.jpg": JPEG,
    b"upper.JPG": JPEG,
    b"exif-6.jpg": rotated_by_exif("JPEG"),
    b"below/one/more.jpg": JPEG,
}
REPLACED = {
    b"cut-90.jpg": JPEG[: len(JPEG) * 9 // 10],
    b"cut-50.jpg": JPEG[: len(JPEG) // 2],
    b"cut-5.jpg": JPEG[: len(JPEG) // 20],
    b"sof9.jpg": patched(JPEG, JPEG.index(b"\xff\xc0") + 1, b"\xc9"),
    b"12-bit.jpg": bad("jpeg 12 bit"),
    b"header-only.jpg": bad("jpeg header only"),
    b"header-zeros.jpg": bad("jpeg zeros in the header"),
    b"page.jpg": bad("html"),
    b"lfs.jpg": bad("lfs pointer"),
    b"random.jpg": bad("random"),
    b"one-byte.jpg": bad("one byte"),
    b"prefix.jpg": bad("jpeg behind a prefix"),
    b"gif.jpg": bad("gif"),
    b"zero-sides.jpg": bad("jpeg height 0"),
    b"bomb.jpg": bad("jpeg bomb"),
    b"empty.jpg": b"",
    b"bad-latin\xe9.jpg": b"no image",
}
DELETED = b"deleted.jpg"  # after the folder was listed


def write(root: Path, files: dict[bytes, bytes]) -> None:
    for name, content in files.items():
        path = Path(os.fsdecode(os.path.join(os.fsencode(root), name)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory) -> tuple[ImageReader, list, list[bytes]]:
    """The reader after two epochs over all files, the batches, and the paths that were listed."""
    root = tmp_path_factory.mktemp("mixed")
    write(root, USED | REPLACED | {DELETED: JPEG, b"._mac.jpg": JPEG, b"no-extension": JPEG})
    (root / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "folder.jpg").mkdir()
    source = list_images(str(root))
    (root / os.fsdecode(DELETED)).unlink()
    reader = ImageReader(source)
    order = SampleOrder(len(source), batch_size=BATCH, seed=0)
    loader = view_loader(
        reader, order, range(2 * order.steps_per_epoch + 2), views=[AugmentConfig(size=16)] * 2,
        options=DecodeOptions(), device=torch.device("cpu"),
    )  # fmt: skip
    found = [(batch.step, batch.ids.numpy().copy(), batch.images.shape) for batch in loader]
    return reader, found, source.paths


def test_what_is_no_file_to_read_is_not_listed_and_counted(trained_on):
    reader, _, paths = trained_on
    assert set(paths) == {*USED, *REPLACED, DELETED}
    assert reader.source.skipped == {
        "hidden": 1, "no extension": 1, "dangling symlink": 1, "folder named .jpg": 1,
    }  # fmt: skip


def test_every_bad_file_is_replaced_and_no_good_one_and_no_batch_is_lost(trained_on):
    reader, batches, paths = trained_on
    assert {paths[index] for index in reader.bad} == {*REPLACED, DELETED}
    assert [step for step, _, _ in batches] == list(range(len(batches)))
    assert all(shape == (2, BATCH, 16, 16, 3) for _, _, shape in batches)
    seen = {paths[index] for _, ids, _ in batches for index in ids}
    assert seen == set(USED)


def test_damage_inside_a_scan_ends_no_run_and_is_replaced_or_decoded(tmp_path):
    """Only a full decode can tell: DALI decodes most of it to other pixels."""
    draw = np.random.default_rng(0)
    data = bytearray(JPEG)
    for at in draw.integers(SOS + 14, len(JPEG) - 2, 200):
        data[at] = draw.integers(255)
    write(tmp_path, {b"%d.jpg" % n: JPEG for n in range(8)} | {b"damaged.jpg": bytes(data)})
    reader = ImageReader(list_images(str(tmp_path)))
    loader = view_loader(
        reader, SampleOrder(9, batch_size=9, seed=0), range(2), views=[AugmentConfig(size=16)] * 2,
        options=DecodeOptions(), device=torch.device("cpu"),
    )  # fmt: skip
    assert [len(batch.ids) for batch in loader] == [9, 9]
    assert {reader.source.name(index) for index in reader.bad} <= {"damaged.jpg"}


@pytest.mark.slow
def test_a_jpeg_of_108_million_pixels_is_used(tmp_path):
    large = encode(Image.new("L", (12_000, 9000), 90), "JPEG")  # the limit is 2^27 pixels
    write(tmp_path, {b"1.jpg": JPEG, b"large.jpg": large})
    reader = ImageReader(list_images(str(tmp_path)))
    loader = view_loader(
        reader, SampleOrder(2, batch_size=2, seed=0), range(1), views=[AugmentConfig(size=16)] * 2,
        options=DecodeOptions(), device=torch.device("cpu"),
    )  # fmt: skip
    (batch,) = loader
    assert sorted(batch.ids.tolist()) == [0, 1] and not reader.bad
    views = batch.images[:, batch.ids.tolist().index(1)].float()
    assert views.std((1, 2, 3)).max() < 1  # one gray each, whatever the jitter made of it
