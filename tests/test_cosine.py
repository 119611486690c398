"""The loss and its meter against the formula; normalisation against torchvision's."""

import numpy as np
import pytest
import torch

from kernels.cosine import symmetric_neg_cosine
from kernels.normalize import normalize_views


def test_loss_equals_the_papers_formula_by_hand():
    p = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]])
    z = torch.tensor([[[0.0, 2.0]], [[1.0, 1.0]]])
    loss, _ = symmetric_neg_cosine(p, z)
    # D(p1, z2) = -(3 + 4) / (5 sqrt 2), D(p2, z1) = 0
    assert loss.item() == pytest.approx(-0.5 * 7 / (5 * 2**0.5), rel=1e-6)


def test_gradient_reaches_p_and_not_z():
    p, z = (torch.randn(2, 8, 16, requires_grad=True) for _ in range(2))
    loss, z_std = symmetric_neg_cosine(p, z)
    assert not z_std.requires_grad
    loss.backward()
    assert z.grad is None
    p64 = p.detach().double().requires_grad_()
    z64 = z.detach().double()
    cosine = torch.nn.functional.cosine_similarity(p64, z64.flip(0), dim=-1)
    (-cosine.mean()).backward()
    torch.testing.assert_close(p.grad, p64.grad.float(), rtol=1e-5, atol=1e-8)


def test_without_stop_gradient_the_target_gets_a_gradient():
    p, z = (torch.randn(2, 8, 16, requires_grad=True) for _ in range(2))
    symmetric_neg_cosine(p, z, stop_gradient=False)[0].backward()
    assert z.grad is not None and z.grad.abs().max() > 0


def test_meter_is_one_over_root_d_when_spread_and_zero_when_collapsed():
    torch.manual_seed(0)
    spread = torch.randn(2, 4096, 64)
    assert symmetric_neg_cosine(spread, spread)[1].item() == pytest.approx(64**-0.5, rel=0.02)
    same = torch.randn(64).expand(2, 100, 64)
    assert symmetric_neg_cosine(same, same)[1].item() < 1e-6


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, N, D\)"):
        symmetric_neg_cosine(torch.randn(3, 4, 5), torch.randn(3, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_views_equal_totensor_and_normalize(dtype):
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (4, 9, 7, 3), dtype=np.uint8))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = normalize_views(image, mean, std, dtype)
    exact = (image.double() / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
    exact = exact.permute(0, 3, 1, 2)
    plain = ((image.float() / 255 - torch.tensor(mean)) / torch.tensor(std)).to(dtype)
    plain = plain.permute(0, 3, 1, 2)
    error, allowed = ((t.double() - exact).abs().max().item() for t in (out, plain))
    assert error <= 2 * allowed + 1e-6
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (torch.zeros(2, 8, 8, 3), "uint8"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"\(..., H, W, 3\)"),
        (torch.zeros(2, 8, 3, 8, dtype=torch.uint8).transpose(2, 3), "contiguous"),
    ],
)
def test_other_views_are_refused(views, message):
    with pytest.raises(ValueError, match=message):
        normalize_views(views, (0, 0, 0), (1, 1, 1), torch.float32)
