"""Looks at a set of images before training, and derives the settings that follow from it.

Headers and bytes of at most MOST_READ images, evenly over the set, then the pixels of at most
MOST_SEEN: the report says how many were looked at.
"""

import hashlib
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.decode import DecodeOptions
from pipeline.loader import eval_loader
from pipeline.sources.header import format_of
from pipeline.sources.reader import ImageReader

MOST_READ, MOST_SEEN = 20000, 4000
THUMBNAIL = 32  # pixels, of the comparison of images
NEAR = 0.985
"""Correlation of two gray thumbnails from which two images count as near duplicates."""
BLANK = 2.0  # standard deviation of a thumbnail, 0 .. 255, below which there is nothing to compare
GRAY = 3.0  # mean difference between channels, 0 .. 255, of an image without colour
SIDES = (16, 32, 64, 96, 128, 160, 224)  # of views, pixels
CIFAR_SIDE = 64  # the largest for the stem of stride 1 without pooling


@dataclass(frozen=True)
class Images:
    """What was seen; shares are in 0 .. 1."""

    count: int
    """Images of the set."""
    read: int
    """Of these so many files were read, `seen` of which were decoded."""
    seen: int
    classes: int
    """0 without labels."""
    formats: dict[str, int]
    sides: dict[str, int]
    """Percentiles of the shorter side, pixels: p5, p50, p95."""
    bad: int
    reasons: dict[str, int]
    """The most frequent reasons why images are bad."""
    gray: float
    """Share without colour."""
    blank: float
    """Share of nearly one colour."""
    exact: list[list[str]]
    """Groups of files of the same bytes."""
    near: list[list[str]]
    """Pairs of files that look alike."""
    duplicates: float
    """Share that is a copy of an earlier image, exact or near."""
    mean: list[float]
    """Channel means of images in 0 .. 1, at the size of a view."""
    std: list[float]
    contrast: float
    """Mean over images and channels of the standard deviation over an image in 0 .. 1."""

    @property
    def distinct(self) -> int:
        """About how many images there are without copies and bad ones."""
        return round(self.count * (1 - self.duplicates) * (1 - self.bad / self.read))


