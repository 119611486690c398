"""Evaluate a trained encoder: `python train/evaluate.py RUN [--data.root DIR]`, or under torchrun.

The newest checkpoint of a run folder: kNN for several k, a fast linear probe on cached features
(train/evaluation/fast_probe.py), RankMe, the collapse meter, a confusion matrix and test images
with their nearest training images; then, hours for ImageNet, the paper's linear probe
(train/evaluation/linear_probe.py). --probe fast ends before that. Test images are those of val/ or
--data.val, else a tenth of the folder. Written to RUN/evaluation/. A newcomer's mistake: a fast
probe's figure beside the paper's. See the two files.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import dataclasses
import hashlib
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn import functional as F

from pipeline.sources.folder import split_root
from train import distributed
from train.config import Config
from train.distributed import World, from_main
from train.evaluation.config import EvaluateConfig, read_flags, run_config
from train.evaluation.encoded import (
    TOP,
    Encoded,
    accuracy,
    check_k,
    encode,
    load_encoder,
    open_sets,
)
from train.evaluation.fast_probe import fast_probe
from train.evaluation.knn import nearest, ranked
from train.evaluation.linear_probe import LinearProbe, fit_batch, images_a_pass, train_probe
from train.evaluation.pictures import draw_confusion, draw_neighbours
from train.evaluation.spread import measure_spread
from train.network.resnet import ResNet
from train.run.checkpoint import Checkpoint
from train.run.data import EvalSet, check_apart, open_data
from train.run.folder import (
    SLOW_PRECISION,
    Log,
    RunFolder,
    environment,
    is_slow_precision,
    newest_checkpoint,
)
from train.run.program import error_text, is_out_of_memory, memory_line, print_result, refuse
from train.run.report import print_evaluation, thumbnails

QUERIES, NEIGHBOURS, SIDE = 10, 8, 96  # test images shown, neighbours of each, pixels
CONFUSION, CONFUSION_LINEAR = "confusion.png", "confusion_linear.png"
STOPPED = (
    "stopped. evaluation.json has what was done; the same command starts again, and goes on after "
    "the linear probe's last epoch"
)


@dataclass(frozen=True)
class Job:
    """What an evaluation works with, put together once."""

    found: Checkpoint
    config: Config
    """The run's, with the images and the device of this evaluation."""
    chosen: EvaluateConfig
    names: list[str]
    """Of the classes; none without labels."""
    train: EvalSet
    test: EvalSet
    world: World
    out: Path
    log: Log

    @property
    def top(self) -> int:
        """Guesses for an image: five, or as many as there are classes."""
        return min(TOP, len(self.names))


def knn(job: Job, train: Encoded, test: Encoded) -> tuple[dict, Tensor]:
    """Accuracies by k, and the guesses with the largest k."""
    ks = job.chosen.k
    similarity, rows = nearest(
        F.normalize(test.features, dim=1), F.normalize(train.features, dim=1), max(ks)
    )
    labels = train.labels[rows]
    guesses = {
        k: ranked(
            similarity[:, :k], labels[:, :k], num_classes=len(job.names),
            temperature=job.config.eval.temperature, top=job.top,
        )
        for k in ks
    }  # fmt: skip
    return {str(k): accuracy(g, test.labels) for k, g in guesses.items()}, guesses[max(ks)]


def on_cached(job: Job, train: Encoded, test: Encoded) -> tuple[dict, Tensor]:
    """The fast probe's result and guesses."""
    result, guesses = fast_probe(
        train.features, train.labels, test.features, config=job.chosen.fast,
        num_classes=len(job.names), top=job.top, seed=job.config.seed,
    )  # fmt: skip
    by_lr = result["held_out_top1_by_lr"]
    if result["lr"] in (job.chosen.fast.lrs[0], job.chosen.fast.lrs[-1]) and len(by_lr) > 1:
        job.log.warn(
            f"fast probe: the best learning rate, {result['lr']}, is at an end of the sweep: "
            "widen --fast.lrs"
        )
    return accuracy(guesses, test.labels) | result, guesses


