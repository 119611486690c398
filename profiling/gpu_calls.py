"""Brings the GPU suite to a machine without a network, in calls that carry a limited number of MB.

    python profiling/gpu_calls.py pack DEST --images DIR     here: DEST/1, DEST/2 ..., one a call
    python3 profiling/gpu_calls.py run CARRIED HOME RESULTS [flags of gpu_suite.py]    on the other
    python profiling/gpu_calls.py rehearse DEST --python PY  all calls here, in copies of the tree

Each call carries the working tree and one of the folders. `run` adds what came to HOME, which stays
from call to call, unpacks what is complete, and runs profiling/gpu_suite.py for what is left of the
call's minutes; figures and logs come back as RESULTS/figures.tar.xz, compiled code as cache.tar.xz.
After a machine was lost, put both into the next call's folder. docs/gpu_suite.md has the calls.
`run` needs nothing but Python: the packages that it brings are not installed yet.
"""

import root_first  # isort: skip # noqa: F401

import argparse
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pipeline.sources.paths import named_path
from pipeline.streams import print_result, protect_output

ROOT = Path(__file__).resolve().parent.parent
MB = 10**6
SPARE = MB // 2  # of each call: the protocol's own
PROGRAMS = ("jsonargparse", "typeshed_client", "docstring_parser", "pytorch-optimizer")
"""What a machine with PyTorch, pytest, rich, safetensors and scikit-learn may still lack. Those
that no requirement file names (jsonargparse[signatures] needs them) are taken at their newest."""
UNNEEDED = (
    "numpy*",
    "bin",
    "nvidia/libnvcomp/bin",
)  # installed already; programs; 9 MB of examples
PLACES = {"site": "programs dali", "images": "imagenet cifar10", "out": "figures cache"}
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
MOST_BACK = 16 * MB  # a file that comes back


def pins() -> dict[str, str]:
    """The versions that the requirement files name."""
    text = "\n".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    return dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)", text, re.MULTILINE))


def install(target: Path, python: str, packages: Iterable[str], *flags: str) -> None:
    """Put packages for another machine's Python into a folder."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(target)]
    command += ["--no-compile", "--no-warn-conflicts", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python]
    command += [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    subprocess.run([*command, *flags, *packages], check=True)


def prune(site: Path, python: str) -> None:
    """Remove what the other machine has, headers, and libraries for other versions of Python."""
    tag = f".cpython-{python.replace('.', '')}-"
    for pattern in (*UNNEEDED, "**/include", "**/__pycache__"):
        for path in list(site.glob(pattern)):
            shutil.rmtree(path)
    for path in site.rglob("*.cpython-*.so"):
        if tag not in path.name:
            path.unlink()


def archive(folder: Path, out: Path) -> Path:
    """A folder's content as .tar.xz, or .tar where images are compressed already."""
    if out.suffix == ".tar":
        with tarfile.open(out, "w") as tar:
            tar.add(folder, folder.name)
        return out
    # machine code is 4 % smaller after the x86 filter; not by xz, which not every image has
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 7}]
    with (
        lzma.open(out, "wb", filters=filters) as file,
        tarfile.open(fileobj=file, mode="w|") as tar,
    ):
        tar.add(folder, ".")
    return out


