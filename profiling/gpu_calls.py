"""Brings the GPU suite to a machine without a network that takes so many MB at a time.

    python profiling/gpu_calls.py pack DEST --images DIR     here: DEST/1, DEST/2 ..., one a call
    python3 profiling/gpu_calls.py run CARRIED HOME RESULTS [flags of gpu_suite.py]      there
    python profiling/gpu_calls.py rehearse DEST --python PY  all calls here, in copies of the tree

Each call carries the working tree and one of the folders. `run` adds what came to HOME, which stays
from call to call, unpacks what is complete, and runs profiling/gpu_suite.py for what is left of the
call's minutes; figures and logs come back as RESULTS/figures.tar.xz, compiled code as cache.tar.xz.
A machine that was lost takes both back: lay them into the next call's folder. docs/gpu_suite.md has
the calls. `run` needs nothing but Python: the packages that it brings are not there yet.
A newcomer's mistake: packing for this machine's Python. --python names that of the other one.
"""

import argparse
import json
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

ROOT = Path(__file__).resolve().parent.parent
MB = 10**6
SPARE = MB // 2  # of each call: the protocol's own
PROGRAMS = ("jsonargparse", "typeshed_client", "docstring_parser", "pytorch-optimizer")
"""What a machine with PyTorch, pytest, rich, safetensors and scikit-learn may still lack. Those
that no requirement file names (jsonargparse[signatures] needs them) are taken at their newest."""
UNNEEDED = ("numpy*", "bin", "nvidia/libnvcomp/bin")  # there already; programs; 9 MB of examples
PLACES = {
    "programs": "site", "dali": "site", "imagenet": "images", "cifar10": "images",
    "figures": "out", "cache": "out",
}  # fmt: skip
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
MOST_BACK = 16 * MB  # a file that comes back


def pins() -> dict[str, str]:
    """The versions that the requirement files name."""
    text = "\n".join(path.read_text() for path in ROOT.glob("requirements*.txt"))
    return dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)", text, re.MULTILINE))


def install(target: Path, python: str, packages: Iterable[str], *flags: str) -> None:
    """Put packages for another machine's Python into a folder."""
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", str(target), "--no-compile",
         "--no-warn-conflicts", "--only-binary=:all:", "--implementation", "cp",
         "--python-version", python, *platforms, *flags, *packages], check=True,
    )  # fmt: skip


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
    """The archives one behind the other into DEST/1, DEST/2 ..., `room` bytes each, as pieces.

    A piece is named NAME.tar.xz.2-of-3: it is complete once all have come, in any order.
    """
    pieces: list[tuple[int, Path, int, int]] = []  # call, archive, its first and last byte
    call, left = 1, room
    for path in archives:
        size, begin = path.stat().st_size, 0
        while begin < size:
            if not left:
                call, left = call + 1, room
            end = min(size, begin + left)
            pieces.append((call, path, begin, end))
            begin, left = end, left - (end - begin)
    for path in archives:
        own = [piece for piece in pieces if piece[1] == path]
        for number, (call, _, begin, end) in enumerate(own, 1):
            folder = dest / str(call)
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read(end - begin)
            (folder / f"{path.name}.{number}-of-{len(own)}").write_bytes(data)
    return [dest / str(number) for number in range(1, call + 1)]


def tree_bytes() -> int:
    """What the working tree itself takes of a call."""
    return len(subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True,
                              capture_output=True).stdout)  # fmt: skip


def pack(dest: Path, images: Path | None, *, python: str, limit_mb: int, photos: int) -> list[Path]:
    """Download, pack and cut what the calls carry; their folders."""
    room, known = limit_mb * MB - SPARE - tree_bytes(), pins()
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
            (work / "small" / "cifar10").mkdir(parents=True)
            shutil.copytree(images / "cifar10", work / "small" / "cifar10", dirs_exist_ok=True)
            archives.append(archive(work / "small", work / "cifar10.tar.xz"))
        if dest.exists():
            shutil.rmtree(dest)
        return cut(archives, dest, room)


