"""The optimizer, its schedule, and the guard that keeps a bad gradient from the weights.

SGD on all parameters, or LARS; the predictor has a parameter group of its own, whose learning rate
need not decay. A newcomer's mistake: leaving batch norm and biases out of SGD's weight decay. The
paper does not; LARS does.
"""

import importlib.metadata
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from train.config import OptimConfig
from train.run.lars import LARS

BAD_STEPS_IN_A_ROW = 3
MIN_SCALE = 2.0**-4
NO_APEX = "apex is not installed"
GROUPS = ("encoder", "predictor", "prototypes")
"""Parameter groups: the submodules of these names, and all else in "encoder". Prototypes that stand
still at first need their own: in a group, fused SGD wants momentum of all parameters or of none."""


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
    options: dict = {
        "lr": lr,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
    }
    if config.implementation == "apex":
        return find_apex_sgd(device)(groups, **options)
    if config.name == "lars":
        optimizer: torch.optim.SGD = LARS(groups, **options)
    else:
        optimizer = torch.optim.SGD(groups, fused=True, **options)
    if config.momentum:  # torch leaves it uninitialised memory where the first step is skipped
        for parameter in [one for group in groups for one in group["params"]]:
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
    """None where NVIDIA's apex can be imported, else what there is in its place."""
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
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, *, lr: float, total: int,
    steps_per_epoch: int,
) -> float:  # fmt: skip
    """Set the learning rate of both groups for a step; returns the encoder's."""
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
        self.in_a_row = torch.zeros((), device=self.device)
        self.worst = torch.zeros((), device=self.device)
        self.skipped = torch.zeros((), device=self.device)

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
        grads = [
            p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None
        ]
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
            self.in_a_row = (self.in_a_row + 1) * bad
        self.worst = torch.maximum(self.worst, self.in_a_row)
        self.skipped += bad
        return norm

    def check(self, step: int) -> int:
        """Steps skipped so far. Raises: FloatingPointError when training cannot go on.

        Under fp16 that is for the loss scale to say, which each bad step halves: from 65,536 on,
        SimCLR took eight of them in a row before its first good step (ResNet-50, width 16).
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
