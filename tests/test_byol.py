"""BYOL's loss and gradients against the formula, its momentum encoder, its views."""

import copy

import pytest
import torch
from torch.nn import functional as F

from pipeline.augment import AugmentConfig
from test_methods import METHODS, config_of, flat, in_double_precision, made, some_views
from train.methods.byol import BYOL, momentum_at
from train.methods.method import MomentumEncoder
from train.network.norm import set_views


def distance(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(1).mean()


@pytest.mark.parametrize("name", ["byol", "byol without predictor"])
@in_double_precision()  # a predictor of few units may be off for an image but for rounding
def test_loss_and_gradients_equal_the_formula_of_two_passes(name):
    model, plain = made(METHODS[name]), made(METHODS[name])
    assert isinstance(plain, BYOL)
    with torch.no_grad():  # a target of its own
        for parameter in (*model.target.parameters(), *plain.target.parameters()):
            parameter.mul_(1.1).add_(0.01)
    views = some_views(0)
    loss, scalars = model(flat(views))
    loss.backward()
    set_views(plain, 1)
    passes = [view.contiguous(memory_format=torch.channels_last) for view in views]
    p1, p2 = (plain.predictor(plain.projector(plain.backbone(view))) for view in passes)
    z1, z2 = (plain.target(view) for view in passes)
    expected = distance(p1, z2) + distance(p2, z1)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (key, ours), (_, theirs) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert (ours.grad is None) == key.startswith("target."), key
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=key)
    unit = F.normalize(torch.stack([z1, z2]), dim=-1)
    meter = unit.std(1, correction=0).mean() * 16**0.5
    torch.testing.assert_close(scalars["z_std"], meter)
    for (key, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(ours, theirs, msg=key)


def test_a_head_is_linear_norm_relu_linear_without_bias():
    model = made(METHODS["byol"])
    for head in (model.projector, model.predictor):
        names = [name for name, _ in head.named_parameters()]
        assert names == ["0.linear.weight", "0.norm.weight", "0.norm.bias", "1.linear.weight"]


def test_the_target_moves_by_the_momentum_and_keeps_its_own_batch_norm_state():
    model = made(METHODS["byol"])
    model(flat(some_views(0)))
    assert model.target.backbone.bn1.running_mean.abs().max() > 0  # it is in training mode
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * parameter.requires_grad)
    before, online = copy.deepcopy(model.target), model.backbone.state_dict()
    model.after_step(3, 10)
    tau = momentum_at(3, 10, 0.99)
    for key, old in before.backbone.named_parameters():
        now = model.target.backbone.get_parameter(key)
        torch.testing.assert_close(now, tau * old + (1 - tau) * online[key])
        assert not now.equal(old), key
    for key, old in before.named_buffers():
        assert model.target.get_buffer(key).equal(old), key


def test_momentum_rises_from_its_start_to_one_by_a_cosine():
    assert momentum_at(0, 100, 0.99) == pytest.approx(0.99)
    assert momentum_at(50, 100, 0.99) == pytest.approx(0.995)
    assert momentum_at(25, 100, 0.9) == pytest.approx(1 - 0.1 * (2**-0.5 + 1) / 2)
    assert momentum_at(100, 100, 0.99) == 1


def test_a_momentum_encoder_starts_as_a_copy_and_never_learns():
    backbone, projector = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    target = MomentumEncoder(backbone, projector)
    x = torch.randn(5, 3)
    torch.testing.assert_close(target(x), projector(backbone(x)))
    assert not target(x).requires_grad and not any(p.requires_grad for p in target.parameters())
    target.follow(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2), 1.0)
    torch.testing.assert_close(target(x), projector(backbone(x)))


def test_the_second_view_is_blurred_less_and_solarized():
    config = config_of(METHODS["byol"])
    first, second = config.views
    assert first == config.augment
    assert (second.blur, second.solarize) == (pytest.approx(0.1 * first.blur), 0.2)
    assert second.size == first.size and second.scale == first.scale
    assert AugmentConfig().solarize == 0 == first.solarize
