"""The random numbers of the views: crop windows, colour maps, blur, solarize; no pixels.

All randomness of a view is drawn here, keyed by (seed, step) and the position in the *global*
batch: the views do not depend on the number of ranks, a resumed run repeats them bit for bit
without state, and the DALI graph (pipeline/graph.py) is a pure function.

Colour jitter, in torchvision's random order, and grayscale are one linear map of RGB: with mu the
mean colour of the cropped view, out = A rgb + B mu. Contrast is where mu comes in. Clamping between
the steps is left out, and hue turns about the gray axis instead of HSV's hexagon; the difference
from torchvision is in tests/test_augment.py.

Source: SimSiam appendix A and the official main_simsiam.py (MoCo v2's augmentations).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as PIL's convert("L")
OPENCV_COLOR, OPENCV_BLUR = 1024, 256  # OpenCV's units of uint8 images' matrices, and of their blur


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is drawn for each view; the defaults are the paper's for ImageNet."""

    size: int = 224
    """Side of a view, pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height, log-uniform."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Brightness factor is uniform in 1 -+ this."""
    contrast: float = 0.4
    """Contrast factor is uniform in 1 -+ this."""
    saturation: float = 0.4
    """Saturation factor is uniform in 1 -+ this."""
    hue: float = 0.1
    """Hue turn is uniform in -+ this, in turns."""
    gray: float = 0.2
    """Probability of grayscale."""
    blur: float = 0.5
    """Probability of Gaussian blur (the paper's code; 0 for CIFAR)."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's sigma, pixels of the view."""
    solarize: float = 0.0
    """Probability of inverting what is at least half bright (BYOL's second view: 0.2)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        for name in ("flip", "jitter", "gray", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name} is a probability, got {getattr(self, name)}")
        for name, high in (("scale", 1), ("ratio", 1000), ("blur_sigma", 1000)):
            a, b = getattr(self, name)
            if not 0 < a <= b <= high:
                raise ValueError(f"augment.{name} needs 0 < low <= high <= {high}, got {a} {b}")
        if self.size < 1:
            raise ValueError(f"augment.size is in pixels and at least 1, got {self.size}")
        for name, high in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= (value := getattr(self, name)) <= high:
                raise ValueError(f"augment.{name} must be in 0 .. {high}, got {value}")


@dataclass(frozen=True)
class ViewDraws:
    """Parameters of one view for a batch of N images, all float32."""

    roi_start: np.ndarray  # (N, 2) y, x as shares of the sides; the right edge if flipped
    roi_end: np.ndarray  # (N, 2) of the window's end, likewise
    color: np.ndarray  # (N, 3, 3) the matrix A
    color_mean: np.ndarray  # (N, 3, 3) the matrix B, applied to the mean colour of the window
    sigma: np.ndarray  # (N,) of the blur in pixels; 0 for no blur
    solarize: np.ndarray  # (N,) 1 where the view is solarized, else 0


def pack_draws(configs: Sequence[AugmentConfig], draws: Sequence[ViewDraws]) -> np.ndarray:
    """What kernels/normalize.py needs of the draws: (V, N, 20 + R) float32, V views of N images.

    Of a row: A and B by rows (9 each), solarize, and R + 1 weights of the blur from the centre
    outwards, in units of 1/256; R is the largest radius that the views may draw. A is rounded to
    1/1024, as OpenCV does.
    """
    radius = max(blur_radius(np.float32(c.blur_sigma[1])) if c.blur else 0 for c in configs)
    rows = []
    for draw in draws:
        color = np.rint(draw.color * OPENCV_COLOR) / OPENCV_COLOR
        parts = color, draw.color_mean, draw.solarize, blur_weights(draw.sigma, radius)
        rows.append(np.concatenate([part.reshape(len(color), -1) for part in parts], axis=1))
    return np.stack(rows).astype(np.float32)


def blur_radius(sigma: float | np.floating) -> int:
    """Pixels to each side that a blur reads."""
    return int(np.ceil(3 * float(sigma)))


def blur_weights(sigma: np.ndarray, radius: int) -> np.ndarray:
    """(N, radius + 1) integral weights of the pixels 0, 1, ... from the centre; sigma (N,).

    The rounding error of a weight goes into the next one, from the outermost to the centre, so that
    the sum over both sides is 256. Source: getGaussianKernelFixedPoint_ED in OpenCV's
    modules/imgproc/src/smooth.dispatch.cpp.
    """
    sigma = sigma.astype(np.float64)[:, None]
    offset = np.arange(radius + 1)
    inside = offset <= np.ceil(3 * sigma)
    weights = np.exp(-np.square(offset / np.where(sigma > 0, sigma, 1)) / 2) * inside
    weights *= OPENCV_BLUR / (2 * weights.sum(1, keepdims=True) - 1)
    error = np.zeros(len(sigma))
    for column in range(radius, 0, -1):
        exact = weights[:, column] + error
        weights[:, column] = np.rint(exact)
        error = np.where(inside[:, column], exact - weights[:, column], 0)
    weights[:, 0] = OPENCV_BLUR - 2 * weights[:, 1:].sum(1)
    return weights


def draw_views(
    configs: Sequence[AugmentConfig],
    rng: np.random.Generator,
    sizes: np.ndarray,
    rows: slice,
    total: int,
) -> list[ViewDraws]:
    """Draw the views, one for each of `configs`, of `total` images; return those of `rows`.

    Shapes: sizes (rows, 2) heights and widths in pixels of this rank's images.
    """
    views = []
    for config in configs:
        start, end = _crops(config, rng, sizes, rows, total)
        flipped = (rng.random(total) < config.flip)[rows]
        start[flipped, 1], end[flipped, 1] = end[flipped, 1], start[flipped, 1]
        color, color_mean = _colors(config, rng, rows, total)
        low, high = config.blur_sigma
        has_blur = rng.random(total) < config.blur
        sigma = np.where(has_blur, rng.uniform(low, high, total), 0.0)[rows]
        # drawn only where a view needs it: the numbers of the others do not depend on it
        solarize = rng.random(total) < config.solarize if config.solarize else np.zeros(total)
        arrays = (start, end, color, color_mean, sigma, solarize[rows])
        views.append(ViewDraws(*(np.ascontiguousarray(array, np.float32) for array in arrays)))
    return views


def _crops(
    config: AugmentConfig, rng: np.random.Generator, sizes: np.ndarray, rows: slice, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's RandomResizedCrop.get_params for a batch: (N, 2) relative start and end."""
    attempts = (total, CROP_ATTEMPTS)
    area_share = rng.uniform(config.scale[0], config.scale[1], attempts)[rows]
    low, high = np.log(config.ratio)
    log_ratio = rng.uniform(low, high, attempts)[rows]
    corner = rng.random((total, 2))[rows]
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area, ratio = area_share * height * width, np.exp(log_ratio)
    w, h = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(1)
    index = np.arange(len(sizes))
    w, h = w[index, first], h[index, first]
    height, width = height[:, 0], width[:, 0]
    top = np.floor(corner[:, 0] * (height - h + 1))
    left = np.floor(corner[:, 1] * (width - w + 1))
    # no attempt fitted: the largest centred window whose ratio is in range
    low, high = config.ratio
    center_w = np.where(width / height > high, np.round(height * high), width)
    center_h = np.where(width / height < low, np.round(width / low), height)
    none = ~fits.any(1)
    w, h = np.where(none, center_w, w), np.where(none, center_h, h)
    top = np.where(none, (height - h) // 2, top)
    left = np.where(none, (width - w) // 2, left)
    start, end = np.stack([top, left], 1), np.stack([top + h, left + w], 1)
    return start / sizes, end / sizes


def _colors(
    config: AugmentConfig, rng: np.random.Generator, rows: slice, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3, 3) A and B of out = A rgb + B mu for jitter in random order, then grayscale."""
    brightness, contrast, saturation = (
        rng.uniform(1 - width, 1 + width, total)[rows]
        for width in (config.brightness, config.contrast, config.saturation)
    )
    hue = rng.uniform(-config.hue, config.hue, total)[rows]
    order = rng.permuted(np.tile(np.arange(4), (total, 1)), axis=1)[rows]
    has_jitter = (rng.random(total) < config.jitter)[rows]
    is_gray = (rng.random(total) < config.gray)[rows]
    steps = color_steps(brightness, contrast, saturation, hue)
    color = np.broadcast_to(np.eye(3), (len(hue), 3, 3)).copy()
    color_mean = np.zeros_like(color)
    index = np.arange(len(hue))
    for position in range(4):
        matrix, pivot = (part[order[:, position], index] for part in steps)
        color, color_mean = compose(color, color_mean, matrix, pivot)
    color[~has_jitter], color_mean[~has_jitter] = np.eye(3), 0
    gray = np.tile(LUMA, (3, 1))
    color[is_gray], color_mean[is_gray] = gray @ color[is_gray], gray @ color_mean[is_gray]
    return color, color_mean


def color_steps(
    brightness: np.ndarray, contrast: np.ndarray, saturation: np.ndarray, hue: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(4, N, 3, 3) twice: each step's matrix on the colour and on the mean colour before it."""
    eye, gray = np.eye(3), np.tile(LUMA, (3, 1))
    b, c, s = (f[:, None, None] for f in (brightness, contrast, saturation))
    axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    angle = 2 * np.pi * hue[:, None, None]
    turn = np.cos(angle) * eye + np.sin(angle) * axis + (1 - np.cos(angle)) / 3
    zero = np.zeros_like(turn)
    colors = np.stack([b * eye, c * eye, s * eye + (1 - s) * gray, turn])
    return colors, np.stack([zero, (1 - c) * gray, zero, zero])


def compose(
    color: np.ndarray, color_mean: np.ndarray, matrix: np.ndarray, pivot: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) followed by a step: the mean colour before the step is (A + B) mu."""
    return matrix @ color, matrix @ color_mean + pivot @ (color + color_mean)
