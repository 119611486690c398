"""A step as a CUDA graph, rehearsed on the CPU: the recording is replaced by calls of the step."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from measure.kernel_times import random_draws
from pipeline.augment import AugmentConfig
from pipeline.loader import Batch
from pipeline.order import SampleOrder
from train.config import Config, DataConfig, MethodConfig, ModelConfig
from train.distributed import World
from train.loop import train_step
from train.main import build_state, why_no_graph
from train.run import step_graph
from train.run.optim import Schedule
from train.run.state import TrainState
from train.run.step_graph import WARM_UP, Results, StepGraph

ROWS, SIZE, STEPS = 8, 16, 6
WORLD = World(0, 1, 0, 1, torch.device("cpu"), None)
GPU = replace(WORLD, device=torch.device("cuda"))
CONFIG = Config(
    data=DataConfig(root="none", batch_size=ROWS),
    augment=AugmentConfig(size=SIZE),
    model=ModelConfig(
        arch="resnet18",
        stem="cifar",
        width=4,
        projector_dim=8,
        projector_hidden=8,
        predictor_hidden=4,
    ),
    precision="fp32",
)


class Repeated:
    """In place of a recording: calls the step, and leaves the results where the first ones were."""

    def __init__(self, update, inputs):
        self.update, self.inputs, self.results = update, inputs, None

    def replay(self) -> Results:
        loss, scalars, norm = self.update(*self.inputs)
        if self.results is None:
            self.results = Results(loss.clone(), dict(scalars), norm.clone())
        self.results.loss.copy_(loss)
        self.results.norm.copy_(norm)
        return self.results


def train(current: TrainState, steps: range) -> list[tuple]:
    """Loss, gradient norm and learning rate of each step on crops and draws, read at the end."""
    order = SampleOrder(10 * ROWS, batch_size=ROWS, seed=0)
    results = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        shape = 2, ROWS, SIZE, SIZE, 3
        views = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        device = current.guard.device
        draws = random_draws(CONFIG.views, ROWS, device).roll(step, 1)
        batch = Batch(step, views.to(device), torch.arange(ROWS), draws=draws)
        loss, _, norm, lr = train_step(current, CONFIG, Schedule(order, 1), batch)
        results.append((loss, norm, lr))
    return [(loss.item(), norm.item(), lr) for loss, norm, lr in results]


def recorded(monkeypatch) -> TrainState:
    """A training whose steps are recorded by `Repeated`."""
    monkeypatch.setattr(step_graph, "Captured", Repeated)
    current = build_state(CONFIG, WORLD, 100)
    current.graph = StepGraph(current.optimizer, WORLD.device)
    return current


def test_replayed_steps_train_as_launched_ones_do(monkeypatch):
    plain, current = build_state(CONFIG, WORLD, 100), recorded(monkeypatch)
    assert train(current, range(STEPS)) == train(plain, range(STEPS))
    assert current.graph is not None and current.graph.captured is not None
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, current.model.state_dict()[name]), name
    assert all(isinstance(group["lr"], float) for group in current.optimizer.param_groups)


def test_a_recorded_step_sees_the_learning_rate_of_its_schedule_as_a_tensor(monkeypatch):
    current, seen = recorded(monkeypatch), []

    class Watched(Repeated):
        def replay(self) -> Results:
            seen.append([rate.item() for rate in current.graph.rates])  # type: ignore[union-attr]
            return super().replay()

    monkeypatch.setattr(step_graph, "Captured", Watched)
    rates = [lr for *_, lr in train(current, range(STEPS))][WARM_UP:]
    assert len(set(rates)) == len(rates) == STEPS - WARM_UP
    assert [encoder for encoder, _ in seen] == pytest.approx(rates)
    assert [predictor for _, predictor in seen] == pytest.approx([CONFIG.lr] * len(rates))


class Reads(TorchDispatchMode):
    """Records the operations that read the device."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "local_scalar_dense" in str(func) or "nonzero" in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_replaces_no_tensor_that_outlives_it_and_reads_nothing_from_the_device(monkeypatch):
    current = recorded(monkeypatch)
    train(current, range(WARM_UP + 1))

    def places() -> list[int]:
        guard, model, optimizer = current.guard, current.model, current.optimizer
        counters = [guard.in_a_row, guard.worst, guard.skipped]
        momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
        kept = *model.parameters(), *model.buffers(), *momenta, *counters
        return [tensor.data_ptr() for tensor in kept]

    before, graph = places(), current.graph
    assert graph is not None
    with Reads() as reads:
        inputs = (kept.clone() for kept in graph.inputs)
        update = graph.captured.update  # type: ignore[union-attr]
        update(*inputs)
    assert places() == before and reads.found == []


@pytest.mark.parametrize(
    ("changes", "world", "problem"),
    [
        ({}, WORLD, "it needs a CUDA device"),
        ({}, replace(GPU, size=2), "several GPUs"),
        ({"precision": "fp16"}, GPU, "the loss scale of --precision fp16"),
        ({"method": MethodConfig(name="byol")}, GPU, "a step of BYOL"),
        ({"method": MethodConfig(moving_average=0.8, predictor="none")}, GPU, "a step of SimSiam"),
        ({}, GPU, None),
    ],
)
def test_a_graph_is_refused_where_steps_differ(changes, world, problem):
    found = why_no_graph(replace(CONFIG, **changes), world)
    assert found is problem is None or found.startswith(problem)  # type: ignore[union-attr]


def test_true_is_refused_on_a_cpu_and_auto_leaves_it_out():
    with pytest.raises(ValueError, match="--cuda_graph true: it needs a CUDA device: leave it out"):
        build_state(replace(CONFIG, cuda_graph="true"), WORLD, 100)
    assert build_state(replace(CONFIG, cuda_graph="auto"), WORLD, 100).graph is None


@pytest.mark.parametrize(("ms", "is_recorded"), [(5.0, True), (50.0, False)])
def test_auto_records_a_short_step_alone(monkeypatch, ms, is_recorded):
    current = recorded(monkeypatch)

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    current.graph = StepGraph(current.optimizer, WORLD.device, only_short=True)
    train(current, range(WARM_UP + step_graph.TIMED + 1))
    assert (current.graph.captured is not None) is is_recorded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_recorded_step_on_cuda_trains_as_a_launched_one():
    config = replace(CONFIG, compile="false", device="cuda")
    plain = build_state(config, GPU, 100)
    current = build_state(replace(config, cuda_graph="true"), GPU, 100)
    losses = [[loss for loss, *_ in train(each, range(STEPS))] for each in (plain, current)]
    assert current.graph is not None and current.graph.captured is not None
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4)
