"""From a folder to batches: order, coverage, ranks, replacement, resume, evaluation crops."""

import dataclasses
import gc
import io
import os
import re
import time
import weakref
from contextlib import nullcontext
from functools import partial
from operator import gt
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.normalize import finish_views
from pipeline import graph
from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions, decode_arguments, reserve
from pipeline.loader import DaliLoader, Ranks, eval_loader, view_loader
from pipeline.order import SampleOrder, ViewPlan
from pipeline.pack import pack_root
from pipeline.sources import reader as reader_module
from pipeline.sources.folder import READERS, list_images
from pipeline.sources.header import Header, read_header
from pipeline.sources.reader import ImageReader
from pipeline.sources.shards import open_source

CPU = torch.device("cpu")
SMALL = AugmentConfig(size=24)


@pytest.fixture
def folder(tmp_path, photos) -> Path:
    """40 small real pictures of differing sizes in one folder."""
    rng = np.random.default_rng(0)
    for number in range(40):
        photo = photos[number % 2]
        h, w = rng.integers(40, 90, 2)
        y, x = rng.integers(photo.shape[0] - h), rng.integers(photo.shape[1] - w)
        Image.fromarray(photo[y : y + h, x : x + w]).save(tmp_path / f"{number:03d}.jpg")
    return tmp_path


def batches(
    folder, steps, *, batch_size=8, rank=0, world=1, seed=0, views=(SMALL, SMALL), reader=None
):
    reader = reader or ImageReader(list_images(str(folder)))
    order = SampleOrder(len(reader.source), batch_size=batch_size, seed=seed)
    loader = view_loader(
        reader, order, steps, views=views, options=DecodeOptions(), device=CPU,
        ranks=Ranks(rank, world),
    )  # fmt: skip
    return list(loader)


def test_two_uint8_nhwc_views_and_ids_come_out(folder):
    batch = batches(folder, range(1))[0]
    assert batch.images.shape == (2, 8, 24, 24, 3) and batch.images.dtype == torch.uint8
    order = SampleOrder(40, batch_size=8, seed=0)
    np.testing.assert_array_equal(batch.ids, order.global_batch(0))
    assert (batch.images[0] != batch.images[1]).float().mean() > 0.5


def test_views_of_a_second_size_come_out_apart_and_change_nothing_of_the_first(folder):
    crop = dataclasses.replace(SMALL, size=12, scale=(0.05, 0.2))
    plain = batches(folder, range(1))[0]
    multi = batches(folder, range(1), views=(SMALL, SMALL, crop, crop, crop))[0]
    assert plain.small is None and multi.small is not None
    assert multi.small.shape == (3, 8, 12, 12, 3)
    assert (multi.images == plain.images).all()
    assert (multi.small[0] != multi.small[1]).float().mean() > 0.5


def test_an_epoch_covers_every_sample_once_and_epochs_differ():
    order = SampleOrder(103, batch_size=10, seed=1)
    assert order.steps_per_epoch == 10
    for epoch in range(3):
        assert sorted(order.permutation(epoch)) == list(range(103))
        seen = np.concatenate([order.global_batch(epoch * 10 + i) for i in range(10)])
        assert len(set(seen)) == 100
    assert (order.permutation(0) != order.permutation(1)).mean() > 0.9
    assert (order.permutation(0) != SampleOrder(103, batch_size=10, seed=2).permutation(0)).any()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_are_disjoint_and_together_the_one_ranks_batches_bit_for_bit(folder, world):
    whole = batches(folder, range(3))
    parts = [batches(folder, range(3), rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].ids for part in parts]), batch.ids)
        assert torch.equal(torch.cat([part[step].images for part in parts], dim=1), batch.images)
        assert len(set(batch.ids.tolist())) == 8


def test_entering_at_any_step_gives_the_same_batches(folder):
    whole = batches(folder, range(12))
    for start in (1, 4, 5, 11):
        for batch in batches(folder, range(start, 12)):
            assert torch.equal(batch.images, whole[batch.step].images)
            assert torch.equal(batch.ids, whole[batch.step].ids)


