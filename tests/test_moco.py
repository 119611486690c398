"""MoCo's loss and gradients against a loop, and the queue of keys."""

import math

import pytest
import torch
from torch.nn import functional as F

from test_methods import METHODS, ROWS, flat, made, some_views
from train.methods.method import RecentImages
from train.methods.moco import info_nce
from train.network.norm import BatchNorm, set_views


def by_loop(q, k, negatives, temperature):
    losses = [
        F.cross_entropy(torch.stack([one @ own, *(one @ n for n in negatives)]) / temperature,
                        torch.tensor(0))
        for one, own in zip(q, k, strict=True)
    ]  # fmt: skip
    return torch.stack(losses).mean()


def test_info_nce_and_its_gradient_equal_the_loop():
    torch.manual_seed(0)
    draws = [F.normalize(torch.randn(n, 8), dim=1) for n in (5, 5, 9)]
    q, twin = draws[0].clone().requires_grad_(), draws[0].clone().requires_grad_()
    loss = info_nce(q, *draws[1:], temperature=0.2)
    expected = by_loop(twin, *draws[1:], 0.2)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(q.grad, twin.grad)


def test_a_found_key_among_orthogonal_ones_has_the_loss_worked_out_by_hand():
    axes = torch.eye(4)
    loss = info_nce(axes[:1], axes[:1], axes[1:], temperature=0.2)
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-5)), rel=1e-4)


def test_loss_and_gradients_of_a_step_equal_the_formula_of_two_passes():
    model, plain = made(METHODS["moco"]), made(METHODS["moco"])
    views = some_views(0)
    negatives = plain.queue.rows.flatten(0, 1).clone()
    model.before_step(0)
    loss, _ = model(flat(views))
    loss.backward()
    set_views(plain, 1)
    passes = [view.contiguous(memory_format=torch.channels_last) for view in views]
    q1, q2 = (F.normalize(plain.projector(plain.backbone(view)), dim=1) for view in passes)
    k1, k2 = (F.normalize(plain.target(view), dim=1) for view in passes)
    expected = (by_loop(q1, k2, negatives, 0.2) + by_loop(q2, k1, negatives, 0.2)) / 2
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == key.startswith("target."), key
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=key)
    torch.testing.assert_close(model.queue.rows[:ROWS], torch.stack([k1, k2], dim=1))


def test_the_head_has_no_batch_norm_and_the_queue_starts_with_unit_vectors():
    model = made(METHODS["moco"])
    assert not any(isinstance(part, BatchNorm) for part in model.projector.modules())
    assert [name for name, _ in model.projector.named_parameters()] == [
        "0.linear.weight", "0.linear.bias", "1.linear.weight", "1.linear.bias",
    ]  # fmt: skip
    torch.testing.assert_close(model.queue.rows.norm(dim=-1), torch.ones(12, 2))


def test_the_oldest_rows_are_replaced_in_turn_past_the_end():
    recent = RecentImages(torch.zeros(5, 2, 1))
    for step in range(3):  # three images a step: 0 1 2, 3 4 5, 6 7 8
        recent.point(3 * step)
        images = torch.arange(3.0 * step, 3 * step + 3).expand(2, 3)[..., None]
        recent.put(images * torch.tensor([1.0, -1.0]).view(2, 1, 1), None)
    assert recent.rows[:, 0, 0].tolist() == [5, 6, 7, 8, 4]
    assert recent.rows[:, 1, 0].tolist() == [-5, -6, -7, -8, -4]


def test_keys_that_are_not_finite_stay_out_of_the_queue():
    recent = RecentImages(torch.ones(4, 2, 2))
    z = torch.full((2, 3, 2), 5.0)
    z[1, 1, 0], z[0, 2, 1] = float("nan"), float("inf")
    recent.put(z, None)
    assert recent.rows[:, 0, 0].tolist() == [5, 1, 1, 1] and recent.rows.isfinite().all()
