"""What holds for every method: ranks, resume, refusals."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pipeline.augment import AugmentConfig
from pipeline.loader import Batch
from pipeline.order import SampleOrder
from test_sync_norm import free_port
from test_train import result, run
from train.config import Config, DataConfig, ModelConfig
from train.config.parser import parse_config
from train.distributed import World
from train.evaluation.encoded import load_encoder
from train.loop import train_step
from train.main import build_state
from train.methods import Method, MethodConfig
from train.methods.byol import BYOLConfig
from train.methods.moco import MoCoConfig
from train.methods.simclr import SimCLRConfig
from train.methods.swav import SwAVConfig
from train.network.norm import BatchNorm
from train.run import checkpoint, state
from train.run.optim import Schedule, build_optimizer
from train.run.state import TrainState, build_method

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, 1, CPU, None)
ROWS, IMAGES, SIZE = 6, 12, 16
SMALL = ModelConfig(
    arch="resnet18", stem="cifar", width=8, projector_layers=2, projector_dim=16,
    projector_hidden=16, predictor_hidden=8,
)  # fmt: skip
# a queue of two batches: full before the third step; two small views; an epoch of two steps
SWAV = SwAVConfig(
    prototypes=7, queue=12, queue_from_epoch=0, small_views=2, small_size=8, frozen_epochs=0.5
)
METHODS = {
    "simsiam of four views": MethodConfig(views=4),
    "byol": MethodConfig(name="byol"),
    "byol without predictor": MethodConfig(name="byol", byol=BYOLConfig(predictor=False)),
    # at 0.1 the gradients are so steep that rounding shows in three steps
    "simclr": MethodConfig(name="simclr", simclr=SimCLRConfig(temperature=0.5)),
    "swav": MethodConfig(name="swav", swav=SWAV),
    "moco": MethodConfig(name="moco", moco=MoCoConfig(queue=24)),
    "vicreg": MethodConfig(name="vicreg"),
}


def config_of(method: MethodConfig, **options) -> Config:
    return Config(
        data=DataConfig(root=".", batch_size=ROWS), model=SMALL, method=method, precision="fp32",
        augment=AugmentConfig(size=SIZE), **options,
    )  # fmt: skip


def made(method: MethodConfig) -> Method:
    torch.manual_seed(0)
    model = build_method(config_of(method), images=IMAGES, device=CPU)
    return model.to(memory_format=torch.channels_last)


def some_views(step: int, *, views: int = 2, size: int = SIZE) -> torch.Tensor:
    """(V, N, 3, S, S); each image's views are alike."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(ROWS, 3, 4, 4, generator=generator)
    image = torch.nn.functional.interpolate(image, size)
    return image + 0.3 * torch.randn(views, ROWS, 3, size, size, generator=generator)


def flat(views: torch.Tensor) -> torch.Tensor:
    return views.flatten(0, 1).contiguous(memory_format=torch.channels_last)


class TinyBackbone(nn.Module):
    """One layer in place of the ResNet, which takes too long to compile here."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), BatchNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x), relu=True).mean((2, 3))


@contextmanager
def in_double_precision() -> Iterator[None]:
    """What asks for fp32 gets fp64: no rounding is left that could turn a ReLU on or off.

    In fp32 one such unit moves a gradient by percents, and which one depends on the CPU.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def three_steps(name: str, rank: int, group, *, compiled: bool) -> dict:
    """Gradients of the first step, losses, and all of the state after three steps.

    On half of the batch or on all of it, in fp64; compiled: in fp32, for Dynamo takes `float` for
    that, with TinyBackbone, in one graph on two ranks.
    """
    with nullcontext() if compiled else in_double_precision():
        return _three_steps(name, rank, group, compiled=compiled)


