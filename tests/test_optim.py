"""The schedule, the parameter groups, and the guard against gradients that are not finite."""

import copy
import sys
import types

import pytest
import torch

from train.config import MethodConfig, ModelConfig, OptimConfig
from train.methods.simsiam import SimSiam
from train.run.optim import GuardedStep, build_optimizer, find_apex_sgd, lr_at, set_lr

CPU = torch.device("cpu")
SMALL = ModelConfig(
    arch="resnet18", stem="cifar", width=8, projector_dim=8, projector_hidden=8, predictor_hidden=4
)


def small_model() -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(SMALL, MethodConfig()).to(memory_format=torch.channels_last)


def test_schedule_is_the_papers_cosine_with_optional_linear_warm_up():
    assert lr_at(0, base=0.1, total=100) == pytest.approx(0.1)
    assert lr_at(50, base=0.1, total=100) == pytest.approx(0.05)
    assert lr_at(100, base=0.1, total=100) == pytest.approx(0)
    assert lr_at(0, base=0.1, total=110, warmup=10) == pytest.approx(0.01)
    assert lr_at(9, base=0.1, total=110, warmup=10) == pytest.approx(0.1)
    assert lr_at(60, base=0.1, total=110, warmup=10) == pytest.approx(0.05)


@pytest.mark.parametrize("constant", [True, False])
def test_the_predictor_keeps_its_learning_rate_if_asked_to(constant):
    config = OptimConfig(constant_predictor_lr=constant)
    optimizer = build_optimizer(small_model(), config, lr=0.1, device=CPU)
    set_lr(optimizer, config, 50, lr=0.1, total=100, steps_per_epoch=10)
    by_name = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert by_name["encoder"] == pytest.approx(0.05)
    assert by_name["predictor"] == pytest.approx(0.1 if constant else 0.05)


def test_every_parameter_is_in_one_group_with_weight_decay():
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=1e-4), lr=0.1, device=CPU)
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)


def step_once(model, guard, scale: float) -> None:
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    loss, _ = model(x.to(memory_format=torch.channels_last))
    guard(loss * scale)


def guarded(model, *, fp16: bool = False) -> GuardedStep:
    optimizer = build_optimizer(model, OptimConfig(), lr=0.1, device=CPU)
    return GuardedStep(optimizer, torch.amp.GradScaler("cpu", enabled=fp16), CPU)


