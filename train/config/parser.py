"""Reads flags and YAML files into a Config; for an unknown name the error suggests the nearest."""

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from pipeline.sources.paths import expanded
from pipeline.streams import write_error
from train.config.schema import Config
from train.methods import MethodSpec

PATHS = ("data.root", "data.val", "out", "init", "run", "file")
"""Flags and positional arguments that are paths, of all programs."""
EXPECTED = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
}


def flags(config: type = Config, prefix: str = "") -> list[str]:
    """Every flag's dotted name, groups included."""
    names = []
    for part in dataclasses.fields(config):
        names.append(prefix + part.name)
        if dataclasses.is_dataclass(part.type) and isinstance(part.type, type):
            names += flags(part.type, f"{prefix}{part.name}.")
    return names


def with_brackets(words: Sequence[str], lists: Collection[str]) -> list[str]:
    """10,20 after one of the flags `lists` becomes [10,20], which jsonargparse reads as a list."""
    done: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if equals and flag in lists and not value.startswith("["):
            word = f"{flag}=[{value}]"
        elif done and done[-1] in lists and not word.startswith("["):
            word = f"[{word}]"
        done.append(word)
    return done


class FlagParser(ArgumentParser):
    """The parser of all programs that take a configuration."""

    continues_runs = False
    """Whether the config.yaml of a run, without --out, is for continuing that run."""

    def __init__(self, program: str, description: str, usage: str | None = None):
        super().__init__(
            prog=program,
            description=description,
            usage=usage,
            exit_on_error=False,
            allow_abbrev=False,  # --epoch for --epochs would break once --epoch_s is added
        )

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """With 1 where stdout, the only place of what --print_config prints, cannot be written."""
        sys.stdout.flush()
        if status == 0 and (error := write_error(sys.stdout)) is not None:
            status, message = 1, f"error: stdout cannot be written ({error.strerror})\n"
        super().exit(status, message)

    def parse_args(
        self, args: Sequence[str] | None = None, *more: Any, **options: Any
    ) -> Namespace:
        """As jsonargparse, with ~ expanded in paths and `out` as `chosen_out` has it.

        Raises: ValueError for a path or an `out` that cannot be meant.
        """
        words = list(sys.argv[1:] if args is None else args)
        with open(os.devnull, "w") as nowhere:  # what --help and --print_config print, once
            is_main = os.environ.get("RANK", "0") == "0"
            with nullcontext() if is_main else redirect_stdout(nowhere):
                values = super().parse_args(words, *more, **options)
        if values.get("config"):
            values["out"] = self.chosen_out(words, values)
        for flag in PATHS:
            if isinstance(given := values.get(flag), str):
                values[flag] = expanded(given)
        return values

    def chosen_out(self, words: Sequence[str], values: Namespace) -> str:
        """--out of the command line, else that of the files.

        The config.yaml of a run belongs to the folder it lies in, which may have been moved or
        copied: the program that continues runs writes there, and no other one does.
        Raises: ValueError where that file itself names another folder.
        """
        alone = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        alone.add_argument("--out")
        if (given := alone.parse_known_args(words)[0].out) is not None:
            return given
        out = values["out"]
        for file in reversed(values["config"]):
            run = file and run_of(Path(expanded(str(file))))  # None: YAML in the flag itself
            if run is None:
                continue
            said = yaml.safe_load((run / "config.yaml").read_text()).get("out") or ""
            if out != said:  # another file names one
                continue
            if not self.continues_runs:
                return ""
            if not said or Path(expanded(said)).resolve() == run.resolve():
                return str(run)
            raise ValueError(
                f"--config {file} is of the run in {run}, but its `out` is {said}: give "
                f"--out {run} to continue that run, or --out DIR for a new one"
            )
        return out


def run_of(config: Path) -> Path | None:
    """The run folder whose own settings a file has; None for any other file."""
    written_with_it = (config.parent / name for name in ("command.txt", "checkpoints"))
    is_own = config.name == "config.yaml" and all(path.exists() for path in written_with_it)
    return config.parent if is_own else None


