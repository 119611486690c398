"""Evaluate a trained encoder: `python train/evaluate.py RUN [--data.root DIR]`, or under torchrun.

Takes the newest checkpoint of a run folder: kNN for several k, the fast linear probe on cached
features with all labels and with few, RankMe, the collapse meter, a confusion matrix and test
images with their nearest training images; then, unless --probe fast, the paper's linear probe:
hours for ImageNet. Test images are those of val/ or --data.val, or a tenth of the folder. Written
to RUN/evaluation/.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import dataclasses
import json
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn import functional as F

from pipeline.sources.splits import split_root
from pipeline.streams import print_result, protect_output
from train import distributed
from train.config import Config
from train.distributed import World, from_main
from train.evaluation import encoded, linear_probe, pictures
from train.evaluation.config import EvaluateConfig, read_flags
from train.evaluation.embed import nearest, ranked
from train.evaluation.encoded import Encoded, accuracy
from train.evaluation.fast_probe import fast_probe, few_labels
from train.evaluation.linear_probe import LinearProbe
from train.network.resnet import ResNet
from train.run import folder as run_folder
from train.run.checkpoint import Checkpoint
from train.run.data import EvalSet, check_apart, open_data
from train.run.folder import Log, RunFolder
from train.run.program import exit_on_error
from train.run.report import print_evaluation, thumbnails

QUERIES, NEIGHBOURS, SIDE = 10, 8, 96  # test images shown, neighbours of each, pixels
CONFUSION, CONFUSION_LINEAR = "confusion.png", "confusion_linear.png"
DESCRIPTION = "Evaluate the newest checkpoint of a run: kNN, probes, RankMe, pictures."
STOPPED = (
    "stopped. evaluation.json has the finished parts; the same command starts again, and resumes "
    "after the linear probe's last epoch"
)


@dataclass(frozen=True)
class Job:
    """One evaluation: what its parts share. `config` is the run's with this evaluation's images."""

    saved: Checkpoint
    config: Config
    options: EvaluateConfig
    names: list[str]
    """Of the classes; empty without labels."""
    train: EvalSet
    test: EvalSet
    world: World
    out: Path
    log: Log

    @property
    def guesses(self) -> dict:
        """How many classes there are and how many guesses to make: five, if there are as many."""
        return {"num_classes": len(self.names), "top": min(encoded.TOP, len(self.names))}


def knn(job: Job, train: Encoded, test: Encoded) -> tuple[dict, Tensor]:
    """Accuracies by k, and the guesses with the largest k."""
    ks, temperature = job.options.k, job.config.eval.temperature
    bank, queries = F.normalize(train.features, dim=1), F.normalize(test.features, dim=1)
    similarity, rows = nearest(queries, bank, max(ks))
    labels = train.labels[rows]
    guesses = {
        k: ranked(similarity[:, :k], labels[:, :k], temperature=temperature, **job.guesses)
        for k in ks
    }
    return {str(k): accuracy(g, test.labels) for k, g in guesses.items()}, guesses[max(ks)]


def run_fast_probe(job: Job, train: Encoded, test: Encoded) -> tuple[dict, Tensor]:
    """The fast probe's result and guesses."""
    config, seed = job.options.fast, job.config.seed
    result, guesses = fast_probe(train, test, config=config, seed=seed, **job.guesses)
    if len(config.lrs) > 1 and result["lr"] in (config.lrs[0], config.lrs[-1]):
        job.log.warn(
            f"fast probe: the best learning rate, {result['lr']}, is at an end of the sweep: "
            "widen --fast.lrs"
        )
    return accuracy(guesses, test.labels) | result, guesses


def run_few_labels(job: Job, train: Encoded, test: Encoded) -> list[dict]:
    """The fast probe's accuracies with few labels."""
    config = job.options.fast
    found = few_labels(train, test, config=config, seed=job.config.seed, **job.guesses)
    fewest = int(train.labels.bincount()[train.labels].min())  # of a class that has images
    for row in found:
        if row["fraction"] * fewest < 1:
            job.log(
                f"few labels: {100 * row['fraction']:g} % is less than one image of a class with "
                f"{fewest}: one is taken of it, {row['labels']} labels in all"
            )
    return found


