"""Photos to measure the loader on where no folder is given: cut from the two that scikit-learn has.

china.jpg and flower.jpg (640 x 427), cut and scaled to the sizes of ImageNet's photos (mean about
390 x 470 pixels) and written as JPEGs of quality 95, about 110 kB each. Real textures, so that
decoding costs what it costs; no data set to learn from.
A newcomer's mistake: taking their rate for that of another folder. Give --data.root for that.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

WIDTHS, RATIOS = (380, 560), (0.67, 1.0)


def write_photos(folder: Path, *, count: int = 512) -> Path:
    """Write `count` JPEGs into the folder, once; returns it."""
    if (folder / f"{count - 1:05d}.jpg").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for index in range(count):
        source = sources[index % len(sources)]
        width = int(rng.integers(*WIDTHS))
        height = int(width * rng.uniform(*RATIOS))
        share = rng.uniform(0.6, 1.0)
        part_w = min(source.width, int(source.width * share))
        part_h = min(source.height, int(part_w * height / width))
        left = int(rng.integers(0, source.width - part_w + 1))
        top = int(rng.integers(0, source.height - part_h + 1))
        box = (left, top, left + part_w, top + part_h)
        photo = source.resize((width, height), Image.Resampling.BICUBIC, box=box)
        photo.save(folder / f"{index:05d}.jpg", quality=95)
    return folder
