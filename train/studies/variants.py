"""The paper's experiments as data: which variants stand beside which, and what it found.

train/study.py runs them. A variant that stands in several studies has one name and runs once.
A newcomer's mistake: comparing our percentages with the paper's. Theirs are of a linear classifier
on ImageNet after 100 epochs of a ResNet-50; what can be compared is what happens in each row.
Source: Chen & He, CVPR 2021, where each study says.
"""

from dataclasses import dataclass
from typing import Literal

from train.config import Config

Outcome = Literal["learns", "collapse", "worse", "same", "better"]
LEAST_BATCH = 16  # images of which batch norm's statistics are still of use
PAPER_BATCH, PAPER_DIM = 512, 2048  # the baseline's


@dataclass(frozen=True)
class Row:
    """A variant, and what the paper has of it."""

    name: str
    """Of the variant and its folder."""
    label: str
    """In tables and figures."""
    paper: float | None
    """ImageNet linear top-1 in percent after 100 epochs; None: the paper has no number."""
    outcome: Outcome | None
    """In the paper. A study's first row learns or collapses; the others are worse, the same (less
    than one point apart) or better than it, or collapse. None: the paper does not say."""
    says: str
    """What the paper says happens."""
    flags: tuple[str, ...] = ()
    """What differs from the baseline."""


@dataclass(frozen=True)
class Study:
    """Rows that are compared with the first one."""

    name: str
    title: str
    source: str
    """Where the paper has it."""
    rows: tuple[Row, ...]
    panels: tuple[str, ...] = ("train/loss", "train/z_std", "eval/knn_top1")
    """Of the figure, over epochs."""


def studies(base: Config) -> dict[str, Study]:
    """Every study by name, around this baseline."""
    found = (
        stop_gradient(), predictor(), batch_norm(base), symmetry(), similarity(), dimension(base),
        batch_size(base), alternation(), moving_average(), methods(base),
    )  # fmt: skip
    return {study.name: study for study in found}


def baseline(says: str, *, paper: float = 68.1) -> Row:
    """SimSiam as it is."""
    return Row("baseline", "SimSiam", paper, "learns", says)


NO_PREDICTOR = Row(
    "no-predictor", "no predictor", 0.1, "collapse", "collapses", ("--method.predictor=none",)
)


def stop_gradient() -> Study:
    """What keeps the constant solution away."""
    without = Row(
        "no-stop-gradient", "without stop-gradient", 0.1, "collapse",
        "the loss reaches -1, the std 0", ("--method.stop_gradient=false",),
    )  # fmt: skip
    with_it = baseline("std(z/|z|) sqrt(d) near 1", paper=67.7)
    return Study("stop-gradient", "Stop-gradient", "section 4.1, figure 2", (with_it, without))


def predictor() -> Study:
    """What h must do."""
    decayed = Row(
        "decayed-predictor", "its learning rate decays too", 67.7, "same", "works",
        ("--optim.constant_predictor_lr=false",),
    )  # fmt: skip
    fixed = Row(
        "fixed-predictor", "fixed at its random start", 1.5, "worse",
        "does not converge: the loss stays high", ("--method.predictor=fixed",),
    )  # fmt: skip
    rows = baseline("its learning rate is constant"), decayed, fixed, NO_PREDICTOR
    return Study("predictor", "Predictor", "section 4.2, table 1", rows)


def batch_norm(base: Config) -> Study:
    """Where the heads need it."""
    hidden = Row(
        "norm-hidden", "hidden layers", 67.4, "same", "works", ("--model.head_norm=hidden",)
    )
    none = Row(
        "norm-none", "none", 34.6, "worse", "hard to optimise, no collapse",
        ("--model.head_norm=none", warm_up(base)),
    )  # fmt: skip
    everywhere = Row(
        "norm-all", "all layers", None, None, "unstable: the loss oscillates; no collapse",
        ("--model.head_norm=all",),
    )  # fmt: skip
    rows = baseline("all but the predictor's output"), hidden, none, everywhere
    return Study("batch-norm", "Batch norm in the heads", "section 4.4, table 3", rows)


def symmetry() -> Study:
    """Whether both views must be predicted."""
    once = Row(
        "asymmetric", "asymmetric", 64.8, "worse", "less accurate, no collapse",
        ("--method.symmetry=asymmetric",),
    )  # fmt: skip
    twice = Row(
        "asymmetric-2x", "asymmetric, two pairs of views", 67.3, "same", "makes up for it",
        ("--method.symmetry=asymmetric_2x",),
    )  # fmt: skip
    return Study("symmetry", "Symmetric loss", "section 4.6", (baseline("symmetric"), once, twice))


def similarity() -> Study:
    """Whether it must be the cosine; losses of two kinds share no axis."""
    other = Row(
        "cross-entropy", "cross-entropy", 63.2, "worse", "less accurate, no collapse",
        ("--method.similarity=cross_entropy",),
    )  # fmt: skip
    return Study(
        "similarity", "Similarity function", "section 4.5", (baseline("cosine"), other),
        ("train/z_std", "eval/knn_top1"),
    )  # fmt: skip


