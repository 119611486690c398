"""Runs the programs in processes forked from one that has imported torch and DALI already.

    done = forked(["train/main.py", "--max_steps=2"])

Most of a tiny run's 6 s are imports; here they are made once for all runs of a test's process. A
test of how a process starts, of its signals or of several ranks starts it as a user does instead,
and one test compares the weights of both. With PACKAGES alone nothing of ours is imported before.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


PACKAGES = (
    "nvidia.dali.plugin.pytorch", "torch._dynamo", "torch.utils.tensorboard", "matplotlib.figure",
    "matplotlib.backends.backend_agg",
)  # fmt: skip
ALL = ("train.main", "pipeline.graph", *PACKAGES)


@cache
def server(modules: tuple[str, ...]) -> subprocess.Popen:
    """The process that forks; it ends with this one, whose end it reads as that of its input."""
    return subprocess.Popen(
        [sys.executable, __file__, *modules], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def forked(
    argv: list[str], *, cwd: Path = ROOT, modules: tuple[str, ...] = ALL
) -> subprocess.CompletedProcess:
    """As subprocess.run of a Python program, with UserWarnings as errors.

    modules: what is imported before, once.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        process = server(modules)
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None
        job = {"argv": argv, "cwd": str(cwd), "out": str(out), "err": str(err)}
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        if not (answer := stdout.readline()):  # tests/limits.py has ended both
            with process:
                server.cache_clear()
            raise TimeoutError(err.read_text())
        code = int(answer)
        return subprocess.CompletedProcess(argv, code, out.read_text(), err.read_text())


def run(argv: list[str]) -> int:
    """Run a program as Python does, to its exit code."""
    warnings.simplefilter("error", UserWarning)
    sys.argv = argv
    code: object = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined] - waits for threads that are no daemons
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)  # type: ignore[call-overload]


def serve() -> None:
    """Fork for each line of the input. What was imported is not taken apart: that takes 1 s."""
    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        if pid := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print(code, flush=True)
            continue
        for descriptor, path in ((1, job["out"]), (2, job["err"])):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(file, descriptor)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["cwd"])
        sys.path[0] = str(Path(job["argv"][0]).absolute().parent)
        os._exit(run(job["argv"]))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    for module in sys.argv[1:]:
        importlib.import_module(module)
    serve()
