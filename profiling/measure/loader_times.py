"""Images/s of the loader alone, its stages, and of two peers that do the same recipe.

torchvision: the official code's PIL transforms in a DataLoader with a worker for each core.
dali_example: DALI as NVIDIA's examples use it: its file reader, a decode for each view, separate
colour operators, fp32 NCHW out.
A repetition starts a loader, leaves out its first batches and times the rest to the last one; what
is in flight then is dropped before the next variant begins. Ours has a queue of batches that were
read and one of batches that DALI is at, each --dali.prefetch long, which fill while the first batch
is made: those are left out, and on a GPU at least 100 batches are timed. When the clock starts ours
and torchvision, with 2 batches a worker, are as full as later; dali_example is so at the end too.
A newcomer's mistake: timing next(loader) of a full queue.
"""

# DALI makes its operators at import, where pyright cannot see them:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageFilter

from measure.peers import import_torchvision
from measure.turns import Repetition, Timing, seconds_of, take_turns
from pipeline import graph
from pipeline.augment import AugmentConfig, ViewDraws, draw_views, draws_in_graph
from pipeline.color_blur import finish_views
from pipeline.decode import DecodeOptions, capability_of, decode_arguments
from pipeline.loader import DaliLoader, Ranks, num_threads, view_loader
from pipeline.machine import usable_cores
from pipeline.order import SampleOrder
from pipeline.sources.folder import ImageFolder
from pipeline.sources.reader import ImageReader
from train.config import Config
from train.distributed import World

MIN_CUDA_STEPS = 100  # batches of a repetition on a GPU: nine in flight at its start are 9 % of it
RESERVING = (
    "device_memory_padding", "host_memory_padding", "preallocate_width_hint",
    "preallocate_height_hint",
)  # fmt: skip
STAGES = ("read", "decode", "crop", "color", "blur")


def endless_order(reader: ImageReader, config: Config, world: World) -> tuple[SampleOrder, int]:
    """An order whose global batch fits the images, and this rank's images a batch."""
    batch = min(config.data.batch_size, len(reader.source)) // world.size * world.size
    order = SampleOrder(len(reader.source), batch_size=max(world.size, batch), seed=config.seed)
    return order, order.batch_size // world.size


def open_loader(
    reader: ImageReader, order: SampleOrder, config: Config, world: World, steps: range
) -> DaliLoader:
    """This rank's loader of training over `steps`."""
    return view_loader(
        reader, order, steps, views=config.views, options=config.dali, device=world.device,
        ranks=Ranks(world.rank, world.size, world.local_size),
    )  # fmt: skip


def num_filling(config: Config, device: torch.device) -> int:
    """Batches before the clock starts: those of both queues, the one in hand and the first."""
    return 2 * config.dali.depth(device.type) + 2


def seconds_after_filling(batches: Iterator, filling: int, world: World) -> float:
    """Seconds after `filling` batches. All ranks begin at once, for their rates are added."""
    for _ in range(filling):
        next(batches)
    if world.size > 1:
        dist.barrier(group=world.host_group)
    return seconds_of(lambda: [None for _ in batches], world.device)


def ours(reader: ImageReader, config: Config, world: World, *, steps: int) -> Repetition:
    """Our loader over `steps` batches."""
    order, _ = endless_order(reader, config, world)
    filling = num_filling(config, world.device)
    begin = 0

    def repeat() -> float:
        nonlocal begin
        loader = open_loader(reader, order, config, world, range(begin, begin + filling + steps))
        begin += filling + steps
        return seconds_after_filling(iter(loader), filling, world)

    return repeat


class OfficialViews(torch.utils.data.Dataset):
    """Two views by the official code's transforms. Source: facebookresearch/simsiam @a7bc177."""

    def __init__(self, reader: ImageReader, config: Config):
        t = import_torchvision().transforms
        a = config.augment
        jitter = t.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
        steps: list[Any] = [
            t.RandomResizedCrop(a.size, scale=a.scale, ratio=a.ratio),
            t.RandomApply([jitter], p=a.jitter),
            t.RandomGrayscale(p=a.gray),
        ]
        if a.blur:
            steps.append(t.RandomApply([PilBlur(a.blur_sigma)], p=a.blur))
        steps += [t.RandomHorizontalFlip(a.flip), t.ToTensor(),
                  t.Normalize(config.data.mean, config.data.std)]  # fmt: skip
        self.transform, self.source = t.Compose(steps), reader.source

    def __len__(self) -> int:
        """Images of the folder."""
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two views (3, S, S), fp32, normalised."""
        image = Image.open(io.BytesIO(self.source.read(index).tobytes())).convert("RGB")
        return self.transform(image), self.transform(image)


class PilBlur:
    """The official GaussianBlur: PIL's, of a random radius."""

    def __init__(self, sigma: tuple[float, float]):
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """The blurred image."""
        low, high = self.sigma
        return image.filter(ImageFilter.GaussianBlur(low + (high - low) * torch.rand(()).item()))