BAD = {
    "zero bytes": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:600]),
    "html": lambda path: path.write_bytes(b"<html><body>404 not found</body></html>"),
    "vanished": lambda path: path.unlink(),
    "bomb": lambda path: path.write_bytes(bomb(path.read_bytes())),
}


def bomb(jpeg: bytes) -> bytes:
    """The JPEG with a header that claims 65500 x 65500 pixels."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + (65500).to_bytes(2, "big") * 2 + jpeg[at + 4 :]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_replaced_and_named_and_the_rest_is_untouched(folder, kind):
    clean = batches(folder, range(5))
    source = list_images(str(folder))
    victim = int(clean[0].ids[3])
    BAD[kind](folder / os.fsdecode(source.paths[victim]))
    reader = ImageReader(source)
    found = batches(folder, range(5), reader=reader)
    assert set(reader.bad) == {victim}
    assert len(found) == 5
    replaced = found[0].ids != clean[0].ids
    assert replaced.tolist() == [row == 3 for row in range(8)]
    keep = [row for row in range(8) if row != 3]
    assert torch.equal(found[0].images[:, keep], clean[0].images[:, keep])
    again = batches(folder, range(5), reader=ImageReader(source))
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, again, strict=True))


def test_an_image_that_only_dali_refuses_is_found_and_its_step_run_again(folder, monkeypatch):
    clean = batches(folder, range(5))
    source = list_images(str(folder))
    victim = int(clean[2].ids[5])
    path = folder / os.fsdecode(source.paths[victim])
    path.write_bytes(path.read_bytes()[:700])
    monkeypatch.setattr(reader_module, "read_header", blind)
    reader = ImageReader(source)
    found = batches(folder, range(5), reader=reader)
    assert set(reader.bad) == {victim}
    assert [batch.step for batch in found] == [0, 1, 2, 3, 4]
    assert (found[2].ids != clean[2].ids).tolist() == [row == 5 for row in range(8)]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory",
        "Critical error in pipeline:\nencountered:\n\nstd::bad_alloc\n",
    ],
)
def test_a_device_or_memory_that_fails_marks_no_image_as_bad(folder, monkeypatch, text):
    def run_out(self):
        raise RuntimeError(text)

    images = [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(folder.iterdir())[:2]]
    monkeypatch.setattr(graph.Pipeline, "run", run_out)
    with pytest.raises(RuntimeError, match=re.escape(text)):
        graph.undecodable(images, DecodeOptions(), device_id=None)


def test_each_image_that_dali_refuses_is_found_behind_another_one(folder):
    good = [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(folder.iterdir())[:4]]
    images = [good[0], good[1][:700], good[2][:700], good[3]]
    found = graph.undecodable(images, DecodeOptions(), device_id=None)
    assert set(found) == {1, 2} and found[1].startswith("JPEG that DALI cannot decode: damaged")


def test_the_pipeline_that_failed_is_gone_before_its_images_are_tried(folder, monkeypatch):
    """On a GPU it holds gigabytes that the search, and the next pipeline, may need."""
    source = list_images(str(folder))
    path = folder / os.fsdecode(source.paths[3])
    path.write_bytes(path.read_bytes()[:700])
    monkeypatch.setattr(reader_module, "read_header", blind)
    built, alive = [], []
    build, search = graph.build_view_pipeline, graph.undecodable

    def spied_build(*args, **kwargs):
        pipeline = build(*args, **kwargs)
        built.append(weakref.ref(pipeline))
        return pipeline

    def spied_search(*args, **kwargs):
        alive.append(sum(pipeline() is not None for pipeline in built))
        return search(*args, **kwargs)

    monkeypatch.setattr(graph, "build_view_pipeline", spied_build)
    monkeypatch.setattr(graph, "undecodable", spied_search)
    assert len(batches(folder, range(5), reader=ImageReader(source))) == 5
    assert alive == [0]


class Spied(graph.Pipeline):
    """A pipeline that says which of the arrays fed to it are alive."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fed, self.events = [], []

    def release_outputs(self):
        if self.fed:
            self.events.append([array() is not None for array in self.fed.pop(0)])
        super().release_outputs()


