"""The methods' switches: `--method.name byol --method.byol.momentum 0.99`.

SimSiam's stand at method.* itself, each other method's in a group of its own name, with the values
of its ImageNet recipe. A switch of a method that is not named is refused.
A newcomer's mistake: looking for head widths here. They are model.projector_* and
model.predictor_hidden for every method; the presets in configs/ hold each recipe's.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

MOST = 1 << 40  # of counts and sizes: more is a slip, and from 2^63 on torch and NumPy overflow
MethodName = Literal["simsiam", "byol", "simclr", "swav", "moco"]


@dataclass(frozen=True, kw_only=True)
class BYOLConfig:
    """A momentum encoder as the target."""

    momentum: float = 0.99
    """tau at the start; it rises to 1 by a cosine. The recipe: 0.97 for 40 epochs, 0.99 for 100 to
    300, 0.996 for 1000."""
    predictor: bool = True
    """false: the projection itself is compared with the momentum encoder's."""
    second_blur: float = 0.1
    """Probability of blur in the second view, as a share of augment.blur (1.0 in the recipe)."""
    second_solarize: float = 0.2
    """Probability of solarize in the second view; augment.solarize is the first one's."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("momentum", "second_blur", "second_solarize"):
            share(f"method.byol.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig:
    """NT-Xent, and what SimSiam's section 6.2 adds to it."""

    temperature: float = 0.1
    """Cosines are divided by it; 0.5 for CIFAR."""
    predictor: bool = False
    """true: queries go through SimSiam's prediction MLP (model.predictor_hidden wide)."""
    stop_gradient: bool = False
    """true: what a query is compared with has no gradient."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        positive("method.simclr.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class SwAVConfig:
    """Prototypes, Sinkhorn's iterations, and the optional queue and small views."""

    prototypes: int = 3000
    """How many; ten times the classes of ImageNet, rounded."""
    temperature: float = 0.1
    """Of the predictions: cosines are divided by it."""
    epsilon: float = 0.05
    """Of the assignments: smaller is sharper."""
    sinkhorn_iterations: int = 3
    """Over prototypes and images in turn."""
    frozen_epochs: float = 1.0
    """Epochs in which the prototypes stand still: 313 steps of 4096 images, or 5005 of 256."""
    queue: int = 0
    """Earlier images whose embeddings are assigned too, over all ranks; the recipe: 3840 for a
    batch of 256, none for 4096."""
    queue_from_epoch: int = 15
    """The queue fills from here on and is used once it is full."""
    small_views: int = 0
    """Small views of each image (multi-crop); 6 in the recipe, which counts on them."""
    small_size: int = 96
    """Side of a small view, pixels."""
    small_scale: tuple[float, float] = (0.05, 0.14)
    """Range of a small view's share of the image's area."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("queue", "queue_from_epoch", "frozen_epochs"):
            at_least(f"method.swav.{name}", getattr(self, name), 0)
        at_least("method.swav.small_views", self.small_views, 0, most=100)
        at_least("method.swav.sinkhorn_iterations", self.sinkhorn_iterations, 1, most=1000)
        at_least("method.swav.small_size", self.small_size, 1)
        at_least("method.swav.prototypes", self.prototypes, 2)
        low, high = self.small_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"method.swav.small_scale is a range of shares, got {low} {high}")
        positive("method.swav.temperature", self.temperature)
        if not 0.025 <= self.epsilon < float("inf"):
            raise ValueError(
                f"method.swav.epsilon must be at least 0.025, got {self.epsilon}: below it "
                "exp(-2 / epsilon) is 0 in fp32 and an assignment may be 0 / 0"
            )


@dataclass(frozen=True, kw_only=True)
class MoCoConfig:
    """A momentum encoder and a queue of its keys."""

    queue: int = 65536
    """Keys that a query is told apart from; two of each image, over all ranks."""
    momentum: float = 0.999
    """The momentum encoder keeps this share of itself in each step."""
    temperature: float = 0.2
    """Cosines are divided by it."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        at_least("method.moco.queue", self.queue, 2)
        if self.queue % 2:
            raise ValueError(f"method.moco.queue holds pairs of keys: even, got {self.queue}")
        share("method.moco.momentum", self.momentum)
        positive("method.moco.temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Which method trains the backbone, and its switches; SimSiam's are here."""

    name: MethodName = "simsiam"
    """The method that trains the backbone."""
    stop_gradient: bool = True
    """false is figure 2 of the paper: the representation collapses."""
    predictor: Literal["mlp", "none", "fixed"] = "mlp"
    """none collapses; fixed at its random start does not converge (table 1)."""
    symmetry: Literal["symmetric", "asymmetric", "asymmetric_2x"] = "symmetric"
    """asymmetric: one view alone is predicted; asymmetric_2x: so with two pairs of views (4.6)."""
    similarity: Literal["cosine", "cross_entropy"] = "cosine"
    """cross_entropy: -softmax(z) log softmax(p) over channels (section 4.5)."""
    target_steps: int = 1
    """Batches whose targets are computed before as many SGD steps on them (section 5.2); 0: an
    epoch's; 1 is SimSiam."""
    moving_average: float = 0.0
    """Momentum of a target kept for each image (section 5.2: 0.8, with --method.predictor none);
    0: none is kept."""
    byol: BYOLConfig = field(default_factory=BYOLConfig)
    simclr: SimCLRConfig = field(default_factory=SimCLRConfig)
    swav: SwAVConfig = field(default_factory=SwAVConfig)
    moco: MoCoConfig = field(default_factory=MoCoConfig)

    def __post_init__(self) -> None:
        """Refuse impossible values and switches that exclude each other or have no effect."""
        at_least("method.target_steps", self.target_steps, 0)
        if not 0 <= self.moving_average < 1:
            raise ValueError(f"method.moving_average must lie in 0 .. 1, got {self.moving_average}")
        kept = [
            f"method.{name}"
            for name, is_on in (
                ("target_steps", self.target_steps != 1),
                ("moving_average", self.moving_average > 0),
            )
            if is_on
        ]
        if len(kept) > 1:
            raise ValueError(f"{' and '.join(kept)} exclude each other: use one of them")
        if kept and not self.stop_gradient:
            raise ValueError(
                f"{kept[0]} keeps targets, which have no gradient: "
                "leave --method.stop_gradient true"
            )
        if kept and self.symmetry != "symmetric":
            raise ValueError(f"{kept[0]} goes with --method.symmetry symmetric only")
        for (owner, flag), is_set in self.switches().items():
            if is_set and owner != self.name:
                raise ValueError(
                    f"--{flag} belongs to {owner}, --method.name is {self.name}: leave it out, or "
                    f"take --method.name {owner}"
                )

    def switches(self) -> dict[tuple[str, str], bool]:
        """Whose each switch is and its flag; whether it is away from its default."""
        found = {}
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if dataclasses.is_dataclass(value):
                for inner in dataclasses.fields(value):
                    flag = f"method.{part.name}.{inner.name}"
                    found[part.name, flag] = getattr(value, inner.name) != inner.default
            elif part.name != "name":
                found["simsiam", f"method.{part.name}"] = value != part.default
        return found

    @property
    def title(self) -> str:
        """The method's name as its authors write it."""
        titles = {"simsiam": "SimSiam", "byol": "BYOL", "simclr": "SimCLR", "swav": "SwAV"}
        return titles.get(self.name, "MoCo v2")

    @property
    def least_loss(self) -> float | None:
        """The least value of the loss, which a collapsed run reaches; None where none is known."""
        if self.name == "simsiam":
            return -1.0 if self.similarity == "cosine" else None
        return {"byol": 0.0}.get(self.name)

    @property
    def collapses_by(self) -> str | None:
        """The switch that is off and without which the method collapses, if there is one."""
        if self.name == "simsiam" and not self.stop_gradient:
            return "method.stop_gradient"
        if self.name == "byol" and not self.byol.predictor:
            return "method.byol.predictor"
        return None

    @property
    def has_learning_predictor(self) -> bool:
        """Whether the optimizer has a predictor to train."""
        if self.name == "simsiam":
            return self.predictor == "mlp"
        return (self.name == "byol" and self.byol.predictor) or (
            self.name == "simclr" and self.simclr.predictor
        )

    @property
    def num_views(self) -> int:
        """Views of each image in full size that go through the network."""
        return 4 if self.symmetry == "asymmetric_2x" else 2


def at_least(name: str, value: float, low: int, most: int = MOST) -> None:
    """Raise ValueError if a flag's value is below its least one, or no size that can be meant."""
    if not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def positive(name: str, value: float) -> None:
    """Raise ValueError if a flag's value is not above 0 and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be > 0, got {value}")


def share(name: str, value: float) -> None:
    """Raise ValueError if a flag's value does not lie in 0 .. 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in 0 .. 1, got {value}")
