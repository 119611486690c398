"""The operators of norm_forward and norm_backward in plain fp32: what the kernels compute.

Also what runs on the CPU where statistics are synchronised over ranks. Same names, arguments and
results as the Triton operators, except that the mask of ReLU is a byte an element, and that
max-pool is not among them.
A newcomer's mistake: making these fast. They are the specification that the kernels are held to.

V views, R rows of a view, C channels; x is (V R, C).
"""

import torch
from torch import Tensor


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, num_views: int,
    momentum: float, eps: float, want_var: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean and biased variance of each view, (V, C) fp32 each; nothing else is asked for here."""
    assert running_mean is None and running_var is None and want_var
    var, mean = torch.var_mean(by_view(x, num_views), dim=1, correction=0)
    return mean, var


def apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    shortcut: Tensor | None, mean2: Tensor | None, rstd2: Tensor | None,
    weight2: Tensor | None, bias2: Tensor | None, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y like x, and where there is a shortcut and ReLU the mask (rows, C), else (rows, 0)."""
    y = affine(normalised(x, mean, rstd), weight, bias)
    if shortcut is not None and mean2 is not None and rstd2 is not None:
        y = y + affine(normalised(shortcut, mean2, rstd2), weight2, bias2)
    elif shortcut is not None:
        y = y + by_view(shortcut, len(mean))
    y = y.reshape(x.shape)
    mask = y > 0 if relu and shortcut is not None else y.new_empty((len(x), 0), dtype=torch.bool)
    return (y.relu() if relu else y).to(x.dtype), mask


def reduce(
    dy: Tensor, dy2: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, x2: Tensor | None, mean2: Tensor | None, rstd2: Tensor | None,
    bits: Tensor, relu: bool, write_g: bool, height: int, width: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """g like x (empty unless write_g), sums (V, K, C) of g, g xhat, g xhat2, and over views."""
    assert height == width == 0  # max-pool is PyTorch's own here
    g = dy.float() if dy2 is None else dy.float() + dy2.float()
    if relu:
        mask = bits if bits.shape[1] else affine(normalised(x, mean, rstd), weight, bias) > 0
        g = g * mask.reshape(g.shape)
    if write_g:
        g = g.to(x.dtype)
    rows = by_view(g, len(mean))
    sums = [rows.sum(1), (rows * normalised(x, mean, rstd)).sum(1)]
    if x2 is not None and mean2 is not None and rstd2 is not None:
        sums.append((rows * normalised(x2, mean2, rstd2)).sum(1))
    stacked = torch.stack(sums, dim=1)
    over_views = stacked.sum(0)
    if x2 is not None:  # sum g once more: the second bias's gradient has memory of its own
        over_views = torch.cat([over_views, over_views[:1]])
    return g if write_g else g.new_empty(0), stacked, over_views


def backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    x2: Tensor | None, mean2: Tensor | None, rstd2: Tensor | None, weight2: Tensor | None,
    sums: Tensor, place: Tensor | None, inv_count: float, mask_from_x: bool, height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx like x and dx2 like x2 (empty without one); sums times inv_count are means over rows."""
    rows, means = by_view(g, len(mean)), sums * inv_count
    if mask_from_x:
        rows = rows * (affine(normalised(x, mean, rstd), weight, bias) > 0)

    def gradient(
        x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, which: int
    ) -> Tensor:
        centred = rows - means[:, :1] - normalised(x, mean, rstd) * means[:, which : which + 1]
        scale = rstd if weight is None else rstd * weight
        return (centred * scale[:, None]).reshape(x.shape).to(x.dtype)

    dx = gradient(x, mean, rstd, weight, 1)
    if x2 is None or mean2 is None or rstd2 is None:
        return dx, dx.new_empty(0)
    return dx, gradient(x2, mean2, rstd2, weight2, 2)


def by_view(x: Tensor, num_views: int) -> Tensor:
    """(V R, C) -> (V, R, C) fp32."""
    return x.reshape(num_views, -1, x.shape[1]).float()


def normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """xhat as (V, R, C) fp32."""
    return (by_view(x, len(mean)) - mean[:, None]) * rstd[:, None]


def affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """xhat weight + bias."""
    return xhat if weight is None or bias is None else xhat * weight.float() + bias.float()
