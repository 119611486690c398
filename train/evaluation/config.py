"""The flags of train/evaluate.py and train/features.py; what is not given is the run's.

--model.* and --data.mean are not among them: they belong to the weights, and are read from the
run's config.yaml.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from jsonargparse import ArgumentError, set_parsing_settings

from train.config import Config, at_least
from train.config.parser import FlagParser, explain, flags, parse_config, with_brackets
from train.network.model import Precision
from train.run.folder import CONFIG
from train.run.program import refuse

Options = TypeVar("Options", "EvaluateConfig", "FeaturesConfig")
LISTS = ("--k", "--fast.lrs", "--fast.label_fractions", "--linear.lrs")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Which images; null: the run's."""

    root: str | None = None
    """Folder of images in class folders, or of train/ and val/ with these, as in training."""
    val: str | None = None
    """Folder of labelled test images, with the same class folders as root."""


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How images are resized and cropped; null: as in the run."""

    resize: int | None = None
    """Shorter side before the centre crop, pixels."""
    size: int | None = None
    """Side of the crop, pixels; of the linear probe's random crops too."""
    batch_size: int | None = None
    """Images per forward pass and process."""


@dataclass(frozen=True, kw_only=True)
class LookConfig(CropConfig):
    """How images are resized and cropped, and how neighbours vote; null: as in the run."""

    temperature: float | None = None
    """A neighbour of cosine similarity s votes with weight exp(s / temperature)."""