def _three_steps(name: str, rank: int, group, *, compiled: bool) -> dict:
    method = METHODS[name]
    with pytest.MonkeyPatch.context() as patch:
        if compiled:
            patch.setattr("train.methods.method.build_backbone", lambda model: TinyBackbone())
        model = made(method)
    model.sync_over(group)
    call = model
    if compiled and group:
        torch._dynamo.reset()
        call = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = build_optimizer(model, config_of(method).optim, lr=0.05, device=CPU)
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2) if group else slice(None)
    found = {}
    for step in range(3):
        model.before_step(step)
        small = flat(some_views(step, size=8)[:, mine]) if method.swav.small_views else None
        views = flat(some_views(step, views=method.spec.num_views)[:, mine])
        loss, scalars = call(views, torch.arange(ROWS)[mine], small)
        optimizer.zero_grad()
        loss.backward()
        learned = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for value in (*learned.values(), loss.detach()) if group else ():
            dist.all_reduce(value)
            value /= 2
        found[f"loss {step}"] = loss.detach().clone()
        if step == 0:
            found |= {f"d{name}": gradient.clone() for name, gradient in learned.items()}
        for parameter in model.frozen(step):
            parameter.grad = None
        optimizer.step()
        model.after_step(step, 10)
    assert scalars["z_std"] > 0
    return {n: v.numpy() for n, v in (found | model.state_dict()).items()}


COMPILED = {"simclr", "swav", "moco"}  # BYOL has no collective that SimSiam has not
CASES = [(name, compiled) for name in METHODS for compiled in {False, name in COMPILED}]


def on_rank(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    for name, compiled in CASES:
        found = three_steps(name, rank, dist.group.WORLD, compiled=compiled)
        if rank == 0:
            queue.put((name, compiled, found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_ranks_equal_one_with_the_same_global_batch_and_compile_to_one_graph():
    queue = mp.get_context("spawn").Queue()
    context = mp.spawn(on_rank, args=(free_port(), queue), nprocs=2, join=False)
    parts = [queue.get(timeout=240) for _ in CASES]
    while not context.join():
        pass
    for name, compiled, found in parts:
        whole = three_steps(name, 0, None, compiled=compiled)
        assert found.keys() == whole.keys()
        for key, expected in whole.items():
            if not key.endswith("num_batches_tracked"):
                scale = max(abs(expected).max(), 1e-2)
                assert compiled or expected.dtype == np.float64, key
                error = abs(found[key] - expected).max() / scale
                assert error < (1e-3 if compiled else 1e-8), (name, compiled, key)


def open_training(method: MethodConfig) -> tuple[TrainState, Config, Schedule]:
    """What train_step works with, as train/main.py puts it together."""
    config = config_of(method, epochs=3)
    order = SampleOrder(IMAGES, batch_size=ROWS, seed=0)
    return build_state(config, WORLD, IMAGES), config, Schedule(order, config.epochs)


def train_to(current: TrainState, config: Config, schedule: Schedule, *, step: int) -> None:
    num_small = config.method.swav.small_views
    for at in range(current.step, step):
        generator = torch.Generator().manual_seed(at)

        def draw(views: int, size: int, generator=generator) -> torch.Tensor:
            shape = views, ROWS, size, size, 3
            return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

        small = draw(num_small, 8) if num_small else None
        views = draw(config.method.spec.num_views, SIZE)
        batch = Batch(at, views, torch.arange(ROWS), small)
        train_step(current, config, schedule, batch)


def test_an_unknown_method_is_refused_with_the_nearest_name():
    names = "simsiam, byol, simclr, swav, moco, .*"
    with pytest.raises(ValueError, match=f"--method.name mocco is none of {names}you meant moco$"):
        MethodConfig(name="mocco")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("stop", [1, 4])  # before and after SwAV's queue is full
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(name, stop, tmp_path):
    straight, stopped, again = (open_training(METHODS[name]) for _ in range(3))
    train_to(*straight, step=5)
    train_to(*stopped, step=stop)
    facts = state.run_facts(stopped[1], "", WORLD)
    state.save(stopped[0], tmp_path, facts)
    train_to(*again, step=2)  # what a checkpoint does not hold would differ
    found = checkpoint.load_newest(tmp_path, log=print)
    assert found is not None
    state.check_same_run(found.facts, facts, tmp_path)
    state.restore(again[0], found)
    train_to(*again, step=5)
    ends = []
    for current in (straight[0], again[0]):
        ends.append(current.model.state_dict())
        momentum, _ = checkpoint.flatten_optimizer(current.optimizer, current.names)
        ends[-1] |= momentum
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert value.equal(ends[1][key]), key


@pytest.mark.parametrize("name", [*METHODS, "moving average"])
def test_a_step_that_is_not_finite_leaves_nothing_behind_that_is_not(name):
    averaged = MethodConfig(moving_average=0.8, predictor="none")
    training = open_training(METHODS.get(name, averaged))
    model, guard = training[0].model, training[0].guard
    healthy = model.forward
    for step in range(4):
        broken = float("nan") if step == 0 else 1.0
        model.forward = lambda views, *rest, factor=broken: healthy(views * factor, *rest)
        train_to(*training, step=step + 1)
        guard.check(step + 1)
    assert guard.skipped == 1
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "byol", "stop_gradient": False},
            "--method.stop_gradient belongs to simsiam, --method.name is byol: leave it out, or "
            "take --method.name simsiam",
        ),
        ({"byol": BYOLConfig(momentum=0.9)}, "--method.byol.momentum belongs to byol"),
        (
            {"name": "byol", "moco": MoCoConfig(queue=12)},
            "--method.moco.queue belongs to moco, --method.name is byol",
        ),
    ],
)
def test_a_switch_of_another_method_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (BYOLConfig, {"momentum": 1.5}, "method.byol.momentum must be in 0 .. 1"),
        (SwAVConfig, {"epsilon": 0.01}, "method.swav.epsilon must be at least 0.025"),
        (SwAVConfig, {"prototypes": 1}, "method.swav.prototypes must be at least 2"),
        (MoCoConfig, {"queue": 7}, "method.moco.queue holds pairs of keys: even, got 7"),
        (MoCoConfig, {"temperature": 0.0}, "method.moco.temperature must be > 0"),
    ],
)
def test_impossible_values_name_the_flag(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            MethodConfig(name="moco", moco=MoCoConfig(queue=10)),
            "--method.moco.queue 10 holds the rows of 5 images, a step has 6: take at least 12",
        ),
        (
            MethodConfig(name="moco"),
            "queue 65536 holds the rows of 32768 images, there are 12: take at most 24",
        ),
        (
            MethodConfig(name="swav", swav=SwAVConfig(queue=4)),
            "--method.swav.queue 4 holds the rows of 4 images, a step has 6: take at least 6",
        ),
        (
            MethodConfig(name="swav", swav=SwAVConfig(queue=13)),
            "--method.swav.queue 13 holds the rows of 13 images, there are 12: take at most 12",
        ),
    ],
)
def test_a_queue_shorter_than_a_step_or_longer_than_the_data_is_refused(method, message):
    with pytest.raises(ValueError, match=message):
        made(method)


