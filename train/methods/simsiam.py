"""SimSiam: one encoder, a predictor, a stop-gradient. Chen & He, CVPR 2021, algorithm 1.

Both views go through the network as one batch of two slices, batch norm taking its statistics per
slice: what the paper's two passes compute, in half the launches. SimSiamConfig's switches take out
what the paper takes out (sections 4.1 to 4.6).

More than two views are FastSiam (Pototzky, Sultan & Schmidt-Thieme, GCPR 2022,
doi:10.1007/978-3-031-16788-1_4), which compares each view with the mean of the others:

    L = 1/K sum_i D(p_i, sg(1/(K - 1) sum_{j != i} z_j))

Alternation and MovingAverage are its reading as expectation-maximisation (section 5): the loss is
E |F(T(x)) - eta_x|^2 over the weights and one representation eta_x of each image, minimised
alternately: SGD on the weights, and eta_x <- E_T F(T(x)). SimSiam takes one SGD step on an eta_x
from a single T'; Alternation takes more steps on the same eta; MovingAverage has the expectation
over T from an average over epochs, in place of the predictor.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.choose import Kernels
from kernels.cosine import symmetric_neg_cosine
from pipeline.augment import AugmentConfig
from train.methods.method import (
    Method,
    MethodSpec,
    Scale,
    check_memory,
    collapse_meter,
    finite_or_old,
    gather_rows,
    own_rows,
)
from train.network.model import ModelConfig, at_least, build_predictor
from train.network.norm import count_batches, untracked

MAX_VIEWS = 8  # of each image: memory and time grow with them, the target hardly changes


@dataclass(frozen=True, kw_only=True)
class SimSiamConfig:
    """SimSiam's switches, at method.* themselves."""

    stop_gradient: bool = True
    """false is figure 2 of the paper: the representation collapses."""
    predictor: Literal["mlp", "none", "fixed"] = "mlp"
    """none collapses; fixed at its random start does not converge (table 1)."""
    symmetry: Literal["symmetric", "asymmetric", "asymmetric_2x"] = "symmetric"
    """asymmetric: one view alone is predicted; asymmetric_2x: so with two pairs of views (4.6)."""
    views: int = 2
    """Views of each image; 3 and more are FastSiam: each one's target is the mean of the others' z,
    which steadies small batches, at the cost of as many passes."""
    similarity: Literal["cosine", "cross_entropy"] = "cosine"
    """cross_entropy: -softmax(z) log softmax(p) over channels (section 4.5)."""
    target_steps: int = 1
    """Batches whose targets are computed before as many SGD steps on them (section 5.2); 0: an
    epoch's; 1 is SimSiam."""
    moving_average: float = 0.0
    """Momentum of a target kept for each image (section 5.2: 0.8, with --method.predictor none);
    0: none is kept."""

    def __post_init__(self) -> None:
        """Refuse impossible values and switches that exclude each other."""
        at_least("method.target_steps", self.target_steps, 0)
        at_least("method.views", self.views, 2, most=MAX_VIEWS)
        if self.views > 2 and self.symmetry != "symmetric":
            raise ValueError(
                f"--method.views {self.views} needs --method.symmetry symmetric: every view is "
                "predicted"
            )
        if not 0 <= self.moving_average < 1:
            raise ValueError(f"method.moving_average must be in 0 .. 1, got {self.moving_average}")
        kept = "method.target_steps" if self.target_steps != 1 else "method.moving_average"
        if self.target_steps != 1 and self.moving_average:
            raise ValueError(
                f"{kept} and method.moving_average exclude each other: use one of them"
            )
        if self.target_steps == 1 and not self.moving_average:
            return
        if not self.stop_gradient:
            raise ValueError(
                f"{kept} keeps targets, which have no gradient: leave --method.stop_gradient true"
            )
        if self.symmetry != "symmetric":
            raise ValueError(f"{kept} needs --method.symmetry symmetric")
        if self.views > 2:
            raise ValueError(f"{kept} keeps targets of two views: leave --method.views 2")

    @property
    def num_views(self) -> int:
        """Views of each image that go through the network."""
        return 4 if self.symmetry == "asymmetric_2x" else self.views


