"""Images/s of the loader alone, its stages, and of two peers that do the same recipe.

torchvision: the official code's PIL transforms in a DataLoader with a worker for each core.
dali_example: DALI as NVIDIA's examples use it: its file reader, a decode for each view, separate
colour operators, fp32 NCHW out.
A repetition starts a loader, leaves out its first batches and times the rest to the last one; what
is in flight then is dropped before the next variant begins. Ours has two queues, of batches that
were read and of batches that DALI works on, each --dali.prefetch long, which fill while the first
batch is made: those are left out, and on a GPU at least 100 batches are timed. When the clock
starts ours and torchvision, with 2 batches a worker, are as full as later; dali_example is at the
end too. Timing next(loader) of a full queue would measure nothing.
"""

# DALI makes its operators at import, where pyright cannot see them:
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from PIL import Image, ImageFilter

from kernels.normalize import finish_views as finish_on_device
from measure.harness import MeasureConfig
from measure.peers import import_torchvision, missing
from measure.turns import Repetition, Timing, seconds_of, take_turns
from pipeline import graph
from pipeline.augment import ViewDraws, draw_views, pack_draws
from pipeline.color_blur import finish_views
from pipeline.decode import capability_of, decode_arguments
from pipeline.loader import Ranks, num_threads, view_loader
from pipeline.machine import usable_cores
from pipeline.order import SampleOrder
from pipeline.sources.folder import ImageFolder
from pipeline.sources.reader import ImageReader
from train.config import Config
from train.distributed import World

MIN_CUDA_STEPS = 100  # batches of a repetition on a GPU: nine in flight at its start are 9 % of it
STAGES = ("read", "decode", "crop", "color", "blur")


def endless_order(reader: ImageReader, config: Config, world: World) -> tuple[SampleOrder, int]:
    """An order whose global batch fits the images, and this rank's images a batch."""
    batch = min(config.data.batch_size, len(reader.source)) // world.size * world.size
    order = SampleOrder(len(reader.source), batch_size=max(world.size, batch), seed=config.seed)
    return order, order.batch_size // world.size


def num_filling(config: Config, device: torch.device) -> int:
    """Batches before the clock starts: those of both queues, the one in hand and the first."""
    return 2 * config.dali.depth(device.type) + 2


class OurLoader:
    """Training's loader, opened for one range of steps after another."""

    def __init__(self, reader: ImageReader, config: Config, world: World):
        self.reader, self.config, self.world = reader, config, world
        self.order, self.rows = endless_order(reader, config, world)
        self.num_filling, self.next_step = num_filling(config, world.device), 0

    def next_batches(self, number: int) -> Iterator:
        """The batches of the next `number` steps."""
        steps = range(self.next_step, self.next_step + number)
        self.next_step += number
        world, config = self.world, self.config
        ranks = Ranks(world.rank, world.size, world.local_size)
        how = {"views": config.views, "options": config.dali, "device": world.device}
        return iter(view_loader(self.reader, self.order, steps, ranks=ranks, **how))


def seconds_after_filling(batches: Iterator, filling: int, world: World) -> float:
    """Seconds after `filling` batches. All ranks begin at once, for their rates are added."""
    for _ in range(filling):
        next(batches)
    if world.size > 1:
        dist.barrier(group=world.host_group)
    return seconds_of(lambda: [None for _ in batches], world.device)


def ours(reader: ImageReader, config: Config, world: World, *, steps: int) -> Repetition:
    """Our loader over `steps` batches, whose views are finished, as the peers' are."""
    loader = OurLoader(reader, config, world)
    filling = loader.num_filling

    def finished() -> Iterator:
        for batch in loader.next_batches(filling + steps):
            yield finish_on_device(batch.images, batch.draws)
            if batch.small is not None:
                finish_on_device(batch.small, batch.small_draws)

    return lambda: seconds_after_filling(finished(), filling, world)