def open_probe(job: Job, backbone: ResNet) -> LinearProbe:
    """The linear probe of this encoder, as far as it was trained. Raises: ValueError if it is
    of other settings."""
    config, probe = job.config, job.chosen.linear
    encoder = hashlib.sha256()
    for tensor in backbone.state_dict().values():
        encoder.update(tensor.cpu().contiguous().numpy().tobytes())
    facts = dataclasses.asdict(probe) | {
        "lrs": list(probe.lrs), "size": config.eval.size, "flip": config.augment.flip,
        "precision": config.precision, "seed": config.seed, "num_images": len(job.train.ids),
        "images": job.train.reader.source.fingerprint, "encoder": encoder.hexdigest(),
    }  # fmt: skip
    torch.manual_seed(config.seed)
    opened = LinearProbe(
        probe, features=backbone.num_features, classes=len(job.names), world=job.world, facts=facts,
        folder=job.out / "checkpoints" / f"encoder-{job.found.step:08d}",
    )  # fmt: skip
    opened.restore(job.log)
    return opened


def as_in_paper(
    job: Job, probe: LinearProbe, backbone: ResNet, test: Encoded
) -> tuple[dict, Tensor]:
    """The linear probe's accuracies by learning rate, and the guesses with the last one."""
    train_probe(
        probe, backbone, job.train, (test.features, test.labels), config=job.config,
        log=job.log,
    )  # fmt: skip
    guesses = probe.guesses(test.features, top=job.top)
    by_lr = {
        str(lr): accuracy(guess, test.labels)
        for lr, guess in zip(probe.config.lrs, guesses, strict=True)
    }
    settings = {name: probe.facts[name] for name in ("epochs", "batch_size", "size", "flip")}
    return settings | {"by_lr": by_lr}, guesses[-1]


def show_confusion(job: Job, test: Encoded, guesses: Tensor, *, title: str, picture: str) -> None:
    """Write the confusion matrix of the first guesses."""
    classes = len(job.names)
    cells = (test.labels * classes + guesses[:, 0]).bincount(minlength=classes**2)
    counts = cells.view(classes, classes).cpu().numpy()
    draw_confusion(counts, job.names, job.out / picture, title=title)


def show_neighbours(job: Job, train: Encoded, test: Encoded) -> None:
    """Write neighbours.png: some test images, evenly over the classes, and what is nearest."""
    count = min(QUERIES, len(test.ids))
    chosen = (torch.arange(count, device=test.ids.device) * 2 + 1) * len(test.ids) // (2 * count)
    _, rows = nearest(
        F.normalize(test.features[chosen], dim=1), F.normalize(train.features, dim=1), NEIGHBOURS
    )
    options: dict = {"config": job.config, "device": job.world.device, "side": SIDE}
    queries = thumbnails(job.test.reader, test.ids[chosen], **options)
    neighbours = thumbnails(job.train.reader, train.ids[rows.flatten()], **options)
    names = [*job.names, ""]  # label -1 has no name
    draw_neighbours(
        queries.cpu().numpy(),
        neighbours.view(*rows.shape, *neighbours.shape[1:]).cpu().numpy(),
        [names[label] for label in test.labels[chosen].tolist()],
        [[names[label] for label in row] for row in train.labels[rows].tolist()],
        job.out / "neighbours.png",
    )


