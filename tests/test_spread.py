"""RankMe and the collapse meter of matrices whose values are known."""

import math

import pytest
import torch
from torch import nn

from train.evaluation.encoded import measure_spread
from train.evaluation.health import rankme
from train.network.model import build_projector
from train.run.report import COLLAPSED


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rankme_of_directions_alike_is_their_number(scale):
    directions = torch.linalg.qr(torch.randn(300, 40, generator=seeded())).Q
    assert rankme(scale * directions) == pytest.approx(40, rel=1e-3)
    assert rankme(scale * directions.T) == pytest.approx(40, rel=1e-3)  # fewer images than channels


def test_rankme_of_a_line_is_one():
    line = torch.randn(300, 1, generator=seeded()) @ torch.randn(1, 40, generator=seeded(1))
    assert rankme(line) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(300, 40)) == pytest.approx(1, abs=1e-3)


def test_rankme_of_two_singular_values_is_the_papers_formula():
    p = (0.75, 0.25)
    expected = math.exp(-sum(q * math.log(q) for q in p))
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected, rel=1e-5)


def test_rankme_takes_singular_values_not_eigenvalues_and_does_not_centre():
    x = 5 + torch.randn(200, 30, generator=seeded())
    s = torch.linalg.svdvals(x.double())
    p = s / s.sum() + 1e-7
    assert rankme(x) == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-6)


def test_collapse_meter_is_one_on_the_sphere_and_zero_when_all_are_alike():
    spread = torch.randn(4000, 64, generator=seeded())
    found = measure_spread(nn.Identity(), spread)
    assert found["collapse_meter"] == pytest.approx(1, abs=0.01) and not found["collapsed"]
    scaled = measure_spread(nn.Identity(), 7 * spread)
    assert scaled["collapse_meter"] == pytest.approx(found["collapse_meter"], rel=1e-5)
    alike = measure_spread(nn.Identity(), spread[:1].expand(4000, -1))
    assert alike["collapse_meter"] == pytest.approx(0, abs=1e-3) and alike["collapsed"]


def test_without_a_projector_there_is_rankme_of_the_features_alone():
    x = torch.randn(200, 30, generator=seeded())
    expected = {"rankme": None, "collapse_meter": None, "collapsed": None}
    assert measure_spread(None, x) == {**expected, "rankme_features": rankme(x)}


def test_a_collapse_is_not_hidden_by_the_projectors_batch_norm():
    projector = build_projector(16, hidden=16, outputs=8, layers=2)
    x = torch.randn(500, 16, generator=seeded())
    for _ in range(50):  # running statistics
        projector(x)
    projector.eval()
    assert measure_spread(projector, x)["collapse_meter"] == pytest.approx(1, abs=0.05)
    alike = x[:1] + 0.01 * x
    assert measure_spread(projector, alike)["collapse_meter"] < COLLAPSED
    found = measure_spread(projector, x)
    assert found["rankme"] < 8.1 and 12 < found["rankme_features"] < 16.1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
