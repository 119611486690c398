"""SwAV's assignments and loss against loops, its frozen prototypes, its queue and small views."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from test_methods import METHODS, SWAV, config_of, flat, made, some_views
from train.methods import MethodConfig
from train.methods.swav import sinkhorn, swapped


def cosines(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(*shape[:-1], 16, generator=generator), dim=-1)
    return z @ F.normalize(torch.randn(shape[-1], 16, generator=generator), dim=-1).T


def test_sinkhorn_equals_the_papers_iterations_and_shares_are_even():
    scores = cosines(2, 30, 5)
    found = sinkhorn(scores, epsilon=0.05, iterations=3)
    for view in range(2):
        q = np.exp(scores[view].double().numpy().T / 0.05)  # (K, B), as in the paper
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdims=True) * len(q)
            q /= q.sum(0, keepdims=True) * q.shape[1]
        expected = torch.from_numpy(q.T * q.shape[1]).float()
        torch.testing.assert_close(found[view], expected, rtol=1e-4, atol=1e-6)
    even = sinkhorn(scores, epsilon=0.05, iterations=100)
    torch.testing.assert_close(even.sum(2), torch.ones(2, 30))
    torch.testing.assert_close(even.sum(1), torch.full((2, 5), 6.0), rtol=1e-3, atol=0)


def test_the_loss_and_its_gradient_equal_the_sum_over_pairs_of_views():
    scores, q = (
        cosines(4, 6, 5).requires_grad_(),
        sinkhorn(cosines(2, 6, 5), epsilon=0.05, iterations=3),
    )
    twin = scores.detach().clone().requires_grad_()
    loss = swapped(scores, q, 0.1)
    pairs = [
        F.cross_entropy(twin[view] / 0.1, q[assigned])
        for assigned in range(2)
        for view in range(4)
        if view != assigned
    ]
    expected = torch.stack(pairs).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(scores.grad, twin.grad)


def test_equal_scores_cost_the_logarithm_of_the_prototypes():
    scores = torch.zeros(2, 6, 5)
    loss = swapped(scores, sinkhorn(scores, epsilon=0.05, iterations=3), 0.1)
    assert loss.item() == pytest.approx(np.log(5))


def test_a_whole_step_equals_the_formula_with_queue_and_small_views():
    model, plain = made(METHODS["swav"]), made(METHODS["swav"])
    for one in (model, plain):
        one.before_step(2)  # two batches of six have filled the queue of twelve
        one.queue.rows.copy_(F.normalize(torch.arange(12.0 * 2 * 16).view(12, 2, 16).cos(), dim=-1))
    views, small = some_views(0), some_views(1, size=8)
    loss, _ = model(flat(views), None, flat(small))
    loss.backward()
    features = torch.cat([plain.backbone(flat(views)), plain.backbone(flat(small))])
    z = F.normalize(plain.projector(features), dim=1).view(4, 6, 16)
    weight = plain.prototypes.weight
    rows = torch.cat([plain.queue.rows.transpose(0, 1), z[:2].detach()], dim=1)
    q = sinkhorn(rows @ weight.detach().T, epsilon=0.05, iterations=3)[:, -6:]
    expected = swapped(z @ weight.T, q, 0.1)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (key, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=key)
    torch.testing.assert_close(model.queue.rows[:6], z[:2].detach().transpose(0, 1))
    assert model.queue.rows[6:].equal(plain.queue.rows[6:])  # the oldest alone were replaced


def test_the_queue_fills_from_its_epoch_on_and_assigns_once_it_is_full():
    swav = dataclasses.replace(SWAV, queue_from_epoch=2)  # an epoch has two steps
    model = made(MethodConfig(name="swav", swav=swav))
    seen = []
    for step in range(8):
        model.before_step(step)
        seen.append((model.fills, model.assigns_recent, int(model.queue.slot)))
    assert seen == [
        *[(False, False, 0)] * 4,
        (True, False, 0), (True, False, 6), (True, True, 0), (True, True, 6),
    ]  # fmt: skip


def test_prototypes_have_length_one_and_stand_still_in_the_first_steps():
    model = made(METHODS["swav"])
    with torch.no_grad():
        model.prototypes.weight.mul_(3)
    model.before_step(0)
    torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(7))
    assert [len(model.frozen(step)) for step in range(3)] == [1, 0, 0]  # half of two steps


def test_views_are_two_large_ones_and_the_small_ones():
    views = config_of(METHODS["swav"]).views
    assert [view.size for view in views] == [16, 16, 8, 8]
    assert views[2].scale == (0.05, 0.14) and views[0].scale == (0.2, 1.0)
