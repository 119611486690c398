"""The paper's experiments as data: the variants of each study, and what the paper reports of them.

train/study.py runs them. A variant of several studies has one name and runs once. Our percentages
cannot be compared with the paper's, which are of a linear classifier on ImageNet after 100 epochs
of a ResNet-50; the outcome of each row can.
Source: Chen & He, CVPR 2021, in the section that each study names; views: Pototzky et al., GCPR
2022.
"""

from dataclasses import dataclass
from typing import Literal

from train.config import Config

Outcome = Literal["learns", "collapse", "worse", "same", "better"]
LEAST_BATCH = 16  # images; fewer are too few for the statistics of batch norm
PAPER_BATCH, PAPER_DIM, PAPER_TOP1 = 512, 2048, 68.1  # the baseline's


@dataclass(frozen=True)
class Row:
    """A variant, and the paper's result."""

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
    """The paper's result in words."""
    flags: tuple[str, ...] = ()
    """What differs from the baseline."""
    is_reference: bool = False
    """The rows after it are compared with it, not with the study's first row."""


@dataclass(frozen=True)
class Study:
    """Rows that are compared with the first one, or with the last reference before them."""

    name: str
    title: str
    source: str
    """Section, figure or table of the paper."""
    rows: tuple[Row, ...]
    panels: tuple[str, ...] = ("train/loss", "train/z_std", "eval/knn_top1")
    """Of the figure, over epochs."""


NO_LOSS = "train/z_std", "eval/knn_top1"  # panels where losses of several kinds share no axis
NO_PREDICTOR = Row(
    "no-predictor", "no predictor", 0.1, "collapse", "collapses", ("--method.predictor=none",)
)


def baseline(says: str, *, paper: float = PAPER_TOP1) -> Row:
    """SimSiam with its defaults."""
    return Row("baseline", "SimSiam", paper, "learns", says)


def beside(paper: float) -> Outcome:
    """How a number of the paper compares with its baseline."""
    return "worse" if paper <= PAPER_TOP1 - 1 else "same"


def studies(base: Config) -> dict[str, Study]:
    """Every study by name, around this baseline."""
    of_flags = stop_gradient(), predictor(), batch_norm(base), symmetry(), similarity()
    of_sizes = dimension(base), batch_size(base), views(base)
    of_methods = alternation(), moving_average(), methods(base)
    return {study.name: study for study in (*of_flags, *of_sizes, *of_methods)}


def stop_gradient() -> Study:
    """What prevents the constant solution."""
    says, flags = "the loss reaches -1, the std 0", ("--method.stop_gradient=false",)
    without = Row("no-stop-gradient", "without stop-gradient", 0.1, "collapse", says, flags)
    rows = baseline("std(z/|z|) sqrt(d) near 1", paper=67.7), without
    return Study("stop-gradient", "Stop-gradient", "section 4.1, figure 2", rows)


def predictor() -> Study:
    """What the predictor must do."""
    label, flags = "its learning rate decays too", ("--optim.constant_predictor_lr=false",)
    decayed = Row("decayed-predictor", label, 67.7, "same", "works", flags)
    label, flags = "fixed at its random start", ("--method.predictor=fixed",)
    says = "does not converge: the loss stays high"
    fixed = Row("fixed-predictor", label, 1.5, "worse", says, flags)
    rows = baseline("its learning rate is constant"), decayed, fixed, NO_PREDICTOR
    return Study("predictor", "Predictor", "section 4.2, table 1", rows)


def batch_norm(base: Config) -> Study:
    """Where the heads need it."""
    flag = "--model.head_norm"
    hidden = Row("norm-hidden", "hidden layers", 67.4, "same", "works", (f"{flag}=hidden",))
    says, flags = "hard to optimise, no collapse", (f"{flag}=none", warm_up(base))
    none = Row("norm-none", "none", 34.6, "worse", says, flags)
    says = "unstable: the loss oscillates; no collapse"
    everywhere = Row("norm-all", "all layers", None, None, says, (f"{flag}=all",))
    rows = baseline("all but the predictor's output"), hidden, none, everywhere
    return Study("batch-norm", "Batch norm in the heads", "section 4.4, table 3", rows)


def symmetry() -> Study:
    """Whether both views must be predicted."""
    says, flags = "less accurate, no collapse", ("--method.symmetry=asymmetric",)
    single = Row("asymmetric", "asymmetric", 64.8, "worse", says, flags)
    label, flags = "asymmetric, two pairs of views", ("--method.symmetry=asymmetric_2x",)
    double = Row("asymmetric-2x", label, 67.3, "same", "makes up for it", flags)
    rows = baseline("symmetric"), single, double
    return Study("symmetry", "Symmetric loss", "section 4.6", rows)


def similarity() -> Study:
    """Whether it must be the cosine."""
    says, flags = "less accurate, no collapse", ("--method.similarity=cross_entropy",)
    rows = baseline("cosine"), Row("cross-entropy", "cross-entropy", 63.2, "worse", says, flags)
    return Study("similarity", "Similarity function", "section 4.5", rows, NO_LOSS)


def dimension(base: Config) -> Study:
    """d of z and p, the predictor's hidden layer a quarter of it: the paper's fractions of ours."""
    rows = [baseline(f"d = {PAPER_DIM}")]
    for part, paper in (2, 67.5), (4, 67.2), (8, 65.3):
        dim, says = base.model.projector_dim // part, f"d = {PAPER_DIM // part}"
        flags = f"--model.projector_dim={dim}", f"--model.predictor_hidden={max(1, dim // 4)}"
        rows.append(Row(f"dimension-{dim}", f"d = {dim}", paper, beside(paper), says, flags))
    return Study("dimension", "Output dimension", "appendix B", tuple(rows))


