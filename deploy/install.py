"""Install in an image what the program needs and its base lacks; replace nothing but DALI.

For the Dockerfile: python3 deploy/install.py requirements.txt; PIP_ARGS adds arguments for pip.
Over a base without torch pip resolves the files as usual. Over one with torch, NVIDIA's, pip
resolves nothing: installed packages stay, in whatever version; missing ones are installed without
their requirements, then the missing ones of those. DALI and its own libraries are replaced if it is
too old or of another CUDA than torch's. NVIDIA's constraint file (PIP_CONSTRAINT) is ignored: it
pins the DALI to replace. The versions before and after are compared instead.
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
ENVIRONMENT = os.environ | {"PIP_CONSTRAINT": "", "PIP_BREAK_SYSTEM_PACKAGES": "1"}
ENVIRONMENT |= {"PIP_NO_CACHE_DIR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def installed() -> dict[str, str]:
    """All versions by name; of two of one name the first in sys.path, which Python imports."""
    versions: dict[str, str] = {}
    for package in distributions():
        versions.setdefault(canonicalize_name(package.metadata["Name"]), package.version)
    return versions


def pip(*arguments: str) -> None:
    """Run pip; exit with its code where it fails."""
    words = [sys.executable, "-m", "pip", *arguments]
    if code := subprocess.run(words, env=ENVIRONMENT, check=False).returncode:
        sys.exit(code)


def pip_install(requirements: list[Requirement], *flags: str) -> None:
    """Install them with the user's arguments for pip."""
    for requirement in requirements:
        requirement.marker = None
    pip("install", *os.environ.get("PIP_ARGS", "").split(), *flags, *map(str, requirements))


def lacks(have: dict[str, str], requirement: Requirement) -> bool:
    """Whether it has to be installed: any version will do, except of DALI's own libraries.

    So will any OpenCV: NVIDIA's is named opencv, and all share the folder cv2.
    """
    version = have.get(name := canonicalize_name(requirement.name))
    if name.startswith("opencv-"):
        return not any(package.startswith("opencv") for package in have)
    if version is None or not DALIS_OWN.match(name):
        return version is None
    return not requirement.specifier.contains(version, prereleases=True)


def needs(requirement: Requirement) -> list[Requirement]:
    """What an installed package requires, with the extras that are asked for."""
    extras = ("", *requirement.extras)
    return [
        need
        for need in map(Requirement, distribution(requirement.name).requires or [])
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def complete(wanted: list[Requirement]) -> None:
    """Install the missing ones, then the missing ones of their requirements, and so on."""
    while wanted:
        have = installed()
        missing = {r.name: r for r in wanted if lacks(have, r)}
        if missing:
            pip_install(list(missing.values()), "--no-deps")
        wanted = [need for r in wanted if r.name in missing or r.extras for need in needs(r)]


def replace_dali(pinned: Requirement) -> None:
    """Have one DALI, of torch's CUDA and not too old."""
    code = "import torch; print(torch.version.cuda or '')"
    cuda = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    major = cuda.stdout.strip().split(".")[0]
    name = f"nvidia-dali-cuda{major}0" if major else pinned.name
    present = {n: v for n, v in installed().items() if n.startswith("nvidia-dali-")}
    if list(present) == [name] and not is_old("DALI", present[name]):
        return
    if present:
        print(f"DALI is replaced: {present} by {name}{pinned.specifier}")
        pip("uninstall", "--yes", *present)
    complete([Requirement(f"{name}{pinned.specifier}")])


def main(files: list[str]) -> None:
    """Install what the files ask for, list what stays as it is, refuse other changes."""
    base = installed()
    lines = [line for file in files for line in Path(file).read_text().splitlines()]
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    dali = [r for r in wanted if r.name.startswith("nvidia-dali-")]
    wanted = [r for r in wanted if r not in dali]
    if "torch" not in base:
        pip_install([r for r in wanted if lacks(base, r)])
    elif is_old("torch", base["torch"]):
        old = f"the base's torch {base['torch']} is older than {least('torch')}"
        sys.exit(f"error: {old}: take a newer --build-arg BASE_IMAGE")
    else:
        for r in wanted:
            version = base.get(canonicalize_name(r.name))
            if version and not r.specifier.contains(version, prereleases=True):
                print(f"stays as the base has it: {r.name} {version}, {r.specifier} is asked for")
        complete(wanted)
    for pinned in dali:
        replace_dali(pinned)
    now = installed()
    # setuptools: Debian's stays, beside the newer one of torch
    changed = [
        f"{name} {version} -> {now.get(name, 'none')}"
        for name, version in sorted(base.items())
        if now.get(name) != version and not DALIS_OWN.match(name) and name != "setuptools"
    ]
    if changed:
        sys.exit(f"error: packages of the base were replaced: {', '.join(changed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
