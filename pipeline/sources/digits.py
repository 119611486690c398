"""The embedded data set: 1,797 real handwritten digits from scikit-learn, written as JPEG files.

The first run needs no download and still starts from JPEG bytes. At 8x8 pixels its kNN figures show
no more than that training works.

Source: sklearn.datasets.load_digits (UCI optical recognition of handwritten digits, test part).
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

SIDE = 32  # pixels; the 8x8 originals, magnified four times
TEST_SHARE = 5  # every fifth image is held out


def write_digits(folder: Path) -> Path:
    """Write <folder>/{train,val}/<digit>/<number>.jpg unless it exists; returns the folder.

    Raises: OSError if the folder cannot be written.
    """
    if folder.exists():
        return folder
    from PIL import Image
    from sklearn.datasets import load_digits

    data: Any = load_digits()  # a Bunch: its fields are set at run time
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    for number, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        place = temporary / ("train" if number % TEST_SHARE else "val") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.minimum(image * 16, 255).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture.convert("RGB").save(place / f"{number:04d}.jpg", quality=95)
    try:
        temporary.rename(folder)
    except OSError:  # another run was first
        shutil.rmtree(temporary)
        if not folder.exists():
            raise
    return folder
