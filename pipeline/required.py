"""The least torch and DALI that the program runs with; requirements.txt pins newer ones.

Imports neither: deploy/install.py asks before they are installed.
A newcomer's mistake: comparing whole versions. NVIDIA's builds are named like pre-releases
(2.13.0a0+9186a08b2c.nv26.07), which sort below 2.13: the first two numbers count.
"""

import re

LEAST = {"torch": (2, 11), "DALI": (2, 3)}
"""torch: the oldest that the tests have passed with (profiling/LOG.md). DALI: before 2.2
decoders.image has no adjust_orientation, and 2.2.0 dies of a damaged TFRecord (SIGSEGV; with 2.3.0
and 2.4.0 all tests of the pipeline pass)."""


def least(package: str) -> str:
    """The least version of torch or DALI, as text."""
    return ".".join(map(str, LEAST[package]))


def is_old(package: str, version: str) -> bool:
    """Whether this version of torch or DALI is older than the least one."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    assert numbers is not None, version
    return tuple(map(int, numbers.groups())) < LEAST[package]
