"""The timed loader: where its clock starts, and over how many batches."""

import dataclasses

import pytest
import torch

from loader_times import measure_loader, num_filling
from photos import write_photos
from pipeline.decode import DecodeOptions
from pipeline.reader import ImageReader
from pipeline.sources import list_images
from train import distributed
from train.config import Config, DataConfig

CONFIG = Config(data=DataConfig(root="photos", batch_size=8))


@pytest.mark.parametrize(("device", "prefetch", "filling"), [("cpu", 0, 6), ("cuda", 0, 12),
                                                             ("cuda", 1, 4)])  # fmt: skip
def test_the_clock_of_a_loader_starts_behind_all_that_was_prepared_before_it(
    device, prefetch, filling
):
    config = dataclasses.replace(CONFIG, dali=DecodeOptions(prefetch=prefetch))
    assert num_filling(config, torch.device(device)) == filling


def test_on_a_gpu_at_least_100_batches_are_timed(tmp_path, monkeypatch):
    reader, taken = ImageReader(list_images(str(write_photos(tmp_path, count=24)))), {}
    monkeypatch.setattr("loader_times.ours", lambda *_, steps: taken.setdefault("steps", steps))
    monkeypatch.setattr("loader_times.take_turns", lambda variants, **_: {})
    with distributed.start("cpu") as world:
        gpu = dataclasses.replace(world, device=torch.device("cuda", 0))
    for where, steps in ((world, 2), (gpu, 100)):
        taken.clear()
        measure_loader(reader, CONFIG, where, peers=False, n=1, budget_s=1, images=16)
        assert taken["steps"] == steps