class OfficialViews(torch.utils.data.Dataset):
    """Two views by the official code's transforms. Source: facebookresearch/simsiam @a7bc177."""

    def __init__(self, reader: ImageReader, config: Config):
        t, a = import_torchvision().transforms, config.augment
        jitter = t.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)
        steps: list[Any] = [
            t.RandomResizedCrop(a.size, scale=a.scale, ratio=a.ratio),
            t.RandomApply([jitter], p=a.jitter),
            t.RandomGrayscale(p=a.gray),
        ]
        if a.blur:
            steps.append(t.RandomApply([PilBlur(a.blur_sigma)], p=a.blur))
        steps += [t.RandomHorizontalFlip(a.flip), t.ToTensor()]
        steps += [t.Normalize(config.data.mean, config.data.std)]
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
    reader: ImageReader, config: Config, world: World, *, steps: int
) -> Repetition:
    """The DataLoader over `steps` batches; its workers stay between repetitions."""
    _, rows = endless_order(reader, config, world)
    rng, filling = np.random.default_rng(config.seed), num_filling(config, world.device)
    sampler: list[int] = []
    loader = torch.utils.data.DataLoader(
        OfficialViews(reader, config),
        batch_size=rows,
        sampler=sampler,
        num_workers=max(1, usable_cores() // world.local_size),
        persistent_workers=True,
        pin_memory=world.device.type == "cuda",
        multiprocessing_context="fork",  # torchvision, once imported, is in the workers too
    )

    def repeat() -> float:
        sampler[:] = rng.integers(0, len(reader.source), (filling + steps) * rows).tolist()
        batches = ([v.to(world.device, non_blocking=True) for v in views] for views in loader)
        return seconds_after_filling(batches, filling, world)

    return repeat


def dali_example(reader: ImageReader, config: Config, world: World, *, steps: int) -> Repetition:
    """DALI's own reader, two decodes, colour_twist, fp32 NCHW: over `steps` batches."""
    source, filling = reader.source, num_filling(config, world.device)
    files = [os.path.join(source.root, source.name(i)) for i in range(len(source))]
    common = dali_options(config, world, prefetch_queue_depth=2)
    # NVIDIA's examples reserve too; without, a GPU would allocate within what is timed
    decode = decoding_arguments(config, common)
    reserved = {k: v for k, v in decode.items() if "padding" in k or k.startswith("preallocate")}
    _, rows = endless_order(reader, config, world)

    @pipeline_def(batch_size=rows, enable_conditionals=True, seed=config.seed, **common)
    def example():
        jpegs, _ = fn.readers.file(files=files, random_shuffle=True, name="reader")
        return tuple(example_view(jpegs, config, world.device, reserved) for _ in config.views)

    def repeat() -> float:
        pipeline = example()
        pipeline.build()
        batches = (pipeline.run() for _ in range(filling + steps))
        return seconds_after_filling(batches, filling, world)

    return repeat


def dali_options(config: Config, world: World, **more: int) -> dict[str, Any]:
    """num_threads and device_id of a pipeline on this rank's device."""
    threads = num_threads(config.dali, local_world=world.local_size, device=world.device)
    device_id = None if world.device.type == "cpu" else world.device.index
    return {"num_threads": threads, "device_id": device_id, **more}


def decoding_arguments(config: Config, common: dict[str, Any]) -> dict[str, Any]:
    """Our arguments of fn.decoders.image for a pipeline of dali_options."""
    capability = capability_of(common["device_id"])
    return decode_arguments(config.dali, capability=capability, threads=common["num_threads"])


def example_view(jpegs: Any, config: Config, device: torch.device, reserved: dict[str, int]) -> Any:
    """One view as in NVIDIA's examples. Source: docs/examples of NVIDIA/DALI; solo-learn's DALI."""
    a, uniform = config.augment, fn.random.uniform

    def happens(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    view = fn.decoders.image_random_crop(
        jpegs,
        device="cpu" if device.type == "cpu" else "mixed",
        output_type=types.RGB,
        random_area=list(a.scale),
        random_aspect_ratio=list(a.ratio),
        **reserved,
    )
    view = fn.resize(view, size=(a.size, a.size), interp_type=types.INTERP_LINEAR, antialias=True)
    if happens(a.jitter):
        view = fn.color_twist(
            view,
            brightness=uniform(range=(1 - a.brightness, 1 + a.brightness)),
            contrast=uniform(range=(1 - a.contrast, 1 + a.contrast)),
            saturation=uniform(range=(1 - a.saturation, 1 + a.saturation)),
            hue=uniform(range=(-360 * a.hue, 360 * a.hue)),
        )
    if happens(a.gray):
        view = fn.hsv(view, saturation=0.0)
    if a.blur and happens(a.blur):
        view = fn.gaussian_blur(view, sigma=uniform(range=a.blur_sigma))
    scaled = {name: [255 * v for v in getattr(config.data, name)] for name in ("mean", "std")}
    flip = fn.random.coin_flip(probability=a.flip)
    floats = {"dtype": types.FLOAT, "output_layout": "CHW"}
    return fn.crop_mirror_normalize(view, mirror=flip, **floats, **scaled)


def measure_loader(
    reader: ImageReader, config: Config, m: MeasureConfig, world: World
) -> dict[str, Timing]:
    """Our loader and, with m.peers, the others, taking turns. m: filled."""
    _, rows = endless_order(reader, config, world)
    steps = max(MIN_CUDA_STEPS if world.device.type == "cuda" else 1, m.loader_images // rows)
    variants = {"ours": ours(reader, config, world, steps=steps)}
    skipped: dict[str, str] = {}
    if m.peers:
        if (reason := missing("torchvision")) is not None:
            skipped["torchvision"] = reason
        else:
            variants["torchvision"] = torchvision_loader(reader, config, world, steps=steps)
        if isinstance(reader.source, ImageFolder):
            variants["dali_example"] = dali_example(reader, config, world, steps=steps)
        else:
            skipped["dali_example"] = "it reads the files of a folder, and these are shards"
    timings = take_turns(
        variants, images=steps * rows, n=m.repeats, budget_s=m.budget_s, world=world
    )
    return timings | {name: Timing(0, not_measured=why) for name, why in skipped.items()}


def measure_stages(
    reader: ImageReader, config: Config, world: World, *, n: int, images: int = 128
) -> dict[str, dict]:
    """Milliseconds an image of each stage: what it adds to the stages before it.

    Each runs alone over the same images, on this rank's threads; `read` is from the file system's
    cache after the first time.
    """
    _, rows = endless_order(reader, config, world)
    ids = np.arange(min(rows, images))
    placed = [image for image in reader.read_all(ids) if image is not None]
    encoded, sizes = [p[0] for p in placed], np.array([p[1] for p in placed])
    rng, whole = np.random.default_rng(config.seed), slice(0, len(placed))
    draws = draw_views(config.views, rng, sizes, whole, len(placed))
    runs: dict[str, Callable[[], Any]] = {"read": lambda: reader.read_all(ids)}
    inputs = {"encoded": encoded}
    for number, draw in enumerate(draws):
        inputs |= {f"roi_start_{number}": draw.roi_start, f"roi_end_{number}": draw.roi_end}
    runs |= dali_stages(inputs, config, world)
    sharp = [replace(draw, sigma=np.zeros_like(draw.sigma)) for draw in draws]
    runs["color"] = finishing(runs["crop"](), sharp, config, world)
    if any(view.blur for view in config.views):
        runs["blur"] = finishing(runs["crop"](), draws, config, world)
    timed = {name: (lambda run=run: seconds_of(run, world.device)) for name, run in runs.items()}
    timings = take_turns(timed, images=len(placed), n=n, world=world)
    total = {name: 1e3 / timings[name].rate() for name in STAGES if name in timings}
    alone = {"read", "decode", "color"}  # the stages that do not contain the one before them
    previous = dict(zip(list(total)[1:], total.values(), strict=False))
    return {
        name: {"ms_per_image": round(ms - (0 if name in alone else previous[name]), 4), "n": n}
        for name, ms in total.items()
    }


def dali_stages(
    inputs: dict[str, Any], config: Config, world: World
) -> dict[str, Callable[[], Any]]:
    """The stages that are DALI's: decode, crop. inputs: of the training graph."""
    rows = len(inputs["encoded"])
    common = dali_options(config, world)
    decode = decoding_arguments(config, common)

    @pipeline_def(batch_size=rows, prefetch_queue_depth=1, **common)
    def decoding():
        data = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(data, **decode)

    def stage(pipeline: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
        pipeline.build()

        def run() -> Any:
            for name, values in inputs.items():
                pipeline.feed_input(name, values)
            return pipeline.run()

        return run

    cropping = graph.build_view_pipeline(
        config.dali, config.views, batch_size=rows, prefetch=1, **common
    )
    return {
        "decode": stage(decoding(), {"encoded": inputs["encoded"]}),
        "crop": stage(cropping, inputs),
    }


def finishing(
    outputs: Sequence[Any], draws: Sequence[ViewDraws], config: Config, world: World
) -> Callable[[], Any]:
    """What follows the crops that DALI has made: OpenCV on the CPU, the kernels on a GPU."""
    if world.device.type == "cpu":
        crops = [np.array(output.as_array()) for output in outputs]
        out = [np.empty_like(crop) for crop in crops]
        pool = ThreadPoolExecutor(dali_options(config, world)["num_threads"])
        return lambda: finish_views(crops, draws, out, pool=pool)
    packed = torch.from_numpy(pack_draws(config.views, draws)).to(world.device)
    images = []
    for output in outputs:
        tensor = output.as_tensor()
        images.append(torch.empty(tensor.shape(), dtype=torch.uint8, device=world.device))
        feed_ndarray(tensor, images[-1])
    pairs = list(zip(images, packed, strict=True))
    return lambda: [finish_on_device(*pair) for pair in pairs]
