"""Rank and spectrum of matrices whose values are known, and in runs that collapse."""

import json
from functools import cache

import pytest
import torch

from forked import forked
from train.config import MethodConfig
from train.evaluation.health import decay, spectrum
from train.methods.byol import BYOLConfig
from train.run.report import collapse_advice


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_singular_values(values: torch.Tensor, rows: int = 600) -> torch.Tensor:
    """(rows, len(values)) fp32 whose columns sum to 0, with these singular values."""
    basis = torch.randn(rows, len(values), generator=seeded(), dtype=torch.float64)
    left = torch.linalg.qr(basis - basis.mean(0)).Q
    right = torch.linalg.qr(torch.randn(len(values), len(values), generator=seeded(1)).double()).Q
    return (left * values @ right).float()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_the_decay_of_a_power_law_is_its_exponent(alpha):
    k = torch.arange(1, 101, dtype=torch.float64)
    assert decay(with_singular_values(k ** (-alpha / 2))) == pytest.approx(alpha, abs=0.01)


def test_too_few_directions_have_no_decay():
    assert decay(with_singular_values(torch.ones(6).double())) is None
    assert decay(torch.ones(50, 20)) is None


def test_the_spectrum_is_of_the_centred_matrix_at_powers_of_two():
    values = torch.arange(40, 0, -1, dtype=torch.float64)
    x = with_singular_values(values) + 1000
    expected = [(values[k - 1] / values[0]).item() for k in (1, 2, 4, 8, 16, 32)]
    assert spectrum(x) == pytest.approx(expected, rel=1e-3)
    assert spectrum(torch.ones(50, 20)) == []


SMALL = [
    "train/main.py", "--config=configs/demo.yaml", "--device=cpu", "--max_steps=40",
    "--model.width=8", "--model.projector_dim=64", "--model.projector_hidden=64",
    "--model.predictor_hidden=16", "--eval.every_epochs=100", "--eval.rank_images=300",
    "--eval.rank_steps=20", "--log_every=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The result and stderr of a short run on the digits, by its flags; each is run once."""

    @cache
    def run(*flags: str) -> tuple[dict, str]:
        done = forked([*SMALL, f"--out={tmp_path_factory.mktemp('run')}/run", *flags])
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--optim.lr=30", "--optim.weight_decay=0.1"])
def test_a_partial_collapse_that_the_meter_misses_is_warned_of_and_its_remedy_helps(flag, trained):
    found, stderr = trained(flag)
    assert found["partially_collapsed"] and found["rank_z"] < 4 and not found["collapsed"]
    assert "PARTIAL COLLAPSE" in stderr and flag.split("=")[0] in stderr.split("Remedy: ")[1]
    found, stderr = trained()  # the flag at the preset's value, which is lower
    assert not found["partially_collapsed"] and found["rank_z"] > 12
    assert "COLLAPSE" not in stderr


NO_NORM = "--model.head_norm=none"
SHORT = "--log_every=4", "--max_steps=24"


@pytest.mark.parametrize("changed", [(NO_NORM, "--optim.lr=0.05"), ("--optim.lr=3",)])
def test_each_remedy_for_a_collapse_ends_it(changed, trained):
    collapsing = NO_NORM, "--optim.lr=3"
    found, stderr = trained(*collapsing, *SHORT)
    assert found["collapsed"]
    (flag,) = {flag.split("=")[0] for flag in set(collapsing) - set(changed)}
    assert flag in stderr.split("COLLAPSED: ")[1].split("Remedy: ")[1].splitlines()[0]
    found, stderr = trained(*changed, *SHORT)
    assert not found["collapsed"] and "COLLAPSED" not in stderr


@pytest.mark.parametrize(
    ("switches", "remedy"),
    [
        ({"stop_gradient": False}, "--method.stop_gradient true"),
        ({"predictor": "none"}, "--method.predictor mlp"),
        ({"name": "byol", "byol": BYOLConfig(predictor=False)}, "--method.byol.predictor true"),
    ],
)
def test_the_switch_that_makes_a_method_collapse_is_named(switches, remedy):
    # that they collapse, and do not with the switch on: the studies, docs/study.md
    advice = collapse_advice(0.1, threshold=0.5, method=MethodConfig(**switches).spec)
    assert f"Remedy: set {remedy}." in advice
