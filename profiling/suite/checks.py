"""Figures against goals, and the programs that give them: what a stage of the GPU suite works with.

profiling/gpu_suite.py runs the stages; profiling/suite/stages.py and extras.py hold them.
A newcomer's mistake: other flags in a rehearsal. It takes the same line and appends flags that make
it tiny, so that a flag that is wrong on a GPU is wrong in the rehearsal too.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TO_SAVE_S = 20.0  # for a training to write its checkpoint and result after SIGTERM
TINY = (
    "--model.arch=resnet18", "--model.stem=cifar", "--model.width=8", "--augment.size=16",
    "--data.batch_size=16", "--eval.size=16", "--eval.resize=16", "--eval.k=5",
)  # fmt: skip
TINY_STEPS = (*TINY, "--precision=fp32", "--steps=1", "--warmup=1", "--repeats=1",
              "--loader_images=32")  # fmt: skip


class StageFailed(Exception):
    """A program of a stage did not end well; the first line says why."""


class OutOfTime(StageFailed):
    """A program took longer than its stage may; with more time it may well end."""


@dataclass
class Check:
    """A figure against its goal; without one it is only told."""

    what: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        """pass, fail, or "" where there is no goal; a figure that is missing fails its goal."""
        if self.at_least is None and self.at_most is None:
            return ""
        if self.value is None:
            return "fail"
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return "pass" if low <= self.value <= high else "fail"

    @property
    def goal(self) -> str:
        """The goal in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"


@dataclass
class Suite:
    """Where results go, where images are, and what the stage that runs has found so far."""

    out: Path
    images: Path | None
    rehearse: bool
    apex: Path | None = None
    stage: str = ""
    deadline: float = 0.0
    begin: float = 0.0
    found: dict = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Of the programs: what they compile is kept in OUT, for later stages and calls."""
        kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        cache = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        kept |= {name: str(self.out / "cache" / folder) for name, folder in cache.items()}
        return kept

    @property
    def imagenet(self) -> str:
        """The folder of photos; profiling's embedded ones where there is none."""
        return "photos" if self.images is None else str(self.images / "imagenet")

    @property
    def cifar10(self) -> str:
        """The folder of CIFAR-10; the embedded digits where there is none."""
        return "digits" if self.images is None else str(self.images / "cifar10")

    def write(self, *, ended: bool, error: str | None = None, attempts: int = 1) -> None:
        """Write OUT/<stage>.json: all that the stage has found so far."""
        written = {
            "stage": self.stage, "rehearsal": self.rehearse, "ended": ended, "error": error,
            "attempts": attempts, "seconds": round(time.monotonic() - self.begin, 1),
            "checks": [asdict(c) | {"verdict": c.verdict, "goal": c.goal} for c in self.checks],
            "found": self.found,
        }  # fmt: skip
        path = self.out / f"{self.stage}.json"
        path.with_suffix(".part").write_text(json.dumps(written, indent=1) + "\n")
        path.with_suffix(".part").replace(path)

    def check(self, what: str, value: float | None, **goal: float) -> None:
        """Note a figure, at once; goal: at_least or at_most. A rehearsal has none."""
        self.checks.append(Check(what, value, **({} if self.rehearse else goal)))
        self.write(ended=False)

    def run(
        self, name: str, *command: str, tiny: tuple[str, ...] = (), saves: bool = False,
        until: Callable[[], bool] | None = None, wrapper: tuple[str, ...] = (),
        interpret: bool = False, judges: bool = False,
    ) -> dict:  # fmt: skip
        """A program's last stdout line as JSON, kept under `name`, at once. Raises: StageFailed.

        tiny: what a rehearsal appends. saves: a training, which gets SIGTERM at the stage's limit
        and saves; others are killed. until: SIGTERM as soon as it says so. interpret: a rehearsal
        has Triton's interpreter for a GPU. judges: exit code 1 says that what it printed is bad.
        Output goes to OUT/<stage>-<name>.log.
        """
        log = self.out / f"{self.stage}-{name}.log"
        line = [*wrapper, sys.executable, *command, *(tiny if self.rehearse else ())]
        limit = self.deadline - time.monotonic() - (TO_SAVE_S if saves else 0)
        environment = self.environment | (
            {"TRITON_INTERPRET": "1"} if interpret and self.rehearse else {}
        )
        with log.open("w") as file, (log.with_suffix(".out")).open("w+") as answer:
            process = subprocess.Popen(
                line, cwd=ROOT, env=environment, stdout=answer, stderr=file,
                start_new_session=True,
            )  # fmt: skip
            is_late = not _wait(process, limit, until)
            if is_late or process.poll() is None:
                _end(process, politely=saves or until is not None)
            answer.seek(0)
            stdout = answer.read()
        log.with_suffix(".out").unlink()
        complaint = last_line(log)
        with log.open("a") as file:
            file.write(stdout)
        if is_late and not saves:
            raise OutOfTime(f"{name} took longer than {limit:.0f} s: {log.name}")
        code = process.returncode
        return self._answer(name, log, 0 if judges and code == 1 else code, stdout, complaint)

    def _answer(self, name: str, log: Path, code: int, stdout: str, complaint: str) -> dict:
        try:
            result = json.loads(stdout.splitlines()[-1])
            assert isinstance(result, dict)
        except (IndexError, ValueError, AssertionError):
            result = None
        if result is not None:  # a program that found a fault says what it found too
            self.found[name] = result
            self.write(ended=False)
        if code:
            raise StageFailed(f"{name} ended with {code}: {complaint}")
        if result is None:
            raise StageFailed(f"{name} printed no JSON line at its end: {complaint}")
        return result

    def pytest(self, name: str, *arguments: str) -> None:
        """Tests as a check: how many did not pass. Raises: StageFailed if none ran."""
        log = self.out / f"{self.stage}-{name}.log"
        # another machine's packages have warnings of their own: they are no failure here
        command = [
            sys.executable, "-m", "pytest", "-o", "junit_family=xunit2", "-o", "filterwarnings=",
            f"--junitxml={log.with_suffix('.xml')}", *arguments,
        ]  # fmt: skip
        limit = self.deadline - time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
            if not _wait(process, limit):
                _end(process, politely=False)
                raise OutOfTime(f"{name} took longer than {limit:.0f} s: {log.name}")
        report = log.with_suffix(".xml")
        if not report.exists():
            raise StageFailed(f"{name} ended with {process.returncode}: {last_line(log)}")
        counts = count_tests(report)
        self.found[name] = counts | {"exit_code": process.returncode}
        self.check(f"{name}: tests that ran", counts["ran"])
        self.check(f"{name}: tests that failed", counts["failed"], at_most=0)
        if counts["ran"] == 0 and not self.rehearse:
            raise StageFailed(f"{name}: no test ran: {last_line(log)}")


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
    import xml.etree.ElementTree as ET

    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped, failures, errors = (
        int(suite.get(key, 0)) for key in ("tests", "skipped", "failures", "errors")
    )
    return {"ran": total - skipped, "failed": failures + errors, "skipped": skipped}


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "nothing was printed")