@pytest.mark.parametrize("fp16", [False, True])
def test_a_step_whose_gradient_is_not_finite_changes_no_weight(fp16):
    model = small_model()
    guard = guarded(model, fp16=fp16)
    step_once(model, guard, 1.0)
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    step_once(model, guard, float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert guard.check(2) == 1
    step_once(model, guard, 1.0)
    assert any((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


def test_a_bad_first_step_leaves_no_garbage_in_the_momentum():
    models = small_model(), small_model()
    guards = [guarded(model) for model in models]
    step_once(models[0], guards[0], float("nan"))
    momenta = [entry["momentum_buffer"] for entry in guards[0].optimizer.state.values()]
    assert momenta and not any(momentum.any() for momentum in momenta)
    for model, guard in zip(models, guards, strict=True):
        step_once(model, guard, 1.0)
    for skipped, plain in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(skipped, plain)


def test_three_bad_steps_in_a_row_end_the_run_and_two_do_not():
    model = small_model()
    guard = guarded(model)
    for scale in (float("nan"), float("nan"), 1.0, float("nan"), float("nan")):
        step_once(model, guard, scale)
    assert guard.check(5) == 4
    step_once(model, guard, float("nan"))
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        guard.check(6)


def test_fp16_finds_its_loss_scale_over_more_than_three_bad_steps():
    model = small_model()
    guard = guarded(model, fp16=True)
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    for skipped in range(1, 6):
        step_once(model, guard, float("inf"))
        assert guard.check(skipped) == skipped
    assert guard.scaler.get_scale() == 2.0**11
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for _ in range(16):
        step_once(model, guard, float("inf"))
    with pytest.raises(FloatingPointError, match="loss scale fell below"):
        guard.check(21)


def test_a_loss_scale_that_collapses_is_an_error_not_a_silent_zero():
    guard = guarded(small_model(), fp16=True)
    guard.scaler.load_state_dict(guard.scaler.state_dict() | {"scale": 2.0**-5})
    with pytest.raises(FloatingPointError, match="loss scale"):
        guard.check(1)


def test_a_missing_apex_and_pypis_apex_are_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ValueError, match="apex is not installed"):
        find_apex_sgd(CPU)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # a web toolkit
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.9.10.dev0")
    with pytest.raises(ValueError, match="is not NVIDIA's .* pip uninstall apex"):
        find_apex_sgd(CPU)


def test_nvidias_apex_is_used_where_it_is_and_needs_a_gpu(monkeypatch):
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedSGD = torch.optim.SGD
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    assert find_apex_sgd(torch.device("cuda")) is torch.optim.SGD
    with pytest.raises(ValueError, match="needs a CUDA device"):
        find_apex_sgd(CPU)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_follows_its_formula_on_weights_and_is_plain_sgd_on_the_rest(decay):
    model = torch.nn.Linear(5, 3)
    with torch.no_grad():
        model.bias.fill_(0.5)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = {name: torch.zeros_like(p) for name, p in expected.items()}
    config = OptimConfig(name="lars", weight_decay=decay)
    optimizer = build_optimizer(model, config, lr=0.3, device=CPU)
    guard = GuardedStep(optimizer, torch.amp.GradScaler("cpu", enabled=False), CPU)
    for step in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        set_lr(optimizer, config, step, lr=0.3, total=3, steps_per_epoch=3)
        weight, bias = expected.values()
        y = x @ weight.T + bias
        gradients = {"weight": 2 * y.T @ x, "bias": 2 * y.sum(0)}  # of the sum of squares
        for name, p in expected.items():
            g = gradients[name]
            if name == "weight":
                ratio = 0.001 * p.norm() / (g.norm() + decay * p.norm())
                g = ratio * (g + decay * p)
            buffers[name] = 0.9 * buffers[name] + g
            expected[name] = p - lr_at(step, base=0.3, total=3) * buffers[name]
        guard(model(x).square().sum())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], msg=name)


def test_lars_leaves_all_as_it_is_where_a_gradient_is_not_finite():
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig(name="lars"), lr=0.1, device=CPU)
    guard = GuardedStep(optimizer, torch.amp.GradScaler("cpu", enabled=False), CPU)
    step_once(model, guard, 1.0)
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    momentum = copy.deepcopy(list(optimizer.state.values()))
    step_once(model, guard, float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for old, new in zip(momentum, optimizer.state.values(), strict=True):
        assert old["momentum_buffer"].equal(new["momentum_buffer"])
    assert guard.check(2) == 1


def test_apex_has_no_lars():
    with pytest.raises(ValueError, match="apex has no LARS"):
        OptimConfig(name="lars", implementation="apex")


class ApexSGD(torch.optim.Optimizer):
    """As NVIDIA apex's FusedSGD: its kernel does nothing where its flag is not 0."""

    def __init__(self, groups, **options):
        super().__init__(groups, options)
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(torch.where(self._dummy_overflow_buf != 0, p, p - group["lr"] * p.grad))


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "lars", "apex"])
def test_no_optimizer_waits_for_the_host_and_none_takes_a_bad_step(monkeypatch, kind, fp16):
    model = small_model()
    if kind == "apex":
        optimizer = ApexSGD([{"params": list(model.parameters())}], lr=0.1)
    else:
        optimizer = build_optimizer(model, OptimConfig(name=kind), lr=0.1, device=CPU)
    guard = GuardedStep(optimizer, torch.amp.GradScaler("cpu", enabled=fp16), CPU)

    def refuse(tensor):
        raise AssertionError("reads the device")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "__bool__", refuse)
        patched.setattr(torch.Tensor, "item", refuse)
        before = copy.deepcopy([p.detach() for p in model.parameters()])
        step_once(model, guard, float("inf"))
        kept = [p.detach().clone() for p in model.parameters()]
        step_once(model, guard, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    assert any((a != b).any() for a, b in zip(before, model.parameters(), strict=True))
    assert guard.check(2) == 1