@pytest.mark.parametrize(("epochs", "first", "told"), [(1, 0, 1), (2, 0, 0), (2, 1, 1)])
def test_a_queue_that_is_never_full_is_told_before_training(epochs, first, told):
    swav = MethodConfig(name="swav", swav=SwAVConfig(queue=12, queue_from_epoch=first))
    config = dataclasses.replace(config_of(swav), epochs=epochs)
    lines: list[str] = []
    model = build_method(config, images=IMAGES, device=CPU, tell=lines.append)
    warnings = [line for line in lines if "--method.swav.queue 12 is never full" in line]
    assert len(warnings) == told
    used = []
    for step in range(epochs * (IMAGES // ROWS)):
        model.before_step(step)
        used.append(model.assigns_recent)
    assert any(used) != bool(told)


def test_a_queue_that_does_not_fit_into_memory_says_how_much_is_left():
    moco = MethodConfig(name="moco", moco=MoCoConfig(queue=10**12))
    with pytest.raises(
        ValueError, match=r"--method.moco.queue 1\d+ takes 59604.6 GiB .* has .* left"
    ):
        build_method(config_of(moco), images=10**12, device=CPU)


def test_settings_that_do_not_go_with_a_method_are_refused():
    method = METHODS["byol"]
    with pytest.raises(ValueError, match="--model.head_norm belongs to simsiam"):
        dataclasses.replace(
            config_of(method), model=dataclasses.replace(SMALL, head_norm="none")
        )  # fmt: skip
    same_size = dataclasses.replace(SWAV, small_size=SIZE)
    with pytest.raises(ValueError, match=f"--method.swav.small_size {SIZE} is that of the other"):
        config_of(MethodConfig(name="swav", swav=same_size))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("swav --method.swav.small_size=8", "small_size has no effect with .*small_views 0"),
        ("swav --method.swav.small_scale=[0.1,0.2]", "small_scale has no effect with"),
        ("swav --method.swav.queue_from_epoch=0", "queue_from_epoch has no effect with .*queue 0"),
        ("swav --method.swav.queue=8 --epochs=15", "queue 8 would fill from epoch 15 of 15"),
        (
            "byol --method.byol.second_blur=1 --augment.blur=0",
            "share of --augment.blur, which is 0",
        ),
        ("moco --optim.constant_predictor_lr=false", "MoCo v2 has none with these flags"),
        ("simsiam --model.head_norm=all --method.predictor=none", "is default without a predictor"),
        ("simsiam --method.swav.small_size=8", "small_size belongs to swav"),
        ("swav --method.swav.sinkhorn_iterations=1001", "sinkhorn_iterations must be at most 1000"),
        ("swav --method.swav.frozen_epochs=1e308", "frozen_epochs must be at most"),
        ("simsiam --optim.warmup_epochs=1e308", "warmup_epochs must be at most"),
        ("moco --method.moco.queue=10000000000000", "queue must be at most 1099511627776"),
    ],
)
def test_flags_without_effect_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_config(["--data.root=x", *f"--method.name={flags}".split()])


