"""The timed loader: where its clock starts, and over how many batches."""

import dataclasses

import numpy as np
import pytest
import torch

from measure import host_cost
from measure.harness import MeasureConfig, write_photos
from measure.loader_times import measure_loader, num_filling
from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions
from pipeline.graph import ROI
from pipeline.sources.folder import list_images
from pipeline.sources.reader import ImageReader
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
    monkeypatch.setattr(
        "measure.loader_times.ours", lambda *_, steps: taken.setdefault("steps", steps)
    )
    monkeypatch.setattr("measure.loader_times.take_turns", lambda variants, **_: {})
    with distributed.start("cpu") as world:
        gpu = dataclasses.replace(world, device=torch.device("cuda", 0))
    for where, steps in ((world, 2), (gpu, 100)):
        taken.clear()
        once = MeasureConfig(peers=False, repeats=1, budget_s=1, loader_images=16)
        measure_loader(reader, CONFIG, once, where)
        assert taken["steps"] == steps


def test_what_the_loader_takes_of_the_host_is_measured_both_ways(tmp_path, monkeypatch):
    for name, value in {
        "SHORT": 2,
        "LONG": 400,
        "WINDOW_S": 0.05,
        "SETTLE_S": 0.0,
        "RATE": 100,
    }.items():
        monkeypatch.setattr(host_cost, name, value)
    reader = ImageReader(list_images(str(write_photos(tmp_path, count=24))))
    with distributed.start("cpu") as world:
        found = host_cost.measure_host(reader, CONFIG, world, n=1)
    assert found.pop("images_a_batch") == 24  # all there are
    assert set(found) == {"process", "thread"}
    for one in found.values():
        assert one["images_per_cpu_s"] == one["images_per_cpu_s_median"] > 0  # of one repetition
        paced, full = one["launches"]
        assert paced["slowed_times"] > 0 and full["slowed_times"] > 0
        assert paced["images_per_s_beside"] < full["images_per_s_beside"]


def test_the_graph_that_decodes_nothing_takes_every_input_of_the_training_graph():
    config = dataclasses.replace(CONFIG, augment=AugmentConfig(size=16))
    encoded = np.zeros(7, np.uint8)
    draws = {
        f"{name}_{number}": np.full((1, 2), 2.0 + number, np.float32)
        for number in range(len(config.views))
        for name in ROI
    }
    inputs = {"encoded": [encoded], **draws}
    for left_out in (None, *inputs):
        pipeline = host_cost.feeding_pipeline(config, rows=1, prefetch=1)
        for name, value in inputs.items():
            if name != left_out:
                pipeline.feed_input(name, value)
        if left_out is None:
            (lengths,) = pipeline.run()
            assert np.array(lengths[0]).tolist() == [encoded.size]
        else:
            with pytest.raises(IndexError, match="data batch that doesn.t exist"):
                pipeline.run()
