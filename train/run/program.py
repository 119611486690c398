"""What the programs share: read the flags, report an error in one line."""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from train.config import Config
from train.config.parser import parse_config
from train.distributed import start
from train.distributed.watch import end_torchrun

USAGE_ERROR = 2
OWN = ("kernels", "pipeline", "train")  # a module of these that is missing is a mistake of ours


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, or the error's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_disk_full(error: BaseException) -> bool:
    """Whether an OSError is of a full disk, a quota or ulimit -f: its text names no file."""
    full = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
    return isinstance(error, OSError) and error.errno in full


def error_text(error: BaseException, out: Path) -> str:
    """An error's text, with the folder where the disk is full."""
    return f"{error} (--out {out})" if is_disk_full(error) else str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch on a GPU or the CPU, NumPy or DALI could not allocate memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        text in str(error) for text in ("can't allocate memory", "bad_alloc", "out of memory")
    )


def memory_line(error: BaseException) -> str:
    """The line of such an error that states how much was requested, or where."""
    return next((line.strip() for line in str(error).splitlines() if "alloc" in line), "")


@contextmanager
def exit_on_error(
    out: Path | None = None, *, memory_remedy: str = "", stopped: str = ""
) -> Iterator[None]:
    """Print what the user can fix as one line on stderr and exit; the body of a program's main().

        out = Path(chosen.out)
        with exit_on_error(out, memory_remedy="lower --eval.batch_size", stopped="stopped; ..."):
            found = newest_checkpoint(run, log=log)      # raises ValueError
            with closing(RunFolder(str(out))) as folder:     # its own errors are printed too
                ...

    ValueError, OSError and FloatingPointError exit with 1 and their text; where the disk is full it
    names `out`. A package that is missing exits with 1, as does running out of memory where there
    is a `memory_remedy`; Ctrl-C exits with 130 where there is a text for `stopped`. All else passes
    through, with its traceback.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        refuse(str(error) if out is None else error_text(error, out), code=1)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OWN:
            raise
        refuse(f"{error.name} is missing: requirements.txt names what to install", code=1)
    except (RuntimeError, MemoryError) as error:
        if not (memory_remedy and is_out_of_memory(error)):
            raise
        refuse(f"out of memory ({memory_line(error)}): {memory_remedy}", code=1)
    except KeyboardInterrupt:
        if not stopped:
            raise
        refuse(stopped, code=130)


def refuse(message: str, *, code: int = USAGE_ERROR) -> NoReturn:
    """One line on stderr, then the exit code.

    A stop by signal (130), which all ranks receive, is printed once a host. A mistake in the flags
    of one host of several is printed by rank 0, with the host, and all ranks exit.
    """
    if code == USAGE_ERROR:
        try:
            tell_ranks(message)
        except (ValueError, OSError) as error:
            refuse(str(error), code=1)
    if code not in (USAGE_ERROR, 130) or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    if code == USAGE_ERROR:
        end_torchrun()
    raise SystemExit(code)


def tell_ranks(mistake: str) -> None:
    """Where other ranks wait for this one to join, end them all. One alone is left to its caller.

    Raises: ValueError on rank 0, with the host of the mistake; SystemExit on the others.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        with start("cpu", mistake=mistake):
            pass


def read_config(arguments: Sequence[str] | None = None) -> Config:
    """The Config of a command line. Exits with 2 and one line for a mistake in it."""
    try:
        return parse_config(arguments)
    except ValueError as error:
        refuse(str(error))
