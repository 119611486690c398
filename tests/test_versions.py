"""The least torch and DALI are the same everywhere and refused in one line; hardware decoders."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline import machine
from pipeline.graph import DecodeOptions, decode_arguments
from pipeline.machine import is_old, least
from train import main
from train.run import versions

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_versions_are_compared_as_numbers_and_nvidias_builds_count_as_their_release():
    for version in ("2.13.0a0+9186a08b2c.nv26.07", "2.11.0a0+a6c236b9fd.nv26.3.46836102", "3.0"):
        assert not is_old("torch", version)
    assert is_old("torch", "2.10.0a0+b4e4ee81d3.nv25.12") and is_old("torch", "2.9.1")
    assert is_old("DALI", "1.53.0") and is_old("DALI", "2.2.0")
    assert not is_old("DALI", "2.3.0") and not is_old("DALI", "2.10.0")


def test_the_requirements_are_new_enough_and_the_readme_names_the_least():
    pinned = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "requirements.txt").read_text(), re.M))
    assert not is_old("torch", pinned["torch"])
    assert not is_old("DALI", pinned["nvidia-dali-cuda120"])
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"torch {least('torch')} and DALI {least('DALI')} or newer" in readme


@pytest.mark.parametrize(
    ("package", "version", "remedy"),
    [
        ("torch", "2.10.0a0+b4e4ee81d3.nv25.12", "a newer base image"),
        ("DALI", "1.53.0", "pip install 'nvidia-dali-cuda130>=2.3'"),
    ],
)
def test_training_with_an_older_torch_or_dali_is_refused_in_one_line(
    monkeypatch, tmp_path, capsys, package, version, remedy
):
    if package == "torch":
        monkeypatch.setattr(versions.torch, "__version__", version)
    else:
        monkeypatch.setattr(machine, "dali_version", lambda: (version, 12))
    monkeypatch.setattr(torch.version, "cuda", "13.3")
    out = tmp_path / "run"
    command = ["main.py", "--data.root=digits", "--device=cpu", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        main.main.__wrapped__()  # without torch's @record, which wants a real stderr
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and not out.exists()
    assert line.startswith(f"error: {package} {version} is older than {least(package)}: ")
    assert remedy in line
    finding = versions.torch_build() if package == "torch" else versions.dali()
    assert finding.ok is False and remedy in finding.remedy and version in finding.found


def test_no_decoder_is_built_with_a_dali_that_lacks_its_arguments(monkeypatch):
    monkeypatch.setattr(machine, "dali_version", lambda: ("2.2.0", 12))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"DALI 2.2.0 .*'nvidia-dali-cuda120>=2.3'"):
        decode_arguments(DecodeOptions(), capability=None, threads=1)


STUB = """
int nvjpegCreateEx(int backend, void *a, void *b, unsigned flags, void **handle) {
    if (backend != 3 || a || b || flags) return 2;
    *handle = (void *)0x123456789abc;
    return %(status)d;
}
int nvjpegGetHardwareDecoderInfo(void *handle, unsigned *engines, unsigned *cores) {
    if (handle != (void *)0x123456789abc) return 2;
    *engines = %(engines)d; *cores = 1;
    return 0;
}
int nvjpegDestroy(void *handle) { return 0; }
"""


@pytest.mark.parametrize(
    ("status", "engines", "says"),
    [
        (0, 7, "7 engines in hardware, cores each: 1"),
        (7, 0, "none in hardware (nvJPEG's status 7): CUDA decodes, on the SMs"),
        (0, 0, "none in hardware (nvJPEG's status 0): CUDA decodes, on the SMs"),
    ],
)
def test_the_doctor_says_which_hardware_decoders_nvjpeg_found(
    monkeypatch, tmp_path, status, engines, says
):
    compiler = shutil.which("cc") or shutil.which("c++")
    assert compiler, "a C++ compiler is among this project's needs"
    library = tmp_path / "libnvjpeg.so"
    subprocess.run(
        [compiler, "-xc", "-", "-shared", "-o", str(library)],
        input=STUB % {"status": status, "engines": engines}, text=True, check=True,
    )  # fmt: skip
    monkeypatch.setattr(machine, "nvjpeg_path", lambda: str(library))
    monkeypatch.setattr(machine, "NVCUVID", str(library))
    finding = versions.jpeg_decoders(CUDA)
    assert finding.ok is True and finding.found == says
    assert versions.jpeg_decoders(CPU).ok is None


def test_a_container_without_the_video_driver_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(machine, "NVCUVID", "libno-such-driver.so.1")
    finding = versions.jpeg_decoders(CUDA)
    assert finding.ok is False and "libno-such-driver.so.1" in finding.found
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in finding.remedy


def test_nvjpeg_is_the_one_that_nvimagecodec_loads():
    major = machine.dali_version()[1]
    path = Path(machine.nvjpeg_path())
    assert path.exists() and path.name == f"libnvjpeg.so.{major}"
