"""NT-Xent and its gradients against a double loop and a hand-worked case; SimCLR's heads."""

import math

import pytest
import torch
from torch.nn import functional as F

from test_methods import METHODS, flat, made, some_views
from train.methods import MethodConfig
from train.methods.simclr import SimCLRConfig, nt_xent


def by_loops(queries: torch.Tensor, keys: torch.Tensor, temperature: float) -> torch.Tensor:
    """Summed over both directions, as the official code has it."""
    views, rows, _ = queries.shape
    total = torch.zeros((), dtype=queries.dtype)
    for view in range(views):
        for row in range(rows):
            terms = {
                (v, r): F.cosine_similarity(queries[view, row], keys[v, r], dim=0) / temperature
                for v in range(views)
                for r in range(rows)
                if (v, r) != (view, row)
            }
            total -= terms[1 - view, row] - torch.stack(list(terms.values())).logsumexp(0)
    return total / rows


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_and_its_gradients_equal_the_double_loop(temperature):
    torch.manual_seed(0)
    draws = [torch.randn(2, 5, 8) for _ in range(2)]
    found = []
    for loss in (nt_xent, by_loops):
        leaves = [draw.double().requires_grad_() for draw in draws]
        if loss is nt_xent:
            value = nt_xent(*leaves, temperature=temperature)
        else:
            value = by_loops(*leaves, temperature)
        value.backward()
        found.append([value, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)


def test_equal_views_of_two_orthogonal_images_have_the_loss_worked_out_by_hand():
    z = torch.eye(4)[:2].repeat(2, 1, 1)  # cosine 1 with the other view, 0 with the other image
    expected = 2 * -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + 2))
    assert nt_xent(z, 3 * z, temperature=0.5).item() == pytest.approx(expected)


def test_batch_norm_takes_both_views_as_one_batch_and_stands_after_every_layer():
    model = made(METHODS["simclr"])
    views = some_views(0) + torch.tensor([0.0, 2.0]).view(2, 1, 1, 1, 1)
    model(flat(views))
    both = model.backbone.conv1(flat(views))
    torch.testing.assert_close(model.backbone.bn1.running_mean, 0.1 * both.mean((0, 2, 3)))
    names = [name for name, p in model.projector.named_parameters() if p.requires_grad]
    assert names == [
        "0.linear.weight", "0.norm.weight", "0.norm.bias", "1.linear.weight", "1.norm.weight",
    ]  # fmt: skip


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_predictor_and_stop_gradient_of_section_6_2(stop_gradient):
    simclr = SimCLRConfig(predictor=True, stop_gradient=stop_gradient)
    model, plain = (made(MethodConfig(name="simclr", simclr=simclr)) for _ in range(2))
    x = flat(some_views(0))
    loss, _ = model(x)
    loss.backward()
    z = plain.projector(plain.backbone(x))
    p = plain.predictor(z).view(2, -1, 16)
    keys = z.view(2, -1, 16)
    expected = by_loops(p, keys.detach() if stop_gradient else keys, 0.1)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    ours, theirs = (m.projector[0].linear.weight.grad for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