@dataclass(frozen=True, kw_only=True)
class FastProbeConfig:
    """The fast probe: one linear classifier on cached features for each learning rate."""

    lrs: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates of SGD on standardised features; a held-out part of the training set picks."""
    epochs: int = 50
    """Passes over the cached features."""
    batch_size: int = 256
    """Rows per step."""
    label_fractions: tuple[float, ...] = (0.01, 0.1)
    """Shares of the training labels for the accuracy with few labels; [] for none. The same share
    of each class is drawn, at least one image. The learning rate is picked as with all labels."""
    label_draws: int = 5
    """Draws of the labelled images for each share: the result is their mean and spread."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not all(0 < share <= 1 for share in self.label_fractions):
            raise ValueError(
                "fast.label_fractions takes shares of the labels in 0 .. 1, such as 0.01,0.1, got "
                f"{list(self.label_fractions)}"
            )
        at_least("fast.label_draws", self.label_draws, 1)


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig:
    """The paper's linear evaluation: LARS on augmented images through the frozen backbone."""

    lrs: tuple[float, ...] = (0.02, 0.1)
    """Learning rates for a batch of 256, scaled linearly with the batch: the paper's and the
    official code's. A classifier for each is trained on the same features."""
    batch_size: int = 4096
    """Images per step over all processes; lowered, with a warning, if there are fewer images."""
    epochs: int = 90
    """Passes over the training images; the cosine schedule ends there."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation of the newest checkpoint of a run."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours, e.g. --k 10,20; [] for no kNN."""
    probe: Literal["fast", "linear", "both", "none"] = "both"
    """fast: minutes, on cached features. linear: the paper's recipe, 90 epochs of forward passes;
    it is saved each epoch, and the same command continues it. both: fast first, then linear."""
    out: str = ""
    """Folder for evaluation.json, pictures and the linear probe. Empty: RUN/evaluation.

    Each evaluation replaces the previous one in it; evaluations.jsonl keeps a line of each.
    """
    device: Literal["auto", "cpu", "cuda"] | None = None
    """auto: a CUDA device if there is one; null: as in the run."""
    precision: Precision | None = None
    """Of the backbone; probes are fp32, or tf32 with it. null: as in the run."""
    data: ImagesConfig = field(default_factory=ImagesConfig)
    eval: LookConfig = field(default_factory=LookConfig)
    fast: FastProbeConfig = field(default_factory=FastProbeConfig)
    linear: LinearProbeConfig = field(default_factory=LinearProbeConfig)

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for k in self.k:
            at_least("k", k, 1)
        for name, probe in ("fast", self.fast), ("linear", self.linear):
            if not probe.lrs or not all(0 < lr < float("inf") for lr in probe.lrs):
                raise ValueError(
                    f"{name}.lrs takes learning rates > 0, such as 0.02,0.1, got {list(probe.lrs)}"
                )
            at_least(f"{name}.epochs", probe.epochs, 1)
            at_least(f"{name}.batch_size", probe.batch_size, 1)
            if probe != type(probe)() and not self.runs(name):
                raise ValueError(
                    f"--{name}.* has no effect with --probe {self.probe}: leave it out, or take "
                    f"--probe {name} or both"
                )
        if self.eval.temperature is not None and not self.k:
            raise ValueError("--eval.temperature has no effect with --k []: leave it out")

    def runs(self, probe: str) -> bool:
        """Whether the probe "fast" or "linear" is asked for."""
        return self.probe in (probe, "both")

    @property
    def needs_labels(self) -> bool:
        """Whether anything but RankMe, the collapse meter and neighbours is asked for."""
        return bool(self.k) or self.probe != "none"


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Which images."""

    root: str
    """Folder of images, with or without class folders; folder or quoted glob of tar, TFRecord or
    RecordIO shards. All images under it, those of train/ and val/ too. An unreadable image has no
    row, in no file; bad_files.jsonl lists it with the reason."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """The features of all images of a folder or of shards, and what is alike among them."""

    data: FolderConfig
    out: str
    """Folder for the features. The same command continues an interrupted one; other values of --k,
    --duplicate_cosine, --map and --format use the features that it has."""
    format: Literal["npy", "parquet"] = "npy"
    """npy: features.npy, (N, D) fp32, which numpy.load(mmap_mode="r") opens without reading it, and
    names.txt with the name of each row. parquet: features.parquet too, with the columns name, label
    and features; it needs pyarrow."""
    k: int = 10
    """Nearest neighbours of each image, by cosine similarity; 0 for none. All pairs are compared:
    the time grows with the square of the number of images."""
    duplicate_cosine: float = 0.99
    """Two images with a larger cosine similarity, one among the other's k nearest, are listed as
    near duplicates. What 0.99 finds is in profiling/LOG.md. Features of a small or little trained
    network lie closer together: raise it there."""
    map: Literal["pca", "umap", "none"] = "pca"
    """How the images of map.png are laid out; umap needs umap-learn."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """auto: a CUDA device if there is one; null: as in the run."""
    precision: Precision | None = None
    """Of the backbone; the features are stored as fp32. null: as in the run."""
    eval: CropConfig = field(default_factory=CropConfig)

    def __post_init__(self) -> None:
        """Refuse impossible values, and what needs a package that is missing."""
        at_least("k", self.k, 0)
        if not self.out:
            raise ValueError("--out is empty: give the folder for the features")
        if not -1 < self.duplicate_cosine < 1:
            raise ValueError(
                f"duplicate_cosine must be in -1 .. 1, such as 0.99, got {self.duplicate_cosine}"
            )
        for flag, package, module in (
            ("--format parquet", "pyarrow", "pyarrow"),
            ("--map umap", "umap-learn", "umap"),
        ):
            name, value = flag.removeprefix("--").split()
            if getattr(self, name) == value and importlib.util.find_spec(module) is None:
                raise ValueError(f"{flag} needs {package}: pip install {package}, or leave it out")


def read_flags(
    program: str, description: str, options: type[Options], arguments: Sequence[str] | None = None
) -> tuple[Path, Options]:
    """The run folder and the options. Exits with 2 and one line for a mistake in them."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = FlagParser(program, description)
    parser.add_argument("run", type=str, help="the --out folder of a training")
    parser.add_class_arguments(options, as_group=True)
    lists = LISTS if options is EvaluateConfig else ()
    words = with_brackets(sys.argv[1:] if arguments is None else arguments, lists)
    try:
        values = vars(parser.instantiate(parser.parse_args(words)))
        return Path(values.pop("run")), options(**values)
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        refuse(explain(str(error), flags(options)))


def run_config(run: Path, options: EvaluateConfig | FeaturesConfig) -> Config:
    """The run's configuration with the images, device and crops of the options."""
    try:
        saved = parse_config(["--config", str(run / CONFIG), f"--out={run}"])
    except ValueError as error:
        raise ValueError(f"{run / CONFIG} is not a training's: {error}") from error
    data = saved.data
    if options.data.root is not None:  # the run's --data.val belongs to its --data.root
        data = dataclasses.replace(data, root=options.data.root, val=None)
    if isinstance(options, EvaluateConfig) and options.data.val is not None:
        data = dataclasses.replace(data, val=options.data.val)
    if not data.root:
        raise ValueError(f"{run} was imported and names no images: give --data.root DIR")
    look = {name: v for name, v in dataclasses.asdict(options.eval).items() if v is not None}
    return dataclasses.replace(
        saved,
        data=data,
        eval=dataclasses.replace(saved.eval, **look),
        device=options.device or saved.device,
        precision=options.precision or saved.precision,
        # a run of a GPU may be evaluated without one
        model=dataclasses.replace(saved.model, kernels="auto", recompute=False),
    )