def torchvision_loader(
    reader: ImageReader, config: Config, world: World, *, steps: int, workers: int
) -> Repetition:
    """The DataLoader over `steps` batches; its workers stay between repetitions."""
    _, rows = endless_order(reader, config, world)
    rng, filling = np.random.default_rng(config.seed), num_filling(config, world.device)
    sampler: list[int] = []
    loader = torch.utils.data.DataLoader(
        OfficialViews(reader, config), batch_size=rows, sampler=sampler, num_workers=workers,
        persistent_workers=True, pin_memory=world.device.type == "cuda",
        multiprocessing_context="fork",  # torchvision, once imported, is in the workers too
    )  # fmt: skip

    def repeat() -> float:
        sampler[:] = (int(i) for i in rng.integers(0, len(reader.source), (filling + steps) * rows))

        batches = ([v.to(world.device, non_blocking=True) for v in views] for views in loader)
        return seconds_after_filling(batches, filling, world)

    return repeat


def dali_example(reader: ImageReader, config: Config, world: World, *, steps: int) -> Repetition:
    """DALI's own reader, two decodes, colour_twist, fp32 NCHW: over `steps` batches."""
    _, rows = endless_order(reader, config, world)
    device_id = None if world.device.type == "cpu" else world.device.index
    files = [
        os.path.join(reader.source.root, reader.source.name(i)) for i in range(len(reader.source))
    ]
    a, threads = (
        config.augment,
        num_threads(config.dali, local_world=world.local_size, device=world.device),
    )
    capability = capability_of(device_id)
    arguments = decode_arguments(config.dali, capability=capability, threads=threads)
    # NVIDIA's examples reserve too; without, a GPU would allocate within what is timed
    reserved = {name: arguments[name] for name in RESERVING if name in arguments}

    @pipeline_def(
        batch_size=rows,
        num_threads=threads,
        device_id=device_id,
        enable_conditionals=True,
        prefetch_queue_depth=2,
        seed=config.seed,
    )
    def example():
        jpegs, _ = fn.readers.file(files=files, random_shuffle=True, name="reader")
        return tuple(example_view(jpegs, a, config, device_id, reserved) for _ in config.views)

    def repeat() -> float:
        pipeline = example()
        pipeline.build()
        filling = num_filling(config, world.device)
        batches = (pipeline.run() for _ in range(filling + steps))
        return seconds_after_filling(batches, filling, world)

    return repeat


def example_view(
    jpegs: Any, a: AugmentConfig, config: Config, device_id: int | None, reserved: dict[str, int]
) -> Any:
    """One view as in NVIDIA's examples. Source: docs/examples of NVIDIA/DALI; solo-learn's DALI."""
    view = fn.decoders.image_random_crop(
        jpegs, device="cpu" if device_id is None else "mixed", output_type=types.RGB,
        random_area=list(a.scale), random_aspect_ratio=list(a.ratio), **reserved,
    )  # fmt: skip
    view = fn.resize(view, size=(a.size, a.size), interp_type=types.INTERP_LINEAR, antialias=True)
    if fn.random.coin_flip(probability=a.jitter, dtype=types.BOOL):
        view = fn.color_twist(
            view,
            brightness=fn.random.uniform(range=(1 - a.brightness, 1 + a.brightness)),
            contrast=fn.random.uniform(range=(1 - a.contrast, 1 + a.contrast)),
            saturation=fn.random.uniform(range=(1 - a.saturation, 1 + a.saturation)),
            hue=fn.random.uniform(range=(-360 * a.hue, 360 * a.hue)),
        )
    if fn.random.coin_flip(probability=a.gray, dtype=types.BOOL):
        view = fn.hsv(view, saturation=0.0)
    if a.blur and fn.random.coin_flip(probability=a.blur, dtype=types.BOOL):
        view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=a.blur_sigma))
    return fn.crop_mirror_normalize(
        view, dtype=types.FLOAT, output_layout="CHW",
        mirror=fn.random.coin_flip(probability=a.flip),
        mean=[255 * m for m in config.data.mean], std=[255 * s for s in config.data.std],
    )  # fmt: skip