def batch_size(base: Config) -> Study:
    """The paper's multiples of our batch; the learning rate follows it (train/config/schema.py)."""
    rows, top1 = [baseline(f"{PAPER_BATCH} images")], (66.1, 67.3, 68.1, 68.0, 67.9, 64.0)
    for images, paper in zip((64, 128, 256, 1024, 2048, 4096), top1, strict=True):
        size = base.data.batch_size * images // PAPER_BATCH
        name, label, says = f"batch-{size}", f"{size} images", f"{images} images"
        flags = f"--data.batch_size={size}", *([warm_up(base)] if images >= 1024 else [])
        rows.append(Row(name, label, paper, beside(paper), says, flags))
    return Study("batch-size", "Batch size", "section 4.3, table 2", tuple(rows))


def views(base: Config) -> Study:
    """FastSiam's small batches: four views of each image against two.

    With as many images seen, and two views again in twice the epochs: with as many views seen. The
    paper's abstract has the outcome for 32 images; it compares detection and segmentation.
    """
    rows, longer = [], f"--epochs={2 * base.epochs}"
    sizes: tuple[tuple[int, Outcome | None], ...] = (16, None), (32, "better")
    for size, outcome in sizes:
        batch, four = f"--data.batch_size={size}", "--method.views=4"
        says = "converges faster: a steadier target" if outcome else "as many images seen"
        label, name = f"{size} images, 2 views", f"two-views-{size}"
        rows.append(Row(name, label, None, None, "SimSiam", (batch,), is_reference=True))
        name, flags = f"four-views-{size}", (batch, four)
        rows.append(Row(name, f"{size} images, 4 views", None, outcome, says, flags))
        name, label, says = f"longer-{size}", f"{label}, twice the epochs", "as many views as of 4"
        rows.append(Row(name, label, None, None, says, (batch, longer)))
    return Study("views", "More than two views", "Pototzky et al., GCPR 2022", tuple(rows))


def alternation() -> Study:
    """k SGD steps on targets computed before them."""
    rows, better = [baseline("k = 1 is SimSiam")], "a little better"
    for k, paper, says in (10, 68.7, better), (100, 68.9, better), (0, 67.0, "a little worse"):
        name, label = f"alternation-{k or 'epoch'}", f"k = {k or 'one epoch'}"
        flags = (f"--method.target_steps={k}",)
        rows.append(Row(name, label, paper, beside(paper), says, flags))
    return Study("alternation", "Multi-step alternation", "section 5.2", tuple(rows))


def moving_average() -> Study:
    """The mean over views that the predictor stands for, taken over epochs instead."""
    label, says = "moving average of 0.8 for each image", "learns without a predictor"
    flags = "--method.predictor=none", "--method.moving_average=0.8"
    kept = Row("moving-average", label, 55.0, "better", says, flags)
    rows = NO_PREDICTOR, kept
    return Study("moving-average", "Targets without a predictor", "section 5.2", rows)


def methods(base: Config) -> Study:
    """The methods that it is compared with.

    With the baseline's backbone, projector layers and SGD, and each method's default settings
    except those that a few hundred steps on the digits need: less momentum of BYOL's target, half
    the learning rate for its loss, which is four times SimSiam's, and no solarize, which inverts a
    digit; sharper assignments and queries; for MoCo a small step while its queue is random.
    """
    dim, worse = "--model.projector_dim=128", "a little worse, with a batch of 4096"
    flags = "--method.name=simclr", "--method.simclr.temperature=0.5", dim
    simclr = Row("simclr", "SimCLR", 66.5, "worse", worse, flags)
    queue, temperature = f"queue={16 * base.data.batch_size}", "temperature=0.07"
    flags = "--method.name=moco", f"--method.moco.{queue}", f"--method.moco.{temperature}"
    moco = Row("moco", "MoCo v2", 67.4, "same", "the same", (*flags, dim, warm_up(base)))
    flags = "--method.name=byol", "--method.byol.momentum=0.97", "--method.byol.second_solarize=0"
    hidden = f"--model.predictor_hidden={4 * base.model.predictor_hidden}"
    flags = *flags, f"--optim.lr={base.optim.lr / 2:g}", dim, hidden
    byol = Row("byol", "BYOL", 66.5, "worse", worse, flags)
    flags = "--method.name=swav", "--method.swav.prototypes=50", "--method.swav.epsilon=0.025"
    flags = *flags, "--model.projector_dim=32"
    swav = Row("swav", "SwAV without multi-crop", 66.5, "worse", worse, flags)
    rows = baseline("the best of them after 100 epochs"), simclr, moco, byol, swav
    return Study("methods", "Methods", "section 6.1, table 4, 100 epochs", rows, NO_LOSS)


def warm_up(base: Config) -> str:
    """The paper's 10 epochs of 100."""
    return f"--optim.warmup_epochs={base.epochs / 10:g}"


def left_out(config: Config, images: int) -> str | None:
    """Why a variant cannot be trained on this many images; None if it can."""
    batch, method = config.data.batch_size, config.method
    reasons = {
        f"{batch} images are too few for the statistics of batch norm": batch < LEAST_BATCH,
        f"there are {images} images": images < batch,
        f"there are {images} images, fewer than its queue holds": method.spec.least_images > images,
        f"an epoch has {images // batch} steps": method.target_steps > images // batch,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