def test_the_bytes_that_dali_reads_in_place_are_kept_until_their_batch_is_released(
    folder, monkeypatch
):
    monkeypatch.setattr(graph, "pipeline_def", spied_definition(spied := []))
    feed = DaliLoader._feed

    def spied_feed(pipeline, work):
        arrays = work.inputs["encoded"]
        pipeline.fed.append([weakref.ref(array) for array in arrays])
        for number, array in enumerate(arrays):
            weakref.finalize(array, pipeline.events.append, number)
        feed(pipeline, work)

    monkeypatch.setattr(DaliLoader, "_feed", staticmethod(spied_feed))
    assert len(batches(folder, range(6))) == 6
    (pipeline,) = spied
    released = [event for event in pipeline.events if isinstance(event, list)]
    assert released == [[True] * 8] * 6
    assert len(pipeline.events) == 6 + 6 * 8  # and no longer: the heap does not grow


def test_a_loader_that_fails_ends_dali_before_the_bytes_that_it_reads_go(folder, monkeypatch):
    monkeypatch.setattr(graph, "pipeline_def", spied_definition(spied := []))
    reader = ImageReader(list_images(str(folder)))
    order = SampleOrder(40, batch_size=8, seed=0)
    loader = view_loader(
        reader, order, range(100), views=[SMALL] * 2, options=DecodeOptions(), device=CPU
    )
    iterator = iter(loader)
    next(iterator)
    monkeypatch.setattr(ImageReader, "read_all", unreadable)
    pipeline = weakref.ref(spied.pop())
    with pytest.raises(OSError, match="the disk is gone") as failed:
        list(iterator)
    # the traceback has the frames, and so the arrays: the pipeline must not live as long
    assert failed.value.__traceback__ is not None and pipeline() is None


def blind(data, *, max_pixels):
    """Stands in for read_header: a guard that sees nothing."""
    return Header(50, 50)


def unreadable(reader, ids, allocate):
    """Stands in for read_all."""
    raise OSError("the disk is gone")


def spied_definition(spied: list):
    """DALI's decorator, with pipelines of the class above."""

    def definition(**options):
        def decorate(function):
            def make():
                pipeline = Spied(**options)
                with pipeline:
                    pipeline.set_outputs(*function())
                spied.append(pipeline)
                return pipeline

            return make

        return decorate

    return definition


def test_a_header_is_read_once_and_again_once_its_file_was_written_to(folder, monkeypatch):
    parsed = []

    def spied(data, *, max_pixels):
        parsed.append(len(data))
        return read_header(data, max_pixels=max_pixels)

    monkeypatch.setattr(reader_module, "read_header", spied)
    reader = ImageReader(list_images(str(folder)))
    first = batches(folder, range(5), reader=reader)
    assert len(parsed) == 40
    victim, other = int(first[0].ids[3]), int(first[1].ids[0])
    again = batches(folder, range(5), reader=reader)
    assert len(parsed) == 40
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    for index, change in ((victim, bomb), (other, bytes)):  # of the same length, the same bytes
        path = folder / os.fsdecode(reader.source.paths[index])
        status = path.stat()
        path.write_bytes(change(path.read_bytes()))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    found = batches(folder, range(5), reader=reader)
    assert set(reader.bad) == {victim} and "exceeds the limit" in reader.bad[victim]
    assert len(parsed) == 42 and int(found[0].ids[3]) != victim


def test_a_header_of_a_shard_is_read_again_once_the_shard_was_written_to(folder, tmp_path_factory):
    packed = tmp_path_factory.mktemp("packed")
    pack_root(str(folder), packed, shard_bytes=1 << 30)
    reader = ImageReader(open_source(str(packed)))
    assert None not in reader.read_all(np.arange(40))
    shard = Path(reader.source.shards[0])
    data = bytearray(shard.read_bytes())
    at = int(reader.source.offsets[7])
    data[at : at + 2] = b"no"
    with shard.open("r+b") as file:
        file.write(data)
    placed = reader.read_all(np.arange(40))
    assert [index for index, image in enumerate(placed) if image is None] == [7]


