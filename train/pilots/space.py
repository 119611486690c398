"""The settings that a pilot tries, and how its time is shared among them: successive halving.

Trials are compared after the same number of steps; the better half continues for as many steps
again. In each part the learning rate decays to 0: encoders in the middle of a schedule score worse
the higher their rate (profiling/LOG.md, 2026-11-29).
Source: Jamieson & Talwalkar, AISTATS 2016 (successive halving); Loshchilov & Hutter, ICLR 2017
(restarts of the cosine schedule).
"""

import itertools
import math
from dataclasses import dataclass, replace

from torch.quasirandom import SobolEngine

from train.config import Config
from train.distributed import resolve_device

LR, CROP, COLOR = (0.01, 10.0), (0.08, 0.6), (0.0, 1.5)
"""Ranges of optim.lr and augment.scale's lower end, both on a logarithmic scale, and of the factor
on brightness, contrast, saturation and hue."""
LEAST_STEPS = 16  # of a trial's first part
TIME_USED = 0.9  # the share of the time that is planned
LEAST_SIDE, MOST_SIDE = 16, 112  # pixels; between them a trial's views have half the side


@dataclass(frozen=True, order=True)
class Setting:
    """What is varied."""

    lr: float
    """optim.lr, for 256 images."""
    crop: float
    """The least share of an image that a crop has (augment.scale)."""
    color: float
    """Factor on the strengths of colour jitter."""

    def apply(self, config: Config) -> Config:
        """The configuration with this setting."""
        old = config.augment
        strengths = {
            name: min(most, getattr(old, name) * self.color)
            for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5))
        }
        augment = replace(old, scale=(self.crop, max(self.crop, old.scale[1])), **strengths)
        return replace(config, augment=augment, optim=replace(config.optim, lr=self.lr))

    @property
    def key(self) -> str:
        """For a folder's name."""
        return f"lr-{self.lr:g}-crop-{self.crop:g}-color-{self.color:g}"

    def __str__(self) -> str:
        """For people."""
        return f"lr {self.lr:g}, crops from {self.crop:.0%}, colour x {self.color:g}"


def settings_around(base: Config, count: int) -> list[Setting]:
    """The base's own setting, then points of a Sobol sequence over the ranges."""
    settings = [Setting(base.optim.lr, base.augment.scale[0], 1.0)]
    points = SobolEngine(3, scramble=True, seed=1).draw(count).tolist()
    for u, v, w in points[1:]:
        lr, crop = (a * (b / a) ** x for (a, b), x in ((LR, u), (CROP, v)))
        color = COLOR[0] + w * (COLOR[1] - COLOR[0])
        settings.append(Setting(float(f"{lr:.2g}"), float(f"{crop:.2g}"), round(color, 1)))
    return settings


def trial_config(base: Config) -> Config:
    """The configuration at a trial's size: smaller views, nothing compiled, no warm-up."""
    side = min(base.augment.size, MOST_SIDE, max(LEAST_SIDE, base.augment.size // 2))
    resize = round(base.eval.resize * side / base.augment.size)
    method, swav = base.method, base.method.swav
    if swav.small_views:
        small_size = max(LEAST_SIDE // 2, round(swav.small_size * side / base.augment.size))
        method = replace(method, swav=replace(swav, small_size=small_size))
    return replace(
        base,
        device=resolve_device(base.device),
        method=method,
        optim=replace(base.optim, warmup_epochs=0),  # of epochs that are longer than a trial
        augment=replace(base.augment, size=side),
        eval=replace(base.eval, size=side, resize=max(side, resize)),
        compile="false",
    )


@dataclass(frozen=True)
class Plan:
    """How many trials take part, and to which step each part leads."""

    counts: list[int]
    steps: list[int]

    @property
    def total(self) -> int:
        """Steps of all parts."""
        return self.steps[-1]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """The steps at which each part begins and ends."""
        return list(itertools.pairwise([0, *self.steps]))

    @property
    def all_steps(self) -> int:
        """Of all trials and parts."""
        return sum(
            n * (end - begin) for n, (begin, end) in zip(self.counts, self.parts, strict=True)
        )


def plan(count: int, *, workers: int, seconds: float, step_s: float, fixed_s: float) -> Plan:
    """Halving that takes about so many seconds with so many trials at once.

    step_s: of a step; fixed_s: of what a part of a trial costs beside its steps. With too little
    time there are fewer trials, then parts of LEAST_STEPS.
    """
    while True:
        counts = [count >> part for part in range(max(1, count.bit_length() - 1))]
        turns = [math.ceil(n / workers) for n in counts]
        weight = sum(n * max(1, 1 << part >> 1) for part, n in enumerate(turns))
        first = math.floor((TIME_USED * seconds - fixed_s * sum(turns)) / (weight * step_s))
        if first >= LEAST_STEPS or count <= 4:
            first = max(first, LEAST_STEPS)
            return Plan(counts, [first << part for part in range(len(counts))])
        count = count * 3 // 4
