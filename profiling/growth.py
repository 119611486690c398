"""Whether cost grows linearly: `python profiling/growth.py --save growth`.

    images    seconds an image of the loader over folders of 1,000 to 50,000 images
    batch     the same for batches of 32 to 256
    list      a folder of as many files as ImageNet: scanning it, opening the list that ranks get
    memory    resident memory of the loader after each of three epochs

The folders are hard links to the photos of --data.root, made in a temporary folder and removed.
"""

import root_first  # isort: skip # noqa: F401

import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure.harness import open_images, read_flags, with_batch
from measure.loader_times import ours
from measure.results import ROOT, errors_in_one_line, save_and_print
from measure.turns import take_turns
from pipeline.sources.folder import ImageFolder, list_images
from pipeline.sources.reader import ImageReader
from pipeline.streams import protect_output
from train import distributed
from train.config import Config
from train.distributed import World
from train.run.folder import environment

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
    rows = {}
    for name, timing in take_turns(variants, images=images, n=n, world=world).items():
        rows[name] = timing.summary()
        if timing.not_measured is None:
            rows[name] = {"ms_per_image": round(1e3 / timing.rate(), 4), "n": n, "images": images}
    return rows


def open_list(folder: Path, target: Path) -> dict:
    """Seconds to scan a folder, and seconds and GiB to open its pickled list in a new process."""
    begin = time.perf_counter()
    images = list_images(str(folder))
    scan_s = time.perf_counter() - begin
    target.write_bytes(pickle.dumps(images))
    command = [sys.executable, "-c", OPEN_LIST, str(target), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
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


def say(*words: object) -> None:
    """Progress, on stderr."""
    print(*words, "...", file=sys.stderr, flush=True)


def measure_growth(
    config: Config, reader: ImageReader, world: World, *, n: int, images: int
) -> dict:
    """All four parts."""
    result: dict = {}
    images -= images % max(BATCHES)  # whole batches of each size
    # on the file system of the images: a hard link cannot leave it
    with tempfile.TemporaryDirectory(dir=Path(reader.source.root).parent) as temporary:
        parent, middle = Path(temporary), with_batch(config, 64)
        say("folders of", *COUNTS, "images")
        linked = {
            count: ImageReader(list_images(str(link_folder(reader, parent / str(count), count))))
            for count in COUNTS
        }
        folders = {str(count): (folder, middle) for count, folder in linked.items()}
        result["images"] = rates_over(folders, world, images=images, n=n)
        say("batches of", *BATCHES)
        largest = linked[max(COUNTS)]
        sizes = {str(batch): (largest, with_batch(config, batch)) for batch in BATCHES}
        result["batch"] = rates_over(sizes, world, images=images, n=n)
        say("three epochs")
        epoch = ours(linked[min(COUNTS)], middle, world, steps=min(COUNTS) // 64)
        held = []
        for _ in range(4):  # the first fills pools and caches
            epoch()
            held.append(round(resident_gib(), 4))
        result["memory_gib"] = held[1:]
        say(IMAGENET_IMAGES, "files")
        folder = link_folder(reader, parent / "all", IMAGENET_IMAGES)
        result["list"] = open_list(folder, parent / "list.pickle")
    for part in ("images", "batch"):
        times = [row["ms_per_image"] for row in result[part].values() if "n" in row]
        result[f"{part}_slowest_by_fastest"] = round(max(times) / min(times), 3)
    result["memory_growth"] = round(max(held[1:]) / min(held[1:]) - 1, 4)
    return result


def main() -> None:
    """Read the flags, measure, print one JSON line."""
    config, m = read_flags("profiling/growth.py", "Measure how cost grows.")
    with errors_in_one_line(), distributed.start(config.device, config) as world:
        if world.size > 1:
            raise ValueError("profiling/growth.py measures one process: start it with python")
        reader = open_images(config, world)
        if not isinstance(reader.source, ImageFolder):
            raise ValueError("profiling/growth.py links files: give it a folder, not shards")
        m = m.filled(world.device)
        if m.loader_images < max(BATCHES):
            raise ValueError(
                f"--loader_images {m.loader_images} is less than a batch of {max(BATCHES)}, "
                "the largest that is measured: raise it"
            )
        result = measure_growth(config, reader, world, n=m.repeats, images=m.loader_images)
        result |= {"n": m.repeats, "environment": environment(world.size, world.device)}
    save_and_print(result, m.save)


if __name__ == "__main__":
    protect_output()
    main()