def test_only_bad_images_end_in_an_error_not_a_hang(folder):
    source = list_images(str(folder))
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="100 images drawn as replacements"):
        batches(folder, range(2), reader=ImageReader(source))


def test_fewer_images_than_a_batch_are_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match="5 images are fewer than one global batch of 8"):
        SampleOrder(5, batch_size=8, seed=0)


def test_ranks_that_do_not_divide_the_batch_are_refused(folder):
    with pytest.raises(ValueError, match="3 processes do not divide the global batch of 8"):
        batches(folder, range(1), world=3)


def test_leaving_the_loop_early_ends_the_reading_thread(folder):
    import threading

    before = threading.active_count()
    reader = ImageReader(list_images(str(folder)))
    order = SampleOrder(40, batch_size=8, seed=0)
    loader = view_loader(
        reader, order, range(100), views=[SMALL] * 2, options=DecodeOptions(), device=CPU
    )
    iterator = iter(loader)
    next(iterator)
    iterator.close()
    assert threading.active_count() <= before + READERS  # the pool stays, the thread ends


def test_loaders_one_after_another_leave_no_thread_and_no_open_file(folder):
    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    batches(folder, range(2))  # what is opened once
    before = held()
    for _ in range(5):
        batches(folder, range(2))
    until = time.monotonic() + 20  # DALI's threads end in their own time
    while any(map(gt, held(), before)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(gt, held(), before))


def test_evaluation_crops_equal_torchvisions(torchvision, tmp_path, photos):
    from torchvision.transforms import CenterCrop, Resize

    for number, photo in enumerate(photos):
        Image.fromarray(photo).save(tmp_path / f"{number}.png")
    (tmp_path / "5.png").write_bytes(b"")
    reader = ImageReader(list_images(str(tmp_path)))
    loader = eval_loader(
        reader, np.arange(len(photos)), resize=128, size=112, batch_size=4,
        options=DecodeOptions(), device=CPU,
    )  # fmt: skip
    found = list(loader)
    ids = torch.cat([batch.ids for batch in found]).tolist()
    assert ids == [index if index != 5 else -1 for index in range(len(photos))]
    ours = torch.cat([batch.images for batch in found]).float().numpy()
    for index, photo in enumerate(photos):
        if index != 5:
            reference = CenterCrop(112)(Resize(128)(Image.fromarray(photo)))
            assert np.abs(ours[index] - np.asarray(reference)).mean() < 2.0


def test_exif_orientation_is_not_applied_as_in_torchvision(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif, quality=95)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    loader = eval_loader(
        ImageReader(list_images(str(tmp_path))), np.arange(1), resize=20, size=20, batch_size=1,
        options=DecodeOptions(), device=CPU,
    )  # fmt: skip
    image = next(iter(loader)).images[0].float()
    assert image[:, :8].mean() > 240 and image[:, 12:].mean() < 15


A100, L4, H200 = (8, 0), (8, 9), (9, 0)


@pytest.mark.parametrize(("capability", "load"), [(A100, 0.75), (H200, 0.99), (L4, 0.65)])
def test_the_hardware_decoder_gets_its_architectures_share_unless_one_is_asked_for(
    capability, load
):
    gpu = decode_arguments(DecodeOptions(), capability=capability, threads=6)
    assert gpu["device"] == "mixed" and gpu["hw_decoder_load"] == load
    for asked in (0.0, 0.7):
        options = DecodeOptions(hw_decoder_load=asked)
        gpu = decode_arguments(options, capability=capability, threads=6)
        assert gpu["hw_decoder_load"] == asked
    cpu = decode_arguments(DecodeOptions(), capability=None, threads=6)
    assert cpu["device"] == "cpu" and "hw_decoder_load" not in cpu
    assert gpu["adjust_orientation"] is cpu["adjust_orientation"] is False


