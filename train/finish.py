"""What a run leaves behind: curves.png, result.json, the projector's features, the table.

A newcomer's mistake: averaging images/s over wall time. Only training steps count.
"""

import dataclasses
import math

import torch
from torch import Tensor

from pipeline.loader import eval_loader
from pipeline.sources.reader import ImageReader
from train.config import Config
from train.distributed import from_main
from train.evaluation.embed import embed
from train.run.folder import RunFolder
from train.run.metrics import Metrics
from train.run.report import draw_curves, print_table
from train.run.state import comparable
from train.session import Session

EMBEDDED = 1000  # images in TensorBoard's projector


def finish(session: Session, *, ended: str) -> dict:
    """Write the end of a run on rank 0, say how to go on; returns the result."""
    current, config = session.state, session.config
    images = current.step * session.order.batch_size
    steps = sorted(int(step) for step in current.knn)
    loss, z_std = (finite(current.last.get(f"train/{name}")) for name in ("loss", "z_std"))
    newest = steps[-1] if steps else 0
    result = {
        "knn_top1": current.knn[str(newest)] if newest else None,
        "knn_step": newest or None,
        "knn_top1_untrained": None if config.init else current.knn.get("0"),
        "loss": loss,
        "z_std": z_std,
        "collapsed": None if z_std is None else z_std < session.collapse_threshold,
        "collapse_threshold": session.collapse_threshold,
        "method": config.method.name,
        "stop_gradient": config.method.stop_gradient,
        "views": len(config.views),
        "images_per_s": images / current.train_s if current.train_s else None,
        "data_wait_pct": 100 * current.wait_s / current.train_s if current.train_s else None,
        "train_s": current.train_s,
        "steps": current.step,
        "batch_size": session.order.batch_size,
        "bad_images": int(current.last.get("data/bad_samples", 0)),
        "knn_by_step": {step: current.knn[str(step)] for step in steps},
        "state": ended,
        "run": str(session.run.path) if session.run is not None else "",
    }
    if ended == "finished":
        write_features(session)
    if session.run is not None and session.metrics is not None:
        write_end(session, session.run, session.metrics, result)
    return from_main(session.world, result)  # the others wait until all is written


def finite(value: float | None) -> float | None:
    """None for NaN and infinity, which JSON does not have: a skipped step among the last ones."""
    return value if value is not None and math.isfinite(value) else None


def write_end(session: Session, run: RunFolder, metrics: Metrics, result: dict) -> None:
    """What rank 0 leaves in the run folder and tells the user."""
    ended, current = result["state"], session.state
    metrics.hyper_parameters(comparable(session.config), result)
    metrics.close()
    threshold, method = session.collapse_threshold, session.config.method.spec
    draw_curves(metrics.path, run.path / "curves.png", threshold=threshold, method=method)
    run.write("result.json", result)
    run.status(ended, current.step)
    if ended == "preempted":
        session.log(
            f"stopped at step {current.step} of {session.last_step}; the checkpoint is in "
            f"{run.checkpoints}. The same command goes on from there: {run.command()}"
        )
    print_table(result, method)


def write_features(session: Session) -> None:
    """Features of some held-out images, thumbnails and classes for TensorBoard's projector."""
    data, metrics = session.data, session.metrics
    if data.queries is None or metrics is None:
        return
    alone = dataclasses.replace(session.world, rank=0, size=1)
    some = dataclasses.replace(
        data.queries, ids=data.queries.ids[:EMBEDDED], labels=data.queries.labels[:EMBEDDED]
    )
    features, labels, ids = embed(session.state.model.backbone, some, session.config, alone)
    pictures = thumbnails(some.reader, ids, config=session.config, device=session.world.device)
    names = [data.class_names[label] for label in labels.tolist()]
    metrics.embedding(session.state.step, features, names, pictures)


def thumbnails(
    reader: ImageReader, ids: Tensor, *, config: Config, device: torch.device, side: int = 32
) -> Tensor:
    """(N, side, side, 3) uint8 pictures of the samples."""
    loader = eval_loader(
        reader, ids.cpu().numpy(), resize=side, size=side, batch_size=256, options=config.dali,
        device=device,
    )  # fmt: skip
    return torch.cat([batch.images for batch in loader])