def gather(carried: Path, home: Path) -> list[str]:
    """Keep what came, and unpack each archive that is complete; their names."""
    (home / "parts").mkdir(parents=True, exist_ok=True)
    for path in carried.iterdir():
        shutil.copy(path, home / "parts")
    done = []
    for first in sorted((home / "parts").iterdir()):
        name = re.sub(r"\.\d+-of-\d+$", "", first.name)
        total = int(first.name.rpartition("-of-")[2]) if name != first.name else 1
        pieces = [home / "parts" / f"{name}.{n}-of-{total}" for n in range(1, total + 1)]
        pieces = pieces if name != first.name else [first]
        if name in done or not all(piece.exists() for piece in pieces):
            continue
        target = home / PLACES[name.split(".")[0]]
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
    small = [p for p in out.iterdir() if p.is_file()]
    runs = [
        p for name in ("*.json", "*.jsonl", "*.txt", "*.yaml") for p in out.glob(f"runs/*/{name}")
    ]
    found = {}
    for name, paths in (("figures", [*small, *runs]), ("cache", [out / "cache"])):
        path = results / f"{name}.tar.xz"
        with tarfile.open(path, "w:xz", preset=1) as tar:
            for one in paths:
                if one.exists():
                    tar.add(one, one.relative_to(out))
        found[name] = path.stat().st_size
        if found[name] > MOST_BACK:
            path.unlink()
            found[name] = 0
    return found


def run(carried: Path, home: Path, results: Path, flags: list[str]) -> int:
    """One call, on the other machine; the suite's exit code."""
    done = gather(carried, home)
    print(f"unpacked: {', '.join(done) or 'nothing yet'}", file=sys.stderr, flush=True)
    where = [str(home / "site"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, where))}
    (home / "images").mkdir(exist_ok=True)  # what needs them waits until they are in it
    command = [sys.executable, "profiling/gpu_suite.py", str(home / "out"),
               "--images", str(home / "images"), *flags]  # fmt: skip
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    sizes = bring_back(home / "out", results)
    print(json.dumps({"exit_code": code, "unpacked": done, "bytes_back": sizes}))
    return code


def rehearse(dest: Path, python: str, flags: list[str]) -> None:
    """Every call in a copy of the tree, which is made anew as a transfer would."""
    calls = sorted(dest.iterdir(), key=lambda folder: int(folder.name))
    with tempfile.TemporaryDirectory() as name:
        home, there = Path(name) / "home", Path(name) / "tree"
        for call in calls:
            shutil.rmtree(there, ignore_errors=True)
            there.mkdir()
            tar = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True,
                                 capture_output=True).stdout  # fmt: skip
            subprocess.run(["tar", "x"], cwd=there, input=tar, check=True)
            shutil.copytree(call, there / "carried")
            size = sum(path.stat().st_size for path in there.rglob("*") if path.is_file())
            print(
                f"call {call.name}: {size / MB:.1f} MB with the tree", file=sys.stderr, flush=True
            )
            subprocess.run(
                [python, "profiling/gpu_calls.py", "run", "carried", str(home),
                 str(Path(name) / "results"), "--rehearse", *flags], cwd=there, check=False,
            )  # fmt: skip


def main() -> None:
    """Read the flags; pack, run or rehearse."""
    parser = argparse.ArgumentParser(description="Bring the GPU suite to a machine, in parts.")
    parts = parser.add_subparsers(dest="part", required=True)
    packing = parts.add_parser("pack", help="here: make the folders that the calls carry")
    packing.add_argument("dest", type=Path)
    packing.add_argument("--images", type=Path, help="folder with imagenet/ and cifar10/")
    packing.add_argument("--photos", type=int, default=400, help="of imagenet/, about 110 kB each")
    packing.add_argument("--python", default="3.12", help="version there")
    packing.add_argument("--mb", type=int, default=64, help="that a call may carry, with the tree")
    running = parts.add_parser("run", help="there: unpack what came, run the suite")
    for folder in ("carried", "home", "results"):
        running.add_argument(folder, type=Path)
    rehearsing = parts.add_parser("rehearse", help="here: all calls, tiny")
    rehearsing.add_argument("dest", type=Path)
    rehearsing.add_argument("--python", default=sys.executable, help="interpreter with torch")
    arguments, flags = parser.parse_known_args()
    if arguments.part == "run":
        carried, home, results = (
            path.resolve() for path in (arguments.carried, arguments.home, arguments.results)
        )
        raise SystemExit(run(carried, home, results, flags))
    if arguments.part == "rehearse":
        return rehearse(arguments.dest, arguments.python, flags)
    if flags:
        parser.error(f"unknown: {' '.join(flags)}")
    calls = pack(arguments.dest, arguments.images, python=arguments.python,
                 limit_mb=arguments.mb, photos=arguments.photos)  # fmt: skip
    sizes = {str(call): sum(p.stat().st_size for p in call.iterdir()) for call in calls}
    print(json.dumps({"tree_bytes": tree_bytes(), "calls": sizes}))


if __name__ == "__main__":
    main()
