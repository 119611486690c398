"""The optimizer, its schedule, and the guard that keeps a bad gradient from the weights.

SGD on all parameters, or LARS. As in the paper SGD's weight decay includes batch norm and biases.
The predictor is a separate parameter group, whose learning rate need not decay.
"""

import importlib.metadata
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from pipeline.order import SampleOrder
from train.config import OptimConfig

BAD_STEPS_IN_A_ROW = 3
MIN_SCALE = 2.0**-4
NO_APEX = "apex is not installed"
GROUPS = ("encoder", "predictor", "prototypes")
"""Parameter groups: the submodules of these names, and all else in "encoder". Prototypes, frozen
at first, need theirs: in a group, fused SGD wants momentum of all parameters or of none."""


class LARS(torch.optim.SGD):
    """A gradient g becomes trust |w| / (|g| + wd |w|) (g + wd w), then momentum as in SGD.

    g + wd w itself where |w| or the denominator is 0; plain SGD without weight decay for tensors of
    one dimension. So it was in apex's LARC, SwAV's; SimCLR's and BYOL's divide by |g + wd w|, which
    differs by at most the share wd |w| / |g|. SimCLR's momentum also has the learning rate inside,
    and SwAV's code adapts batch norm and biases too. The scaled gradients go through torch's fused
    SGD, which reads on the device whether to skip a step (GuardedStep): no wait for the host, and
    the momentum is updated in the same kernel. Source: You, Gitman & Ginsburg, arXiv:1708.03888.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        super().__init__(params, lr=lr, momentum=momentum, fused=True)
        self.trust, self.decay = trust, weight_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        """One update; the gradients are changed. `closure` is torch's contract and not taken."""
        assert closure is None
        params = (p for group in self.param_groups for p in group["params"])
        weights = [p for p in params if p.grad is not None and p.dim() > 1]
        if weights:
            gradients = [p.grad for p in weights]
            w = torch.stack(torch._foreach_norm(weights))
            scale = torch.stack(torch._foreach_norm(gradients)) + self.decay * w
            ratio = torch.where((w > 0) & (scale > 0), self.trust * w / scale, 1.0)
            torch._foreach_add_(gradients, weights, alpha=self.decay)
            torch._foreach_mul_(gradients, ratio.unbind())
        return super().step()


@dataclass(frozen=True)
class Schedule:
    """Which samples each step takes, and how many steps there are."""

    order: SampleOrder
    epochs: int
    max_steps: int = 0
    """End after this many, the learning rate's schedule unchanged; 0: after the last epoch."""
    begin: int = 0
    """The step at which the learning rate's schedule begins (a part of a pilot's trial)."""
    end: int = 0
    """The step at which it ends; 0: after all epochs."""

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.order.steps_per_epoch

    @property
    def total(self) -> int:
        """The step at which the learning rate has decayed."""
        return self.end or self.steps_per_epoch * self.epochs

    @property
    def last(self) -> int:
        """Where this run ends."""
        return min(self.max_steps or self.total, self.total)


