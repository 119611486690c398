"""Features of all images of a source in their order, over all ranks, and a hash of each file."""

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.loader import eval_loader
from pipeline.sources.folder import Allocate
from pipeline.sources.reader import ImageReader, Placed
from pipeline.sources.shards import ImageSource
from train import distributed
from train.config import Config
from train.distributed import World
from train.evaluation.embed import features_of, gather_rows
from train.evaluation.encoded import NOT_FINITE
from train.network.resnet import ResNet


class HashingReader(ImageReader):
    """Keeps a hash of the bytes of each image that was read, until it is taken."""

    def __post_init__(self) -> None:
        """No image was read yet."""
        super().__post_init__()
        self._hashes: dict[int, bytes] = {}

    def read_all(self, ids: np.ndarray, allocate: Allocate | None = None) -> list[Placed | None]:
        """As ImageReader's."""
        images = super().read_all(ids, allocate)
        for index, image in zip(ids.tolist(), images, strict=True):
            if image is not None:
                self._hashes[index] = hashlib.sha256(image[0].data).digest()[:16]
        return images

    def take_hashes(self, ids: list[int]) -> np.ndarray:
        """The hashes (N, 16) uint8 of these images, whose memory is freed."""
        taken = bytearray().join(self._hashes.pop(index) for index in ids)
        return np.frombuffer(taken, np.uint8).reshape(-1, 16)


class Round(NamedTuple):
    """One forward pass of each rank, in the order of the ids; the same on all ranks.

    Shapes: features (B, D) fp32, hashes (B, 16) uint8, ids (B,) int64; bad: why, by id.
    """

    features: Tensor
    hashes: Tensor
    ids: Tensor
    bad: dict[int, str]


def rounds(
    source: ImageSource, backbone: ResNet, config: Config, world: World, *, first: int
) -> Iterator[Round]:
    """The features of all images from number `first` on, one forward pass of each rank at a time.

    Raises: ValueError if they are not finite.
    """
    look, reader = config.eval, HashingReader(source, config.data.max_pixels)
    ids = np.arange(first, len(source))[world.rank :: world.size]
    sizes = {"resize": look.resize, "size": look.size, "batch_size": look.batch_size}
    options: dict = {"options": config.dali, "device": world.device}
    loader = eval_loader(reader, ids, **sizes, **options, local_world=world.local_size)
    batches = iter(loader)
    for begin in range(0, math.ceil((len(source) - first) / world.size), look.batch_size):
        read = torch.empty(0, dtype=torch.int64)
        features = torch.empty(0, backbone.num_features, device=world.device)
        if (batch := next(batches, None)) is not None:  # in the last round a rank may have none
            good = batch.ids >= 0
            features = features_of(backbone, batch.images, config)[good.to(world.device)]
            read = batch.ids[good]
        mine = ids[begin : begin + look.batch_size].tolist()
        bad = {index: reader.bad[index] for index in mine if index in reader.bad}
        hashes = torch.from_numpy(reader.take_hashes(read.tolist())).to(world.device)
        features, hashes, read = (
            gather_rows(world, part) for part in (features, hashes, read.to(world.device))
        )
        if not features.isfinite().all():
            raise ValueError(NOT_FINITE)
        order = read.argsort()
        all_bad = {i: why for part in distributed.gather(world, bad) for i, why in part.items()}
        yield Round(features[order], hashes[order], read[order], dict(sorted(all_bad.items())))
