"""Colours, blur and solarize on a GPU are those of OpenCV on the CPU: plain, and the kernels."""

import cv2
import numpy as np
import pytest
import torch

from kernels.normalize import finish_views, normalize_views
from pipeline.augment import AugmentConfig, ViewDraws, blur_radius, blur_weights, draw_views
from pipeline.augment import pack_draws as pack
from pipeline.color_blur import finish_view
from pipeline.order import Purpose, keyed_rng

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VIEWS = [AugmentConfig(), AugmentConfig(solarize=0.5, blur=0.7, brightness=1, contrast=1)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def some_crops(photos, count: int, height: int, width: int) -> np.ndarray:
    """Pieces of photos, (V, count, height, width, 3)."""
    rng, pieces = np.random.default_rng(0), []
    for number in range(len(VIEWS) * count):
        photo = photos[number % len(photos)]
        y, x = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
        pieces.append(photo[y : y + height, x : x + width])
    return np.stack(pieces).reshape(len(VIEWS), count, height, width, 3)


def some_draws(configs, count: int) -> list[ViewDraws]:
    rng, sizes = keyed_rng(0, Purpose.VIEWS, 3), np.full((count, 2), 300)
    return draw_views(configs, rng, sizes, slice(0, count), count)


def opencvs(crops: np.ndarray, draws: list[ViewDraws]) -> np.ndarray:
    out = np.empty_like(crops)
    for view, draw in enumerate(draws):
        for row, crop in enumerate(crops[view]):
            finish_view(crop, draw, row, out=out[view, row])
    return out


# two tiles, the last one short; a blur wider than the image; one pixel
@pytest.mark.parametrize("kernels", ["plain", "triton"])
@pytest.mark.parametrize("shape", [(3, 41, 13), (3, 3, 2), (3, 1, 1)])
def test_finished_views_are_opencvs(photos, shape, kernels):
    crops, draws = some_crops(photos, *shape), some_draws(VIEWS, shape[0])
    assert 0 < np.count_nonzero(draws[0].sigma) < shape[0] and draws[1].solarize.any()
    packed = torch.from_numpy(pack(VIEWS, draws)).to(DEVICE)
    ours = finish_views(torch.from_numpy(crops).to(DEVICE), packed, kernels=kernels)
    gap = np.abs(ours.cpu().numpy().astype(int) - opencvs(crops, draws))
    # fp32 may round the shift B mean(crop) the other way, by 1/1024: some pixels differ by 1
    assert gap.max() <= 1 and np.mean(gap > 0) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_views_are_finished_and_normalised_at_once(photos, dtype):
    crops, draws = some_crops(photos, 2, 11, 17), some_draws(VIEWS, 2)
    packed = torch.from_numpy(pack(VIEWS, draws)).to(DEVICE)
    crops = torch.from_numpy(crops).to(DEVICE)
    finished = finish_views(crops, packed, kernels="triton").flatten(0, 1).double()
    mean, std = (torch.tensor(value, device=DEVICE).double() for value in (MEAN, STD))
    reference = ((finished / 255 - mean) / std).permute(0, 3, 1, 2)
    found = {
        kernels: normalize_views(
            crops.flatten(0, 1), MEAN, STD, dtype, draws=packed, kernels=kernels
        )
        for kernels in ("plain", "triton")
    }
    ours, plain = ((found[k].double() - reference).abs().max() for k in ("triton", "plain"))
    assert found["triton"].dtype == dtype and ours <= 2 * plain + 1e-6
    assert found["triton"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["plain", "triton"])
def test_further_channels_are_zero_and_change_no_other(photos, kernels, dtype, channels):
    crops = torch.from_numpy(some_crops(photos, 3, 41, 13)).to(DEVICE).flatten(0, 1)
    packed = torch.from_numpy(pack(VIEWS, some_draws(VIEWS, 3))).to(DEVICE)
    for draws in (None, packed):
        values: dict = {"draws": draws, "kernels": kernels}
        three = normalize_views(crops, MEAN, STD, dtype, **values)
        wide = normalize_views(crops, MEAN, STD, dtype, channels=channels, **values)
        assert wide.shape == (len(crops), channels, *crops.shape[1:3]) and wide.dtype == dtype
        assert wide.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(wide[:, :3], three) and not wide[:, 3:].any()


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 2.0, 5.0])
def test_weights_are_those_of_opencvs_blur_of_bytes(sigma):
    sigma = np.float32(sigma)
    radius = blur_radius(sigma)
    line = np.zeros((1, 2 * radius + 41), np.uint8)
    line[0, radius + 20] = 255
    side = 2 * radius + 1
    blurred = cv2.GaussianBlur(line, (side, 1), float(sigma), borderType=cv2.BORDER_REFLECT_101)
    weights = blur_weights(np.array([0, sigma], np.float32), radius + 2)
    assert weights[0].tolist() == [256] + [0] * (radius + 2)
    assert weights[1, -2:].tolist() == [0, 0] and 2 * weights[1].sum() - weights[1, 0] == 256
    half = np.floor(255 * weights[1] / 256 + 0.5)
    assert np.array_equal(blurred[0, radius + 20 : 2 * radius + 23], half)


def test_views_without_blur_pack_one_weight():
    views = [AugmentConfig(blur=0), AugmentConfig(blur=0, solarize=0.5)]
    packed = pack(views, some_draws(views, 5))
    assert packed.shape == (2, 5, 20) and (packed[..., 19] == 256).all()
    assert pack(VIEWS, some_draws(VIEWS, 5)).shape == (2, 5, 26)


def test_crops_and_draws_that_do_not_belong_together_are_refused():
    crops = torch.zeros(2, 4, 5, 5, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"draws of 8 images.*got torch.float32 \(2, 3, 26\)"):
        finish_views(crops, torch.zeros(2, 3, 26))
    with pytest.raises(ValueError, match="draws of 4 images"):
        normalize_views(crops[0], MEAN, STD, torch.float32, draws=torch.zeros(2, 4, 26))
    with pytest.raises(ValueError, match="3, 4 or 8 channels, got 5"):
        normalize_views(crops[0], MEAN, STD, torch.float32, channels=5)
    with pytest.raises(ValueError, match="contiguous"):
        finish_views(crops.transpose(2, 3), None)
    assert finish_views(crops, None) is crops
