"""Flags and images of the measuring programs: train/main.py's flags, with other defaults.

Without --data.root they measure on photos that scikit-learn carries; without --data.batch_size on
256 images a GPU, or 16 a CPU process (it is global, as in training); without --precision in bf16
where the device multiplies bf16, else in fp32.
"""

import os
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse import ArgumentError
from PIL import Image

from measure.results import check_save
from pipeline.sources.reader import ImageReader
from pipeline.sources.shards import open_source
from train.config import Config, at_least
from train.config.parser import build_parser, explain, flags, with_brackets
from train.distributed import World, from_main
from train.run.folder import has_fast_bf16
from train.run.program import refuse

PHOTOS = "photos"
PHOTO_WIDTHS, PHOTO_RATIOS = (380, 560), (0.67, 1.0)
What = Literal["loader", "host", "step", "end_to_end", "limit", "ranks"]


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is measured, and how often."""

    what: tuple[What, ...] = ("loader", "host", "step", "end_to_end", "limit", "ranks")
    """Parts to measure, e.g. --what loader,step."""
    peers: bool = True
    """Measure the peers too, taking turns with ours."""
    steps: int = 0
    """Steps of a repetition; 0 takes 50 on a GPU, 1 on a CPU."""
    warmup: int = 0
    """Steps before the first timed one; 0 takes 20 on a GPU, 1 on a CPU."""
    repeats: int = 0
    """Repetitions; 0 takes 3 on a GPU, 5 on a CPU."""
    loader_images: int = 0
    """Images of a repetition of the loader; 0 takes 8,192 on a GPU, 512 on a CPU."""
    budget_s: float = 120.0
    """Seconds after which a part starts no further repetition; at least one is timed."""
    save: str = ""
    """Also write profiling/results/<this>_<device>_<yyyymm>.json and .png."""
    dry_run: bool = False
    """--dry-run: hold no device, print what a step would need and take."""
    gpu: Literal["h200", "h100", "a100"] = "h200"
    """With --dry-run: the GPU."""
    gpus: int = 1
    """With --dry-run: how many."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("steps", "warmup", "repeats", "loader_images"):
            at_least(name, getattr(self, name), 0)
        at_least("gpus", self.gpus, 1)
        check_save(self.save)
        if not self.what:
            raise ValueError("what names no part: leave it out to measure all")
        if not 0 <= self.budget_s < float("inf"):
            raise ValueError(f"budget_s must be >= 0, got {self.budget_s}")

    def filled(self, device: torch.device) -> "MeasureConfig":
        """With the device's own defaults in place of 0."""
        names = ("steps", "warmup", "repeats", "loader_images")
        defaults = (50, 20, 3, 8192) if device.type == "cuda" else (1, 1, 5, 512)
        values = zip(names, defaults, strict=True)
        return replace(self, **{name: getattr(self, name) or value for name, value in values})


def read_flags(program: str, description: str) -> tuple[Config, MeasureConfig]:
    """The configuration of a command line. Exits with 2 and one line for a mistake in it."""
    parser = build_parser(program, description, root=PHOTOS)
    parser.add_class_arguments(MeasureConfig, as_group=True)
    words = ["--dry_run=true" if word == "--dry-run" else word for word in sys.argv[1:]]
    words = with_brackets(words, ["--what"])
    is_dry = "--dry_run=true" in words
    is_cuda = torch.cuda.is_available() or is_dry
    rows = 256 if is_cuda else 16
    batch_size = rows * int(os.environ.get("WORLD_SIZE", "1"))
    precision = "bf16" if is_cuda or has_fast_bf16() else "fp32"
    parser.set_defaults({"data.batch_size": batch_size, "precision": precision})
    try:
        values = vars(parser.instantiate(parser.parse_args(words)))
        values.pop("config", None)
        measure = MeasureConfig(**{f.name: values.pop(f.name) for f in fields(MeasureConfig)})
        config = Config(**values)
        if is_dry and not any("batch_size" in word for word in words):
            config = with_batch(config, rows * measure.gpus)
        return config, measure
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        refuse(explain(str(error), [*flags(), *flags(MeasureConfig)]))


def with_batch(config: Config, batch_size: int) -> Config:
    """The configuration with another global batch."""
    return replace(config, data=replace(config.data, batch_size=batch_size))


def open_images(config: Config, world: World) -> ImageReader:
    """The images of --data.root, listed on rank 0. Raises: ValueError where there are none."""
    source = None
    if world.is_main:
        try:
            root = config.data.root
            if root == PHOTOS:
                root = str(write_photos(Path(tempfile.gettempdir()) / f"twinturbo-{os.getuid()}"))
            source = open_source(root)
        except (ValueError, OSError) as error:
            source = error
    source = from_main(world, source)
    if isinstance(source, Exception):
        raise source
    return ImageReader(source, config.data.max_pixels)


def write_photos(folder: Path, *, count: int = 512) -> Path:
    """Write `count` JPEGs into the folder, unless they are there; returns it.

    Parts of scikit-learn's china.jpg and flower.jpg, scaled to the sizes of ImageNet's photos (mean
    about 390 x 470 pixels), quality 95, about 110 kB each: decoding costs what it costs for real
    textures. The rate on other images differs: give --data.root for that.
    """
    from sklearn.datasets import load_sample_images

    if (folder / f"{count - 1:05d}.jpg").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for index in range(count):
        source = sources[index % len(sources)]
        width = int(rng.integers(*PHOTO_WIDTHS))
        height = int(width * rng.uniform(*PHOTO_RATIOS))
        part_w = min(source.width, int(source.width * rng.uniform(0.6, 1.0)))
        part_h = min(source.height, int(part_w * height / width))
        left = int(rng.integers(0, source.width - part_w + 1))
        top = int(rng.integers(0, source.height - part_h + 1))
        box = (left, top, left + part_w, top + part_h)
        photo = source.resize((width, height), Image.Resampling.BICUBIC, box=box)
        photo.save(folder / f"{index:05d}.jpg", quality=95)
    return folder
