"""Checks of a flag's value, for the dataclasses that hold flags.

A newcomer's mistake: an upper bound as a matter of taste. Only what no size can mean is refused.
"""

MOST = 1 << 40  # of counts and sizes: more is a slip, and from 2^63 on torch and NumPy overflow


def at_least(name: str, value: float, low: int, most: int = MOST) -> None:
    """Raise ValueError if a flag's value is below its least one, or no size that can be meant."""
    if not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def positive(name: str, value: float) -> None:
    """Raise ValueError if a flag's value is not above 0 and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be > 0, got {value}")


def share(name: str, value: float) -> None:
    """Raise ValueError if a flag's value does not lie in 0 .. 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in 0 .. 1, got {value}")
