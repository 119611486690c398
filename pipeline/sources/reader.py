"""Reads images and checks their headers; remembers which were bad, and the sizes of the others.

Imports neither torch nor DALI: on a GPU machine it runs in a separate process
(pipeline/reading_process.py).
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from pipeline.sources.folder import READERS, Allocate
from pipeline.sources.header import BadImage, read_header
from pipeline.sources.shards import ImageSource

Placed = tuple[np.ndarray, tuple[int, int]]
"""An image's bytes and its (height, width) in pixels."""
KEPT = np.dtype(
    [("stamp", np.int64), ("height", np.int32), ("width", np.int32), ("by_pillow", np.bool)]
)
"""17 bytes an image: 22 MB for ImageNet's, in each process that reads."""
HASHED = 64  # images in memory at once


def hash_images(
    source: ImageSource,
    numbers: range,
    pool: ThreadPoolExecutor,
    moved: Callable[[int], None] = lambda number: None,
) -> str:
    """SHA-256 of the bytes of images, or of the reason why one cannot be read.

    moved is called with the number behind the last image that was read.
    """
    digest = hashlib.sha256()
    for start in range(numbers.start, numbers.stop, HASHED):
        part = range(start, min(start + HASHED, numbers.stop))
        for image in source.read_many(part, pool):
            digest.update(str(image).encode() if isinstance(image, BadImage) else image[0].data)
        moved(part.stop)
    return digest.hexdigest()


@dataclass
class ImageReader:
    """Reads and checks images of a folder or of shards.

    A size is used again only while the file has the stamp (inode, length, times of change) that its
    header was read under.
    """

    source: ImageSource
    max_pixels: int = 1 << 27
    bad: dict[int, str] = field(default_factory=dict)
    """Why, by sample."""
    several: tuple[int, int] = (0, -1)
    """How many images that were read have further pages or frames, and the last one of them."""

    def __post_init__(self) -> None:
        """Start the reading threads."""
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="image reader")
        self._kept = np.zeros(len(self.source), KEPT)

    def __reduce__(self) -> tuple:
        """Pickle without threads and sizes."""
        return ImageReader, (self.source, self.max_pixels, dict(self.bad))

    def read(self, index: int, allocate: Allocate | None = None) -> Placed | None:
        """The image's bytes and size; None for a bad image."""
        return self.read_all(np.array([index]), allocate)[0]

    def read_all(self, ids: np.ndarray, allocate: Allocate | None = None) -> list[Placed | None]:
        """`read` for each id, in order, into memory from `allocate`."""
        indices = ids.tolist()
        wanted = [index for index in indices if index not in self.bad]
        images = self.source.read_many(wanted, self._pool, allocate)
        kept = self._kept[wanted].tolist()
        placed: dict[int, Placed] = {}
        for index, image, (stamp, height, width, by_pillow) in zip(
            wanted, images, kept, strict=True
        ):
            try:
                if isinstance(image, BadImage):
                    raise image
                data, now = image
                if now != stamp:
                    header = read_header(data, max_pixels=self.max_pixels)
                    height, width, by_pillow, has_several = header
                    self._kept[index] = now, height, width, by_pillow
                    if has_several:
                        self.several = self.several[0] + 1, index
                if by_pillow:
                    from pipeline.sources.by_pillow import decoded  # slow to import

                    data = decoded(data)
                placed[index] = data, (height, width)
            except BadImage as error:
                self.bad[index] = str(error)
        return [placed.get(index) for index in indices]
