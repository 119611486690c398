"""The training loop: batches in, steps, what is logged and saved in between.

Between two log steps nothing here waits for the device: no .item() in a step.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.profiler import record_function

from kernels.normalize import finish_views, normalize_views
from pipeline.loader import Batch, Ranks, view_loader
from train.config import Config
from train.distributed import StopSignal, World
from train.distributed.world import ALLOWED_S, Stacks
from train.evaluation.embed import EvaluationStopped, embed, knn_accuracy
from train.evaluation.health import log_health, measure_health
from train.network.model import DTYPES, autocast
from train.run import state
from train.run.data import RunData
from train.run.folder import RunWriter
from train.run.optim import Schedule, set_lr
from train.run.report import thumbnails
from train.run.state import TrainState
from train.run.step_graph import Results
from train.window import Window, warn_of_bad_queries

PICTURES, EMBEDDED = 8, 1000  # images whose views, whose features TensorBoard shows


def train(
    config: Config,
    world: World,
    data: RunData,
    current: TrainState,
    schedule: Schedule,
    run: RunWriter,
    stacks: Stacks,
) -> str:
    """Run to the last step or to a signal; returns "finished" or "preempted".

    Raises: ValueError for too many bad images, FloatingPointError for gradients that stay bad,
    CheckpointError if the last checkpoint cannot be written, ConnectionError on all ranks when the
    torchrun of one was killed, after a checkpoint.
    """
    stop = StopSignal(world)
    passes = plan(current, schedule)
    loader = view_loader(
        data.train,
        schedule.order,
        [step for step, _ in passes],
        views=config.views,
        options=config.dali,
        device=world.device,
        ranks=Ranks(world.rank, world.size, world.local_size),
    )
    window = Window(config, world, data.train, current, schedule, run)
    run.log.start_bar(schedule.last, current.step)
    save_every = config.checkpoint_every or schedule.steps_per_epoch

    def stopping_in_check() -> bool:
        stacks.allow(ALLOWED_S)  # for each batch
        return stop.agreed()

    def check() -> None:
        stacks.allow(ALLOWED_S)
        check_encoder(config, world, data, current, schedule, run, stop=stopping_in_check)

    ended = "finished"
    try:
        if check_is_due(config, schedule, current.step):  # step 0, or the run was stopped within it
            check()
        window.restart()
        for batch, (_, for_targets) in zip(loader, passes, strict=True):
            window.data_arrived()
            if for_targets:
                views = normalized(config, batch.images, batch.draws)
                with autocast(config.precision, world.device):
                    current.model.keep_targets(views, batch.step)
                window.work_queued()
                stacks.allow(ALLOWED_S)  # the first step of a block may compile
                continue
            if batch.step == 0:
                views = finish_views(batch.images, batch.draws, kernels=config.model.kernels)
                run.metrics.view_grid(0, views[:, :PICTURES])
            window.step_done(*train_step(current, config, schedule, batch))
            is_last, stopping = current.step == schedule.last, stop.agreed()
            if current.step % config.log_every == 0 or current.step == 1 or is_last or stopping:
                window.log()
            if check_is_due(config, schedule, current.step):
                window.pause()
                check()
            if current.step % save_every == 0 or is_last or stopping:
                stacks.allow(ALLOWED_S)
                window.pause()
                state.warn_of_differing_ranks(current, world, run.log.warn)
                state.save_checkpoint(current, run, is_last=is_last or stopping)
            if stopping and not is_last:
                ended = "preempted"
                break
            window.resume()
            stacks.allow()
    except EvaluationStopped:  # the same command repeats the check
        state.save_checkpoint(current, run, is_last=True)
        ended = "preempted"
    finally:
        run.log.stop_bar()
        stop.close()
    if ended == "preempted":
        stop.check_torchrun()
    return ended


def plan(current: TrainState, schedule: Schedule) -> list[tuple[int, bool]]:
    """The batches to go through: (step, whether it only computes targets).

    A method that keeps the targets of k steps sees a block of k batches twice. Blocks are whole
    even where --max_steps ends the run within one, so that a resumed run has the same targets.
    """
    block = current.model.target_steps
    passes = []
    for step in range(current.step, schedule.last):
        if block > 1 and step % block == 0:
            end = min(step + block, schedule.total)
            passes += [(later, True) for later in range(step, end)]
        passes.append((step, False))
    return passes


def train_step(
    current: TrainState, config: Config, schedule: Schedule, batch: Batch
) -> tuple[Tensor, dict[str, Tensor], Tensor, float]:
    """One step of the optimizer: loss, scalars, gradient norm (on the device), learning rate."""
    device = current.guard.device
    lr = set_lr(
        current.optimizer,
        config.optim,
        current.step - schedule.begin,
        lr=config.lr,
        total=schedule.total - schedule.begin,
        steps_per_epoch=schedule.steps_per_epoch,
    )
    current.model.before_step(current.step)

    def update(images: Tensor, ids: Tensor, draws: Tensor | None) -> Results:
        views, small = normalized(config, images, draws), None
        if batch.small is not None:
            small = normalized(config, batch.small, batch.small_draws)
        with record_function("forward"), autocast(config.precision, device):
            loss, scalars = current.ddp(views, ids, small)
        norm = current.guard(loss, frozen=current.model.frozen(current.step))
        return Results(loss.detach(), scalars, norm)

    ids = batch.ids.to(device, non_blocking=True)
    call = update if current.graph is None else partial(current.graph, update)
    loss, scalars, norm = call(batch.images, ids, batch.draws)
    current.model.after_step(current.step, schedule.total)
    current.step += 1
    return loss, scalars, norm, lr


def normalized(config: Config, images: Tensor, draws: Tensor | None) -> Tensor:
    """Shapes: images (V, N, S, S, 3) uint8 -> (V N, C, S, S) channels_last in the run's dtype.

    draws: a Batch's; the images are crops where there are any. C is --model.stem_channels.
    """
    model, dtype = config.model, DTYPES[config.precision]
    how = {"draws": draws, "channels": model.stem_channels, "kernels": model.kernels}
    with record_function("normalize"):
        flat = images.flatten(0, 1)
        return normalize_views(flat, config.data.mean, config.data.std, dtype, **how)


def knn_is_due(config: Config, schedule: Schedule, step: int) -> bool:
    """Before the first step, every eval.every_epochs epochs, after the last step."""
    every = schedule.steps_per_epoch * config.eval.every_epochs
    return step % every == 0 or step == schedule.last


def check_is_due(config: Config, schedule: Schedule, step: int) -> bool:
    """With kNN, and every eval.rank_steps steps for rank and spectrum alone."""
    every, images = config.eval.rank_steps, config.eval.rank_images
    return knn_is_due(config, schedule, step) or bool(images and every and step % every == 0)


def check_encoder(
    config: Config,
    world: World,
    data: RunData,
    current: TrainState,
    schedule: Schedule,
    run: RunWriter,
    *,
    stop: Callable[[], bool],
) -> None:
    """Measure and log rank and spectrum, and kNN where it is due; not again after a resume.

    Raises: EvaluationStopped when `stop` says so.
    """
    step, model, epoch = current.step, current.model, current.step / schedule.steps_per_epoch
    if config.eval.rank_images and current.health.get("step") != step:
        health = measure_health(model, data.train, config, world, step=step, stop=stop)
        if health is not None:
            log_health(health, current.health, epoch, run)
            current.health = health
    if knn_is_due(config, schedule, step) and str(step) not in current.knn:
        top1 = knn_accuracy(model.backbone, data, config, world, tell=run.log, stop=stop)
        if top1 is None:
            return
        current.knn[str(step)] = top1
        run.log(f"epoch {epoch:.2f}  step {step}  kNN top-1 {top1:.2f} %")
        clock = {"train_s": round(current.train_s, 3)}
        run.metrics.scalars(step, {"eval/knn_top1": top1}, epoch=epoch, **clock)
        if step == 0:
            warn_of_bad_queries(data, world, run.log)


def write_features(
    config: Config, world: World, data: RunData, current: TrainState, run: RunWriter
) -> None:
    """Features of some held-out images, thumbnails and classes for TensorBoard's projector."""
    if data.queries is None or run.folder is None:
        return
    ids, labels = data.queries.ids[:EMBEDDED], data.queries.labels[:EMBEDDED]
    some = dataclasses.replace(data.queries, ids=ids, labels=labels)
    alone = dataclasses.replace(world, rank=0, size=1)
    features, classes, known = embed(current.model.backbone, some, config, alone)
    pictures = thumbnails(some.reader, known, config=config, device=world.device)
    names = [data.class_names[label] for label in classes.tolist()]
    run.metrics.embedding(current.step, features, names, pictures)
