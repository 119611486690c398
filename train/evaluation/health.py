"""What features are like, measured without labels: their effective rank and spectrum.

All in fp64, on the features of a few hundred to a few thousand images.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.order import Purpose, keyed_rng
from pipeline.sources.reader import ImageReader
from train.config import Config
from train.distributed import World
from train.evaluation.embed import embed, gather_rows
from train.methods import Method
from train.run.data import EvalSet
from train.run.folder import RunWriter
from train.run.report import spectra_figure

EPSILON = 1e-7
LEAST_RANK = 4.0
"""Of z, once training has begun; below it the run counts as partially collapsed. On the digits (462
steps, d = 512) it was 8 and 80 where kNN rose by 14 and 20 points, and 1.6 to 2.7 without
stop-gradient, without predictor, and at a learning rate at which kNN fell by 20 points while the
collapse meter read 0.75 (profiling/LOG.md)."""
DECAY_RANGE = 3, 64
"""Eigenvalues, counted from 1, that the decay is fitted to: the first ones are of the mean image
and the strongest contrasts, the last ones of noise."""


def singular_values(outputs: Tensor) -> Tensor:
    """Of (N, D), not centred; largest first, (min(N, D),) fp64."""
    x = outputs.double()
    x = x if len(x) >= x.shape[1] else x.T
    # of the Gram matrix in fp64: closer to the true ones than svdvals in fp32, in a tenth the time
    return torch.linalg.eigvalsh(x.T @ x).clamp_min(0).sqrt().flip(0)


def rankme(outputs: Tensor) -> float:
    """exp(-sum_k p_k log p_k) with p_k = s_k / sum(s) + 1e-7, s the singular values of (N, D).

    From 1 (all rows on one line) to min(N, D) (all directions alike). Not centred. It orders the
    runs of one method and width, not methods or networks.
    Source: Garrido et al., ICML 2023, equation 1, for the projector's outputs of 25,600 training
    images.
    """
    s = singular_values(outputs)
    p = s / s.sum().clamp_min(torch.finfo(s.dtype).tiny) + EPSILON
    return (-(p * p.log()).sum()).exp().item()


def spectrum(outputs: Tensor) -> list[float]:
    """s_k / s_1 for k = 1, 2, 4, 8, ... of the centred (N, D); [] where all rows are equal."""
    s = singular_values(outputs.double() - outputs.double().mean(0))
    if not s[0] > 0:
        return []
    return [(s[k - 1] / s[0]).item() for k in (1 << i for i in range(len(s).bit_length()))]


def decay(outputs: Tensor) -> float | None:
    """alpha of the covariance's eigenvalues, lambda_k ~ k^-alpha; None where there are too few.

    Near 1 generalises best, larger is fewer directions. A regression of log lambda_k on log k with
    weights 1 / k. Source: Agrawal et al., NeurIPS 2022 (alpha-ReQ); Stringer et al., Nature 2019.
    """
    s = singular_values(outputs.double() - outputs.double().mean(0))
    first, last = DECAY_RANGE
    s = s[: min(last, int((s > s[0] * 1e-6).sum()))][first - 1 :]
    if len(s) < 5:
        return None
    k = torch.arange(first, first + len(s), dtype=s.dtype, device=s.device)
    weight, x, y = 1 / k, k.log(), 2 * s.log()
    dx, dy = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
    return -((weight * dx * dy).sum() / (weight * dx * dx).sum()).item()


@torch.no_grad()
def measure_health(
    model: Method,
    reader: ImageReader,
    config: Config,
    world: World,
    *,
    step: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict | None:
    """Rank and spectrum of the backbone's features and of z on a fixed sample of clean images.

    All ranks compute the features, each of its share. None where fewer than two images can be
    read, or where features are not finite. Raises: EvaluationStopped when `stop` says so.
    """
    order = keyed_rng(config.seed, Purpose.RANK_IMAGES).permutation(len(reader.source))
    ids = np.sort(order[: config.eval.rank_images])
    images = EvalSet(reader, ids, np.zeros(len(ids), dtype=np.int64))
    parts = embed(model.backbone, images, config, world, normalized=False, stop=stop)
    features = gather_rows(world, parts[0])
    if len(features) < 2:
        return None
    projector = model.get_submodule("projector")
    was_training = projector.training
    z = projector.eval()(features)
    projector.train(was_training)
    if not (features.isfinite().all() and z.isfinite().all()):
        return None
    rank_z = rankme(z)
    return {
        "step": step,
        "rank_features": rankme(features),
        "rank_z": rank_z,
        "decay_features": decay(features),
        "spectrum_features": spectrum(features),
        "spectrum_z": spectrum(z),
        "rank_limit": min(z.shape),
        "partially_collapsed": step > 0 and is_partially_collapsed(rank_z, min(z.shape)),
    }


def is_partially_collapsed(rank: float, limit: int) -> bool:
    """Whether the effective rank of z, at most `limit`, is that of a partial collapse."""
    return rank < min(LEAST_RANK, limit / 8)


def log_health(health: dict, before: dict, epoch: float, run: RunWriter) -> None:
    """Write a measurement to the log, metrics.jsonl and TensorBoard; `before` is the last one."""
    step = health["step"]
    run.log(
        f"epoch {epoch:.2f}  step {step}  effective rank {health['rank_features']:.1f} of "
        f"features, {health['rank_z']:.1f} of z (at most {health['rank_limit']})"
    )
    names = ("rank_features", "rank_z", "decay_features")
    scalars = {f"eval/{name}": health[name] for name in names if health[name] is not None}
    spectra = {f"eval/{name}": health[name] for name in ("spectrum_features", "spectrum_z")}
    run.metrics.scalars(step, scalars, epoch=epoch, **spectra)
    if run.folder is not None:
        run.metrics.figure(step, "spectrum", spectra_figure({"step": step, **spectra}))
    if health["partially_collapsed"] and not before.get("partially_collapsed"):
        run.log.warn(partial_collapse_advice(health))


def partial_collapse_advice(health: dict) -> str:
    """One line that says what happened and what to change."""
    return (
        f"PARTIAL COLLAPSE: z varies along {health['rank_z']:.1f} directions of "
        f"{health['rank_limit']} (effective rank), which the collapse meter need not show. "
        "Remedy: lower --optim.lr, or --optim.weight_decay where it is above 0.001"
    )
