"""Images/s of the training step alone and end to end, ours and the peers'.

The step runs on random uint8 views on the device: nothing waits for data, and random ones, unlike
zeros, draw as much power as images. End to end is the same step fed by the loader.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.normalize import normalize_views
from measure.harness import MeasureConfig
from measure.kernel_times import random_draws
from measure.peers import missing, peer_step
from measure.turns import Repetition, Timing, seconds_of, take_turns
from pipeline.loader import Batch
from pipeline.order import SampleOrder
from pipeline.sources.reader import ImageReader
from train.config import Config
from train.distributed import World, gather
from train.loop import train_step
from train.main import build_state
from train.run.folder import has_fast_bf16
from train.run.optim import Schedule
from train.run.program import first_line
from train.run.state import TrainState
from train.window import WaitClock

PEERS = ("official", "eager_bf16", "compiled_plain", "lightly", "solo_learn")


def open_step(config: Config, world: World) -> tuple[TrainState, Callable[[Batch], object]]:
    """The state and the training step on it, as train/main.py has them; no data, no run folder."""
    size = config.data.batch_size
    order = SampleOrder(1000 * size, batch_size=size, seed=config.seed)
    state = build_state(config, world, order.num_samples)
    return state, partial(train_step, state, config, Schedule(order, config.epochs))


def random_batch(config: Config, world: World) -> Batch:
    """Random views on the device, as the loader would give this rank its part of a global batch."""
    rows = config.data.batch_size // world.size
    torch.manual_seed(config.seed + world.rank)

    def draw(views: int, size: int) -> Tensor:
        shape = views, rows, size, size, 3
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=world.device)

    spec = config.method.spec
    large, small, draws = draw(spec.num_views, config.augment.size), None, (None, None)
    if spec.num_small_views:
        small = draw(spec.num_small_views, config.views[-1].size)
    if world.device.type == "cuda":
        packed = random_draws(config.views, rows, world.device)
        draws = packed[: spec.num_views], packed[spec.num_views :]
    return Batch(0, large, torch.arange(rows), small, *draws)


def repeated(
    step: Callable[[], object], device: torch.device, *, steps: int, idle: list[bool]
) -> Repetition:
    """`steps` steps between two events. A step that the host limits counts as long as it takes.

    After each step on CUDA `idle` gets whether the GPU waits for the host. The first steps of a
    repetition, before a queue has formed, may say so of a GPU that is kept busy.
    """

    def work() -> None:
        for _ in range(steps):
            step()
            if device.type == "cuda":
                idle.append(torch.cuda.current_stream(device).query())

    return lambda: seconds_of(work, device)


def why_not(name: str, config: Config, world: World) -> str | None:
    """Why a peer cannot be measured on this machine, or None."""
    if name in ("eager_bf16", "compiled_plain") and world.device.type == "cpu":
        if not has_fast_bf16():
            return "this CPU has no bf16 instructions"
        if name == "compiled_plain" and config.compile != "true":
            return "compiling takes minutes on a CPU: give --compile true"
    if config.model.width != 64:
        return "torchvision's networks are 64 channels wide: leave --model.width at 64"
    if name == "lightly" and config.model.projector_layers != 3:
        return "its projector has 3 layers: leave --model.projector_layers at 3"
    package = {"lightly": "lightly", "solo_learn": "solo"}.get(name, "torchvision")
    return missing(package) or missing("torchvision")


def measure_step(config: Config, m: MeasureConfig, world: World) -> dict[str, Timing]:
    """Our step and, with m.peers, the others, taking turns. m: filled."""
    batch, data = random_batch(config, world), config.data
    _, train = open_step(config, world)
    steps: dict[str, Callable[[], object]] = {"ours": lambda: train(batch)}
    skipped = {}
    first, second = (
        normalize_views(view, data.mean, data.std, torch.float32, kernels="plain").contiguous()
        for view in batch.images[:2]
    )
    for name in PEERS if m.peers else ():
        reasons = gather(world, why_not(name, config, world))
        reason = next((reason for reason in reasons if reason is not None), None)
        try:
            if reason is None:
                steps[name] = peer_step(name, config, world, (first, second))
        except ImportError as error:
            reason = f"does not import: {first_line(error)}"
        if reason is not None:
            skipped[name] = Timing(0, not_measured=reason)
    idle: dict[str, list[bool]] = {name: [] for name in steps}
    variants = {
        name: repeated(step, world.device, steps=m.steps, idle=idle[name])
        for name, step in steps.items()
    }
    images = m.steps * data.batch_size // world.size
    warmup = -(-m.warmup // m.steps)
    timings = take_turns(
        variants, images=images, warmup=warmup, n=m.repeats, budget_s=m.budget_s, world=world
    )
    for name, timing in timings.items():
        timing.gpu_was_idle = idle[name][warmup * m.steps :]
    return timings | skipped


def measure_end_to_end(
    reader: ImageReader, config: Config, m: MeasureConfig, world: World
) -> tuple[Timing, float]:
    """Our loader and step together, and the percentage of time spent waiting for data."""
    from measure.loader_times import OurLoader  # imports DALI

    steps = max(m.steps, 3)
    loader = OurLoader(reader, config, world)
    _, train = open_step(config, world)
    waited = total = 0.0

    def repeat() -> float:
        nonlocal waited, total
        batches = loader.next_batches(loader.num_filling + steps)
        for _ in range(loader.num_filling):
            train(next(batches))
        clock = WaitClock(world.device)

        def work() -> None:
            for batch in batches:
                clock.data_arrived()
                train(batch)
                clock.work_queued()

        seconds = seconds_of(work, world.device)  # waits for the device
        total += seconds
        waited += clock.take()
        return seconds

    timing = take_turns(
        {"ours": repeat},
        images=steps * loader.rows,
        warmup=0,
        n=m.repeats,
        budget_s=m.budget_s,
        world=world,
    )["ours"]
    return timing, 100 * waited / total if total else 0.0
