"""Install in an image what the program needs and its base lacks; exchange nothing but DALI.

For the Dockerfile: python3 deploy/install.py requirements.txt; PIP_ARGS has more for pip.
Over a base without torch pip resolves the files as elsewhere. Over one with torch, NVIDIA's, pip
resolves nothing: what is there stays, in whatever version; what is missing is installed without its
requirements, then those of them that are missing. DALI is exchanged, with its own libraries, where
it is too old or of another CUDA than torch's.
A newcomer's mistake: keeping NVIDIA's constraint file (PIP_CONSTRAINT). It pins the DALI that has
to go. Here the versions before and after are compared instead.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import re
import subprocess
from importlib.metadata import distribution, distributions
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

from pipeline.machine import is_old, least

DALIS_OWN = re.compile(r"nvidia-(dali|nvimgcodec|nvjpeg|nvtiff|libnvcomp|nvcomp)")
ENVIRONMENT = os.environ | {
    "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_CONSTRAINT": "", "PIP_NO_CACHE_DIR": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}  # fmt: skip


def installed() -> dict[str, str]:
    """All versions by name; of two of one name the first in sys.path, which Python imports."""
    found: dict[str, str] = {}
    for one in distributions():
        found.setdefault(canonicalize_name(one.metadata["Name"]), one.version)
    return found


def pip(*arguments: str) -> None:
    """Run pip; where it fails it has said why."""
    words = [sys.executable, "-m", "pip", *arguments]
    if done := subprocess.run(words, env=ENVIRONMENT, check=False).returncode:
        sys.exit(done)


def pip_install(requirements: list[Requirement], *flags: str) -> None:
    """Install them with the user's arguments for pip."""
    for requirement in requirements:
        requirement.marker = None
    pip("install", *os.environ.get("PIP_ARGS", "").split(), *flags, *map(str, requirements))


def read(file: str) -> list[Requirement]:
    """The lines of a requirements file."""
    lines = Path(file).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def lacks(have: dict[str, str], requirement: Requirement) -> bool:
    """Whether it has to be installed: any version will do, but of DALI's own libraries.

    So will any OpenCV: NVIDIA's is named opencv, and all share the folder cv2.
    """
    version = have.get(name := canonicalize_name(requirement.name))
    if name.startswith("opencv-"):
        return not any(one.startswith("opencv") for one in have)
    if version is None or not DALIS_OWN.match(name):
        return version is None
    return not requirement.specifier.contains(version, prereleases=True)


def needs(requirement: Requirement) -> list[Requirement]:
    """What an installed package requires, with the extras that are asked for."""
    lines = distribution(requirement.name).requires or []
    return [
        one
        for one in map(Requirement, lines)
        if one.marker is None
        or any(one.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras))
    ]


def complete(wanted: list[Requirement]) -> None:
    """Install what is missing of them, then what is missing of its requirements, and so on."""
    while wanted:
        have = installed()
        missing = {r.name: r for r in wanted if lacks(have, r)}
        if missing:
            pip_install(list(missing.values()), "--no-deps")
        wanted = [one for r in wanted if r.name in missing or r.extras for one in needs(r)]


def exchange_dali(pinned: Requirement) -> None:
    """Have one DALI, of torch's CUDA and not too old."""
    code = "import torch; print(torch.version.cuda or '')"
    cuda = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    major = cuda.stdout.strip().split(".")[0]
    name = f"nvidia-dali-cuda{major}0" if major else pinned.name
    found = {one: v for one, v in installed().items() if one.startswith("nvidia-dali-")}
    if list(found) == [name] and not is_old("DALI", found[name]):
        return
    if found:
        print(f"DALI is exchanged: {found} for {name}{pinned.specifier}")
        pip("uninstall", "--yes", *found)
    complete([Requirement(f"{name}{pinned.specifier}")])


def main(files: list[str]) -> None:
    """Install what the files ask for, tell what stays as it is, refuse what else has changed."""
    brought = installed()
    wanted = [one for file in files for one in read(file)]
    dali = next((one for one in wanted if one.name.startswith("nvidia-dali-")), None)
    wanted = [one for one in wanted if one is not dali]
    if "torch" not in brought:
        pip_install([one for one in wanted if lacks(brought, one)])
    elif is_old("torch", brought["torch"]):
        sys.exit(f"error: the base's torch {brought['torch']} is older than {least('torch')}: "
                 "take a newer --build-arg BASE_IMAGE")  # fmt: skip
    else:
        for one in wanted:
            version = brought.get(canonicalize_name(one.name))
            if version and not one.specifier.contains(version, prereleases=True):
                print(
                    f"stays as the base has it: {one.name} {version}, {one.specifier} is asked for"
                )
        complete(wanted)
    if dali is not None:
        exchange_dali(dali)
    now = installed()
    changed = [
        f"{name} {version} -> {now.get(name, 'none')}"
        for name, version in sorted(brought.items())
        if now.get(name) != version
        and not DALIS_OWN.match(name)
        and name != "setuptools"  # Debian's stays where it is, beside the newer one of torch
    ]
    if changed:
        sys.exit(f"error: packages of the base were exchanged: {', '.join(changed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