def cut(archives: list[Path], dest: Path, room: int) -> list[Path]:
    """The archives one after another into DEST/1, DEST/2 ..., `room` bytes each, as pieces.

    A piece is named NAME.tar.xz.2-of-3: it is complete once all have come, in any order.
    """
    begin = 0  # of an archive in all archives' bytes
    for path in archives:
        end = begin + path.stat().st_size
        calls = range(begin // room, -(-end // room))
        with path.open("rb") as file:
            for number, call in enumerate(calls, 1):
                folder = dest / str(call + 1)
                folder.mkdir(parents=True, exist_ok=True)
                data = file.read((call + 1) * room - begin - file.tell())
                (folder / f"{path.name}.{number}-of-{len(calls)}").write_bytes(data)
        begin = end
    return [dest / str(number + 1) for number in range(-(-begin // room))]


def tree() -> bytes:
    """The working tree's commit as a tar archive."""
    command = ["git", "archive", "HEAD"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout


def pack(dest: Path, images: Path | None, *, python: str, limit_mb: int, photos: int) -> list[Path]:
    """Download, pack and cut what the calls carry; their folders."""
    room, known = limit_mb * MB - SPARE - len(tree()), pins()
    with tempfile.TemporaryDirectory() as name:
        work, archives = Path(name), []
        own = [f"{p}=={known[p]}" if p in known else p for p in PROGRAMS]
        install(work / "programs", python, own, "--no-deps")
        dali = next(v for p, v in known.items() if p.startswith("nvidia-dali"))
        install(work / "dali", python, [f"nvidia-dali-cuda130=={dali}"])
        for part in ("programs", "dali"):
            prune(work / part, python)
            archives.append(archive(work / part, work / f"{part}.tar.xz"))
        if images is not None:
            folder = work / "imagenet"
            folder.mkdir()
            for path in sorted((images / "imagenet").iterdir())[:photos]:
                shutil.copy(path, folder)
            archives.append(archive(folder, work / "imagenet.tar"))
            shutil.copytree(images / "cifar10", work / "small" / "cifar10")
            archives.append(archive(work / "small", work / "cifar10.tar.xz"))
        if dest.exists():
            shutil.rmtree(dest)
        return cut(archives, dest, room)


def gather(carried: Path, home: Path) -> list[str]:
    """Keep what came, and unpack each archive that is complete; their names."""
    parts = home / "parts"
    shutil.copytree(carried, parts, dirs_exist_ok=True)
    archives: dict[str, list[Path]] = {}
    for path in sorted(parts.iterdir()):
        archives.setdefault(re.sub(r"\.\d+-of-\d+$", "", path.name), []).append(path)
    done = []
    for name, pieces in archives.items():
        total = int(pieces[0].name.rpartition("-of-")[2]) if pieces[0].name != name else 1
        if len(pieces) == total:
            pieces.sort(key=lambda path: int(path.name.removeprefix(name)[1:].split("-")[0] or 1))
            kind = name.split(".")[0]
            target = home / next(place for place, kinds in PLACES.items() if kind in kinds.split())
            target.mkdir(exist_ok=True)
            unpack(pieces, target)
            for piece in pieces:
                piece.unlink()
            done.append(name)
    return done


def unpack(pieces: list[Path], target: Path) -> None:
    """Unpack an archive that came in pieces."""
    whole = pieces[0].with_name("whole")
    with whole.open("wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    with tarfile.open(whole) as tar:
        # Python 3.11.3 and older have no filter; the archives are our own
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _path: member)
        tar.extractall(target)
    whole.unlink()


def bring_back(out: Path, results: Path) -> dict[str, int]:
    """Pack figures and logs, and compiled code, into RESULTS; bytes of each, 0 if too large."""
    results.mkdir(parents=True, exist_ok=True)
    figures = [path for path in out.iterdir() if path.is_file()]
    for kind in ("json", "jsonl", "txt", "yaml"):
        figures += out.glob(f"runs/*/*.{kind}")
    sizes = {}
    for name, paths in (("figures", figures), ("cache", [out / "cache"])):
        path = results / f"{name}.tar.xz"
        with tarfile.open(path, "w:xz", preset=1) as tar:
            for kept in paths:
                if kept.exists():
                    tar.add(kept, kept.relative_to(out))
        sizes[name] = path.stat().st_size
        if sizes[name] > MOST_BACK:
            path.unlink()
            sizes[name] = 0
    return sizes


def run(carried: Path, home: Path, results: Path, flags: list[str]) -> int:
    """A call, on the other machine; the suite's exit code."""
    done = gather(carried, home)
    print(f"unpacked: {', '.join(done) or 'nothing yet'}", file=sys.stderr, flush=True)
    paths = [str(home / "site"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    images = home / "images"
    images.mkdir(exist_ok=True)  # what needs them waits until they are in it
    command = [sys.executable, "profiling/gpu_suite.py", str(home / "out"), "--images", str(images)]
    code = subprocess.run([*command, *flags], cwd=ROOT, env=environment, check=False).returncode
    sizes = bring_back(home / "out", results)
    print_result({"exit_code": code, "unpacked": done, "bytes_back": sizes})
    return code


def rehearse(dest: Path, python: str, flags: list[str]) -> None:
    """Every call in a fresh copy of the tree, as a transfer would make it."""
    with tempfile.TemporaryDirectory() as name:
        copy, home, results = (Path(name) / part for part in ("tree", "home", "results"))
        for call in sorted(dest.iterdir(), key=lambda folder: int(folder.name)):
            shutil.rmtree(copy, ignore_errors=True)
            copy.mkdir()
            subprocess.run(["tar", "x"], cwd=copy, input=tree(), check=True)
            shutil.copytree(call, copy / "carried")
            size = sum(path.stat().st_size for path in copy.rglob("*") if path.is_file()) / MB
            print(f"call {call.name}: {size:.1f} MB with the tree", file=sys.stderr, flush=True)
            folders = ["carried", str(home), str(results)]
            command = [python, "profiling/gpu_calls.py", "run", *folders, "--rehearse", *flags]
            subprocess.run(command, cwd=copy, check=False)


def main() -> None:
    """Read the flags; pack, run or rehearse."""
    parser = argparse.ArgumentParser(description="Bring the GPU suite to a machine, in parts.")
    parts = parser.add_subparsers(dest="part", required=True)
    packing = parts.add_parser("pack", help="here: make the folders that the calls carry")
    packing.add_argument("dest", type=named_path)
    packing.add_argument("--images", type=named_path, help="folder with imagenet/ and cifar10/")
    packing.add_argument("--photos", type=int, default=400, help="of imagenet/, about 110 kB each")
    packing.add_argument("--python", default="3.12", help="version on the other machine")
    packing.add_argument("--mb", type=int, default=64, help="that a call may carry, with the tree")
    running = parts.add_parser("run", help="on the other machine: unpack what came, run the suite")
    for folder in ("carried", "home", "results"):
        running.add_argument(folder, type=named_path)
    rehearsing = parts.add_parser("rehearse", help="here: all calls, tiny")
    rehearsing.add_argument("dest", type=named_path)
    rehearsing.add_argument("--python", default=sys.executable, help="interpreter with torch")
    given, flags = parser.parse_known_args()
    if given.part == "run":
        folders = (given.carried.resolve(), given.home.resolve(), given.results.resolve())
        raise SystemExit(run(*folders, flags))
    if given.part == "rehearse":
        return rehearse(given.dest, given.python, flags)
    if flags:
        parser.error(f"unknown: {' '.join(flags)}")
    how = {"python": given.python, "limit_mb": given.mb, "photos": given.photos}
    calls = pack(given.dest, given.images, **how)
    sizes = {str(call): sum(p.stat().st_size for p in call.iterdir()) for call in calls}
    print_result({"tree_bytes": len(tree()), "calls": sizes})


if __name__ == "__main__":
    protect_output()
    main()
