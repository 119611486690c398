"""Images/s of the training step alone and end to end, ours and the peers'.

The step runs on random uint8 views that lie on the device: nothing waits for data. End to end is
the same step behind the loader.
A newcomer's mistake: zeros as images. Random ones draw more power, and clocks are lower.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.normalize import normalize_views
from measure.peers import missing, peer_step
from measure.turns import Repetition, Timing, seconds_of, take_turns
from pipeline.order import SampleOrder
from pipeline.runner import Batch
from pipeline.sources.reader import ImageReader
from train.config import Config
from train.distributed import World
from train.loop import train_step
from train.main import build_state
from train.run.folder import has_fast_bf16
from train.run.optim import Schedule
from train.run.program import first_line
from train.run.state import TrainState
from train.window import WaitClock

PEERS = ("official", "eager_bf16", "compiled_plain", "lightly", "solo_learn")
NEEDS = {"lightly": ("lightly", "torchvision"), "solo_learn": ("solo", "torchvision")}


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
    large, small = draw(spec.num_views, config.augment.size), None
    if spec.num_small_views:
        small = draw(spec.num_small_views, config.views[-1].size)
    return Batch(0, large, torch.arange(rows), small)


def repeated(
    step: Callable[[], object], device: torch.device, *, steps: int, idle: list[bool]
) -> Repetition:
    """`steps` steps between two events. A step that the host limits counts as long as it takes.

    After each step on CUDA `idle` is told whether the GPU waits for the host. The first steps of a
    repetition, before a queue has formed, may say so of a GPU that is kept busy.
    """

    def work() -> None:
        for _ in range(steps):
            step()
            if device.type == "cuda":
                idle.append(torch.cuda.current_stream(device).query())

    return lambda: seconds_of(work, device)


def why_not(name: str, config: Config, world: World) -> str | None:
    """Why a peer cannot be measured here, or None."""
    if name in ("eager_bf16", "compiled_plain") and world.device.type == "cpu":
        if not has_fast_bf16():
            return "this CPU has no bf16 instructions"
        if name == "compiled_plain" and config.compile != "true":
            return "compiling takes minutes on a CPU: give --compile true"
    if config.model.width != 64:
        return "torchvision's networks are 64 channels wide: leave --model.width at 64"
    if name == "lightly" and config.model.projector_layers != 3:
        return "its projector has 3 layers: leave --model.projector_layers at 3"
    reasons = (missing(package) for package in NEEDS.get(name, ("torchvision",)))
    return next((reason for reason in reasons if reason is not None), None)


def measure_step(
    config: Config, world: World, *, peers: bool, steps: int, warmup: int, n: int, budget_s: float
) -> dict[str, Timing]:
    """Our step and, with `peers`, the others, taking turns."""
    batch = random_batch(config, world)
    todo: dict[str, Callable[[], object]] = {"ours": partial(open_step(config, world)[1], batch)}
    left_out = {}
    view1, view2 = (
        normalize_views(view, config.data.mean, config.data.std, torch.float32, kernels="plain")
        .contiguous()
        for view in batch.images[:2]
    )  # fmt: skip
    for name in PEERS if peers else ():
        reason = why_not(name, config, world)
        if reason is not None:
            left_out[name] = Timing(0, not_measured=reason)
            continue
        try:
            todo[name] = peer_step(name, config, world, (view1, view2))
        except ImportError as error:
            left_out[name] = Timing(0, not_measured=f"does not import: {first_line(error)}")
    idle: dict[str, list[bool]] = {name: [] for name in todo}
    variants = {
        name: repeated(step, world.device, steps=steps, idle=idle[name])
        for name, step in todo.items()
    }
    images = steps * config.data.batch_size // world.size
    turns = -(-warmup // steps)
    found = take_turns(variants, images=images, warmup=turns, n=n, budget_s=budget_s, world=world)
    for name, timing in found.items():
        timing.gpu_was_idle = idle[name][turns * steps :]
    return found | left_out


def measure_end_to_end(
    reader: ImageReader, config: Config, world: World, *, steps: int, n: int, budget_s: float
) -> tuple[Timing, float]:
    """Our loader and step together, and the percentage of time spent waiting for data."""
    from measure.loader_times import endless_order, num_filling, open_loader  # imports DALI

    order, rows = endless_order(reader, config, world)
    _, step = open_step(config, world)
    begin, waited, total = 0, 0.0, 0.0
    filling = num_filling(config, world.device)

    def repeat() -> float:
        nonlocal begin, waited, total
        loader = open_loader(reader, order, config, world, range(begin, begin + filling + steps))
        begin += filling + steps
        batches = iter(loader)
        for _ in range(filling):
            step(next(batches))
        waiting = WaitClock(world.device)

        def work() -> None:
            for batch in batches:
                waiting.data_arrived()
                step(batch)
                waiting.work_queued()

        seconds = seconds_of(work, world.device)  # waits for the device
        total += seconds
        waited += waiting.take()
        return seconds

    found = take_turns(
        {"ours": repeat}, images=steps * rows, warmup=0, n=n, budget_s=budget_s, world=world
    )
    return found["ours"], 100 * waited / total if total else 0.0