def evaluate(job: Job, folder: RunFolder | None) -> dict:
    """All that was asked for, the cheap parts first; evaluation.json and pictures on rank 0.

    They replace those of an evaluation before; evaluations.jsonl keeps the results of all.
    """
    start = time.monotonic()
    backbone, projector = load_encoder(job.found, job.config, device=job.world.device)
    linear = open_probe(job, backbone) if job.chosen.probe in ("linear", "both") else None
    train = encode(backbone, job.train, job.config, job.world, job.log)
    test = encode(backbone, job.test, job.config, job.world, job.log)
    check_k(job.chosen.k, len(train.ids))  # again, now without those that cannot be read
    result: dict = {
        "out": str(job.out), "step": job.found.step, "data": job.train.reader.source.root,
        "train_images": len(train.ids), "test_images": len(test.ids), "classes": len(job.names),
        "knn": {}, "fast_probe": None, "linear_probe": None,
        **measure_spread(projector, train.features),
    }  # fmt: skip

    def write(title: str, guesses: Tensor | None, picture: str = CONFUSION) -> None:
        result["seconds"] = time.monotonic() - start
        if folder is None:
            return
        if guesses is not None:
            show_confusion(job, test, guesses, title=title, picture=picture)
        folder.write("evaluation.json", result)

    title, guesses = "", None
    if job.chosen.k:
        title, (result["knn"], guesses) = f"kNN, k = {max(job.chosen.k)}", knn(job, train, test)
    if job.chosen.probe in ("fast", "both"):
        title, (result["fast_probe"], guesses) = "fast probe", on_cached(job, train, test)
    if folder is not None:
        for picture in CONFUSION, CONFUSION_LINEAR:  # of an evaluation that this one replaces
            (job.out / picture).unlink(missing_ok=True)
        show_neighbours(job, train, test)
    write(title, guesses)
    if linear is not None:  # hours for ImageNet: what is known by now is written and shown
        if folder is not None and linear.epochs_done < linear.config.epochs:
            print_evaluation(result, job.config.method.spec)
        result["linear_probe"], guesses = as_in_paper(job, linear, backbone, test)
        title = f"linear probe, learning rate {linear.config.lrs[-1]}"
        write(title, guesses, CONFUSION_LINEAR)
    return from_main(job.world, result)  # the others wait until all is written


def start_job(
    found: Checkpoint, run: Path, config: Config, chosen: EvaluateConfig, *, world: World,
    out: Path, log: Log,
) -> Job:  # fmt: skip
    """List the images and check what can be known before the first forward pass."""
    if is_slow_precision(config.precision, world.device):
        log.warn(SLOW_PRECISION)
    data = open_data(config.data, out=run, seed=config.seed, world=world)
    train, test = open_sets(data, chosen, seed=config.seed)
    if chosen.probe in ("linear", "both"):
        chosen = dataclasses.replace(chosen, linear=fit_batch(chosen.linear, len(train.ids), log))
        images_a_pass(chosen.linear, per_rank=config.eval.batch_size, world=world)
    log(f"{run}, step {found.step}: {len(data.class_names)} classes, {world.size} x {world.device}")
    log(data.note)
    return Job(found, config, chosen, data.class_names, train, test, world, out, log)


@record
def main() -> None:
    """Read the flags, evaluate, print the result as the last line of stdout."""
    run, chosen = read_flags()
    out = Path(chosen.out or run / "evaluation")
    folder, log = None, Log(None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        found = newest_checkpoint(run, log=lambda line: print(f"warning: {line}", file=sys.stderr))
        config = run_config(run, chosen)
        with distributed.start(config.device, config) as world:
            if world.is_main:
                check_apart(out, *split_root(config.data.root), config.data.val)
                if any((out / "checkpoints").glob("step-*")):  # its config.yaml is to stay
                    raise ValueError(f"--out {out} is the folder of a training: give another")
                folder = RunFolder(str(out))
                folder.describe(dataclasses.asdict(chosen), environment(world.size, world.device))
                log = Log(out / "log.txt")
            job = start_job(found, run, config, chosen, world=world, out=out, log=log)
            result = evaluate(job, folder)
        if folder is not None:
            kept = json.dumps({**result, "evaluation": dataclasses.asdict(chosen)})
            with (out / "evaluations.jsonl").open("a") as file:
                file.write(f"{kept}\n")
            print_evaluation(result, config.method.spec)
            print_result(result, kept=out / "evaluation.json")
    except KeyboardInterrupt:
        refuse(STOPPED, code=130)
    except (ValueError, OSError) as error:
        refuse(error_text(error, out), code=1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        refuse(
            f"out of memory ({memory_line(error)}): lower --eval.batch_size, --eval.size or "
            "--fast.batch_size",
            code=1,
        )
    finally:
        if folder is not None:
            folder.close()


if __name__ == "__main__":
    main()
