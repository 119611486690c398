"""Probes on made-up features: against scikit-learn, plain SGD, LARS by hand and timm's LARS."""

import math
import os
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
from train.evaluation.fast_probe import (
    draw_labelled,
    fast_probe,
    few_labels,
    split,
    spread,
    train_heads,
)
from train.evaluation.linear_probe import (
    Head,
    LinearProbe,
    PartOrder,
    build_lars,
    check_losses,
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


def test_a_probe_that_diverges_at_every_learning_rate_is_an_error_and_at_one_a_warning(capsys):
    x, labels, *_ = problem(0.3)
    train, config = encoded(x, labels), FastProbeConfig(lrs=(1e38, 1e37), epochs=5)
    with pytest.raises(FloatingPointError, match=r"diverged at all of --fast.lrs 1e\+38,1e\+37"):
        fast_probe(train, train, config=config, num_classes=7, top=5, seed=0)
    rates = LinearProbeConfig(lrs=(0.1, 30.0))
    probe = LinearProbe(rates, features=4, classes=2, **NEW | {"log": Log(Path(os.devnull))})
    assert check_losses(probe, [0.5, math.nan], set()) == {30.0}
    assert (
        "warning: the linear probe diverged in epoch 1 at --linear.lrs 30.0"
        in capsys.readouterr().err
    )
    assert check_losses(probe, [0.5, math.inf], {30.0}) == {30.0}
    assert capsys.readouterr().err == ""
    with pytest.raises(FloatingPointError, match=r"in epoch 1 at --linear.lrs 0.1,30.0: lower"):
        check_losses(probe, [math.inf, math.nan], set())


def test_few_labels_are_the_same_share_of_each_class_and_at_least_one():
    labels = torch.tensor([0] * 400 + [1] * 200 + [2] * 30).roll(77)
    train = encoded(torch.randn(630, 4, generator=torch.Generator().manual_seed(0)), labels)
    _, held = split(train, 3)
    draws = [draw_labelled(train, 0.1, seed=3, draw=draw) for draw in range(3)]
    for rows in draws:
        assert labels[rows].bincount().tolist() == [40, 20, 3]
        assert len(set(rows.tolist())) == len(rows) and not set(rows.tolist()) & set(held.tolist())
    assert len({tuple(rows.tolist()) for rows in draws}) == 3
    assert draws[1].tolist() == draw_labelled(train, 0.1, seed=3, draw=1).tolist()
    few = draw_labelled(train, 0.01, seed=3, draw=0)
    assert labels[few].bincount().tolist() == [4, 2, 1]  # 0.3 of the last class is one


def test_with_all_labels_the_probe_is_the_whole_one_and_with_fewer_it_is_worse():
    x, labels, test_x, test_labels = problem(1.5)
    sets = encoded(x, labels), encoded(test_x, test_labels)
    config = FastProbeConfig(epochs=10, label_fractions=(0.01, 0.1, 1.0), label_draws=3)
    options: dict = {"config": config, "num_classes": 7, "top": 5, "seed": 0}
    _, whole = fast_probe(*sets, **options)
    rows = torch.from_numpy(draw_labelled(sets[0], 1.0, seed=0, draw=2))
    assert torch.equal(fast_probe(*sets, **options, labelled=rows)[1], whole)
    one, tenth, everything = few_labels(*sets, **options)
    expected = 100 * (whole[:, 0] == test_labels).float().mean().item()
    assert everything["top1"] == {
        "mean": pytest.approx(expected), "std": pytest.approx(0, abs=1e-6),
        "values": [pytest.approx(expected)] * 3,
    }  # fmt: skip
    assert (one["labels_per_class"], everything["labels"]) == ([1, 2], 900)
    assert 100 / 7 < one["top1"]["mean"] < tenth["top1"]["mean"] < expected
    assert one["top1"]["std"] == pytest.approx(np.std(one["top1"]["values"], ddof=1)) != 0
    assert one["top5"]["mean"] > one["top1"]["mean"]


def test_with_few_labels_the_probe_reaches_what_logistic_regression_reaches():
    x, labels, test_x, test_labels = problem(0.3)
    train, test = encoded(x, labels), encoded(test_x, test_labels)
    rows = draw_labelled(train, 0.01, seed=0, draw=0)
    mean, std = x.mean(0), x.std(0)
    reference = LogisticRegression(max_iter=2000).fit(((x - mean) / std)[rows], labels[rows])
    expected = 100 * reference.score(((test_x - mean) / std).numpy(), test_labels.numpy())
    options: dict = {"config": FastProbeConfig(), "num_classes": 7, "top": 5, "seed": 0}
    _, guesses = fast_probe(train, test, **options, labelled=torch.from_numpy(rows))
    assert 100 * (guesses[:, 0] == test_labels).float().mean().item() > expected - 2
    assert expected > 80


def test_the_spread_of_one_draw_or_of_fewer_than_five_classes_is_unknown():
    assert spread([3.0]) == {"mean": 3.0, "std": None, "values": [3.0]}
    assert spread([None, None]) is None


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