def open_probe(job: Job, backbone: ResNet) -> LinearProbe:
    """The linear probe of this encoder, resumed from its checkpoint if there is one.

    Raises: ValueError if the checkpoint is of other settings.
    """
    config, probe, source = job.config, job.options.linear, job.train.reader.source
    facts = dataclasses.asdict(probe) | {"lrs": list(probe.lrs), "size": config.eval.size}
    facts |= {"flip": config.augment.flip, "precision": config.precision, "seed": config.seed}
    facts |= {"num_images": len(job.train.ids), "images": source.fingerprint}
    facts["encoder"] = encoded.fingerprint(backbone)
    folder = job.out / "checkpoints" / f"encoder-{job.saved.step:08d}"
    torch.manual_seed(config.seed)
    sizes = {"features": backbone.num_features, "classes": len(job.names)}
    opened = LinearProbe(probe, **sizes, facts=facts, folder=folder, world=job.world, log=job.log)
    opened.restore()
    return opened


def run_linear_probe(
    job: Job, probe: LinearProbe, backbone: ResNet, test: Encoded
) -> tuple[dict, Tensor]:
    """The linear probe's accuracies by learning rate, and the guesses with the last one."""
    linear_probe.train_probe(probe, backbone, job.train, test, job.config)
    guesses = probe.guesses(test.features, top=job.guesses["top"])
    by_lr = {
        str(lr): accuracy(guess, test.labels)
        for lr, guess in zip(probe.config.lrs, guesses, strict=True)
    }
    settings = {name: probe.facts[name] for name in ("epochs", "batch_size", "size", "flip")}
    return settings | {"by_lr": by_lr}, guesses[-1]


def show_neighbours(job: Job, train: Encoded, test: Encoded) -> None:
    """Write neighbours.png: test images, evenly over the classes, and their nearest neighbours."""
    count = min(QUERIES, len(test.ids))
    chosen = (torch.arange(count, device=test.ids.device) * 2 + 1) * len(test.ids) // (2 * count)
    bank, queries = F.normalize(train.features, dim=1), F.normalize(test.features[chosen], dim=1)
    _, rows = nearest(queries, bank, NEIGHBOURS)
    options: dict = {"config": job.config, "device": job.world.device, "side": SIDE}
    images = thumbnails(job.test.reader, test.ids[chosen], **options)
    neighbours = thumbnails(job.train.reader, train.ids[rows.flatten()], **options)
    names = [*job.names, ""]  # label -1 has no name
    pictures.draw_neighbours(
        images.cpu().numpy(),
        neighbours.view(*rows.shape, *neighbours.shape[1:]).cpu().numpy(),
        [names[label] for label in test.labels[chosen].tolist()],
        [[names[label] for label in row] for row in train.labels[rows].tolist()],
        job.out / "neighbours.png",
    )