def dimension(base: Config) -> Study:
    """d of z and p, the predictor's hidden layer a quarter of it: the paper's shares of ours."""
    measured: tuple[tuple[int, float, Outcome], ...] = (
        (2, 67.5, "same"), (4, 67.2, "same"), (8, 65.3, "worse"),
    )  # fmt: skip
    rows = [baseline(f"d = {PAPER_DIM}")]
    for part, paper, outcome in measured:
        dim = base.model.projector_dim // part
        flags = f"--model.projector_dim={dim}", f"--model.predictor_hidden={max(1, dim // 4)}"
        says = f"d = {PAPER_DIM // part}"
        rows.append(Row(f"dimension-{dim}", f"d = {dim}", paper, outcome, says, flags))
    return Study("dimension", "Output dimension", "appendix B", tuple(rows))


def batch_size(base: Config) -> Study:
    """The paper's multiples of our batch; the learning rate follows it (train/config/schema.py)."""
    measured: tuple[tuple[int, float, Outcome], ...] = (
        (64, 66.1, "worse"), (128, 67.3, "same"), (256, 68.1, "same"), (1024, 68.0, "same"),
        (2048, 67.9, "same"), (4096, 64.0, "worse"),
    )  # fmt: skip
    rows = [baseline(f"{PAPER_BATCH} images")]
    for images, paper, outcome in measured:
        size = base.data.batch_size * images // PAPER_BATCH
        flags = (f"--data.batch_size={size}",)
        if images >= 1024:
            flags += (warm_up(base),)
        says = f"{images} images"
        rows.append(Row(f"batch-{size}", f"{size} images", paper, outcome, says, flags))
    return Study("batch-size", "Batch size", "section 4.3, table 2", tuple(rows))


def alternation() -> Study:
    """k SGD steps on targets computed before them."""
    measured: tuple[tuple[int, str, float, Outcome, str], ...] = (
        (10, "k = 10", 68.7, "same", "a little better"),
        (100, "k = 100", 68.9, "same", "a little better"),
        (0, "k = one epoch", 67.0, "worse", "a little worse"),
    )
    rows = [baseline("k = 1 is SimSiam")]
    for steps, label, paper, outcome, says in measured:
        name = f"alternation-{steps or 'epoch'}"
        rows.append(Row(name, label, paper, outcome, says, (f"--method.target_steps={steps}",)))
    return Study("alternation", "Multi-step alternation", "section 5.2", tuple(rows))


def moving_average() -> Study:
    """The mean over views that the predictor stands for, taken over epochs instead."""
    kept = Row(
        "moving-average", "moving average of 0.8 for each image", 55.0, "better",
        "learns without a predictor", ("--method.predictor=none", "--method.moving_average=0.8"),
    )  # fmt: skip
    return Study(
        "moving-average", "Targets without a predictor", "section 5.2", (NO_PREDICTOR, kept)
    )


def methods(base: Config) -> Study:
    """The methods that it is compared with; losses of several kinds share no axis.

    With the baseline's backbone, projector layers and SGD; each method's own settings by default,
    but for what is named here, which a few hundred steps on the digits need: less momentum of
    BYOL's target, half the learning rate for its loss, which is four times SimSiam's, and no
    solarize, which inverts a digit; sharper assignments and queries; and for MoCo a small step
    while the queue still holds random vectors.
    """
    dim, queue = "--model.projector_dim=128", 16 * base.data.batch_size
    simclr = Row(
        "simclr", "SimCLR", 66.5, "worse", "a little worse, with a batch of 4096",
        ("--method.name=simclr", "--method.simclr.temperature=0.5", dim),
    )  # fmt: skip
    moco = Row(
        "moco", "MoCo v2", 67.4, "same", "the same",
        (
            "--method.name=moco", f"--method.moco.queue={queue}", "--method.moco.temperature=0.07",
            dim, warm_up(base),
        ),
    )  # fmt: skip
    byol = Row(
        "byol", "BYOL", 66.5, "worse", "a little worse, with a batch of 4096",
        (
            "--method.name=byol", "--method.byol.momentum=0.97",
            "--method.byol.second_solarize=0", f"--optim.lr={base.optim.lr / 2:g}", dim,
            f"--model.predictor_hidden={4 * base.model.predictor_hidden}",
        ),
    )  # fmt: skip
    swav = Row(
        "swav", "SwAV without multi-crop", 66.5, "worse", "a little worse, with a batch of 4096",
        (
            "--method.name=swav", "--method.swav.prototypes=50", "--method.swav.epsilon=0.025",
            "--model.projector_dim=32",
        ),
    )  # fmt: skip
    return Study(
        "methods", "Methods", "section 6.1, table 4, 100 epochs",
        (baseline("the best of them after 100 epochs"), simclr, moco, byol, swav),
        ("train/z_std", "eval/knn_top1"),
    )  # fmt: skip


def warm_up(base: Config) -> str:
    """The paper's 10 epochs of 100."""
    return f"--optim.warmup_epochs={base.epochs / 10:g}"


def left_out(config: Config, images: int) -> str | None:
    """Why a variant cannot be trained on so many images, if it cannot."""
    batch = config.data.batch_size
    steps_per_epoch = images // batch
    if batch < LEAST_BATCH:
        return f"{batch} images are too few for the statistics of batch norm"
    if not steps_per_epoch:
        return f"there are {images} images"
    if config.method.spec.least_images > images:
        return f"there are {images} images, fewer than its queue holds"
    if config.method.target_steps > steps_per_epoch:
        return f"an epoch has {steps_per_epoch} steps"
    return None
