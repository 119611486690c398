"""The flags of train/pilot.py: its own and, for all trials, train/main.py's."""

from collections.abc import Sequence
from dataclasses import dataclass

from jsonargparse import ArgumentError

from train.config import Config, at_least
from train.config.parser import build_parser, explain, flags
from train.run.program import refuse


@dataclass(frozen=True, kw_only=True)
class PilotConfig:
    """How long and how much; every other flag is train/main.py's and holds for all trials."""

    minutes: float = 20.0
    """Of everything: looking, trials and report."""
    settings: int = 16
    """Combinations to try; fewer where the minutes do not suffice."""
    jobs: int = 0
    """Trials at once; 0: one for each GPU, or each core without GPUs."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not 0.1 <= self.minutes <= 10_000:
            raise ValueError(f"minutes must be in 0.1 .. 10000, got {self.minutes}")
        at_least("settings", self.settings, 4, most=256)
        at_least("jobs", self.jobs, 0)


def parse(words: Sequence[str]) -> tuple[PilotConfig, Config]:
    """The pilot's flags and the trials'. Raises: ValueError with one line for a mistake in them."""
    description = "Look at images, try settings on them in short trainings, choose one."
    parser = build_parser("train/pilot.py", description)
    parser.add_class_arguments(PilotConfig, as_group=True)
    try:
        values = vars(parser.instantiate(parser.parse_args(words)))
        own = PilotConfig(**{key: values.pop(key) for key in flags(PilotConfig)})
        config = Config(**{key: value for key, value in values.items() if key != "config"})
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise ValueError(explain(str(error), [*flags(), *flags(PilotConfig)])) from error
    if config.method.target_steps != 1:
        raise ValueError("--method.target_steps has no trials: leave it out")
    if config.init:
        raise ValueError("--init is not for trials, which begin at random weights: leave it out")
    return own, config


def read_flags(words: Sequence[str]) -> tuple[PilotConfig, Config]:
    """parse(), which exits with 2 for a mistake."""
    try:
        return parse(words)
    except ValueError as error:
        refuse(str(error))
