"""A test that hangs, or whose processes do, ends with the stacks of all threads."""

import os
import subprocess
import sys
import time
from pathlib import Path

from limits import TO_REPORT_S, descendants

ROOT = Path(__file__).parent.parent
SPIN = "import ctypes; ctypes.CDLL(None).pause()"  # in C: no signal handler of Python's would run
HANGS = f"""
import ctypes, subprocess, sys, threading

def waiting_thread():
    ctypes.CDLL(None).pause()

def test_hangs_in_c():
    threading.Thread(target=waiting_thread, daemon=True).start()
    ctypes.CDLL(None).pause()

def test_waits_for_a_process():
    code = "def stuck():\\n    {SPIN}\\nstuck()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
"""


def run_pytest(folder: Path, name: str, *, limit_s: float) -> subprocess.CompletedProcess:
    """The tests' own settings and fixtures over one of the tests in HANGS."""
    (folder / "test_hangs.py").write_text(HANGS)
    words = [f"{folder}/test_hangs.py", "-k", name, "-p", "conftest", f"--rootdir={folder}",
             "-c", f"{ROOT}/pyproject.toml", "-o", f"faulthandler_timeout={limit_s}"]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )  # fmt: skip


def test_a_test_that_hangs_in_c_ends_with_the_stacks_of_all_threads(tmp_path):
    done = run_pytest(tmp_path, "in_c", limit_s=3)
    assert done.returncode == 1
    assert "in test_hangs_in_c" in done.stderr and "in waiting_thread" in done.stderr


def test_a_process_that_hangs_is_ended_with_its_stacks_before_its_test_is(tmp_path):
    done = run_pytest(tmp_path, "for_a_process", limit_s=TO_REPORT_S + 3)
    assert done.returncode == 1 and "1 failed" in done.stdout
    assert "Fatal Python error: Aborted" in done.stdout and "in stuck" in done.stdout


def test_every_test_has_a_limit(request):
    assert 0 < float(request.config.getini("faulthandler_timeout")) <= 600


def test_grandchildren_are_descendants():
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])"
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        limit = time.monotonic() + 30
        while len(found := descendants(child.pid)) < 1 and time.monotonic() < limit:
            time.sleep(0.01)
        assert found and set(found) < set(descendants(os.getpid()))
    finally:
        child.kill()
        for pid in found:
            os.kill(pid, 9)
        child.wait(10)
