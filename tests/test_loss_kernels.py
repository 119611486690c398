"""The Triton kernels of the loss and of normalisation, in Triton's interpreter or on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from kernels.cosine import symmetric_neg_cosine
from kernels.normalize import normalize_views

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(p, z):
    """Loss, z_std and gradient of p in fp64."""
    p = p.detach().double().requires_grad_()
    target = F.normalize(z.double(), dim=-1)
    loss = -(F.normalize(p, dim=-1) * target.flip(0)).sum(-1).mean()
    (3 * loss).backward()
    return loss.detach(), target.std(1, correction=0).mean(), p.grad


# 3 rows of 5: less than a vector; 300 of 64: several rows a program; 2048: SimSiam's dimension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(3, 5), (300, 64), (7, 2048)])
def test_loss_meter_and_gradient_are_as_exact_as_plain_torch(rows, dim, dtype):
    generator = torch.Generator().manual_seed(0)
    p, z = (torch.randn(2, rows, dim, generator=generator) + 0.3 for _ in range(2))
    p, z = p.to(DEVICE, dtype), z.to(DEVICE, dtype)
    reference = exact(p, z)
    errors = {}
    for kernels in ("plain", "triton"):
        leaf = p.detach().requires_grad_()
        loss, z_std = symmetric_neg_cosine(leaf, z, kernels=kernels)
        assert loss.dtype == z_std.dtype == torch.float32 and not z_std.requires_grad
        (3 * loss).backward()
        assert leaf.grad.dtype == dtype
        values = (loss.detach(), z_std, leaf.grad)
        errors[kernels] = [(a.double() - b).abs().max().item()
                           for a, b in zip(values, reference, strict=True)]  # fmt: skip
    for ours, plain in zip(errors["triton"], errors["plain"], strict=True):
        assert ours <= 2 * plain + 1e-7


def test_meter_of_a_collapsed_batch_is_zero():
    same = torch.randn(64, generator=torch.Generator().manual_seed(0)).expand(2, 100, 64)
    same = same.contiguous().to(DEVICE)
    assert symmetric_neg_cosine(same, same, kernels="triton")[1].item() < 1e-6


def test_loss_refuses_what_it_would_misread():
    p = torch.randn(2, 4, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(2, N, D\)"):
        symmetric_neg_cosine(p[:1], p[:1], kernels="triton")
    with pytest.raises(ValueError, match="contiguous"):
        symmetric_neg_cosine(p.transpose(1, 2), p.transpose(1, 2), kernels="triton")
    with pytest.raises(ValueError, match="floating"):
        symmetric_neg_cosine(p.int(), p.int(), kernels="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalised_views_are_as_exact_as_plain_torch(dtype):
    generator = torch.Generator().manual_seed(0)
    # 3 x 41 x 37 x 3 bytes: several programs, whose first byte is of each of the three channels
    views = torch.randint(0, 256, (3, 41, 37, 3), dtype=torch.uint8, generator=generator)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    reference = ((views.double() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(
        0, 3, 1, 2
    )
    found = {
        kernels: normalize_views(views.to(DEVICE), mean, std, dtype, kernels=kernels).cpu()
        for kernels in ("plain", "triton")
    }
    assert found["triton"].is_contiguous(memory_format=torch.channels_last)
    ours, plain = ((found[k].double() - reference).abs().max() for k in ("triton", "plain"))
    assert found["triton"].dtype == dtype and ours <= 2 * plain + 1e-6
