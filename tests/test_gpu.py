"""What only a CUDA device can show of the pipeline: `make test-gpu`; skipped elsewhere.

Not yet run on a GPU. The kernels' tests run on the device wherever there is one.
"""

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image

from kernels.normalize import finish_views
from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions
from pipeline.loader import eval_loader, view_loader
from pipeline.order import SampleOrder
from pipeline.sources.folder import list_images
from pipeline.sources.reader import ImageReader
from test_header import GOOD, REFUSED
from test_odd_images import RIGHT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
VIEWS = [AugmentConfig(size=64), AugmentConfig(size=64, solarize=0.5)]


@pytest.fixture
def folder(tmp_path, photos):
    for number in range(64):
        photo = np.ascontiguousarray(photos[number % len(photos)][:, number:])
        Image.fromarray(photo).save(tmp_path / f"{number:03d}.jpg", quality=92)
    return tmp_path


def batches(reader: ImageReader, device: torch.device, steps: range) -> list:
    order = SampleOrder(len(reader.source), batch_size=16, seed=0)
    loader = view_loader(reader, order, steps, views=VIEWS, options=DecodeOptions(), device=device)
    return list(loader)


def test_views_made_on_the_gpu_are_those_made_on_the_cpu(folder):
    source = list_images(str(folder))
    gpu, cpu = (batches(ImageReader(source), device, range(4)) for device in (CUDA, CPU))
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert ours.images.device == ours.draws.device == CUDA
        views = finish_views(ours.images, ours.draws)
        gap = (views.cpu().float() - theirs.images.float()).abs().mean()
        assert gap < 2  # of 255: another JPEG decoder, the same draws


def test_a_busy_device_changes_no_view(folder):
    """The copy of a batch waits behind the steps before it: DALI must keep its buffer till then."""
    work = torch.randn(8192, 8192, device=CUDA)  # one product is over 10 ms in fp32
    reader = ImageReader(list_images(str(folder)))
    order = SampleOrder(len(reader.source), batch_size=16, seed=0)
    quiet, busy = [], []
    for found, products in ((quiet, 0), (busy, 10)):
        for batch in view_loader(
            reader, order, range(24), views=VIEWS, options=DecodeOptions(), device=CUDA
        ):
            found.append(finish_views(batch.images, batch.draws))
            for _ in range(products):
                work @ work
    for ours, theirs in zip(busy, quiet, strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= 1


def test_every_format_has_the_pixels_that_the_cpu_finds(tmp_path):
    """CMYK, 16 bits, palettes: nvJPEG and nvTIFF take on the GPU what others decode here."""
    every = GOOD | {name: data for name, (data, _) in RIGHT.items()}
    for number, data in enumerate(every.values()):
        (tmp_path / f"{number:03d}.jpg").write_bytes(data)
    source = list_images(str(tmp_path))
    gpu, cpu = (
        next(
            iter(
                eval_loader(
                    ImageReader(source), np.arange(len(source)), resize=32, size=32,
                    batch_size=len(source), options=DecodeOptions(), device=device,
                )
            )
        ).images.cpu().float()
        for device in (CUDA, CPU)
    )  # fmt: skip
    gaps = (gpu - cpu).abs().mean((1, 2, 3)).tolist()
    assert {name: gap for name, gap in zip(every, gaps, strict=True) if gap > 4} == {}


def test_what_the_cpu_refuses_is_replaced_with_the_mixed_decoder_too(folder):
    for number, (data, _) in enumerate(REFUSED.values()):
        (folder / f"bad-{number:03d}.jpg").write_bytes(data)
    for number, data in enumerate(GOOD.values()):
        (folder / f"good-{number:03d}.jpg").write_bytes(data)
    reader = ImageReader(list_images(str(folder)), max_pixels=1 << 24)
    steps = len(reader.source) // 16 * 2
    assert len(batches(reader, CUDA, range(steps))) == steps
    names = {reader.source.name(index) for index in reader.bad}
    assert any("bad-" in name for name in names)
    assert not any(os.path.basename(name)[0].isdigit() for name in names)


def test_device_memory_does_not_grow_over_epochs(folder):
    reader = ImageReader(list_images(str(folder)))
    held = []
    for epoch in range(4):
        batches(reader, CUDA, range(4 * epoch, 4 * epoch + 4))
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(CUDA)
        held.append(total - free)
    assert held[3] <= 1.05 * held[1]


def test_other_shares_of_the_hardware_decoder_decode_the_same_pixels(folder):
    source = list_images(str(folder))
    order = SampleOrder(len(source), batch_size=16, seed=0)
    found = [
        next(
            iter(
                view_loader(
                    ImageReader(source), order, range(1), views=VIEWS, device=CUDA,
                    options=dataclasses.replace(DecodeOptions(), hw_decoder_load=share),
                )
            )
        ).images.float()
        for share in (0.0, 0.99)
    ]  # fmt: skip
    assert (found[0] - found[1]).abs().mean() < 2


def damaged(jpeg: bytes) -> bytes:
    """The JPEG with other entropy-coded data in the middle of its scan; its header is whole."""
    scan = jpeg.index(b"\xff\xda")
    middle = (scan + len(jpeg)) // 2
    noise = np.random.default_rng(0).integers(0, 255, 256, dtype=np.uint8).tobytes()
    return jpeg[:middle] + noise + jpeg[middle + 256 :]


def test_a_damaged_scan_changes_no_other_image_of_its_batch(folder):
    """The hardware decoder fails for its whole batch, and each image is decoded once more.

    Source: NvJpegHwDecoderPlugin in nvImageCodec's extensions/nvjpeg/hw_decoder.cpp marks every
    image as failed where nvjpegDecodeBatchedEx fails, and each falls back to the next decoder,
    which fails for the damaged one or decodes garbage in silence.
    """
    source = list_images(str(folder))
    clean = batches(ImageReader(source), CUDA, range(4))
    victim = int(clean[1].ids[5])
    path = folder / os.fsdecode(source.paths[victim])
    path.write_bytes(damaged(path.read_bytes()))
    reader = ImageReader(source)
    found = batches(reader, CUDA, range(4))
    assert set(reader.bad) <= {victim}
    for step, (ours, theirs) in enumerate(zip(found, clean, strict=True)):
        others = [row for row in range(16) if (step, row) != (1, 5)]
        assert torch.equal(ours.ids[others], theirs.ids[others])
        gaps = (ours.images[:, others].float() - theirs.images[:, others].float()).abs()
        assert gaps.mean((0, 2, 3, 4)).max() < 2
    assert (int(found[1].ids[5]) != victim) == (victim in reader.bad)
