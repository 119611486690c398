"""The configuration of a run: frozen dataclasses, read from YAML files and flags by jsonargparse.

`--config configs/cifar10.yaml --optim.lr 0.1` reads the file, then the flag. Derived values are
properties.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions
from train.methods import MethodConfig
from train.network.model import ModelConfig, Precision, at_least

MAX_EPOCHS = 1_000_000  # larger is surely a typo; the steps of all are listed at the start
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and how many a step."""

    root: str
    """Folder of images, with or without class folders; folder or quoted glob of tar, TFRecord or
    RecordIO shards; a folder with train/ and val/ (or test/) of these inside; or "digits", the
    handwritten digits that scikit-learn carries, written as JPEG files."""
    val: str | None = None
    """Folder or shards of labelled images for the kNN check, of the same classes as root."""
    batch_size: int = 512
    """Images a step over all processes and nodes (the paper's batch size)."""
    max_bad_fraction: float = 0.02
    """Stop when more than this share of the images turned out unreadable."""
    max_pixels: int = 1 << 27
    """An image with more pixels counts as bad: decoding it would take more than 400 MB."""
    verify: bool = False
    """Read all images at the start, on all ranks together, and keep a hash of them with the run:
    begun with it a run refuses to continue with others of the same names and sizes."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Channel means of images in 0 .. 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Channel standard deviations of images in 0 .. 1."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        at_least("data.batch_size", self.batch_size, 2)
        at_least("data.max_pixels", self.max_pixels, 1)
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is a share, got {self.max_bad_fraction}")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"data.std must be positive, got {self.std}")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"data.mean takes three numbers, got {self.mean}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, and a cosine schedule over the whole run, set at every step."""

    name: Literal["sgd", "lars"] = "sgd"
    """lars: for the large batches of SimCLR, BYOL and SwAV."""
    lr: float = 0.05
    """Learning rate for a global batch of 256 images; scaled linearly with the global batch."""
    momentum: float = 0.9
    """Momentum of the update."""
    weight_decay: float = 1e-4
    """SGD's on all parameters, batch norm and biases too (as the official code); LARS's on weights
    alone."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up; the paper has 10 for batches of 1024 and more."""
    constant_predictor_lr: bool = True
    """The predictor keeps the starting learning rate: 68.1 against 67.7 % (table 1)."""
    implementation: Literal["torch", "apex"] = "torch"
    """apex: FusedSGD of NVIDIA's apex where that is installed; torch: torch's fused SGD."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        at_least("optim.warmup_epochs", self.warmup_epochs, 0)
        for name in ("lr", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"optim.{name} must be >= 0, got {getattr(self, name)}")
        if self.name == "lars" and self.implementation == "apex":
            raise ValueError("--optim.implementation apex has no LARS: leave it at torch")
        if self.momentum >= 1:
            raise ValueError(f"optim.momentum must be in 0 .. 1, got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The kNN check on clean features (backbone output, centre crop)."""

    every_epochs: int = 1
    """Epochs between two checks; one before the first and one after the last step always run."""
    k: int = 200
    """Neighbours."""
    temperature: float = 0.1
    """A neighbour of cosine similarity s votes with weight exp(s / temperature)."""
    resize: int = 256
    """Shorter side before the centre crop, pixels."""
    size: int = 224
    """Side of the centre crop, pixels."""
    batch_size: int = 256
    """Images a forward pass and process."""
    rank_images: int = 1024
    """Training images, clean, whose features' rank and spectrum are measured with each check, which
    needs no labels; 0: not measured."""
    rank_steps: int = 1000
    """Steps between two such measurements within an epoch; 0: with kNN alone."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("every_epochs", "k", "resize", "size", "batch_size"):
            at_least(f"eval.{name}", getattr(self, name), 1)
        at_least("eval.rank_images", self.rank_images, 0)
        at_least("eval.rank_steps", self.rank_steps, 0)
        if not self.temperature >= 0.02:  # exp(1 / 0.01) is more than fp32 holds
            raise ValueError(f"eval.temperature must be at least 0.02, got {self.temperature}")
        if self.size > self.resize:
            raise ValueError(f"eval.size {self.size} exceeds eval.resize {self.resize}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run. The paper's ImageNet recipe by default, except for the data."""

    data: DataConfig
    out: str = ""
    """Run folder; the same command continues the run in it. Empty: runs/<time of start>."""
    init: str = ""
    """Run folder whose newest weights a new run starts from: a training's, or one written by
    train/import_checkpoint.py. Empty: random weights."""
    seed: int = 0
    """Of weights, order and views. The same seed gives the same run, on CPU bit for bit."""
    epochs: int = 100
    """Passes over the images; the cosine schedule ends there."""
    max_steps: int = 0
    """End after this many steps, schedule unchanged; 0: after the last epoch."""
    precision: Precision = "bf16"
    """Of the forward pass; weights, statistics and losses stay fp32. tf32: fp32 that rounds what it
    multiplies to TF32, on a CUDA device."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA device where there is one."""
    compile: Literal["auto", "true", "false"] = "auto"
    """torch.compile of the model; auto: on a CUDA device."""
    cuda_graph: Literal["auto", "true", "false"] = "false"
    """Launch the step as one CUDA graph, SimSiam's on one GPU; auto: where that can be and a step
    takes less than 20 ms. Not yet run on a GPU."""
    log_every: int = 10
    """Steps between two lines of metrics, for which the program waits for the device."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: one an epoch. SIGTERM and Ctrl-C save one too."""
    timeout_s: float = 60.0
    """Several processes: exit when one gives no sign of life for this long (stopped, its host or
    link down). One that lives but keeps the others waiting has ten times as long. A step that takes
    longer writes its stacks to stacks-rank-N.txt."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    dali: DecodeOptions = field(default_factory=DecodeOptions)

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        at_least("epochs", self.epochs, 1)
        at_least("log_every", self.log_every, 1)
        at_least("timeout_s", self.timeout_s, 5)
        for name in ("max_steps", "checkpoint_every"):
            at_least(name, getattr(self, name), 0)
        spec = self.method.spec
        spec.check(self.model, self.augment, self.epochs)
        if not self.optim.constant_predictor_lr and not spec.has_learning_predictor:
            raise ValueError(
                "--optim.constant_predictor_lr false needs a predictor that learns, and "
                f"{spec.title} has none with these flags: leave it true"
            )
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be less than 2^64 and not negative, got {self.seed}")
        if self.epochs > MAX_EPOCHS:
            raise ValueError(f"epochs must be at most {MAX_EPOCHS}, got {self.epochs}")

    @property
    def views(self) -> list[AugmentConfig]:
        """How each view of an image is drawn."""
        return self.method.spec.views(self.augment)

    @property
    def lr(self) -> float:
        """The learning rate at the start: optim.lr scaled with the global batch."""
        return self.optim.lr * self.data.batch_size / 256


def flat(config: Any) -> dict[str, str]:
    """Every setting of a Config, or of another dataclass of flags, as text by flag name."""

    def flatten(prefix: str, value: object) -> dict[str, str]:
        if not isinstance(value, dict):
            return {prefix: str(value)}
        parts = (flatten(f"{prefix}.{name}".lstrip("."), inner) for name, inner in value.items())
        return {flag: text for part in parts for flag, text in part.items()}

    return flatten("", asdict(config))