def look(
    reader: ImageReader, options: DecodeOptions, device: torch.device, *, budget_s: float
) -> Images:
    """Read and decode for about `budget_s` seconds at most. Raises: ValueError if all are bad."""
    source, until = reader.source, time.monotonic() + budget_s
    formats, shorter, groups, num_read = Counter(), [], {}, 0
    # in no order, so that those read in time stand for all
    chosen = np.random.default_rng(0).permutation(evenly(len(source), MOST_READ))
    for part in np.array_split(chosen, -(-len(chosen) // 64)):
        for index, placed in zip(part.tolist(), reader.read_all(part), strict=True):
            num_read += 1
            if placed is not None:
                formats[format_of(placed[0])] += 1
                shorter.append(min(placed[1]))
                groups.setdefault(hashlib.blake2b(placed[0].data).digest(), []).append(index)
        if time.monotonic() > until - budget_s * 2 / 3:
            break
    sides = {f"p{p}": int(np.percentile(shorter or [0], p)) for p in (5, 50, 95)}
    first = np.array([group[0] for group in groups.values()])  # of copies one is decoded
    seen = decode(reader, first, options, device, side=view_side(sides["p50"]), until=until)
    reasons = Counter(reader.bad.values())
    if not len(seen.ids):
        raise ValueError(
            f"none of {num_read} images under {source.root} can be used: "
            f"{reasons.most_common(1)[0][0]}, such as {source.name(next(iter(reader.bad)))}"
        )
    small = seen.small.float()
    deviation = small.std(dim=(2, 3)).mean(1)
    pairs = near_pairs(small)
    exact = sorted(sorted(group) for group in groups.values() if len(group) > 1)
    copies = sum(len(group) - 1 for group in exact) / num_read
    copies += len({second for _, second in pairs}) / len(seen.ids)
    return Images(
        count=len(source),
        read=num_read,
        seen=len(seen.ids),
        classes=len(source.class_names) if source.labels is not None else 0,
        formats=dict(formats.most_common()),
        sides=sides,
        bad=sum(reasons.values()),
        reasons=dict(reasons.most_common(3)),
        gray=share((small - small.mean(1, keepdim=True)).abs().mean((1, 2, 3)) < GRAY),
        blank=share(deviation < BLANK),
        exact=[[source.name(index) for index in group] for group in exact],
        near=[[source.name(int(seen.ids[row])) for row in pair] for pair in pairs],
        duplicates=min(1.0, copies),
        mean=[round(value, 4) for value in seen.mean.tolist()],
        std=[round(max(value, 1e-3), 4) for value in seen.std.tolist()],
        contrast=(deviation / 255).mean().item(),
    )


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` numbers below `count`, evenly spaced, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def share(flags: Tensor) -> float:
    """The share of rows that are true."""
    return flags.float().mean().item()


def view_side(shorter: int) -> int:
    """The side of views for images whose shorter side is so many pixels."""
    return max((side for side in SIDES if side <= shorter), default=SIDES[0])


@dataclass(frozen=True)
class Decoded:
    """What is kept of decoded images, in the set's order."""

    ids: np.ndarray
    small: Tensor
    """Thumbnails, (N, 3, THUMBNAIL, THUMBNAIL) uint8."""
    mean: Tensor
    """Of channels in 0 .. 1 at the size of a view, (3,)."""
    std: Tensor


def decode(
    reader: ImageReader,
    ids: np.ndarray,
    options: DecodeOptions,
    device: torch.device,
    *,
    side: int,
    until: float,
) -> Decoded:
    """Centre crops of what can be decoded before `until`, in no order of the set."""
    if not len(ids):
        return Decoded(ids, torch.empty(0), *torch.zeros(2, 3))
    ids = np.random.default_rng(0).permutation(ids[evenly(len(ids), MOST_SEEN)])
    parts, seen, moments = [], [], torch.zeros(3, 3, dtype=torch.float64)
    sizes: dict = {"resize": side, "size": side, "batch_size": min(64, len(ids))}
    for batch in eval_loader(reader, ids, **sizes, options=options, device=device):
        good = batch.ids >= 0
        pixels = batch.images[good.to(device)].cpu().permute(0, 3, 1, 2).float()
        values = pixels.double() / 255
        sums = [torch.ones_like(values), values, values.square()]
        moments += torch.stack([each.sum((0, 2, 3)) for each in sums])
        parts.append(F.adaptive_avg_pool2d(pixels, THUMBNAIL).round().byte())
        seen.append(batch.ids[good].numpy())
        if time.monotonic() > until:
            break
    mean, square = moments[1:] / moments[0].clamp_min(1)
    found = np.concatenate(seen)
    order = found.argsort()
    return Decoded(
        found[order], torch.cat(parts)[order], mean, (square - mean**2).clamp_min(0).sqrt()
    )


def near_pairs(small: Tensor) -> list[list[int]]:
    """Rows of images that look alike, each with the first one that it looks like.

    By the correlation of gray thumbnails. Shapes: small (N, 3, T, T), 0 .. 255.
    """
    gray = small.mean(1).flatten(1)
    gray = gray - gray.mean(1, keepdim=True)
    has_content = gray.std(1) >= BLANK
    unit = F.normalize(gray, dim=1) * has_content[:, None]
    pairs = []
    for start in range(0, len(unit), 1024):
        alike = (unit[start : start + 1024] @ unit.T >= NEAR).tril(start - 1)
        rows = alike.any(1).nonzero()[:, 0].tolist()
        pairs += [[int(alike[row].int().argmax()), start + row] for row in rows]
    return pairs


def settings_for(images: Images, *, on_gpu: bool) -> dict:
    """The settings that follow from the images, as a nested dictionary of flags."""
    side, is_small = view_side(images.sides["p50"]), view_side(images.sides["p50"]) <= CIFAR_SIDE
    batch = 1 << max(4, min(9 if on_gpu else 7, (images.count // 20).bit_length() - 1))
    augment: dict = {"size": side}
    if is_small:  # as for CIFAR: a blurred or tiny crop of few pixels shows nothing
        augment |= {"blur": 0.0}
    if images.gray > 0.95:  # colour operations would only change the brightness
        augment |= {"hue": 0.0, "saturation": 0.0, "gray": 0.0}
    model: dict = {"arch": "resnet18", "stem": "cifar", "projector_layers": 2}
    if not is_small:
        model = {"arch": "resnet50" if on_gpu else "resnet18", "stem": "imagenet"}
    if not on_gpu:  # what two to sixteen cores can train in hours
        model |= {"width": 16, "projector_layers": 2, "projector_hidden": 512}
        model |= {"projector_dim": 512, "predictor_hidden": 128}
    return {
        "data": {
            "batch_size": max(2, min(batch, images.count)),
            "mean": images.mean,
            "std": images.std,
        },
        "augment": augment,
        "model": model,
        "optim": {"weight_decay": 5e-4 if is_small else 1e-4},
        "eval": {"resize": side * 8 // 7 if not is_small else side, "size": side},
        "precision": "bf16" if on_gpu else "fp32",
    }
