"""oneDNN's convolutions compute what they should, whatever instructions the CPU has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{}, AVX2], ids=["this CPU", "AVX2"])
def test_every_convolution_agrees_with_double_precision(setting):
    done = subprocess.run(
        [sys.executable, "tests/convolutions.py"], cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False, env=os.environ | setting,
    )  # fmt: skip
    wrong = [line for line in done.stdout.splitlines()[1:] if ": right" not in line]
    assert done.returncode == 0 and not wrong, (wrong, done.stderr[-2000:])
    if setting:
        assert done.stdout.startswith("AVX2")
