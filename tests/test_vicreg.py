"""VICReg's terms against algorithm 1 and a case worked out by hand; its projector."""

import math

import pytest
import torch
from torch.nn import functional as F

from test_methods import METHODS, flat, made, some_views
from train.methods.vicreg import terms


def algorithm_1(z_a: torch.Tensor, z_b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The paper's pseudocode, one view after the other."""
    rows, dim = z_a.shape
    lacking, others = [], []
    for z in (z_a, z_b):
        std = torch.sqrt(z.var(dim=0) + 1e-4)
        lacking.append(torch.mean(F.relu(1 - std)))
        z = z - z.mean(dim=0)
        cov = z.T @ z / (rows - 1)
        others.append(cov[~torch.eye(dim, dtype=torch.bool)].pow(2).sum() / dim)
    return F.mse_loss(z_a, z_b), sum(lacking) / 2, sum(others)


def test_terms_and_their_gradients_equal_algorithm_1():
    torch.manual_seed(0)
    draw = 0.7 * torch.randn(2, 12, 5, dtype=torch.float64)
    ours, theirs = (draw.clone().requires_grad_() for _ in range(2))
    found, expected = terms(ours), algorithm_1(theirs[0], theirs[1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    sum(found).backward()
    sum(expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_collapsed_batch_lacks_all_variance_and_has_no_other_loss():
    invariance, variance, covariance = terms(torch.full((2, 8, 3), 5.0))
    assert invariance == 0 and covariance == 0
    assert variance.item() == pytest.approx(1 - math.sqrt(1e-4))


def test_two_dimensions_that_are_equal_have_the_covariance_worked_out_by_hand():
    column = torch.tensor([1.0, -1.0, 1.0, -1.0])
    z = torch.stack([column, column], 1).expand(2, 4, 2)
    _, variance, covariance = terms(z)
    assert variance == 0  # each has 4 / 3
    assert covariance.item() == pytest.approx(2 * 2 * (4 / 3) ** 2 / 2)  # views, pairs; of D = 2


def test_the_loss_weighs_the_terms_of_the_projector_that_ends_in_a_linear_layer():
    model = made(METHODS["vicreg"])
    views = flat(some_views(0))
    loss, scalars = model(views)
    z = model.projector(model.backbone(views)).float().view(2, -1, 16)
    invariance, variance, covariance = terms(z)
    torch.testing.assert_close(loss, 25 * invariance + 25 * variance + covariance)
    assert 0 < scalars["z_std"] < 1.5
    names = [name for name, _ in model.projector.named_parameters()]
    assert names == ["0.linear.weight", "0.norm.weight", "0.norm.bias", "1.linear.weight"]
