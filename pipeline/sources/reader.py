"""Reads images and looks at their headers; remembers which were bad, and the sizes of the others.

Between pipeline/sources/folder.py or shards.py and pipeline/work.py; here and there is neither
torch nor DALI, for on a GPU machine this runs in a process of its own
(pipeline/reading_process.py).
A newcomer's mistake: taking a size that is kept for a file that was checked. It is used again only
while the file's stamp (inode, length, times of change) is the one that the header was read under.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from pipeline.sources.folder import READERS, Allocate
from pipeline.sources.header import BadImage, image_size
from pipeline.sources.shards import ImageSource

Placed = tuple[np.ndarray, tuple[int, int]]
KEPT = np.dtype([("stamp", np.int64), ("height", np.int32), ("width", np.int32)])
"""16 bytes an image: 20 MB for ImageNet's, in each process that reads."""


@dataclass
class ImageReader:
    """Reads and guards images of a folder or of shards; remembers which were bad, and why."""

    source: ImageSource
    max_pixels: int = 1 << 27
    bad: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start the reading threads."""
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="image reader")
        self._kept = np.zeros(len(self.source), KEPT)

    def __reduce__(self) -> tuple:
        """Pickle what the reader was made of, and what was found to be bad."""
        return ImageReader, (self.source, self.max_pixels, dict(self.bad))

    def read(self, index: int, allocate: Allocate | None = None) -> Placed | None:
        """The image's bytes and its (height, width) in pixels; None for a bad image."""
        return self.read_all(np.array([index]), allocate)[0]

    def read_all(self, ids: np.ndarray, allocate: Allocate | None = None) -> list[Placed | None]:
        """`read` for each id, in order, into memory that `allocate` gives."""
        indices = ids.tolist()
        wanted = [index for index in indices if index not in self.bad]
        images = self.source.read_many(wanted, self._pool, allocate)
        kept = self._kept[wanted].tolist()
        found: dict[int, Placed] = {}
        for index, image, (stamp, height, width) in zip(wanted, images, kept, strict=True):
            try:
                if isinstance(image, BadImage):
                    raise image
                data, now = image
                if now != stamp:
                    height, width = image_size(data, max_pixels=self.max_pixels)
                    self._kept[index] = now, height, width
                found[index] = data, (height, width)
            except BadImage as error:
                self.bad[index] = str(error)
        return [found.get(index) for index in indices]