def test_only_the_training_pipeline_reserves_for_the_largest_image(monkeypatch):
    taken = []

    def refuse(encoded, **arguments):
        taken.append(arguments)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(graph, "capability_of", lambda device_id: H200)
    monkeypatch.setattr(graph.fn.decoders, "image", refuse)
    options = DecodeOptions(preallocate_width=5980, preallocate_height=6430)
    common = {"batch_size": 4, "prefetch": 2, "num_threads": 6, "device_id": None}
    for build in (
        lambda: graph.build_view_pipeline(options, [SMALL], **common),
        lambda: graph.build_eval_pipeline(options, size=24, **common),
        lambda: graph.undecodable([b"x"], options, device_id=None),
    ):
        with pytest.raises(RuntimeError, match="no GPU"):
            build()
    names = ("device_memory_padding", "host_memory_padding", "preallocate_width_hint",
             "preallocate_height_hint")  # fmt: skip
    reserved = [tuple(arguments[name] for name in names) for arguments in taken]
    assert reserved == [(256 << 20, 128 << 20, 5980, 6430), (0, 0, 0, 0), (0, 0, 0, 0)]


def test_what_dali_reserves_is_told_for_both_pipelines():
    """6 threads and the one that calls: 7 x 256 MiB, and 7 x 2 x 128 MiB of pinned memory."""
    hints = DecodeOptions(preallocate_width=5980, preallocate_height=6430)
    assert reserve(DecodeOptions(), threads=6) == (
        "training 1.75 GiB of device memory, 1.75 GiB pinned (6 threads); evaluation none"
    )
    told = reserve(hints, threads=6)
    assert "and the hardware decoder's for 5980 x 6430 pixels, 1.75 GiB pinned" in told


def test_decoder_reserves_at_most_2_gib_however_many_threads_there_are():
    """224 threads of 256 MiB, a DGX H100's cores for one rank, would be 56 GiB of its 80."""
    for threads in (1, 6, 16, 224):
        gpu = decode_arguments(DecodeOptions(), capability=H200, threads=threads)
        buffers = threads + 1  # nvImageCodec's own: one more for the thread that calls
        assert buffers * gpu["device_memory_padding"] <= 2 << 30
        assert 2 * buffers * gpu["host_memory_padding"] <= 2 << 30
        if threads <= 6:  # MLPerf's values are kept
            paddings = gpu["device_memory_padding"], gpu["host_memory_padding"]
            assert paddings == (256 << 20, 128 << 20)
    asked = DecodeOptions(device_memory_padding=64 << 20, host_memory_padding=8 << 20)
    gpu = decode_arguments(asked, capability=H200, threads=224)
    assert (gpu["device_memory_padding"], gpu["host_memory_padding"]) == (64 << 20, 8 << 20)


def test_the_crops_and_draws_of_a_gpu_give_the_views_of_the_cpu_bit_for_bit(folder):
    crop = dataclasses.replace(SMALL, size=12, scale=(0.05, 0.2))
    views = (SMALL, dataclasses.replace(SMALL, solarize=0.5), crop, crop)
    reader, order = ImageReader(list_images(str(folder))), SampleOrder(40, batch_size=8, seed=0)
    plan = ViewPlan(order, views, slice(0, 8), packed=True)
    settings = {"batch_size": 8, "num_threads": 1, "device_id": None}
    build = partial(graph.build_view_pipeline, DecodeOptions(), views, **settings)
    preparing = partial(nullcontext, partial(plan.prepare, reader))
    crops = DaliLoader(range(2), preparing, build, reader, DecodeOptions(), CPU)
    for ours, theirs in zip(crops, batches(folder, range(2), views=views), strict=True):
        assert theirs.draws is theirs.small_draws is None
        assert not torch.equal(ours.images, theirs.images)
        assert torch.equal(finish_views(ours.images, ours.draws), theirs.images)
        assert torch.equal(finish_views(ours.small, ours.small_draws), theirs.small)
