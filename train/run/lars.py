"""LARS: SGD whose gradients are scaled to the norm of their weights, layer by layer.

The scaled gradients go through torch's fused SGD, which reads on the device whether to skip a step
(train/run/optim.GuardedStep): no wait for the host, and the momentum is updated in the same kernel.
A newcomer's mistake: weight decay on biases. Tensors of one dimension are plain SGD's.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.SGD):
    """A gradient g becomes trust |w| / (|g| + wd |w|) (g + wd w), then momentum as in SGD.

    g + wd w itself where |w| or the denominator is 0. So it was in apex's LARC, SwAV's; SimCLR's
    and BYOL's divide by |g + wd w|, which differs by at most the share wd |w| / |g|. SimCLR's
    momentum also has the learning rate inside, and SwAV's code adapts batch norm and biases too.
    Source: You, Gitman & Ginsburg, arXiv:1708.03888.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, momentum: float, weight_decay: float = 0.0,
        trust: float = 0.001,
    ):  # fmt: skip
        super().__init__(params, lr=lr, momentum=momentum, fused=True)
        self.trust, self.decay = trust, weight_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        """One update; the gradients are changed. `closure` is torch's contract and not taken."""
        assert closure is None
        weights = [p for group in self.param_groups for p in group["params"]
                   if p.grad is not None and p.dim() > 1]  # fmt: skip
        if weights:
            gradients = [p.grad for p in weights]
            w = torch.stack(torch._foreach_norm(weights))
            scale = torch.stack(torch._foreach_norm(gradients)) + self.decay * w
            ratio = torch.where((w > 0) & (scale > 0), self.trust * w / scale, 1.0)
            torch._foreach_add_(gradients, weights, alpha=self.decay)
            torch._foreach_mul_(gradients, ratio.unbind())
        return super().step()
