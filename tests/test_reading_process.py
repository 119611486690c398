"""The process that reads beside a GPU: the same batches, no memory used twice, no process left."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import reading_process as module
from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions
from pipeline.loader import Ranks, view_loader
from pipeline.order import SampleOrder, ViewPlan, Work
from pipeline.reading_process import _Child, reading_process
from pipeline.sources.folder import list_images
from pipeline.sources.reader import ImageReader

ROOT = Path(__file__).parent.parent
SMALL = AugmentConfig(size=24)
VIEWS = (SMALL, AugmentConfig(size=24, solarize=0.5), AugmentConfig(size=12))


@pytest.fixture
def folder(tmp_path, photos) -> Path:
    """24 pictures of differing sizes, of which the third is cut off."""
    rng = np.random.default_rng(0)
    for number in range(24):
        h, w = rng.integers(40, 90, 2)
        Image.fromarray(photos[number % 2][:h, :w]).save(tmp_path / f"{number:03d}.jpg")
    cut = tmp_path / "002.jpg"
    cut.write_bytes(cut.read_bytes()[:600])
    return tmp_path


@pytest.fixture
def reader(folder) -> ImageReader:
    return ImageReader(list_images(str(folder)))


@pytest.fixture
def plan() -> ViewPlan:
    return ViewPlan(SampleOrder(24, batch_size=8, seed=0), VIEWS, slice(0, 8), packed=True)


@pytest.fixture
def child(reader, plan) -> Iterator[_Child]:
    made = _Child(reader, plan)
    yield made
    made.close()


def bytes_of(work: Work) -> list[bytes]:
    return [image.tobytes() for image in work.inputs["encoded"]]


def files_of(reader: ImageReader, work: Work) -> list[bytes]:
    return [reader.source.read(int(index)).tobytes() for index in work.ids]


def test_it_makes_the_batches_of_this_process_bit_for_bit(folder):
    gray = Image.open(folder / "003.jpg").convert("LA")  # of two pages, decoded by Pillow
    gray.save(folder / "003.jpg", "TIFF", save_all=True, append_images=[gray])

    def batches(*, in_process: bool) -> list:
        reader = ImageReader(list_images(str(folder)))
        order = SampleOrder(24, batch_size=8, seed=0)
        loader = view_loader(
            reader, order, range(2, 9), views=VIEWS, options=DecodeOptions(),
            device=torch.device("cpu"), ranks=Ranks(1, 2), in_process=in_process,
        )  # fmt: skip
        found = list(loader)
        assert set(reader.bad) == {2} and reader.several == (1, 3)
        return found

    for ours, theirs in zip(batches(in_process=True), batches(in_process=False), strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.small, theirs.small)


def test_the_bytes_of_a_batch_stay_as_long_as_it_is_kept_and_their_memory_is_used_again(
    child, reader, plan
):
    kept = [child.prepare(step) for step in range(6)]
    assert np.array_equal(kept[5].draws, plan.prepare(reader, 5).draws)
    assert len(child._buffers) == 6
    assert all(bytes_of(work) == files_of(reader, work) for work in kept)
    del kept
    for step in range(12):
        work = child.prepare(step)
        assert bytes_of(work) == files_of(reader, work)
    assert len(child._buffers) == 6


def test_a_batch_larger_than_the_memory_before_it_is_whole(child, reader, folder):
    before = child.prepare(0)
    copy = bytes_of(before)
    small = (folder / "000.jpg").read_bytes()
    for path in folder.iterdir():  # 3 MB more behind each scan: 24 MB a batch
        path.write_bytes(small + bytes(3 << 20))
    work = child.prepare(1)
    assert bytes_of(work) == files_of(reader, work)
    assert sum(map(len, bytes_of(work))) > module.LEAST
    assert bytes_of(before) == copy


def test_bad_images_are_known_on_both_sides(child, reader):
    for step in range(3):
        child.prepare(step)
    assert set(reader.bad) == {2} and "truncated JPEG" in reader.bad[2]
    marked = int(child.prepare(3).ids[0])
    reader.bad[marked] = "DALI could not decode it"
    ids = child.prepare(3).ids
    assert marked not in ids


def test_what_it_raises_is_raised_here_and_it_serves_on(child, folder):
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    for path in kept:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="100 images drawn as replacements were bad too") as failed:
        child.prepare(0)
    assert any("in prepare" in note for note in failed.value.__notes__)
    assert len(child._free) == 1


def test_signals_to_all_processes_of_a_job_leave_it_to_serve(child):
    child.prepare(0)
    for number in module.SIGNALS:
        child._process.send_signal(number)
    assert child.prepare(1).step == 1


def test_its_death_is_told_with_the_remedy(child):
    child.prepare(0)
    child._process.kill()
    with pytest.raises(RuntimeError, match="ended with -9.*lower --data.batch_size"):
        child.prepare(1)


def test_it_ends_with_its_loader(reader, plan):
    with reading_process(reader, plan) as prepare:
        prepare(0)
        process = prepare.__self__._process  # type: ignore[attr-defined] - of the method
        assert process.poll() is None
    assert process.returncode == 0


TRAINER = """
import sys, time
from pipeline.augment import AugmentConfig
from pipeline.order import SampleOrder
from pipeline.sources.reader import ImageReader
from pipeline.reading_process import _Child
from pipeline.sources.folder import list_images
from pipeline.order import ViewPlan

plan = ViewPlan(SampleOrder(24, batch_size=8, seed=0), (AugmentConfig(),), slice(0, 8), True)
child = _Child(ImageReader(list_images(sys.argv[1])), plan)
child.prepare(0)
assert "torch" not in sys.modules and "nvidia.dali" not in sys.modules
print(child._process.pid, flush=True)
time.sleep(600)
"""


def test_it_needs_neither_torch_nor_dali_and_ends_when_the_trainer_is_killed(folder):
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    with trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        gone = os.pidfd_open(pid)
        os.kill(trainer.pid, signal.SIGKILL)
        assert select.select([gone], [], [], 30)[0]
        os.close(gone)
