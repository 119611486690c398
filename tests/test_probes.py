"""Probes on made-up features: against scikit-learn, plain SGD, LARS by hand and timm's LARS."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from train.distributed import World
from train.evaluation.config import FastProbeConfig, LinearProbeConfig
from train.evaluation.encoded import Encoded
from train.evaluation.fast_probe import fast_probe, train_heads
from train.evaluation.linear_probe import (
    Head,
    LinearProbe,
    PartOrder,
    build_lars,
    fit_batch,
    images_a_pass,
)
from train.run.folder import Log

ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
NEW: dict = {"world": ALONE, "folder": Path("nowhere"), "facts": {}, "log": Log(None)}


def problem(spread: float, *, classes: int = 7, seed: int = 0):
    """Features of the tiny scale and large mean that SimSiam's have: train and test."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 32, generator=generator)
    labels = torch.randint(classes, (1500,), generator=generator)
    x = centers[labels] + spread * torch.randn(1500, 32, generator=generator)
    x = 0.01 * (3 + x * torch.logspace(-1, 1, 32))
    return x[:1000], labels[:1000], x[1000:], labels[1000:]


def encoded(x: torch.Tensor, labels: torch.Tensor) -> Encoded:
    return Encoded(x, labels, torch.arange(len(x)))


@pytest.mark.parametrize("spread", [0.3, 1.5])  # separable; overlapping classes
def test_fast_probe_reaches_what_logistic_regression_reaches(spread):
    x, labels, test_x, test_labels = problem(spread)
    mean, std = x.mean(0), x.std(0)
    reference = LogisticRegression(max_iter=2000).fit(((x - mean) / std).numpy(), labels.numpy())
    expected = 100 * reference.score(((test_x - mean) / std).numpy(), test_labels.numpy())
    train, test = encoded(x, labels), encoded(test_x, test_labels)
    found, guesses = fast_probe(train, test, config=FastProbeConfig(), num_classes=7, top=5, seed=0)
    top1 = 100 * (guesses[:, 0] == test_labels).float().mean().item()
    assert top1 > expected - 1
    assert (expected > 99.5) == (spread == 0.3)
    assert guesses.shape == (500, 5) and all(len(set(row)) == 5 for row in guesses.tolist())
    by_lr = found["held_out_top1_by_lr"]
    assert by_lr[str(found["lr"])] == max(by_lr.values()) and found["held_out_images"] == 100


