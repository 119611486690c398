"""Figures against goals, and the programs that give them: what a stage of the GPU suite works with.

A rehearsal takes the same command lines as a GPU and appends flags that make them tiny, so that a
flag that is wrong on a GPU is wrong in the rehearsal too.
"""

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measure.results import ROOT

TO_SAVE_S = 20.0  # for a training to write its checkpoint and result after SIGTERM
SMALL = (
    "--model.arch=resnet18 --model.stem=cifar --model.width=8 --augment.size=16 "
    "--data.batch_size=16 --eval.size=16 --eval.resize=16 --eval.k=5"
)
TINY = tuple(SMALL.split())
TINY_STEPS = (
    *TINY,
    "--precision=fp32",
    "--steps=1",
    "--warmup=1",
    "--repeats=1",
    "--loader_images=32",
)


class StageFailed(Exception):
    """A program of a stage did not end well; the first line says why."""


class OutOfTime(StageFailed):
    """A program took longer than its stage may; with more time it may well end."""


@dataclass
class Check:
    """A figure against its goal, or one that is only reported."""

    what: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """pass, fail, or "" where there is no goal; a figure that is missing fails its goal."""
        if not self.goal:
            return ""
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return "pass" if self.value is not None and low <= self.value <= high else "fail"

    @property
    def goal(self) -> str:
        """The goal in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"


@dataclass
class Suite:
    """Where results go, where images are, and what the running stage has measured so far."""

    out: Path
    images: Path | None
    rehearse: bool
    apex: Path | None = None
    stage: str = ""
    deadline: float = 0.0
    begin: float = 0.0
    found: dict = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    def folder(self, name: str, embedded: str) -> str:
        """A folder of images; without images the name of embedded ones."""
        return embedded if self.images is None else str(self.images / name)

    def write(self, *, ended: bool, error: str | None = None, attempts: int = 1) -> None:
        """Write OUT/<stage>.json: all that the stage has measured so far."""
        written = {
            "stage": self.stage,
            "rehearsal": self.rehearse,
            "ended": ended,
            "error": error,
            "attempts": attempts,
            "seconds": round(time.monotonic() - self.begin, 1),
            "checks": [asdict(c) | {"verdict": c.verdict, "goal": c.goal} for c in self.checks],
            "found": self.found,
        }
        part = self.out / f"{self.stage}.part"
        part.write_text(json.dumps(written, indent=1) + "\n")
        part.replace(part.with_suffix(".json"))

    def check(self, what: str, value: float | None, **goal: float) -> None:
        """Note a figure, at once; goal: at_least or at_most. A rehearsal has none."""
        self.checks.append(Check(what, value, **({} if self.rehearse else goal)))
        self.write(ended=False)

    def run(
        self,
        name: str,
        *command: str,
        tiny: tuple[str, ...] = (),
        saves: bool = False,
        until: Callable[[], bool] | None = None,
        wrapper: tuple[str, ...] = (),
        interpret: bool = False,
        judges: bool = False,
    ) -> dict:
        """A program's last stdout line as JSON, kept under `name`, at once. Raises: StageFailed.

        tiny: what a rehearsal appends. saves: a training, which gets SIGTERM at the stage's limit
        and saves; others are killed. until: SIGTERM as soon as it returns True. interpret: a
        rehearsal has Triton's interpreter for a GPU. judges: exit code 1 means that what it printed
        is bad. Output is in OUT/<stage>-<name>.log.
        """
        line = [*wrapper, sys.executable, *command, *(tiny if self.rehearse else ())]
        code, stdout, last = self._process(
            name, line, saves=saves, until=until, interpret=interpret and self.rehearse
        )
        try:
            result = json.loads(stdout.splitlines()[-1])
        except (IndexError, ValueError):
            result = None
        if isinstance(result, dict):  # a program that found a fault prints what it measured too
            self.found[name] = result
            self.write(ended=False)
        if code and not (judges and code == 1):
            raise StageFailed(f"{name} ended with {code}: {last}")
        if not isinstance(result, dict):
            raise StageFailed(f"{name} printed no JSON line at its end: {last}")
        return result

    def pytest(self, name: str, *arguments: str) -> None:
        """Tests as a check: how many did not pass. Raises: StageFailed if none ran."""
        report = self.out / f"{self.stage}-{name}.xml"
        # another machine's packages have other warnings: they are no failure
        command = [sys.executable, "-m", "pytest", "-o", "junit_family=xunit2"]
        command += ["-o", "filterwarnings=", f"--junitxml={report}", *arguments]
        code, stdout, last = self._process(name, command)
        last = (stdout.splitlines() or [last])[-1]
        if not report.exists():
            raise StageFailed(f"{name} ended with {code}: {last}")
        counts = count_tests(report)
        self.found[name] = counts | {"exit_code": code}
        self.check(f"{name}: tests that ran", counts["ran"])
        self.check(f"{name}: tests that failed", counts["failed"], at_most=0)
        if counts["ran"] == 0 and not self.rehearse:
            raise StageFailed(f"{name}: no test ran: {last}")

    def _process(
        self,
        name: str,
        line: list[str],
        *,
        saves: bool = False,
        until: Callable[[], bool] | None = None,
        interpret: bool = False,
    ) -> tuple[int, str, str]:
        """(exit code, stdout, last line of stderr) of a program. Raises: OutOfTime."""
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        # compiled code is kept in OUT, for later stages and calls
        environment = os.environ | {k: str(self.out / "cache" / v) for k, v in caches.items()}
        environment.pop("TRITON_INTERPRET", None)
        environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
        log, answer = (self.out / f"{self.stage}-{name}.{kind}" for kind in ("log", "out"))
        limit = self.deadline - time.monotonic() - (TO_SAVE_S if saves else 0)
        with log.open("w") as stderr, answer.open("w") as stdout:
            streams = {"stdout": stdout, "stderr": stderr, "start_new_session": True}
            process = subprocess.Popen(line, cwd=ROOT, env=environment, **streams)
            is_late = not _wait(process, limit, until)
            if process.poll() is None:
                _end(process, politely=saves or until is not None)
        text, last = answer.read_text(), last_line(log)
        answer.unlink()
        with log.open("a") as file:
            file.write(text)
        if is_late and not saves:
            raise OutOfTime(f"{name} took longer than {limit:.0f} s: {log.name}")
        return process.returncode, text, last


def _wait(process: subprocess.Popen, limit: float, until: Callable[[], bool] | None = None) -> bool:
    """Whether the program ended, or `until` came true, within the limit."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            process.wait(timeout=min(0.1, max(0.0, end - time.monotonic())))
            return True
        except subprocess.TimeoutExpired:
            if until is not None and until():
                return True
    return process.poll() is not None


def _end(process: subprocess.Popen, *, politely: bool) -> None:
    """End a program and all that it started."""
    if politely:
        process.send_signal(signal.SIGTERM)
        if _wait(process, TO_SAVE_S):
            return
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def count_tests(report: Path) -> dict[str, int]:
    """Tests that ran and that failed, of pytest's XML report (written by pytest: trusted)."""
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    names = ("tests", "skipped", "failures", "errors")
    total, skipped, failures, errors = (int(suite.get(name, 0)) for name in names)
    return {"ran": total - skipped, "failed": failures + errors, "skipped": skipped}


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "nothing was printed")
