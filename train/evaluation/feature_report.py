"""What train/features.py writes about the rows on disk: names, duplicates, pictures, parquet."""

from typing import Literal

import numpy as np
import torch

from pipeline.sources.reader import ImageReader
from pipeline.sources.shards import ImageSource
from train.config import Config
from train.evaluation import pictures, similar
from train.evaluation.feature_files import FeatureFiles
from train.evaluation.image_map import LEAST, draw_map
from train.run.folder import Log
from train.run.report import thumbnails

SHOWN, SIDE = 400, 64  # images of the map; pixels of a thumbnail
QUERIES, NEIGHBOURS, LARGE = 10, 8, 96  # rows and columns of neighbours.png, pixels
ROWS = 4096  # of a row group of the parquet file


class Described:
    """Names, labels and pictures of the rows that FeatureFiles has, on rank 0."""

    def __init__(self, files: FeatureFiles, source: ImageSource, config: Config, log: Log):
        self.files, self.source, self.config, self.log = files, source, config, log
        self.out, self.ids = files.folder.path, files.load("ids")

    def name(self, row: int) -> str:
        """Printable."""
        return self.source.name(int(self.ids[row]))

    def label(self, row: int) -> str:
        """The class; "" without classes."""
        if self.source.labels is None:
            return ""
        return self.source.class_names[self.source.labels[self.ids[row]]]

    def write_names(self) -> None:
        """names.txt and, where there are classes, labels.txt: a line for each row."""
        texts = {"names.txt": self.name}
        if self.source.labels is not None:
            texts["labels.txt"] = self.label
        for file, text in texts.items():
            with (self.out / file).open("w") as lines:
                lines.writelines(f"{text(row)}\n" for row in range(len(self.ids)))

    def write_duplicates(self, *, above: float, k: int) -> tuple[int, int]:
        """duplicates.json; the number of superfluous copies, and of pairs that are nearly alike."""
        files, pairs, cosines, count = self.files, [], [], 0
        content = files.load("content")
        exact = similar.exact_duplicates(content)
        if k:
            found = files.load("neighbours"), files.load("cosines"), content
            count, pairs, cosines = similar.near_duplicates(*found, above=above)
        near = [
            {"images": [self.name(row) for row in pair], "cosine": round(float(cosine), 6)}
            for pair, cosine in zip(pairs, cosines, strict=True)
        ]
        groups = [[self.name(row) for row in group] for group in exact]
        facts = {"duplicate_cosine": above, "near_pairs": count, "near_pairs_listed": len(near)}
        files.folder.write("duplicates.json", {"exact": groups, "near": near} | facts)
        copies = sum(len(group) - 1 for group in exact)
        self.log(
            f"{copies} images are exact copies of others, and {count} pairs are near duplicates "
            f"(cosine above {above}): {self.out / 'duplicates.json'}"
        )
        if count > len(self.ids):
            self.log.warn(
                f"more pairs than images have a cosine above {above}: this encoder gives most "
                "images nearly the same features. Raise --duplicate_cosine, or train longer"
            )
        return copies, count

    def thumbnails(self, rows: np.ndarray, device: torch.device, side: int) -> np.ndarray:
        """(N, side, side, 3) uint8."""
        reader = ImageReader(self.source, self.config.data.max_pixels)
        ids = torch.from_numpy(self.ids[rows])
        options: dict = {"config": self.config, "device": device, "side": side}
        return thumbnails(reader, ids, **options).cpu().numpy()

    def evenly(self, count: int) -> np.ndarray:
        """At most so many rows, evenly over all."""
        count = min(count, len(self.ids))
        return (np.arange(count) * 2 + 1) * len(self.ids) // (2 * count)

    def draw_neighbours(self, device: torch.device) -> None:
        """neighbours.png: some images and the nearest of each."""
        chosen = self.evenly(QUERIES)
        near = self.files.load("neighbours")[chosen, :NEIGHBOURS]
        images = self.thumbnails(near.flatten(), device, LARGE)
        pictures.draw_neighbours(
            self.thumbnails(chosen, device, LARGE),
            images.reshape(*near.shape, *images.shape[1:]),
            [self.label(row) for row in chosen],
            [[self.label(row) for row in rows] for rows in near],
            self.out / "neighbours.png",
            first="image",
        )

    def draw_map(self, device: torch.device, kind: Literal["pca", "umap"]) -> None:
        """map.png: at most SHOWN of the images."""
        if len(self.ids) < LEAST:
            self.log(f"no map: {len(self.ids)} images are fewer than {LEAST}")
            return
        rows = self.evenly(SHOWN)
        labels = [self.label(row) for row in rows]
        features = np.array(self.files.load("features")[rows])
        images = self.thumbnails(rows, device, SIDE)
        draw_map(images, features, labels, self.out / "map.png", kind=kind)

    def write_parquet(self) -> None:
        """features.parquet: name, label (null without classes), features (list of D fp32)."""
        import pyarrow
        from pyarrow import parquet

        features = self.files.load("features")
        kind = pyarrow.list_(pyarrow.float32(), features.shape[1])
        fields = {"name": pyarrow.string(), "label": pyarrow.string(), "features": kind}
        schema = pyarrow.schema(list(fields.items()))
        temporary = self.out / ".features.parquet"
        with parquet.ParquetWriter(temporary, schema) as file:
            for first in range(0, len(self.ids), ROWS):
                rows = range(first, min(first + ROWS, len(self.ids)))
                flat = pyarrow.array(np.array(features[rows.start : rows.stop]).ravel())
                columns = [
                    pyarrow.array([self.name(row) for row in rows], pyarrow.string()),
                    pyarrow.array([self.label(row) or None for row in rows], pyarrow.string()),
                    pyarrow.FixedSizeListArray.from_arrays(flat, type=kind),
                ]
                file.write_table(pyarrow.table(columns, schema=schema))
        temporary.replace(self.out / "features.parquet")
