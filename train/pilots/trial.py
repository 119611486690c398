"""A trial, what is kept of it on disk, and what all of them together say."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.augment import AugmentConfig
from pipeline.order import PartOrder
from train.config import Config
from train.pilots.look import Images
from train.pilots.space import Setting
from train.run.optim import Schedule

FEW_IMAGES = 100
BETTER = 3.0
"""Points of score above the untrained encoder's from which a setting counts as learning: on the
digits and CIFAR-10 those that did not learn were within 3 of it, those that did 10 to 20 above."""
TOO_SHORT = 100_000  # images of the longest trial, below which not learning may be lack of time


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


@dataclass(frozen=True)
class Trial:
    """A short training with one setting."""

    setting: Setting
    config: Config
    """At a trial's size, with its setting."""
    reference: AugmentConfig
    """The views that all trials are judged on."""
    ids: np.ndarray
    """The images that it trains on."""
    total: int
    """Steps of all its parts."""
    folder: Path

    def schedule(self, begin: int, end: int) -> Schedule:
        """Batches of its images; the learning rate decays from `begin` to `end`."""
        size = self.config.data.batch_size
        order = PartOrder(self.ids, batch_size=size, seed=self.config.seed)
        return Schedule(order, -(-self.total // order.steps_per_epoch), begin=begin, end=end)

    def warn(self, line: str) -> None:
        """Write a line about it to stderr."""
        print(f"warning: {self.setting}: {line}", file=sys.stderr)

    def read(self) -> dict:
        """Its curve of (step, loss, collapse meter) and its judgements, in the order of steps."""
        path = self.folder / "trial.json"
        return json.loads(path.read_text()) if path.exists() else {"curve": [], "judged": []}

    def write(self, known: dict) -> None:
        """Replace what is known of it."""
        write_whole(self.folder / "trial.json", json.dumps(known))

    def judged(self, step: int) -> dict | None:
        """Its judgement at a step."""
        return next((each for each in self.read()["judged"] if each["step"] == step), None)


@dataclass(frozen=True)
class Standing:
    """A trial's place."""

    trial: Trial
    judgement: dict
    """The last one."""


def ranking(trials: Sequence[Trial], last: int) -> list[Standing]:
    """The trials that were judged, best first.

    Collapsed ones are last, then it is by the part that they reached, then by score. last: the step
    at which the last part ends that all of its trials have reached; what was judged later does not
    count, or the first to be judged would be the best.
    """
    known = [[each for each in trial.read()["judged"] if each["step"] <= last] for trial in trials]
    found = [
        Standing(trial, judged[-1]) for trial, judged in zip(trials, known, strict=True) if judged
    ]

    def place(standing: Standing) -> tuple[bool, int, float]:
        judged = standing.judgement
        return not judged["collapsed"], judged["step"], judged["score"]

    return sorted(found, key=place, reverse=True)


@dataclass(frozen=True)
class Verdict:
    """What the trials say."""

    name: str
    """learns, collapses, too few images, too little time, or does not learn."""
    evidence: str
    """In one sentence."""

    @property
    def learns(self) -> bool:
        """Whether there is a setting to train with."""
        return self.name == "learns"


def verdict(images: Images, untrained: dict | None, ranked: Sequence[Standing]) -> Verdict:
    """What was found, with the evidence."""
    if images.distinct < FEW_IMAGES:
        evidence = f"about {images.distinct} different images, and {FEW_IMAGES} are the least"
        return Verdict("too few images", evidence)
    if not ranked or untrained is None:
        return Verdict("too little time", "no trial was judged: give more --minutes")
    best, start = ranked[0], untrained["score"]
    seen = best.judgement["step"] * best.trial.config.data.batch_size
    reached = f"score {best.judgement['score']:.1f}, untrained {start:.1f}"
    collapsed = sum(each.judgement["collapsed"] for each in ranked)
    if not best.judgement["collapsed"] and best.judgement["score"] >= start + BETTER:
        evidence = f"{reached}; {collapsed} of {len(ranked)} settings collapsed"
        return Verdict("learns", evidence + contradiction(best.judgement, untrained))
    if collapsed == len(ranked):
        return Verdict("collapses", f"all {collapsed} settings collapsed; {reached}")
    if seen < TOO_SHORT:
        short = f"{reached} after {seen} images: give more --minutes"
        return Verdict("too little time", short)
    return Verdict("does not learn", f"the best of {len(ranked)} settings: {reached}")


def contradiction(best: dict, untrained: dict) -> str:
    """A warning where kNN of the best by score is below the untrained encoder's; empty if not."""
    before, after = (judged.get("knn") for judged in (untrained, best))
    if before is None or after is None or after >= before:
        return ""
    return (
        f"; warning: its kNN is {after:.1f} %, the untrained encoder's {before:.1f}: the classes "
        "depend on what the views change, such as colour: choose by kNN in the table, or lower the "
        "strengths of --augment"
    )
