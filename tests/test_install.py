"""deploy/install.py over small stand-ins for a base image: a venv with wheels of a few lines."""

import importlib.util
import shutil
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OLD = "2.10.0a0+b4e4ee81d3.nv25.12"
NVIDIAS = "2.13.0a0+9186a08b2c.nv26.7.59513937"
CODEC = "nvidia-nvimgcodec-cu13"


def wheel(folder: Path, name: str, version: str, *requires: str, code: str = "") -> None:
    """Write a wheel: one module, and what it requires."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    extras = "Provides-Extra: all\nProvides-Extra: signatures\n"
    needs = extras + "".join(f"Requires-Dist: {line}\n" for line in requires)
    files = {
        f"{module}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)


class Base:
    """An image's Python: what it has, and what an index would offer."""

    def __init__(self, folder: Path):
        self.folder, self.wheels = folder, folder / "wheels"
        self.wheels.mkdir()
        venv.create(folder / "venv")
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = (folder / "venv" / "lib").glob("*/site-packages")
        # this Python's pip: not every system has ensurepip
        (pip,) = importlib.util.find_spec("pip").submodule_search_locations
        shutil.copytree(pip, self.site / "pip")
        self.first = set(self.site.iterdir())
        cuda = "class version: cuda = '13.3'"
        wheel(self.wheels, "torch", NVIDIAS, "numpy>=2", code=cuda)
        wheel(self.wheels, "torch", OLD, code=cuda)
        wheel(self.wheels, "torch", "2.13.0", "numpy>=2", code=cuda)
        wheel(self.wheels, "numpy", "1.26.4")
        wheel(self.wheels, "numpy", "2.4.6")
        wheel(self.wheels, "nvidia-dali-cuda130", "1.53.0", f"{CODEC}[all]<0.8,>=0.7")
        for cuda_major in (120, 130):
            wheel(
                self.wheels, f"nvidia-dali-cuda{cuda_major}", "2.4.0", "numpy", "makefun",
                f"{CODEC}[all]<0.10,>=0.9",
            )  # fmt: skip
        for version in ("0.7.0", "0.9.0"):
            wheel(self.wheels, CODEC, version, 'nvidia-nvjpeg; extra == "all"')
        for name in ("nvidia-nvjpeg", "makefun", "typeshed-client"):
            wheel(self.wheels, name, "1.0")
        wheel(
            self.wheels, "jsonargparse", "4.53.0", "numpy>=2",
            'typeshed-client; extra == "signatures"',
        )  # fmt: skip

    def has(self, **versions: str) -> None:
        """Make it an image with these packages alone."""
        for path in set(self.site.iterdir()) - self.first:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for module, version in versions.items():
            with zipfile.ZipFile(self.wheels / f"{module}-{version}-py3-none-any.whl") as file:
                file.extractall(self.site)

    def install(self, *lines: str) -> tuple[int, str, dict[str, str]]:
        """Run deploy/install.py: its exit code, what it said and which versions there are then."""
        (self.folder / "requirements.txt").write_text("# a comment\n" + "\n".join(lines))
        constraint = self.folder / "constraint.txt"
        constraint.write_text("nvidia-dali-cuda130==1.53.0\njsonargparse==4.0.0\n")
        done = subprocess.run(
            [self.python, ROOT / "deploy/install.py", self.folder / "requirements.txt"],
            env={"PIP_CONSTRAINT": str(constraint), "PIP_ARGS": f"--no-index -f {self.wheels} -q"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        names = [path.name.removesuffix(".dist-info") for path in self.site.glob("*.dist-info")]
        return done.returncode, done.stdout + done.stderr, dict(name.split("-") for name in names)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Base(tmp_path_factory.mktemp("base"))


WANTED = ("torch==2.13.0", "numpy==2.4.6", "nvidia-dali-cuda120==2.4.0", "jsonargparse[signatures]")


def test_over_nvidias_torch_dali_alone_is_replaced_and_what_is_missing_added(base):
    base.has(
        torch=NVIDIAS, numpy="1.26.4", nvidia_dali_cuda130="1.53.0",
        nvidia_nvimgcodec_cu13="0.7.0", nvidia_nvjpeg="1.0",
    )  # fmt: skip
    code, said, now = base.install(*WANTED)
    assert code == 0, said
    assert now["torch"] == NVIDIAS and now["numpy"] == "1.26.4"  # though jsonargparse wants 2
    assert now["nvidia_dali_cuda130"] == "2.4.0" and "nvidia_dali_cuda120" not in now
    assert now["nvidia_nvimgcodec_cu13"] == "0.9.0"
    assert {"jsonargparse", "typeshed_client", "makefun"} <= set(now)
    assert "stays as the base has it: numpy 1.26.4, ==2.4.6 is asked for" in said.splitlines()


def test_a_dali_of_another_cuda_than_torchs_goes(base):
    base.has(torch=NVIDIAS, numpy="2.4.6", nvidia_dali_cuda120="2.4.0", makefun="1.0")
    code, said, now = base.install("nvidia-dali-cuda120==2.4.0")
    assert code == 0, said
    assert now["nvidia_dali_cuda130"] == "2.4.0" and "nvidia_dali_cuda120" not in now


def test_a_base_with_an_older_torch_is_refused_in_one_line(base):
    base.has(torch=OLD)
    code, said, now = base.install(*WANTED)
    (line,) = said.splitlines()
    assert code == 1 and f"torch {OLD} is older than 2.11" in line
    assert "BASE_IMAGE" in line and "jsonargparse" not in now


def test_over_a_base_without_torch_pip_resolves_and_an_replaced_package_is_refused(base):
    base.has(numpy="1.26.4")
    code, said, now = base.install(*WANTED)
    assert now["torch"] == "2.13.0" and now["nvidia_dali_cuda130"] == "2.4.0"
    assert code == 1 and said.splitlines()[-1] == (
        "error: packages of the base were replaced: numpy 1.26.4 -> 2.4.6"
    )


def test_python_reaches_the_bases_entry_point_with_flags_or_a_program_of_its_own(tmp_path):
    """With and without the base's entry point; each exec keeps the process."""
    script = (ROOT / "deploy" / "entrypoint.sh").read_text()
    nvidias = tmp_path / "nvidia_entrypoint.sh"
    entry = tmp_path / "entrypoint.sh"
    entry.write_text(script.replace("/opt/nvidia/nvidia_entrypoint.sh", str(nvidias)))
    python3 = tmp_path / "python3"
    python3.write_text('#!/bin/sh\necho "$COMPAT $$ $*"\n')
    python3.chmod(0o755)

    def run(*words: str) -> str:
        process = subprocess.Popen(
            ["sh", entry, *words], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, text=True,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        out = process.communicate(timeout=20)[0]
        return out.replace(str(process.pid), "PID")

    assert run("--epochs", "a b") == " PID train/main.py --epochs a b\n"
    nvidias.write_text('#!/bin/sh\necho banner\nexport COMPAT=enabled\nexec "$@"\n')
    nvidias.chmod(0o755)
    assert run("--epochs", "1") == "banner\nenabled PID train/main.py --epochs 1\n"
    assert run("python3", "train/doctor.py") == "banner\nenabled PID train/doctor.py\n"