def evaluate(job: Job, folder: RunFolder | None) -> dict:
    """Every part asked for, the cheap ones first; evaluation.json and pictures on rank 0.

    They replace those of the previous evaluation; evaluations.jsonl keeps all results.
    """
    start, options, names = time.monotonic(), job.options, job.names
    backbone, projector = encoded.load_encoder(job.saved, job.config, device=job.world.device)
    linear = open_probe(job, backbone) if options.runs("linear") else None
    train = encoded.encode(backbone, job.train, job.config, job.world, job.log)
    test = encoded.encode(backbone, job.test, job.config, job.world, job.log)
    encoded.check_k(options.k, len(train.ids))  # again, now without unreadable images
    result: dict = {"out": str(job.out), "step": job.saved.step}
    result |= {"data": job.train.reader.source.root, "train_images": len(train.ids)}
    result |= {"test_images": len(test.ids), "classes": len(names)}
    result |= {"knn": {}, "fast_probe": None, "few_labels": [], "linear_probe": None}
    result |= encoded.measure_spread(projector, train.features)

    def write(title: str, guesses: Tensor | None, picture: str = CONFUSION) -> None:
        result["seconds"] = time.monotonic() - start
        if folder is not None:
            if guesses is not None:
                counts = encoded.confusion(guesses, test.labels, len(names)).cpu().numpy()
                pictures.draw_confusion(counts, names, job.out / picture, title=title)
            folder.write("evaluation.json", result)

    title, guesses = "", None
    if options.k:
        title, (result["knn"], guesses) = f"kNN, k = {max(options.k)}", knn(job, train, test)
    if options.runs("fast"):
        title, (result["fast_probe"], guesses) = "fast probe", run_fast_probe(job, train, test)
        result["few_labels"] = run_few_labels(job, train, test)
    if folder is not None:
        for picture in CONFUSION, CONFUSION_LINEAR:  # of the previous evaluation
            (job.out / picture).unlink(missing_ok=True)
        show_neighbours(job, train, test)
    write(title, guesses)
    if linear is not None:  # hours for ImageNet: show the results so far
        if folder is not None and linear.epochs_done < linear.config.epochs:
            print_evaluation(result, job.config.method.spec)
        result["linear_probe"], guesses = run_linear_probe(job, linear, backbone, test)
        title = f"linear probe, learning rate {linear.config.lrs[-1]}"
        write(title, guesses, CONFUSION_LINEAR)
    return from_main(job.world, result)  # the other ranks wait until all is written


def start_job(
    saved: Checkpoint,
    run: Path,
    config: Config,
    options: EvaluateConfig,
    *,
    world: World,
    out: Path,
) -> Job:
    """List the images and check what can be known before the first forward pass."""
    log = Log(out / "log.txt" if world.is_main else None)
    if run_folder.is_slow_precision(config.precision, world.device):
        log.warn(run_folder.SLOW_PRECISION)
    data = open_data(config.data, out=run, seed=config.seed, world=world)
    train, test = encoded.open_sets(data, options, seed=config.seed)
    if options.runs("linear"):
        linear = linear_probe.fit_batch(options.linear, len(train.ids), log)
        linear_probe.images_a_pass(linear, per_rank=config.eval.batch_size, world=world)
        options = dataclasses.replace(options, linear=linear)
    log(f"{run}, step {saved.step}: {len(data.class_names)} classes, {world.size} x {world.device}")
    for line in data.notes:
        log(line)
    return Job(saved, config, options, data.class_names, train, test, world, out, log)


@record
def main() -> None:
    """Read the flags, evaluate, print the result as the last line of stdout."""
    run, options = read_flags("train/evaluate.py", DESCRIPTION, EvaluateConfig)
    out, folder = Path(options.out or run / "evaluation"), None
    sizes = "lower --eval.batch_size, --eval.size or --fast.batch_size"
    distributed.stop_at_once()
    with exit_on_error(out, memory_remedy=sizes, stopped=STOPPED), ExitStack() as opened:
        with encoded.open_run(run, options) as (saved, config, world):
            if world.is_main:
                check_apart(out, *split_root(config.data.root), config.data.val)
                if any((out / "checkpoints").glob("step-*")):  # keep its config.yaml
                    raise ValueError(f"--out {out} is the folder of a training: give another")
                folder = opened.enter_context(closing(RunFolder(str(out))))
                environment = run_folder.environment(world.size, world.device)
                folder.describe(dataclasses.asdict(options), environment)
            job = start_job(saved, run, config, options, world=world, out=out)
            result = evaluate(job, folder)
        if folder is not None:
            line = json.dumps({**result, "evaluation": dataclasses.asdict(options)})
            with (out / "evaluations.jsonl").open("a") as file:
                file.write(f"{line}\n")
            print_evaluation(result, config.method.spec)
            print_result(result, kept=out / "evaluation.json")


if __name__ == "__main__":
    protect_output()
    main()
