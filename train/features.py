"""Features of any images: `python train/features.py RUN --data.root DIR --out FEATURES`.

Takes the encoder of a run's newest checkpoint and computes the backbone's features of the centre
crop of each image of a folder or of shards, labelled or not. Writes features.npy and names.txt, a
map of the images, their nearest neighbours and the duplicates among them. The same command
continues where it was stopped; under torchrun all ranks share the work and rank 0 writes.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import dataclasses
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from pipeline.sources.shards import ImageSource, open_source
from pipeline.streams import print_result, protect_output
from train import distributed
from train.config import Config
from train.distributed import StopSignal, World, from_main
from train.evaluation import encoded, similar
from train.evaluation.config import FeaturesConfig, read_flags
from train.evaluation.embed import PROGRESS_S, EvaluationStopped
from train.evaluation.feature_files import Countdown, FeatureFiles
from train.evaluation.feature_report import Described
from train.evaluation.feature_rounds import rounds
from train.network.resnet import ResNet
from train.run import folder as run_folder
from train.run.checkpoint import Checkpoint
from train.run.data import check_apart, list_on_main
from train.run.folder import Log, RunFolder
from train.run.program import exit_on_error
from train.run.report import print_on_stderr

DESCRIPTION = "Features of the images of a folder or of shards, a map, neighbours and duplicates."
STOPPED = "stopped; what is done is saved, and the same command continues"


@dataclass(frozen=True)
class Job:
    """What the parts share. `files` is None on every rank but 0."""

    config: Config
    options: FeaturesConfig
    source: ImageSource
    world: World
    files: FeatureFiles | None
    log: Log
    stop: StopSignal

    def save_if_stopped(self) -> None:
        """Raise EvaluationStopped on all ranks after a signal to any of them, with all saved."""
        if self.stop.agreed():
            if self.files is not None:
                self.files.save()
            raise EvaluationStopped

    def countdown(self, what: str, *, total: int, done: int) -> Countdown:
        """Progress of one part."""
        return Countdown(self.log, what, total=total, done=done, every_s=PROGRESS_S)


def compute_features(job: Job, backbone: ResNet) -> None:
    """Append the features of all images that the folder lacks.

    Raises: EvaluationStopped after a signal; ValueError if no image can be read.
    """
    world, files, source = job.world, job.files, job.source
    done = dict(from_main(world, None if files is None else files.done))
    if files is not None:
        files.open_features()
    countdown = job.countdown("features", total=len(source), done=done["images"])
    for part in rounds(source, backbone, job.config, world, first=done["images"]):
        done["images"] += len(part.ids) + len(part.bad)
        done["rows"] += len(part.ids)
        done["bad"] += len(part.bad)
        if files is not None:
            entries = [{"name": source.name(i), "reason": why} for i, why in part.bad.items()]
            files.folder.add_bad_files(entries)
            arrays = (rows.cpu().numpy() for rows in (part.features, part.hashes, part.ids))
            files.append(*arrays, **{name: done[name] for name in ("images", "rows", "bad")})
        countdown.show(done["images"])
        job.save_if_stopped()
    if not done["rows"]:
        raise ValueError(f"no image under {source.root} can be read: give another folder")
    if files is not None:
        files.finish()
    job.log.stop_bar()


def find_neighbours(job: Job, *, rows: int, width: int, k: int) -> None:
    """Append the neighbours of all rows that the folder lacks. Raises: EvaluationStopped."""
    files, world = job.files, job.world
    is_missing = files is not None and files.open_neighbours(k)
    start = files.done["neighbours"] if files is not None and is_missing else rows
    start = from_main(world, start)
    features = None if files is None else files.load("features")
    countdown = job.countdown("neighbours", total=rows, done=start)
    shape = rows, width
    for cosines, found in similar.nearest_others(
        features, shape=shape, k=k, start=start, world=world
    ):
        start += len(found)
        if files is not None:
            files.append(found.cpu().numpy(), cosines.cpu().numpy(), neighbours=start)
        countdown.show(start)
        job.save_if_stopped()
    if files is not None:
        files.finish()
    job.log.stop_bar()


def describe(job: Job, files: FeatureFiles, k: int) -> dict:
    """Everything that follows from the rows on disk; the part of the result about it."""
    options, device = job.options, job.world.device
    described = Described(files, job.source, job.config, job.log)
    described.write_names()
    copies, near = described.write_duplicates(above=options.duplicate_cosine, k=k)
    if k:
        described.draw_neighbours(device)
    if options.map != "none":
        described.draw_map(device, options.map)
    if options.format == "parquet":
        described.write_parquet()
    return {"k": k, "exact_duplicates": copies, "near_duplicates": near}


def compute(
    saved: Checkpoint,
    config: Config,
    options: FeaturesConfig,
    *,
    world: World,
    folder: RunFolder | None,
) -> dict:
    """All parts; the result, on every rank. Raises: EvaluationStopped after a signal."""
    began, files = time.monotonic(), None
    log = Log(None if folder is None else folder.path / "log.txt")
    if run_folder.is_slow_precision(config.precision, world.device):
        log.warn(run_folder.SLOW_PRECISION)
    source, _ = list_on_main(lambda: (open_source(config.data.root), None), world)
    backbone, _ = encoded.load_encoder(saved, config, device=world.device)
    if folder is not None:
        facts = {"step": saved.step, "encoder": encoded.fingerprint(backbone)[:12]}
        facts |= {"images": source.fingerprint[:12], "precision": config.precision}
        facts |= {"eval.resize": config.eval.resize, "eval.size": config.eval.size}
        files = FeatureFiles(folder, facts, width=backbone.num_features)
        environment = run_folder.environment(world.size, world.device)
        folder.describe(dataclasses.asdict(options), environment)
        folder.status("running", files.done["images"])
    log(f"{len(source)} images of {source.root}, step {saved.step}, {world.size} x {world.device}")
    job = Job(config, options, source, world, files, log, StopSignal(world))
    try:
        if from_main(world, files is None or not files.has_features):
            compute_features(job, backbone)
        done = from_main(world, None if files is None else files.done)
        if (k := min(options.k, done["rows"] - 1)) < options.k:
            log(f"k is {k}: {done['rows']} images have no {options.k} neighbours each")
        find_neighbours(job, rows=done["rows"], width=backbone.num_features, k=k)
    finally:
        log.stop_bar()
        job.stop.close()
        if files is not None:
            files.close()
    result = {"out": options.out, "data": source.root, "step": saved.step, "images": done["rows"]}
    result |= {"bad_images": done["bad"], "dimension": backbone.num_features}
    if files is not None:
        result |= describe(job, files, k) | {"seconds": time.monotonic() - began}
        files.folder.write("features.json", result)
        files.folder.status("finished", done["images"])
    return from_main(world, result)  # the other ranks wait until all is written


@record
def main() -> None:
    """Read the flags, compute, print the result as the last line of stdout."""
    run, options = read_flags("train/features.py", DESCRIPTION, FeaturesConfig)
    out, folder, result = Path(options.out), None, None
    sizes = "lower --eval.batch_size or --eval.size"
    with exit_on_error(out, memory_remedy=sizes, stopped=STOPPED), ExitStack() as opened:
        with encoded.open_run(run, options) as (saved, config, world):
            distributed.stop_at_once(world)
            if world.is_main:
                check_apart(out, config.data.root)
                if any((out / "checkpoints").glob("*")):  # keep its config.yaml
                    raise ValueError(
                        f"--out {out} is the folder of a training or an evaluation: give another"
                    )
                folder = opened.enter_context(RunFolder(str(out)))
                folder.checkpoints.rmdir()
            with suppress(EvaluationStopped):
                result = compute(saved, config, options, world=world, folder=folder)
        if result is None:
            raise KeyboardInterrupt  # the folder's status is "preempted", the exit code 130
        if folder is not None:
            size = f"{result['images']} x {result['dimension']}"
            print_on_stderr(f"features.npy ({size}), names.txt and the rest: {result['out']}")
            print_result(result, kept=out / "features.json")


if __name__ == "__main__":
    protect_output()
    main()
