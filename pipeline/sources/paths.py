"""Paths as people type them: ~ for a home folder, and globs beside folders that have brackets."""

import argparse
import glob
import os
from pathlib import Path


def expanded(word: str) -> str:
    """A path with ~ and ~user replaced, once: what is returned may be given again.

    Raises: ValueError for a user who has no home folder.
    """
    if os.path.normpath(word) != word and os.path.normpath(word).startswith("~"):
        return os.path.abspath(word)  # ./~/x is in a folder named ~, and Path would drop the dot
    path = os.path.expanduser(word)
    if path.startswith("~") and not os.path.lexists(path):
        user = path.split("/")[0]
        raise ValueError(f"{word}: no home folder of {user} is known; ./{word} is one named {user}")
    return path


def named_path(word: str) -> Path:
    """A path of a command line; "", which would be the current folder, is refused."""
    if not word:
        raise argparse.ArgumentTypeError("an empty name: is a shell variable unset?")
    try:
        return Path(expanded(word))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def matches(pattern: str) -> list[str] | None:
    """The files that a glob matches, in no order; None for a path that is no glob.

    A file that exists is itself alone, and folders that exist are as they are named, whatever
    brackets they have.
    """
    if os.path.isfile(pattern):
        return [pattern]
    folder = os.path.dirname(pattern)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    rest = pattern[len(folder) :].lstrip("/")
    if not glob.has_magic(rest):
        return None
    found = (os.path.join(folder, name) for name in glob.glob(rest, root_dir=folder or None))
    return list(filter(os.path.isfile, found))
