"""Draw README's picture and the views of each recipe: `python profiling/pictures.py`.

docs/images/collapse.png: two photos and their views by configs/imagenet.yaml, beside the curves of
the newest recorded study of stop-gradient. docs/images/views.jpg: views by five
recipes. The photos are scikit-learn's; the pipeline draws the views on the CPU.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_images

from measure.results import newest
from pipeline.loader import view_loader
from pipeline.order import SampleOrder
from pipeline.sources.folder import list_images
from pipeline.sources.paths import named_path
from pipeline.sources.reader import ImageReader
from pipeline.streams import print_result, protect_output
from train.config.parser import parse_config
from train.studies.report import LABELS

ROOT = Path(__file__).resolve().parent.parent
RECIPES = "imagenet", "simclr", "byol", "vicreg", "swav"
COLORS = "tab:blue", "tab:red"
CPU = torch.device("cpu")
WIDTH = 8  # views of each recipe


def write_photos(folder: Path) -> list[np.ndarray]:
    """Write scikit-learn's two photos as JPEG files and return them, in the files' order."""
    photos = list(load_sample_images().images)
    for number, pixels in enumerate(photos):
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=95)
    return photos


def draw_views(folder: Path, recipe: str, *, seed: int, steps: int) -> list[list[np.ndarray]]:
    """The views of each photo in `steps` steps of configs/<recipe>.yaml, (S, S, 3) uint8."""
    arguments = ["--config", str(ROOT / f"configs/{recipe}.yaml"), "--data.root", str(folder)]
    config = parse_config(arguments)
    reader = ImageReader(list_images(str(folder)))
    order = SampleOrder(len(reader.source), batch_size=len(reader.source), seed=seed)
    loader = view_loader(
        reader, order, range(steps), views=config.views, options=config.dali, device=CPU
    )
    views: list[list[np.ndarray]] = [[] for _ in order.global_batch(0)]
    for batch in loader:
        for images in (batch.images, batch.small):
            if images is not None:
                for row, photo in enumerate(batch.ids.tolist()):
                    views[photo] += list(images[:, row].numpy())
    return views


def draw_collapse(folder: Path, photos: list[np.ndarray], picture: Path) -> None:
    """Photos and their two views, beside the study's curves with and without stop-gradient."""
    study = newest("study-stop-gradient")
    if study is None:
        raise ValueError("profiling/results/ has no study-stop-gradient: run train/study.py first")
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[5.3, 7.7])[0]
    titles = "photo", "one view", "another view"
    rows = zip(photos, draw_views(folder, "imagenet", seed=3, steps=1), strict=True)
    grid = left.subplots(2, 3)
    for axes_row, (photo, views) in zip(grid, rows, strict=True):
        side = min(photo.shape[:2])
        top, start = ((length - side) // 2 for length in photo.shape[:2])
        square = photo[top : top + side, start : start + side]
        for axes, pixels in zip(axes_row, [square, *views], strict=True):
            axes.imshow(pixels)
            axes.axis("off")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    panels = right.subplots(1, len(study["panels"]))
    for axes, tag in zip(panels, study["panels"], strict=True):
        for row, color in zip(study["rows"], COLORS, strict=True):
            curves = np.array([run["curves"][tag] for run in row["runs"]])  # (seeds, points, 2)
            epochs, values = curves[0, :, 0], curves[:, :, 1]
            axes.plot(epochs, values.mean(0), color=color, label=row["label"], linewidth=2)
            axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.2)
        axes.set_title(LABELS[tag], fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    right.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=11, frameon=False)
    figure.savefig(picture, dpi=100)
    Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)  # a quarter


def draw_recipes(folder: Path, picture: Path) -> None:
    """A row of views for each recipe: both photos' in two steps, or all of the first photo's."""
    figure = Figure(figsize=(12, 1.6 * len(RECIPES)), layout="constrained")
    grid = figure.subplots(len(RECIPES), WIDTH)
    for axes_row, recipe in zip(grid, RECIPES, strict=True):
        first, second = draw_views(folder, recipe, seed=0, steps=2)
        axes_row[0].set_title(f"configs/{recipe}.yaml", fontsize=9, loc="left")
        for axes, pixels in zip(axes_row, first + second, strict=False):
            axes.imshow(pixels)
            axes.axis("off")
    figure.savefig(picture, dpi=80)


def main() -> None:
    """Read the flags, draw, print the files' names as one JSON line."""
    parser = argparse.ArgumentParser(description="Draw the pictures of README and docs/.")
    parser.add_argument("--out", type=named_path, default=ROOT / "docs" / "images", help="folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "collapse.png", out / "views.jpg"]
    with tempfile.TemporaryDirectory() as name:
        photos = write_photos(Path(name))
        draw_collapse(Path(name), photos, files[0])
        draw_recipes(Path(name), files[1])
    print_result({"files": [str(file) for file in files]}, kept=out)


if __name__ == "__main__":
    protect_output()
    main()
