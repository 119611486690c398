"""Whether cost grows linearly: `python profiling/growth.py --save growth`.

    images    seconds an image of the loader over folders of 1,000 to 50,000 images
    batch     the same for batches of 32 to 256
    list      a folder of as many files as ImageNet: scanning it, opening the list that ranks get
    memory    resident memory of the loader after each of three epochs

The folders are hard links to the photos of --data.root, made in a temporary folder and removed.
A newcomer's mistake: a small folder. What goes wrong with a million files shows with a million.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import json
import pickle
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from measure.harness import open_images, read_flags, with_batch
from measure.loader_times import ours
from measure.results import save_json
from measure.turns import take_turns
from pipeline.sources.folder import ImageFolder, list_images
from pipeline.sources.reader import ImageReader
from train import distributed
from train.config import Config
from train.distributed import World
from train.run.folder import environment
from train.run.program import refuse

IMAGENET_IMAGES = 1_281_167
FOLDERS = 1000
COUNTS, BATCHES = (1_000, 10_000, 50_000), (32, 64, 128, 256)
OPEN_LIST = """
import pickle, sys, time
sys.path.insert(0, sys.argv[2])
import pipeline.sources.folder
begin = time.perf_counter()
folder = pickle.loads(open(sys.argv[1], "rb").read())
seconds = time.perf_counter() - begin
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(folder), seconds, int(peak.split()[1]) / 2**20)
"""


def link_folder(reader: ImageReader, folder: Path, count: int) -> Path:
    """A folder of `count` links to the images of `reader`, in class folders."""
    source = reader.source
    files = [os.path.join(source.root, source.name(i)) for i in range(len(source))]
    per_folder = -(-count // min(FOLDERS, count))
    for index in range(count):
        number, place = divmod(index, per_folder)
        if place == 0:
            (folder / f"n{number:04d}").mkdir(parents=True)
        os.link(files[index % len(files)], folder / f"n{number:04d}" / f"{index}.jpg")
    return folder


def rates_over(
    readers: dict[str, tuple[ImageReader, Config]], world: World, *, images: int, n: int
) -> dict[str, dict]:
    """ms an image of our loader over several folders or batch sizes, taking turns."""
    variants = {
        name: ours(reader, config, world, steps=images // config.data.batch_size)
        for name, (reader, config) in readers.items()
    }
    found = take_turns(variants, images=images, warmup=1, n=n, budget_s=float("inf"), world=world)
    return {
        name: {"not_measured": timing.not_measured} if timing.not_measured is not None
        else {"ms_per_image": round(1e3 / timing.rate(), 4), "n": n, "images": images}
        for name, timing in found.items()
    }  # fmt: skip


def open_list(folder: Path, target: Path) -> dict:
    """Seconds to scan a folder, and seconds and GiB to open its pickled list in a new process."""
    begin = time.perf_counter()
    found = list_images(str(folder))
    scan_s = time.perf_counter() - begin
    target.write_bytes(pickle.dumps(found))
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", OPEN_LIST, str(target), root],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    count, open_s, gib = done.stdout.split()
    return {
        "entries": int(count),
        "scan_s": round(scan_s, 2),
        "open_s": round(float(open_s), 3),
        "open_peak_gib": round(float(gib), 3),
        "list_mb": round(target.stat().st_size / 1e6, 1),
    }


def resident_gib() -> float:
    """Memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**30


def measure_growth(config: Config, reader: ImageReader, world: World, *, n: int, images: int,
                   entries: int = IMAGENET_IMAGES) -> dict:  # fmt: skip
    """All four parts."""
    found: dict = {}
    images -= images % max(BATCHES)  # whole batches of each size
    # on the file system of the images: a hard link cannot leave it
    with tempfile.TemporaryDirectory(dir=Path(reader.source.root).parent) as temporary:
        parent, middle = Path(temporary), with_batch(config, 64)
        print("folders of", *COUNTS, "images ...", file=sys.stderr, flush=True)
        linked = {
            str(count): ImageReader(
                list_images(str(link_folder(reader, parent / str(count), count)))
            )
            for count in COUNTS
        }
        folders = {name: (one, middle) for name, one in linked.items()}
        found["images"] = rates_over(folders, world, images=images, n=n)
        print("batches of", *BATCHES, "...", file=sys.stderr, flush=True)
        largest = linked[str(max(COUNTS))]
        sizes = {str(batch): (largest, with_batch(config, batch)) for batch in BATCHES}
        found["batch"] = rates_over(sizes, world, images=images, n=n)
        print("three epochs ...", file=sys.stderr, flush=True)
        epoch = ours(linked[str(min(COUNTS))], middle, world, steps=min(COUNTS) // 64)
        held = []
        for _ in range(4):  # the first fills pools and caches
            epoch()
            held.append(round(resident_gib(), 4))
        found["memory_gib"] = held[1:]
        print(f"{entries} files ...", file=sys.stderr, flush=True)
        folder = link_folder(reader, parent / "all", entries)
        found["list"] = open_list(folder, parent / "list.pickle")
    for part in ("images", "batch"):
        times = [one["ms_per_image"] for one in found[part].values() if "n" in one]
        found[f"{part}_slowest_by_fastest"] = round(max(times) / min(times), 3)
    found["memory_growth"] = round(max(found["memory_gib"]) / min(found["memory_gib"]) - 1, 4)
    return found


def main() -> None:
    """Read the flags, measure, print one JSON line."""
    config, m = read_flags("profiling/growth.py", "Measure how cost grows.")
    try:
        with distributed.start(config.device, config) as world:
            if world.size > 1:
                raise ValueError("profiling/growth.py measures one process: start it with python")
            reader = open_images(config, world)
            if not isinstance(reader.source, ImageFolder):
                raise ValueError("profiling/growth.py links files: give it a folder, not shards")
            m = m.filled(torch.device(world.device))
            if m.loader_images < max(BATCHES):
                raise ValueError(
                    f"--loader_images {m.loader_images} is less than a batch of {max(BATCHES)}, "
                    "the largest that is measured: raise it"
                )
            found = measure_growth(config, reader, world, n=m.repeats, images=m.loader_images)
            found |= {"n": m.repeats, "environment": environment(world.size, world.device)}
    except (ValueError, OSError) as error:
        refuse(str(error), code=1)
    if m.save:
        found["files"] = [save_json(m.save, found)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
