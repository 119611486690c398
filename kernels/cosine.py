"""SimSiam's loss, the symmetric negative cosine, and the collapse meter, since z is read here.

    D(p, z) = - p/|p| . z/|z|        L = D(p1, sg(z2)) / 2 + D(p2, sg(z1)) / 2

sg is the stop-gradient. Source: Chen & He, CVPR 2021, equations 1 to 4.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.choose import Kernels, use_triton


def symmetric_neg_cosine(
    p: Tensor, z: Tensor, *, stop_gradient: bool = True, kernels: Kernels = "auto"
) -> tuple[Tensor, Tensor]:
    """The paper's loss and the collapse meter z_std, both fp32 scalars.

    Shapes: p and z (2, N, D), view first; any floating dtype, computed in fp32.
    z_std is the mean over views and channels of std over N of z/|z|: 1/sqrt(D) for features spread
    evenly over the sphere, 0 after collapse. It carries no gradient.
    stop_gradient=False (figure 2) gives the target a gradient too, by PyTorch's operations alone.
    Raises: ValueError for other shapes, dtypes or layouts.
    """
    if p.shape != z.shape or p.dim() != 3 or p.shape[0] != 2:
        raise ValueError(
            "symmetric_neg_cosine takes p and z of one shape (2, N, D), "
            f"got {tuple(p.shape)} and {tuple(z.shape)}"
        )
    if not (p.is_floating_point() and z.is_floating_point()):
        raise ValueError(f"symmetric_neg_cosine takes floating dtypes, got {p.dtype} and {z.dtype}")
    if stop_gradient and use_triton(kernels, p):
        if not (p.is_contiguous() and z.is_contiguous()):
            raise ValueError(
                f"symmetric_neg_cosine takes contiguous p and z, got {p.stride()} and {z.stride()}"
            )
        return _Fused.apply(p, z)
    target = F.normalize((z.detach() if stop_gradient else z).float(), dim=-1)
    loss = -(F.normalize(p.float(), dim=-1) * target.flip(0)).sum(-1).mean()
    return loss, target.detach().std(dim=1, correction=0).mean()


class _Fused(torch.autograd.Function):
    """The kernels compute the gradient of p in the forward pass, in fp32. No second derivative."""

    @staticmethod
    def forward(ctx, p, z):  # noqa: D102 - torch's contract; p, z (2, N, D) contiguous
        from kernels.gpu.cosine import loss_and_gradient  # see norm_autograd

        loss, z_std, dp = loss_and_gradient(p, z)
        ctx.save_for_backward(dp)
        ctx.dtype = p.dtype
        ctx.mark_non_differentiable(z_std)
        return loss, z_std

    @staticmethod
    def backward(ctx, *grads):  # noqa: D102 - torch's contract
        (dp,) = ctx.saved_tensors
        return (grads[0] * dp).to(ctx.dtype), None