def test_classifiers_trained_together_are_those_trained_alone_by_plain_sgd():
    x, labels, _, _ = problem(1.5)
    rows = torch.arange(200)
    config = FastProbeConfig(lrs=(0.03, 0.5), epochs=3, batch_size=64)
    heads = train_heads(encoded(x, labels), rows, config=config, num_classes=7, seed=4)
    mean, std, weight, bias = heads
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(std, x.std(0, correction=0))
    for number, lr in enumerate(config.lrs):
        alone = nn.Linear(32, 7)
        nn.init.zeros_(alone.weight)
        nn.init.zeros_(alone.bias)
        optimizer = torch.optim.SGD(alone.parameters(), lr=lr, momentum=0.9)
        generator = torch.Generator().manual_seed(4)
        for epoch in range(3):
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * epoch / 3)) / 2
            for batch in torch.randperm(200, generator=generator).split(64):
                F.cross_entropy(alone((x[batch] - mean) / std), labels[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(weight[:, number].T, alone.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias[number], alone.bias.detach(), rtol=1e-4, atol=1e-5)


def test_a_learning_rate_that_explodes_spoils_no_other_and_is_not_picked():
    x, labels, test_x, test_labels = problem(0.3)
    sets, options = (encoded(x, labels), encoded(test_x, test_labels)), {"num_classes": 7, "top": 5}
    config = FastProbeConfig(lrs=(1e38, 0.1), epochs=5)
    found, guesses = fast_probe(*sets, config=config, **options, seed=0)
    config = FastProbeConfig(lrs=(0.1,), epochs=5)
    alone, same = fast_probe(*sets, config=config, **options, seed=0)
    assert found["lr"] == 0.1 and (guesses == same).float().mean() > 0.99
    assert found["held_out_top1_by_lr"]["0.1"] == alone["held_out_top1_by_lr"]["0.1"] > 90
    assert found["held_out_top1_by_lr"]["1e+38"] < 50


def test_lars_takes_the_official_step_worked_out_by_hand():
    torch.manual_seed(0)
    head = Head(3, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))  # norm 5
    optimizer = build_lars(nn.ModuleList([head]))
    optimizer.param_groups[0]["lr"] = 2.0
    w, b = head.weight.detach().clone(), head.bias.detach().clone()
    buffer_w, buffer_b = torch.zeros_like(w), torch.zeros_like(b)
    for number in range(3):
        gradient_w, gradient_b = torch.randn(2, 3), torch.randn(1, 2)
        head.weight.grad, head.bias.grad = gradient_w.clone(), gradient_b.clone()
        optimizer.step()
        buffer_w = 0.9 * buffer_w + 0.001 * w.norm() / gradient_w.norm() * gradient_w
        # a bias of 0 takes the gradient as it is, later it is adapted as the weights are
        trust = 0.001 * b.norm() / gradient_b.norm() if number else 1
        buffer_b = 0.9 * buffer_b + trust * gradient_b
        w, b = w - 2 * buffer_w, b - 2 * buffer_b
        torch.testing.assert_close(head.weight.detach(), w)
        torch.testing.assert_close(head.bias.detach(), b)


def test_lars_equals_timms_for_both_learning_rates(torchvision):
    from timm.optim import Lars

    torch.manual_seed(0)
    config = LinearProbeConfig(batch_size=64, epochs=4)
    probe = LinearProbe(config, features=12, classes=5, **NEW)
    theirs = [nn.Linear(12, 5) for _ in config.lrs]
    for head, linear in zip(probe.heads, theirs, strict=True):
        linear.weight.data.copy_(head.weight.data)
        nn.init.zeros_(linear.bias)
    optimizers = [
        Lars(linear.parameters(), momentum=0.9, trust_coeff=0.001, always_adapt=True)
        for linear in theirs
    ]
    for epoch in range(4):
        probe.set_rates()
        x, labels = torch.randn(64, 12), torch.randint(5, (64,))
        probe.step(x, labels)
        probe.epochs_done += 1
        for lr, linear, optimizer in zip(config.lrs, theirs, optimizers, strict=True):
            lr = lr * 64 / 256 * (1 + math.cos(math.pi * epoch / 4)) / 2
            optimizer.param_groups[0]["lr"] = lr
            F.cross_entropy(linear(x), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    for head, linear in zip(probe.heads, theirs, strict=True):
        torch.testing.assert_close(head.weight, linear.weight)
        torch.testing.assert_close(head.bias[0], linear.bias)


def test_learning_rates_are_the_papers_and_the_official_codes():
    probe = LinearProbe(LinearProbeConfig(), features=2, classes=2, **NEW)
    probe.set_rates()
    assert [group["lr"] for group in probe.optimizer.param_groups] == pytest.approx([0.32, 1.6])
    probe.epochs_done = 45  # half of the cosine
    probe.set_rates()
    assert [group["lr"] for group in probe.optimizer.param_groups] == pytest.approx([0.16, 0.8])
    assert all(head.weight.std() < 0.03 and not head.bias.any() for head in probe.heads)


@pytest.mark.parametrize(
    ("batch", "per_rank", "ranks", "expected"),
    [(4096, 256, 1, 256), (4096, 500, 1, 256), (4096, 256, 8, 2048), (96, 256, 1, 96)],
)
def test_forward_passes_divide_the_batch(batch, per_rank, ranks, expected):
    world = World(0, ranks, 0, ranks, torch.device("cpu"), None)
    config = LinearProbeConfig(batch_size=batch)
    assert images_a_pass(config, per_rank=per_rank, world=world) == expected


def test_a_batch_that_the_ranks_do_not_divide_is_refused():
    three = World(0, 3, 0, 3, torch.device("cpu"), None)
    with pytest.raises(ValueError, match="3 processes do not divide --linear.batch_size 4096"):
        images_a_pass(LinearProbeConfig(), per_rank=256, world=three)


def test_a_batch_is_lowered_with_a_warning_only_where_the_images_do_not_fill_it(tmp_path, capsys):
    config, log = LinearProbeConfig(), Log(tmp_path / "log.txt")
    assert fit_batch(config, 4096, log) == config and not capsys.readouterr().err
    assert fit_batch(config, 1437, log) == LinearProbeConfig(batch_size=1024)
    assert "1437 training images do not fill --linear.batch_size 4096" in capsys.readouterr().err


def test_an_epoch_of_a_part_has_each_of_its_samples_once_and_no_other():
    part = np.array([3, 5, 8, 13, 21, 34])
    order = PartOrder(part, batch_size=2, seed=0)
    epochs = [np.concatenate([order.global_batch(3 * e + i) for i in range(3)]) for e in (0, 1)]
    assert all(sorted(epoch) == part.tolist() for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert {order.replacement(0, row, 0) for row in range(40)} <= set(part.tolist())