class SimSiam(Method):
    """backbone -> projector -> predictor, and the symmetric loss of the views."""

    def __init__(self, model: ModelConfig, method: SimSiamConfig):
        super().__init__(model)
        self.projector = self.build_projector(model, norm=model.head_norm)
        self.predictor: nn.Module = nn.Identity()
        if method.predictor != "none":
            self.predictor = build_predictor(
                model.projector_dim, hidden=model.predictor_hidden, norm=model.head_norm
            )
        if method.predictor == "fixed":
            self.predictor.requires_grad_(False)
        self.method = method
        self.kernels: Kernels = model.kernels
        self.finish_init(model, num_views=method.num_views)

    def forward(
        self, views: Tensor, ids: Tensor | None = None, small: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the collapse meter of z. Shapes: as Method.forward."""
        p, z = self.encode(views)
        with torch.autocast(views.device.type, enabled=False):
            loss, z_std = self.loss(p, z)
        return loss, {"z_std": z_std}

    def encode(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """p and z of the views. Shapes: (V N, 3, H, W) -> twice (V, N, D)."""
        count_batches(self)
        z = self.projector(self.backbone(views))
        p = self.predictor(z)
        shape = self.method.num_views, -1, z.shape[1]
        return p.view(shape), z.view(shape)

    def loss(self, p: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of predictions and targets, and the meter of z. Shapes: p, z (V, N, D).

        The fused kernel has SimSiam's loss of two views alone; others are PyTorch's operations.
        """
        method = self.method
        is_symmetric = method.symmetry == "symmetric"
        if method.similarity == "cosine" and is_symmetric and len(p) == 2:
            loss, z_std = symmetric_neg_cosine(
                p, z, stop_gradient=method.stop_gradient, kernels=self.kernels
            )
            return loss, z_std * z.shape[-1] ** 0.5
        target = z.detach() if method.stop_gradient else z
        compare = neg_cosine if method.similarity == "cosine" else cross_entropy
        if is_symmetric:
            pairs = zip(p, mean_of_others(target), strict=True)
            loss = torch.stack([compare(*pair) for pair in pairs]).mean()
        else:  # the first view of each pair looks at the second
            loss = compare(p[::2], target[1::2])
        return loss, collapse_meter(z)


def mean_of_others(z: Tensor) -> list[Tensor]:
    """For each view the mean of the others, fp32; of two views the other. Shapes: (V, N, D)."""
    views = z.float()
    others = [torch.cat([views[:view], views[view + 1 :]]) for view in range(len(views))]
    return [other.mean(0) for other in others]


def neg_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-cos(p, z), the mean over all but the last dimension. Source: SimSiam equation 1."""
    return -F.cosine_similarity(p.float(), z.float(), dim=-1).mean()


def cross_entropy(p: Tensor, z: Tensor) -> Tensor:
    """-softmax(z) . log softmax(p) over channels, the mean over the rest. Source: section 4.5."""
    return -(F.softmax(z.float(), dim=-1) * F.log_softmax(p.float(), dim=-1)).sum(-1).mean()


class SimSiamSpec(MethodSpec):
    """What the program asks of SimSiam with these switches."""

    title = "SimSiam"

    def __init__(self, switches: SimSiamConfig):
        self.switches = switches
        self.num_views = switches.num_views
        self.least_loss = -1.0 if switches.similarity == "cosine" else None
        if not switches.stop_gradient:
            self.collapse_remedy = "set --method.stop_gradient true"
        elif switches.predictor == "none" and not switches.moving_average:
            self.collapse_remedy = "set --method.predictor mlp"
        self.has_learning_predictor = switches.predictor == "mlp"
        self.is_static = switches.target_steps == 1 and not switches.moving_average

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
        switches, images = self.switches, scale.images
        if switches.target_steps > scale.steps_per_epoch:
            raise ValueError(
                f"--method.target_steps {switches.target_steps} exceeds the "
                f"{scale.steps_per_epoch} steps of an epoch: take fewer; 0 takes an epoch's"
            )

        def announce(what: str, remedy: str, rows: int) -> None:
            sizes: dict = {"count": rows, "dim": model.projector_dim, "device": scale.device}
            scale.tell(check_memory(what, remedy, **sizes))

        steps = switches.target_steps or scale.steps_per_epoch
        if steps != 1:  # the loop makes no targets for a block of one: that is SimSiam
            announce(
                f"keeping the targets of {steps} steps (--method.target_steps)",
                "take fewer steps, or a smaller --model.projector_dim",
                steps * 2 * scale.batch_size,
            )
            return Alternation(model, switches, target_steps=steps, batch_size=scale.batch_size)
        if switches.moving_average:
            announce(
                f"a moving average of each of {images} images (--method.moving_average)",
                "take a smaller --model.projector_dim, or fewer images",
                images,
            )
            return MovingAverage(model, switches, images=images)
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
