"""SimSiam as expectation-maximisation: targets that are not the network's of this very step.

The loss is E |F(T(x)) - eta_x|^2 over weights and one representation eta_x of each image, minimised
in turn: SGD on the weights, and eta_x <- E_T F(T(x)). SimSiam takes one SGD step on an eta_x from a
single T'. Alternation takes more steps on the same eta; MovingAverage has the expectation over T
from an average over epochs, in place of the predictor. Source: SimSiam section 5.
A newcomer's mistake: looking for randomness here. A block's batches are drawn twice, by the same
keys: once for their targets, once to train on.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.augment import AugmentConfig
from train.methods.method import (
    MethodSpec,
    Scale,
    check_memory,
    collapse_meter,
    finite_or_old,
    gather_rows,
    own_rows,
)
from train.methods.simsiam import SimSiam, SimSiamConfig
from train.network.model import ModelConfig
from train.network.norm import untracked


class SimSiamSpec(MethodSpec):
    """What the program asks of SimSiam with these switches."""

    title = "SimSiam"

    def __init__(self, switches: SimSiamConfig):
        self.switches = switches
        self.num_views = switches.num_views
        self.least_loss = -1.0 if switches.similarity == "cosine" else None
        self.collapses_by = None if switches.stop_gradient else "method.stop_gradient"
        self.has_learning_predictor = switches.predictor == "mlp"

    def ends_in_norm(self, model: ModelConfig) -> bool:
        """By --model.head_norm."""
        return model.head_norm in ("default", "all")

    def check(self, model: ModelConfig, augment: AugmentConfig, epochs: int) -> None:
        """Refuse a norm of a predictor that is not there."""
        if model.head_norm == "all" and self.switches.predictor == "none":
            raise ValueError(
                "--model.head_norm all is default without a predictor (--method.predictor none): "
                "leave it out"
            )

    def build(self, model: ModelConfig, scale: Scale) -> SimSiam:
        """As MethodSpec.build: SimSiam, or one of the two that read it as EM."""
        switches, dim = self.switches, model.projector_dim
        if switches.target_steps > scale.steps_per_epoch:
            raise ValueError(
                f"--method.target_steps {switches.target_steps} exceeds the "
                f"{scale.steps_per_epoch} steps of an epoch: take fewer; 0 takes an epoch's"
            )
        steps = switches.target_steps or scale.steps_per_epoch
        if steps != 1:  # the loop makes no targets for a block of one: that is SimSiam
            scale.tell(check_memory(
                f"keeping the targets of {steps} steps (--method.target_steps)",
                "take fewer steps, or a smaller --model.projector_dim",
                count=steps * 2 * scale.batch_size, dim=dim, device=scale.device,
            ))  # fmt: skip
            return Alternation(model, switches, target_steps=steps, batch_size=scale.batch_size)
        if switches.moving_average:
            scale.tell(check_memory(
                f"a moving average of each of {scale.images} images (--method.moving_average)",
                "take a smaller --model.projector_dim, or fewer images",
                count=scale.images, dim=dim, device=scale.device,
            ))  # fmt: skip
            return MovingAverage(model, switches, images=scale.images)
        return SimSiam(model, switches)


class Alternation(SimSiam):
    """The targets of k batches are computed first, then k SGD steps are taken on them.

    Holds (k, 2, B, D) fp32 targets of the global batch B on every rank, so that a run that was
    stopped within a block goes on with them. k = 1 is SimSiam, bit for bit (tested).
    """

    def __init__(
        self, model: ModelConfig, method: SimSiamConfig, *, target_steps: int, batch_size: int
    ):
        super().__init__(model, method)
        self.target_steps = target_steps
        self.targets = nn.Buffer(torch.zeros(target_steps, 2, batch_size, model.projector_dim))
        self.slot = nn.Buffer(torch.zeros(1, dtype=torch.long), persistent=False)

    def before_step(self, step: int) -> None:
        """Point at the step's targets."""
        self.slot.fill_(step % self.target_steps)

    @torch.no_grad()
    def keep_targets(self, views: Tensor, step: int) -> None:
        """Compute a later step's targets with the weights as they are now.

        Batch norm takes the batch's statistics, as in training, and does not count them as running
        ones. Shapes: views (2 N, 3, H, W).
        """
        with untracked(self):
            z = self.projector(self.backbone(views))
        z = z.float().view(2, -1, z.shape[1])
        self.targets[step % self.target_steps] = gather_rows(z, self.group, dim=1)

    def forward(
        self, views: Tensor, ids: Tensor | None = None, small: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss against the kept targets, and the meter of the present z."""
        p, z = self.encode(views)
        target = own_rows(self.targets.index_select(0, self.slot)[0], self.group, dim=1)
        with torch.autocast(views.device.type, enabled=False):
            loss, _ = self.loss(p, target.contiguous())
        return loss, {"z_std": collapse_meter(z)}


class MovingAverage(SimSiam):
    """eta_x <- m eta_x + (1 - m) F(T'(x)) for each image x, where F has length 1.

    Holds (images, D) fp32 on every rank, in checkpoints too; a row of zeros has not been seen yet
    and starts with the first F(T'(x)). Each view is compared with the average that the other view
    updated; the row kept is updated with the mean of the two.
    """

    def __init__(self, model: ModelConfig, method: SimSiamConfig, *, images: int):
        super().__init__(model, method)
        self.memory = nn.Buffer(torch.zeros(images, model.projector_dim))

    def forward(
        self, views: Tensor, ids: Tensor | None = None, small: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss against the averages, which are brought up to date."""
        assert ids is not None, "the moving average is kept by sample id"
        p, z = self.encode(views)
        with torch.autocast(views.device.type, enabled=False):
            unit = F.normalize(z.detach().float(), dim=-1)
            loss, z_std = self.loss(p, self.averaged(ids, unit))
            kept = finite_or_old(self.averaged(ids, unit.mean(0)), self.memory[ids])
            with torch.no_grad():
                self.memory.index_copy_(
                    0, gather_rows(ids, self.group), gather_rows(kept, self.group)
                )
        return loss, {"z_std": collapse_meter(z)}

    def averaged(self, ids: Tensor, unit: Tensor) -> Tensor:
        """m eta + (1 - m) unit, or `unit` for images not seen yet. Shapes: unit (..., N, D)."""
        momentum = self.method.moving_average
        old = self.memory[ids]
        seen = (old != 0).any(-1, keepdim=True)
        return torch.where(seen, torch.lerp(unit, old.expand_as(unit), momentum), unit)
