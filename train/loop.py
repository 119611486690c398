"""The training loop: batches in, steps, what is logged and saved on the way.

Between two log steps nothing here waits for the device. A newcomer's mistake: .item() in the step.
"""

from torch import Tensor
from torch.profiler import record_function

from kernels.normalize import normalize_views
from pipeline.loader import view_loader
from pipeline.runner import Batch
from train import distributed
from train.distributed import StopSignal
from train.distributed.stacks import ALLOWED_S
from train.evaluation.embed import EvaluationStopped, knn_accuracy
from train.network.model import DTYPES, autocast
from train.run.optim import set_lr
from train.session import Session, save
from train.window import Window, bad_entries

PICTURES = 8  # images whose two views are shown


def train(session: Session) -> str:
    """Run to the last step or to a signal; returns "finished" or "preempted".

    Raises: ValueError for too many bad images, FloatingPointError for gradients that stay bad,
    CheckpointError if the last checkpoint cannot be written, ConnectionError on all ranks when the
    torchrun of one was killed, after a checkpoint.
    """
    config, current, world = session.config, session.state, session.world
    stop = StopSignal(world)
    passes = plan(session)
    loader = view_loader(
        session.data.train,
        session.order,
        [step for step, _ in passes],
        views=config.views,
        options=config.dali,
        device=world.device,
        rank=world.rank,
        world=world.size,
        local_world=world.local_size,
    )
    window = Window(session)
    session.log.start_bar(session.last_step, current.step)
    per_epoch = session.order.steps_per_epoch
    save_every = config.checkpoint_every or per_epoch
    ended = "finished"
    try:
        if knn_is_due(session) and str(current.step) not in current.knn:  # at 0, or stopped in it
            check_knn(session, stop)
        window.restart()
        for batch, (_, for_targets) in zip(loader, passes, strict=True):
            window.data_arrived()
            if for_targets:
                views = normalized(session, batch.images)
                with autocast(config.precision, world.device):
                    current.model.keep_targets(views, batch.step)
                window.work_queued()
                session.allow(ALLOWED_S)  # the first step of a block may compile
                continue
            if batch.step == 0 and session.metrics is not None:
                session.metrics.view_pairs(0, batch.images[:, :PICTURES])
            loss, scalars, norm, lr = train_step(session, batch)
            current.step += 1
            window.step_done(loss, scalars, norm)
            is_last = current.step == session.last_step
            stopping = stop.agreed()
            if current.step % config.log_every == 0 or current.step == 1 or is_last or stopping:
                window.log(lr)
            if knn_is_due(session):
                window.pause()
                check_knn(session, stop)
            if current.step % save_every == 0 or is_last or stopping:
                session.allow(ALLOWED_S)
                window.pause()
                save(session, is_last=is_last or stopping)
            if stopping and not is_last:
                ended = "preempted"
                break
            window.resume()
            session.allow()
    except EvaluationStopped:  # the same command makes up for the check
        save(session, is_last=True)
        ended = "preempted"
    finally:
        session.log.stop_bar()
        stop.close()
    if ended == "preempted":
        stop.check_torchrun()
    return ended


def plan(session: Session) -> list[tuple[int, bool]]:
    """The batches to go through: (step, whether it is only for targets that are kept).

    A method that keeps the targets of k steps sees a block of k batches twice. Blocks are whole
    even where --max_steps ends the run within one, so that another start goes on with the same.
    """
    block, first = session.state.model.target_steps, session.state.step
    passes = []
    for step in range(first, session.last_step):
        if block > 1 and step % block == 0:
            end = min(step + block, session.schedule_steps)
            passes += [(later, True) for later in range(step, end)]
        passes.append((step, False))
    return passes


def train_step(session: Session, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor, float]:
    """One step of the optimizer. Nothing waits for the device."""
    config, current = session.config, session.state
    lr = set_lr(
        current.optimizer,
        config.optim,
        current.step,
        lr=config.lr,
        total=session.schedule_steps,
        steps_per_epoch=session.order.steps_per_epoch,
    )
    current.model.before_step(current.step)
    views = normalized(session, batch.images)
    ids = batch.ids.to(session.world.device, non_blocking=True)
    small = None if batch.small is None else normalized(session, batch.small)
    with record_function("forward"), autocast(config.precision, session.world.device):
        loss, scalars = session.ddp(views, ids, small)
    norm = current.guard(loss, frozen=current.model.frozen(current.step))
    current.model.after_step(current.step, session.schedule_steps)
    return loss.detach(), scalars, norm, lr


def normalized(session: Session, images: Tensor) -> Tensor:
    """Shapes: images (V, N, S, S, 3) uint8 -> (V N, 3, S, S) channels_last in the run's dtype."""
    config = session.config
    with record_function("normalize"):
        return normalize_views(
            images.flatten(0, 1),
            config.data.mean,
            config.data.std,
            DTYPES[config.precision],
            kernels=config.model.kernels,
        )


def knn_is_due(session: Session) -> bool:
    """Before the first step, every so many epochs, after the last step."""
    step, every = session.state.step, session.config.eval.every_epochs
    return step % (session.order.steps_per_epoch * every) == 0 or step == session.last_step


def check_knn(session: Session, stop: StopSignal) -> None:
    """Measure kNN now and write it down. Raises: EvaluationStopped when a signal comes."""

    def stopping() -> bool:
        session.allow(ALLOWED_S)  # for each batch
        return stop.agreed()

    session.allow(ALLOWED_S)
    current = session.state
    top1 = knn_accuracy(
        current.model.backbone,
        session.data,
        session.config,
        session.world,
        tell=session.log,
        stop=stopping,
    )
    if top1 is None:
        return
    current.knn[str(current.step)] = top1
    epoch = current.step / session.order.steps_per_epoch
    session.log(f"epoch {epoch:.2f}  step {current.step}  kNN top-1 {top1:.2f} %")
    if session.metrics is not None:
        session.metrics.scalars(current.step, {"eval/knn_top1": top1}, epoch=epoch)
    if current.step == 0:
        warn_of_bad_queries(session)


def warn_of_bad_queries(session: Session) -> None:
    """Say which held-out images the kNN check leaves out."""
    assert session.data.queries is not None
    reader = session.data.queries.reader
    if reader is session.data.train:
        return  # counted and listed with the training images
    parts = distributed.gather(session.world, bad_entries(reader, set()))
    entries = [entry for part in parts for entry in part]
    if entries:
        session.log.warn(
            f"{len(entries)} unreadable images of {reader.source.root} are left out of kNN, "
            f"such as {entries[0]['file']}: {entries[0]['reason']}"
        )
