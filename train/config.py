"""The configuration of a run: frozen dataclasses, read from YAML files and flags by jsonargparse.

`--config configs/cifar10.yaml --optim.lr 0.1` reads the file, then the flag. What can be derived is
a property; nothing is changed after reading. A newcomer's mistake: a learning rate for the batch in
use. optim.lr is for 256 images and is scaled with the *global* batch.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from kernels.choose import Kernels
from pipeline.augment import AugmentConfig
from pipeline.decode import DecodeOptions
from train.method_config import BYOLConfig, MethodConfig, MethodName, SwAVConfig, at_least
from train.precision import Precision

__all__ = [
    "Config", "DataConfig", "EvalConfig", "MethodConfig", "ModelConfig", "OptimConfig", "at_least",
]  # fmt: skip

HeadNorm = Literal["none", "hidden", "default", "all"]
MAX_EPOCHS = 1_000_000  # more is a slip; the steps of all are listed at the start
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
    """Images a step over all processes and nodes (the paper's batch size); two views of each."""
    max_bad_fraction: float = 0.02
    """Stop when more than this share of the images turned out unreadable."""
    max_pixels: int = 1 << 27
    """An image with more pixels counts as bad: decoding it would take more than 400 MB."""
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
class ModelConfig:
    """The encoder f (backbone and projection MLP) and the prediction MLP h, of every method."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """The backbone, with torchvision's parameter names."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """cifar: 3x3 convolution of stride 1 and no max-pool, for images of about 32 pixels."""
    width: int = 64
    """Channels of the stem; another value than 64 makes a network that no other tool has."""
    zero_init_residual: bool = True
    """The last batch norm of each block starts at weight 0 (as the official code)."""
    projector_layers: int = 3
    """3 for ImageNet, 2 for CIFAR (appendix D); SimCLR 3, the other methods 2."""
    projector_hidden: int = 0
    """Width of the projector's hidden layers; 0 takes the backbone's feature dimension."""
    projector_dim: int = 2048
    """Dimension d of z and p; 256 for BYOL, 128 for SimCLR, SwAV and MoCo."""
    predictor_hidden: int = 512
    """Width of the predictor's hidden layer; d / 4 in the paper, 4096 for BYOL."""
    head_norm: HeadNorm = "default"
    """Batch norm in SimSiam's heads (table 3): none, in hidden layers, also at the projector's
    output (default), also at the predictor's (all)."""
    kernels: Kernels = "auto"
    """Batch norm, loss and normalisation: auto runs the Triton kernels on a CUDA device and
    PyTorch's own operations elsewhere."""
    recompute: bool = False
    """Normalise again in the backward pass instead of keeping what convolutions read: activations
    take a sixth less memory and 26 MB more an image are moved (ResNet-50). Triton kernels only."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("width", "projector_dim", "predictor_hidden"):
            at_least(f"model.{name}", getattr(self, name), 1)
        at_least("model.projector_layers", self.projector_layers, 1, most=100)
        at_least("model.projector_hidden", self.projector_hidden, 0)

    def ends_in_norm(self, method: MethodName) -> bool:
        """Whether the method's projector ends in batch norm."""
        of_simsiam = method == "simsiam" and self.head_norm in ("default", "all")
        return of_simsiam or method == "simclr"


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
            raise ValueError(f"optim.momentum must lie in 0 .. 1, got {self.momentum}")


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

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for name in ("every_epochs", "k", "resize", "size", "batch_size"):
            at_least(f"eval.{name}", getattr(self, name), 1)
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
    log_every: int = 10
    """Steps between two lines of metrics; only then does the program wait for the device."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: one an epoch. SIGTERM and Ctrl-C save one too."""
    timeout_s: float = 60.0
    """Several processes: end when one gives no sign of life for so long (stopped, its host or link
    down). One that lives but keeps the others waiting has ten times as long. A step that takes
    longer writes down where it stands (stacks-rank-N.txt)."""
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
        if self.method.name != "simsiam" and self.model.head_norm != "default":
            raise ValueError(
                f"--model.head_norm belongs to simsiam, --method.name is {self.method.name}: leave "
                "it out"
            )
        if self.method.swav.small_views and self.method.swav.small_size == self.augment.size:
            raise ValueError(
                f"--method.swav.small_size {self.augment.size} is that of the other views "
                "(--augment.size): take a smaller one"
            )
        self._refuse_what_has_no_effect()
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be less than 2^64 and not negative, got {self.seed}")
        if self.epochs > MAX_EPOCHS:
            raise ValueError(f"epochs must be at most {MAX_EPOCHS}, got {self.epochs}")

    def _refuse_what_has_no_effect(self) -> None:
        """Of the flags that other groups' flags switch off."""
        swav, byol = self.method.swav, self.method.byol
        for name, owner in (
            ("queue_from_epoch", "queue"),
            ("small_size", "small_views"),
            ("small_scale", "small_views"),
        ):
            if not getattr(swav, owner) and getattr(swav, name) != getattr(SwAVConfig, name):
                raise ValueError(
                    f"--method.swav.{name} has no effect with --method.swav.{owner} 0: leave it "
                    f"out, or set --method.swav.{owner}"
                )
        if swav.queue and swav.queue_from_epoch >= self.epochs:
            raise ValueError(
                f"--method.swav.queue {swav.queue} would fill from epoch {swav.queue_from_epoch} "
                f"of {self.epochs}: take a smaller --method.swav.queue_from_epoch, or no queue"
            )
        if byol.second_blur != BYOLConfig.second_blur and not self.augment.blur:
            raise ValueError(
                "--method.byol.second_blur is a share of --augment.blur, which is 0: leave it out, "
                "or set --augment.blur"
            )
        if not self.optim.constant_predictor_lr and not self.method.has_learning_predictor:
            raise ValueError(
                "--optim.constant_predictor_lr false needs a predictor that learns, and "
                f"{self.method.title} has none with these flags: leave it true"
            )
        if self.model.head_norm == "all" and self.method.predictor == "none":
            raise ValueError(
                "--model.head_norm all is default without a predictor (--method.predictor none): "
                "leave it out"
            )

    @property
    def views(self) -> list[AugmentConfig]:
        """How each view of an image is drawn."""
        first, byol, swav = self.augment, self.method.byol, self.method.swav
        if self.method.name == "byol":
            blur = first.blur * byol.second_blur
            return [first, replace(first, blur=blur, solarize=byol.second_solarize)]
        small = replace(first, size=swav.small_size, scale=swav.small_scale)
        return [first] * self.method.num_views + [small] * swav.small_views

    @property
    def lr(self) -> float:
        """The learning rate at the start: optim.lr scaled with the global batch."""
        return self.optim.lr * self.data.batch_size / 256


def flat(config: Config) -> dict[str, str]:
    """Every setting as text, by flag name."""

    def flatten(values: dict, prefix: str) -> dict[str, str]:
        settings = {}
        for name, value in values.items():
            flag = prefix + name
            inner = flatten(value, f"{flag}.") if isinstance(value, dict) else {flag: str(value)}
            settings |= inner
        return settings

    return flatten(asdict(config), "")
