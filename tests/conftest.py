"""Fixtures only."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images


@pytest.fixture(scope="session")
def torchvision():
    """The peer. Its wheel does not import beside a CPU build of torch unless two ops exist."""
    library = torch.library.Library("torchvision", "DEF")
    if not hasattr(torch.ops.torchvision, "nms"):
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            library.define(name + signature)
    import torchvision

    yield torchvision
    del library


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Real photos (scikit-learn's china.jpg and flower.jpg), whole and cut: (H, W, 3) uint8."""
    whole = [np.asarray(image) for image in load_sample_images().images]
    cuts = [image[y : y + 300, x : x + 260] for image in whole for y in (0, 120) for x in (0, 300)]
    return [np.ascontiguousarray(image) for image in [*whole, *cuts]]


@pytest.fixture(scope="session")
def jpegs(photos) -> list[np.ndarray]:
    """The photos as JPEG files."""
    files = []
    for photo in photos:
        buffer = io.BytesIO()
        Image.fromarray(photo).save(buffer, "JPEG", quality=92)
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return files
