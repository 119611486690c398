"""The flags of train/pilot.py: its own and, for all trials, train/main.py's."""

from collections.abc import Sequence
from dataclasses import dataclass

from jsonargparse import ArgumentError

from train.config import at_least
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


def read_flags(words: Sequence[str]) -> tuple[PilotConfig, list[str], str]:
    """The pilot's flags, the words of train/main.py's, --out. Exits with 2 for a mistake."""
    description = "Look at images, try settings on them in short trainings, choose one."
    parser = build_parser("train/pilot.py", description)
    parser.add_class_arguments(PilotConfig, as_group=True)
    try:
        values = vars(parser.instantiate(parser.parse_args(words)))
        own = PilotConfig(**{key: values[key] for key in flags(PilotConfig)})
        if values["method"].target_steps != 1:
            raise ValueError("--method.target_steps has no trials: leave it out")
        if values["init"]:
            raise ValueError(
                "--init is not for trials, which begin at random weights: leave it out"
            )
        return own, without(words, flags(PilotConfig)), values["out"]
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        refuse(explain(str(error), [*flags(), *flags(PilotConfig)]))


def without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words of a command line without these flags and their values."""
    left, skip = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_named = name.removeprefix("--") in names and name.startswith("--")
        if not (is_named or skip):
            left.append(word)
        skip = is_named and not equals
    return left