def lr_at(step: int, *, base: float, total: int, warmup: int = 0) -> float:
    """The learning rate of a step counted from 0: linear warm-up, then a cosine to 0 at `total`."""
    if step < warmup:
        return base * (step + 1) / warmup
    return base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """SGD or LARS with a group for each of GROUPS that has parameters that learn."""
    params: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0]
            params[part if part in GROUPS else "encoder"].append(parameter)
    groups = [{"name": name, "params": params[name]} for name in GROUPS if params[name]]
    options: dict = {"lr": lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    if config.implementation == "apex":
        return find_apex_sgd(device)(groups, **options)
    if config.name == "lars":
        optimizer: torch.optim.SGD = LARS(groups, **options)
    else:
        optimizer = torch.optim.SGD(groups, fused=True, **options)
    if config.momentum:  # torch leaves it uninitialised memory where the first step is skipped
        for parameter in sum(params.values(), []):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def find_apex_sgd(device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """NVIDIA apex's FusedSGD. Raises: ValueError that says what is missing."""
    if (why := why_no_apex()) is not None:
        raise ValueError(
            f"--optim.implementation apex: {why}. Build NVIDIA's from "
            "https://github.com/NVIDIA/apex, or use --optim.implementation torch"
        )
    if device.type != "cuda":
        raise ValueError("--optim.implementation apex needs a CUDA device: use torch on the CPU")
    from apex.optimizers import FusedSGD

    return FusedSGD


def why_no_apex() -> str | None:
    """None where NVIDIA's apex can be imported, else what is installed in its place."""
    try:
        from apex.optimizers import FusedSGD  # noqa: F401 - looked for alone
    except ImportError:
        try:
            version = importlib.metadata.version("apex")
        except importlib.metadata.PackageNotFoundError:
            return NO_APEX
        return (
            f"the installed apex {version} is not NVIDIA's (PyPI's package of that name is "
            "another, unrelated one; remove it with: pip uninstall apex)"
        )
    return None


def set_lr(
    optimizer: torch.optim.Optimizer,
    config: OptimConfig,
    step: int,
    *,
    lr: float,
    total: int,
    steps_per_epoch: int,
) -> float:
    """Set the learning rate of all groups for a step; returns the encoder's."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    now = lr_at(step, base=lr, total=total, warmup=warmup)
    for group in optimizer.param_groups:
        is_constant = group["name"] == "predictor" and config.constant_predictor_lr
        group["lr"] = lr if is_constant else now
    return now


@dataclass
class GuardedStep:
    """optimizer.step() that changes nothing when a gradient is not finite, without a host sync.

    Owns the fp16 scaler and the counters, which stay on the device until `check`.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device

    def __post_init__(self) -> None:
        """Counters start at 0."""
        self.in_a_row, self.worst, self.skipped = torch.zeros(3, device=self.device)

    def __call__(self, loss: Tensor, *, frozen: Iterable[Tensor] = ()) -> Tensor:
        """Backward pass and update of all but `frozen`; returns the gradient norm (unscaled)."""
        with record_function("backward"):
            self.scaler.scale(loss).backward()
        for parameter in frozen:
            parameter.grad = None
        with record_function("optimizer"):
            return self._update()

    def _update(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        params = (p for group in self.optimizer.param_groups for p in group["params"])
        grads = [p.grad for p in params if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        bad = (~torch.isfinite(norm)).float()
        if not isinstance(self.optimizer, torch.optim.SGD):
            # apex's kernel returns where this is not 0 (csrc/multi_tensor_sgd_kernel.cu)
            self.optimizer._dummy_overflow_buf.copy_(bad)  # type: ignore[attr-defined]
            self.optimizer.step()
        elif self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        else:
            # torch's fused optimizers read this flag on the device, as GradScaler sets it
            self.optimizer.found_inf = bad.reshape(1)  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.scaler.is_enabled():  # the scaler skips on the way to its scale; see `check`
            self.in_a_row.add_(1).mul_(bad)
        torch.maximum(self.worst, self.in_a_row, out=self.worst)
        self.skipped += bad
        return norm

    def check(self, step: int) -> int:
        """Steps skipped so far. Raises: FloatingPointError when training cannot go on.

        Under fp16 the loss scale decides, which each bad step halves: from 65,536 on, SimCLR took
        eight of them in a row before its first good step (ResNet-50, width 16).
        """
        if self.worst.item() >= BAD_STEPS_IN_A_ROW:
            raise FloatingPointError(
                f"gradients were not finite {BAD_STEPS_IN_A_ROW} steps in a row before step {step}:"
                " lower --optim.lr, or use --precision bf16 or fp32; the weights are those before"
            )
        if self.scaler.is_enabled() and self.scaler.get_scale() < MIN_SCALE:
            raise FloatingPointError(
                f"the fp16 loss scale fell below {MIN_SCALE} before step {step}: lower --optim.lr, "
                "or use --precision bf16 or fp32; the weights are those before"
            )
        return int(self.skipped.item())
