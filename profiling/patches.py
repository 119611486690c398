"""Labelled small images from photos, for profiling/pilot_check.py.

    python profiling/patches.py PHOTOS --out DIR [--photos 100] [--grid 10] [--contrast 0.05]

The largest centred square of each photo is scaled and cut into a grid of patches of 32 pixels;
those of one photo are a class. With --contrast patches are gray, their values around the middle
with that standard deviation (of 0 .. 1): textures of low contrast.
"""

import root_first  # isort: skip # noqa: F401

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from measure.results import errors_in_one_line
from pipeline.sources.folder import list_images
from pipeline.sources.paths import named_path
from pipeline.streams import print_result, protect_output
from train.pilots.look import evenly

SIDE = 32  # pixels of a patch


def cut(photo: Image.Image, grid: int, contrast: float | None) -> list[np.ndarray]:
    """grid x grid patches, (SIDE, SIDE, 3) or gray (SIDE, SIDE) uint8."""
    size, whole = min(photo.size), SIDE * grid
    left, top = (photo.width - size) // 2, (photo.height - size) // 2
    square = photo.convert("RGB").crop((left, top, left + size, top + size))
    pixels = np.asarray(square.resize((whole, whole), Image.Resampling.LANCZOS))
    rows = [pixels[i * SIDE : (i + 1) * SIDE] for i in range(grid)]
    patches = [row[:, j * SIDE : (j + 1) * SIDE] for row in rows for j in range(grid)]
    if contrast is None:
        return patches
    gray = [patch.mean(2) for patch in patches]
    scaled = [(x - x.mean()) / max(1.0, x.std()) * 255 * contrast + 127.5 for x in gray]
    return [x.clip(0, 255).round().astype(np.uint8) for x in scaled]


def main() -> None:
    """Read the flags, write the patches, print how many as one JSON line."""
    parser = argparse.ArgumentParser(description="Labelled small images from photos.")
    parser.add_argument("photos", type=named_path, help="a folder of photos")
    parser.add_argument("--out", type=named_path, required=True, help="a new folder")
    parser.add_argument(
        "--photos", type=int, dest="count", help="that many, evenly over the folder"
    )
    parser.add_argument("--grid", type=int, default=3, help="patches along a side of the square")
    parser.add_argument("--contrast", type=float, help="make gray textures of that contrast")
    arguments = parser.parse_args()
    with errors_in_one_line():
        photos = list_images(str(arguments.photos))
        arguments.out.mkdir(parents=True)
        chosen = evenly(len(photos), arguments.count or len(photos)).tolist()
        for index in chosen:
            folder = arguments.out / f"{index:04d}"
            folder.mkdir()
            with Image.open(Path(photos.root) / photos.name(index)) as photo:
                for number, patch in enumerate(cut(photo, arguments.grid, arguments.contrast)):
                    Image.fromarray(patch).save(folder / f"{number}.png")
    print_result(
        {"photos": len(chosen), "images": arguments.grid**2 * len(chosen)}, kept=arguments.out
    )


if __name__ == "__main__":
    protect_output()
    main()
