"""How fast each rank decodes, sends to the next rank, and takes part in an all-reduce.

For train/doctor.py. A collective runs at the pace of its slowest link and cannot show which one
that is: each rank also sends to the next one, a pair at a time. Links within a machine are compared
with each other, and so are those between machines.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist

from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions
from pipeline.loader import Ranks, view_loader
from pipeline.order import SampleOrder
from pipeline.sources.folder import list_images
from pipeline.sources.reader import ImageReader
from train.distributed import World, from_main, gather

BUCKET = 25 << 20
"""Bytes of an all-reduce: a bucket of gradients of DistributedDataParallel."""
LINK = 4 << 20
ROUNDS = 5  # over all links, of each the fastest counts: a busy moment is no slow link
PHOTOS, BATCH, FILL = 64, 32, 2  # FILL batches before the clock starts
SLOW = 0.5
"""Share of the median below which a rank or link is called slow."""


def measure(world: World, seconds: float) -> list[dict[str, float]]:
    """The rates of all ranks, in order; in about `seconds`, and one more to write photos.

    decode_images_per_s; where there are several ranks all_reduce_gb_per_s, which is what nccl-tests
    calls bus bandwidth, and link_gb_per_s, to the next rank. GB are 1e9 bytes.
    """
    rates = {"decode_images_per_s": round(decode_rate(world, seconds / 2), 1)}
    if world.size > 1:
        rates["all_reduce_gb_per_s"] = round(all_reduce_rate(world, seconds / 2), 3)
        rates["link_gb_per_s"] = round(link_rate(world), 3)
    return gather(world, rates)


def decode_rate(world: World, seconds: float) -> float:
    """Images/s of the training's loader at 224 pixels while all ranks decode."""
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        write_photos(Path(folder))
        reader = ImageReader(list_images(folder))
        gather(world, None)  # all have written theirs
        order = SampleOrder(PHOTOS, batch_size=BATCH, seed=0)
        options = {"options": DecodeOptions(), "device": world.device}
        options |= {"views": [AugmentConfig()] * 2, "ranks": Ranks(local_size=world.local_size)}
        batches = iter(view_loader(reader, order, range(1 << 30), **options))
        for _ in range(FILL):
            next(batches)
        synchronize(world)
        begin, images = time.perf_counter(), 0
        while (spent := time.perf_counter() - begin) < seconds:
            images += len(next(batches).ids)
            synchronize(world)
        return images / spent


def write_photos(folder: Path) -> None:
    """Smooth noise as JPEGs of 500 x 375, about 100 kB each, as ImageNet's are."""
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        photo = cv2.resize(coarse, (500, 375), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        photo = np.clip(photo + rng.integers(-24, 25, photo.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number:02d}.jpg"), photo, [cv2.IMWRITE_JPEG_QUALITY, 80])


def all_reduce_rate(world: World, seconds: float) -> float:
    """GB/s of all-reduces for `seconds`. Raises: ValueError where a sum is wrong."""
    values = torch.empty(BUCKET // 4, device=world.device)

    def reduce() -> None:
        values.fill_(world.rank + 1)
        dist.all_reduce(values, group=world.group)

    reduce()  # connects
    count = from_main(world, max(1, int(seconds / seconds_of(reduce, world))))
    spent = seconds_of(lambda: [reduce() for _ in range(count)], world) / count
    wanted = world.size * (world.size + 1) / 2
    if not (values == wanted).all():
        raise ValueError(f"an all-reduce gave {values.min().item()}, not {wanted}: see NCCL_DEBUG")
    return 2 * (world.size - 1) / world.size * BUCKET / spent / 1e9


def link_rate(world: World) -> float:
    """GB/s from this rank to the next one; the other pairs wait meanwhile."""
    values, fastest = torch.zeros(LINK // 4, device=world.device), [float("inf")] * world.size
    for _ in range(1 + ROUNDS):  # the first one connects
        for sender in range(world.size):
            receiver = (sender + 1) % world.size
            gather(world, None)
            spent = 0.0
            if world.rank == sender:
                spent = seconds_of(lambda to=receiver: dist.send(values, to), world)
            elif world.rank == receiver:
                spent = seconds_of(lambda of=sender: dist.recv(values, of), world)
            fastest[sender] = min(fastest[sender], max(gather(world, spent)))
    return LINK / fastest[world.rank] / 1e9


def seconds_of(work: Callable[[], object], world: World) -> float:
    """Seconds of a call, the device's work included."""
    synchronize(world)
    begin = time.perf_counter()
    work()
    synchronize(world)
    return time.perf_counter() - begin


def synchronize(world: World) -> None:
    """Wait for the GPU, if there is one."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


Result = tuple[str, bool | None, str, str]
"""A check's name, whether it passed (None: not run), what was measured, the remedy."""


def judge(rates: list[dict[str, float]], hosts: list[str]) -> list[Result]:
    """Of the all-reduce and of decoding. hosts: of each rank."""
    names = [f"rank {rank} on {host}" for rank, host in enumerate(hosts)]
    return [judge_links(rates, hosts, names), judge_decoding(rates, names)]


def judge_decoding(rates: list[dict[str, float]], names: list[str]) -> Result:
    """Whether a rank decodes much slower than the others."""
    speeds = [rate["decode_images_per_s"] for rate in rates]
    slowest = int(np.argmin(speeds))
    measured = f"{sum(speeds):.0f} images/s"
    if len(rates) > 1:
        measured += f" over {len(rates)} ranks, slowest {names[slowest]}: {speeds[slowest]:.0f}"
    if speeds[slowest] >= SLOW * statistics.median_high(speeds):
        return "decode", True, measured, ""
    remedy = "stop other programs on its host, and give its ranks as many cores as the others have"
    return "decode", False, measured, remedy


def judge_links(rates: list[dict[str, float]], hosts: list[str], names: list[str]) -> Result:
    """Whether a rank's link to the next one is much slower than others of its kind."""
    if len(rates) == 1:
        return "all-reduce", None, "one rank: start it with torchrun", ""
    speeds = [rate["link_gb_per_s"] for rate in rates]
    is_near = [host == after for host, after in zip(hosts, hosts[1:] + hosts[:1], strict=True)]
    links = list(zip(names, speeds, is_near, strict=True))
    slow = [
        name
        for name, speed, near in links
        if speed < SLOW * statistics.median_high(s for _, s, kind in links if kind == near)
    ]
    slowest, reduced = int(np.argmin(speeds)), min(rate["all_reduce_gb_per_s"] for rate in rates)
    measured = (
        f"{reduced:.2f} GB/s over {len(rates)} ranks, slowest link {names[slowest]} to "
        f"{names[(slowest + 1) % len(names)]}: {speeds[slowest]:.2f} GB/s"
    )
    if not slow:
        return "all-reduce", True, measured, ""
    remedy = (
        f"{', '.join(slow)} sent at less than half of the others' speed: "
        "look at its network card, cable and switch port, and in NCCL_DEBUG=INFO at the transport"
    )
    return "all-reduce", False, measured, remedy