def build_parser(
    program: str = "train/main.py",
    description: str = "Train a SimSiam encoder on a folder of images.",
    *,
    usage: str = "[flags]",
    root: str | None = None,
) -> FlagParser:
    """The parser of a program: --config FILE, a flag for each field, --print_config.

    root: default of --data.root; None: it is required.
    """
    set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        # the methods' groups have a common base: each is that dataclass, not any subclass
        subclasses_disabled=[lambda kind: issubclass(kind, MethodSpec)],
    )
    needed = "--data.root DIR " if root is None else ""
    parser = FlagParser(program, description, f"{program} {needed}[--config FILE] {usage}")
    parser.add_argument("--config", action="config", help="YAML file with any of the flags below.")
    parser.add_class_arguments(Config, as_group=True)
    if root is not None:
        parser.set_defaults({"data.root": root})
        for action in parser._actions:  # else --help calls it required
            action.required &= action.dest != "data.root"
    return parser


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """The Config of a command line. Raises: ValueError with one line for a mistake in it."""
    parser = build_parser()
    parser.continues_runs = True
    try:
        values = vars(parser.instantiate(parser.parse_args(arguments)))
        config = Config(**{key: value for key, value in values.items() if key != "config"})
        words = sys.argv[1:] if arguments is None else arguments
        is_typed = any(word.partition("=")[0] == "--init" for word in words)  # not a moved run's
        is_same = Path(config.init).resolve() == Path(config.out).resolve()
        if is_typed and config.init and config.out and is_same:
            raise ValueError(f"--init {config.init} is this run's own folder: give another --out")
        return config
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise ValueError(explain(str(error))) from error


def explain(message: str, known: Sequence[str] | None = None) -> str:
    """A parser's message as one line, with the nearest name for an unknown one.

    known: every flag of the program; train/main.py's by default.
    """
    known = flags() if known is None else known
    unknown = re.findall(r"--[\w.-]+", message) if "nrecognized" in message else []
    keys = re.findall(r"(?:[Kk]ey|[Oo]ption) [\"']([\w.]+)[\"']", message)
    groups = re.findall(r"Group [\"']([\w.]+)[\"']", message)
    unknown += [".".join([*groups[:1], key]) for key in keys]
    line = plain(" ".join(part.strip() for part in message.splitlines() if part.strip()), known)
    hints = []
    for shown in unknown:
        name = shown.removeprefix("--")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        near = near or [full for full in known if full.split(".")[-1] == name.split(".")[-1]][:1]
        if near and name not in known:
            hints.append(f"{shown} is unknown: perhaps you meant --{near[0]}")
    return "; ".join(hints) or line


def plain(line: str, known: Sequence[str]) -> str:
    """A parser's message with flags as they are typed and types in words."""
    line = re.sub(r'Parser key "([\w.]+)"', r"--\1", line)
    for kind, words in EXPECTED.items():
        line = line.replace(f"Expected a {kind}", f"expected {words}")
    line = re.sub(
        r"Expected a typing\.Literal\[([^]]*)\]",
        lambda match: "expected " + match[1].replace("', '", " or ").strip("'"),
        line,
    )
    line = line.replace(". Got value:", ", got")
    stray = re.fullmatch(r"[Uu]nrecognized arguments: ([^-]\S*)( .*)?", line)
    if stray:  # a glob that the shell expanded may give thousands
        more = ", and more," if stray[2] else ""
        line = f"{stray[1]}{more} follows no flag: quote a glob, and a value with spaces"
    missing = re.fullmatch(r"the following arguments are required: ([\w., ]+)", line)
    if missing:
        names = missing[1].split(", ")  # a required flag is in a group
        line = "required: " + ", ".join(f"--{n}" if n in known else n.upper() for n in names)
    return line