def measure_loader(
    reader: ImageReader, config: Config, world: World, *, peers: bool, n: int, budget_s: float,
    images: int,
) -> dict[str, Timing]:  # fmt: skip
    """Our loader and, with `peers`, the others, taking turns."""
    _, rows = endless_order(reader, config, world)
    steps = max(MIN_CUDA_STEPS if world.device.type == "cuda" else 1, images // rows)
    variants = {"ours": ours(reader, config, world, steps=steps)}
    missing: dict[str, str] = {}
    if peers:
        if importlib.util.find_spec("torchvision") is None:
            missing["torchvision"] = "not installed: pip install --no-deps torchvision"
        else:
            workers = max(1, usable_cores() // world.local_size)
            variants["torchvision"] = torchvision_loader(
                reader, config, world, steps=steps, workers=workers
            )
        if isinstance(reader.source, ImageFolder):
            variants["dali_example"] = dali_example(reader, config, world, steps=steps)
        else:
            missing["dali_example"] = "it reads the files of a folder, and these are shards"
    found = take_turns(variants, images=steps * rows, warmup=1, n=n, budget_s=budget_s, world=world)
    return found | {name: Timing(0, not_measured=why) for name, why in missing.items()}


def measure_stages(
    reader: ImageReader, config: Config, world: World, *, n: int, images: int = 128
) -> dict[str, dict]:
    """Milliseconds an image of each stage: what it adds to the stages before it.

    Each runs alone over the same images, on this rank's threads; `read` is from the file system's
    cache after the first time.
    """
    _, rows = endless_order(reader, config, world)
    rows = min(rows, images)
    ids = np.arange(rows)
    placed = [image for image in reader.read_all(ids) if image is not None]
    encoded, sizes = [p[0] for p in placed], np.array([p[1] for p in placed])
    rng = np.random.default_rng(config.seed)
    whole = slice(0, len(placed))
    draws = draw_views(config.views, rng, sizes, whole, len(placed))
    options, threads = (
        config.dali,
        num_threads(config.dali, local_world=world.local_size, device=world.device),
    )
    runs: dict[str, Callable[[], object]] = {"read": lambda: reader.read_all(ids)}
    for name, run in dali_stages(encoded, draws, config.views, options, threads, world.device):
        runs[name] = run
    if world.device.type == "cpu":
        crops = [np.array(output.as_array()) for output in runs["crop"]()]  # type: ignore[union-attr] - DALI's outputs
        out = [np.empty_like(crop) for crop in crops]
        sharp = [replace(draw, sigma=np.zeros_like(draw.sigma)) for draw in draws]
        pool = ThreadPoolExecutor(threads)
        runs["color"] = lambda: finish_views(crops, sharp, out, pool=pool)
        if config.augment.blur:
            runs["blur"] = lambda: finish_views(crops, draws, out, pool=pool)
    timed = {name: (lambda run=run: seconds_of(run, world.device)) for name, run in runs.items()}
    found = take_turns(timed, images=len(placed), warmup=1, n=n, budget_s=float("inf"), world=world)
    total = {name: 1e3 / timing.rate() for name, timing in found.items()}
    order = [name for name in STAGES if name in total]
    restarts = {"read", "decode", "color"} if world.device.type == "cpu" else {"read", "decode"}
    return {
        name: {"ms_per_image": round(
            total[name] - (0 if name in restarts else total[order[at - 1]]), 4), "n": n}
        for at, name in enumerate(order)
    }  # fmt: skip


def dali_stages(
    encoded: list, draws: list[ViewDraws], views: list[AugmentConfig], options: DecodeOptions,
    threads: int, device: torch.device,
) -> Iterator[tuple[str, Callable[[], object]]]:  # fmt: skip
    """(name, call) of the stages that are DALI's on this device: decode, crop, and on a GPU all."""
    device_id = None if device.type == "cpu" else device.index
    capability = capability_of(device_id)
    decode = decode_arguments(options, capability=capability, threads=threads)

    @pipeline_def(
        batch_size=len(encoded), num_threads=threads, device_id=device_id, prefetch_queue_depth=1
    )
    def decoding():
        data = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(data, **decode)

    stages: list[tuple[str, Any, list[list[str]]]] = [("decode", decoding(), [])]
    sharp = [replace(view, blur=0.0) for view in views]
    kinds = [("crop", False, sharp)]
    if device.type == "cuda":
        kinds += [("color", True, sharp)] + [("blur", True, views)] * any(v.blur for v in views)
    for name, colors, kind in kinds:
        pipeline = graph.build_view_pipeline(
            options, kind, batch_size=len(encoded), prefetch=1, num_threads=threads,
            device_id=device_id, colors=colors,
        )  # fmt: skip
        stages.append((name, pipeline, [draws_in_graph(v, colors=colors) for v in kind]))
    for name, pipeline, names in stages:
        pipeline.build()

        def run(pipeline=pipeline, names=names) -> object:
            pipeline.feed_input("encoded", encoded)
            for number, taken in enumerate(names):
                for name in taken:
                    pipeline.feed_input(f"{name}_{number}", getattr(draws[number], name))
            return pipeline.run()

        yield name, run