def test_a_checkpoint_names_the_settings_of_its_own_method_alone():
    settings = state.comparable(config_of(METHODS["swav"]))
    assert settings["method.swav.prototypes"] == "7" and settings["method.name"] == "swav"
    assert not [name for name in settings if name.startswith(("method.byol", "method.stop"))]
    other = state.comparable(config_of(dataclasses.replace(METHODS["swav"], swav=SwAVConfig())))
    assert other["method.swav.prototypes"] == "3000"


def test_small_views_reach_the_network(images, tmp_path):
    flags = (
        "--method.name=swav", "--method.swav.small_views=2", "--method.swav.small_size=8",
        "--method.swav.prototypes=10", "--max_steps=2",
    )  # fmt: skip
    found = result(run(images, tmp_path / "run", *flags))
    assert (found["method"], found["views"], found["steps"]) == ("swav", 4, 2)


def test_four_views_reach_the_network_and_tensorboard(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = result(run(images, tmp_path / "run", "--method.views=4", "--max_steps=2"))
    assert (found["method"], found["views"], found["steps"]) == ("simsiam", 4, 2)
    board = EventAccumulator(str(tmp_path / "run" / "tb"))
    board.Reload()
    (picture,) = board.Images("views")
    assert (picture.height, picture.width) == (4 * SIZE, 8 * SIZE)


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    found, facts = (
        state.run_facts(config_of(method), "", WORLD)
        for method in (METHODS["swav"], METHODS["byol"])
    )
    with pytest.raises(ValueError, match=r"checkpoint of swav, this run is of byol.*another --out"):
        state.check_same_run(found, facts, tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_the_encoder_of_every_method_can_be_evaluated(name, tmp_path):
    current, config, schedule = open_training(METHODS[name])
    train_to(current, config, schedule, step=1)
    state.save(current, tmp_path, state.run_facts(config, "", WORLD))
    found = checkpoint.load_newest(tmp_path, log=print)
    backbone, projector = load_encoder(found, config, device=CPU)
    model, x = current.model.eval(), flat(some_views(0))
    expected = model.projector(model.backbone(x))
    assert torch.equal(projector(backbone(x)), expected) and not backbone.training


@pytest.mark.parametrize("name", ["byol", "moco"])
def test_from_another_runs_weights_the_target_starts_as_their_copy(name, tmp_path):
    theirs = open_training(METHODS[name])
    train_to(*theirs, step=2)
    state.save(theirs[0], tmp_path / "checkpoints", {})
    torch.manual_seed(1)
    model = build_method(config_of(METHODS[name]), images=IMAGES, device=CPU)
    state.start_from(model, tmp_path, log=print)
    for part in ("backbone", "projector"):
        for key, value in model.get_submodule(part).named_parameters():
            assert value.equal(theirs[0].model.get_parameter(f"{part}.{key}")), key
            assert value.equal(model.target.get_parameter(f"{part}.{key}")), key
