"""Reads flags and YAML files into a Config; an unknown name is answered with the nearest one.

A newcomer's mistake: adding a flag here. A flag is a field in train/config.py.
"""

import dataclasses
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from train.config import Config
from train.distributed import start
from train.methods import MethodSpec
from train.watch import end_torchrun

USAGE_ERROR = 2


def flags(config: type = Config, prefix: str = "") -> list[str]:
    """Every flag's dotted name, groups included."""
    names = []
    for part in dataclasses.fields(config):
        names.append(prefix + part.name)
        if dataclasses.is_dataclass(part.type) and isinstance(part.type, type):
            names += flags(part.type, f"{prefix}{part.name}.")
    return names


def with_brackets(words: Sequence[str], lists: Collection[str]) -> list[str]:
    """10,20 after a flag that takes several values becomes [10,20], which jsonargparse reads.

    lists: those flags, dashes included.
    """
    done: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if equals and flag in lists and not value.startswith("["):
            word = f"{flag}=[{value}]"
        elif done and done[-1] in lists and not word.startswith("["):
            word = f"[{word}]"
        done.append(word)
    return done


def build_parser(
    program: str = "train/main.py",
    description: str = "Train a SimSiam encoder on a folder of images.",
    *,
    usage: str = "[flags]",
    root: str | None = None,
) -> ArgumentParser:
    """The parser of a program: --config FILE, a flag for each field, --print_config.

    root: --data.root where it is not given; None: it must be.
    """
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        # the methods' groups have a base in common: each is that dataclass, not any subclass
        subclasses_disabled=[lambda kind: issubclass(kind, MethodSpec)],
    )
    needed = "--data.root DIR " if root is None else ""
    parser = ArgumentParser(
        prog=program,
        description=description,
        usage=f"{program} {needed}[--config FILE] {usage}",
        exit_on_error=False,
        allow_abbrev=False,  # --epoch for --epochs would work until --epoch_s is added
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the flags below.")
    parser.add_class_arguments(Config, as_group=True)
    if root is not None:
        parser.set_defaults({"data.root": root})
        for action in parser._actions:  # jsonargparse's --help goes on calling it required
            action.required &= action.dest != "data.root"
    return parser


def read_config(arguments: Sequence[str] | None = None) -> Config:
    """The Config of a command line. Exits with 2 and one line for a mistake in it."""
    try:
        return parse_config(arguments)
    except ValueError as error:
        refuse(str(error))


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """The Config of a command line. Raises: ValueError with one line for a mistake in it."""
    parser = build_parser()
    try:
        namespace = parser.parse_args(arguments)
        return Config(
            **{
                key: value
                for key, value in vars(parser.instantiate(namespace)).items()
                if key != "config"
            }
        )
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise ValueError(explain(str(error))) from error


def explain(message: str, known: Sequence[str] | None = None) -> str:
    """The first line of a parser's message, with the nearest name if one is unknown.

    known: every flag of the program; train/main.py's by default.
    """
    known = flags() if known is None else known
    unknown = re.findall(r"--[\w.-]+", message) if "nrecognized" in message else []
    keys = re.findall(r"(?:[Kk]ey|[Oo]ption) [\"']([\w.]+)[\"']", message)
    groups = re.findall(r"Group [\"']([\w.]+)[\"']", message)
    unknown += [".".join([*groups[:1], key]) for key in keys]
    line = plain(" ".join(part.strip() for part in message.splitlines() if part.strip()))
    hints = []
    for shown in unknown:
        name = shown.removeprefix("--")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        near = near or [full for full in known if full.split(".")[-1] == name.split(".")[-1]][:1]
        if near and name not in known:
            hints.append(f"{shown} is unknown: perhaps you meant --{near[0]}")
    return "; ".join(hints) or line


EXPECTED = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
}


def plain(line: str) -> str:
    """A parser's message with flags as they are typed and types in words."""
    line = re.sub(r'Parser key "([\w.]+)"', r"--\1", line)
    for kind, words in EXPECTED.items():
        line = line.replace(f"Expected a {kind}", f"expected {words}")
    line = re.sub(
        r"Expected a typing\.Literal\[([^]]*)\]",
        lambda found: "expected " + found[1].replace("', '", " or ").strip("'"),
        line,
    )
    line = line.replace(". Got value:", ", got")
    stray = re.fullmatch(r"[Uu]nrecognized arguments: ([^-]\S*)( .*)?", line)
    if stray:  # of a glob that the shell has expanded there may be thousands
        more = ", and more," if stray[2] else ""
        line = f"{stray[1]}{more} follows no flag: quote a glob, and a value with spaces"
    missing = re.fullmatch(r"the following arguments are required: ([\w., ]+)", line)
    if missing:
        names = missing[1].split(", ")  # a flag that is required stands in a group
        line = "required: " + ", ".join(f"--{n}" if "." in n else n.upper() for n in names)
    return line


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or the error's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_disk_full(error: BaseException) -> bool:
    """Whether an OSError says that there is no room: its text names no file."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def told(error: BaseException, out: Path) -> str:
    """An error's text, with the folder that is full where that is what happened."""
    return f"{error} (--out {out})" if is_disk_full(error) else str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch on a GPU or the CPU, NumPy or DALI could not have the memory it asked for."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error) for text in ("can't allocate memory", "bad_alloc", "out of memory")
    )


def memory_line(error: BaseException) -> str:
    """Of the text of such an error the line that says how much was asked for, or where."""
    return next((line.strip() for line in str(error).splitlines() if "alloc" in line), "")


def print_result(result: dict, *, kept: Path) -> None:
    """The last line of stdout; where that is closed or full, one line says where the result is."""
    try:
        print(json.dumps(result), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again
        refuse(f"stdout cannot be written ({error.strerror}): the result is in {kept}", code=1)


def refuse(message: str, *, code: int = USAGE_ERROR) -> NoReturn:
    """One line on stderr, then the exit code.

    A stop by signal (130), which all ranks meet, is told once a host. One host of several may alone
    have a mistake in its flags: rank 0 tells it, with the host, and all ranks end.
    """
    if code == USAGE_ERROR and os.environ.get("WORLD_SIZE", "1") != "1":
        try:
            with start("cpu", mistake=message):
                pass
        except (ValueError, OSError) as error:
            refuse(str(error), code=1)
    if code not in (USAGE_ERROR, 130) or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    if code == USAGE_ERROR:
        end_torchrun()
    raise SystemExit(code)
