"""Before any GPU hour: will these images train, and with which settings?

    python train/pilot.py --data.root DIR --minutes 20 --out PILOT

Looks at the images, derives the settings that follow from them, and tries learning rate, crops and
colour strength in short trainings by successive halving, judged without labels. Writes
PILOT/config.yaml, the command that trains with it, and report.html; exits with 1 where nothing
learns. --config and any flag of train/main.py hold for all trials. The same command resumes.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import dataclasses
import json
import multiprocessing
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from jsonargparse import ArgumentError

from pipeline.augment import AugmentConfig
from pipeline.loader import view_loader
from pipeline.order import PartOrder, Purpose, keyed_rng
from pipeline.sources.reader import ImageReader
from train.config import Config, at_least
from train.config.parser import build_parser, explain, flags, parse_config
from train.distributed import World, resolve_device, take_device
from train.distributed.startup import follow_launcher
from train.loop import train_step
from train.main import build_state
from train.pilots.judge import Judgement, judge
from train.pilots.look import Images, look, settings_for
from train.pilots.report import write_report
from train.pilots.space import Plan, Setting, plan, settings_around
from train.run import checkpoint, state
from train.run.data import open_data
from train.run.folder import Log
from train.run.optim import Schedule
from train.run.program import exit_on_error, print_result, refuse
from train.studies.runs import Place, plan_places

JUDGED = 1024  # images that trials are judged on
CURVE_POINTS = 40  # of loss and collapse meter, of a whole trial
CALIBRATION, WARM_UP = 10, 2  # steps
SHARE = 0.1  # of the time, for looking at the images
RESERVE_S = 10.0  # for the report
stop_event: Any = None  # in a worker: set when the pilot stops


@dataclass(frozen=True, kw_only=True)
class PilotConfig:
    """How long and how much; every other flag is train/main.py's and holds for all trials."""

    minutes: float = 20.0
    """Of everything: looking, trials and report."""
    settings: int = 16
    """Combinations to try; fewer where the minutes do not suffice."""
    jobs: int = 0
    """Trials at once; 0: one for each GPU, or each core without GPUs."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if not 0.1 <= self.minutes <= 10_000:
            raise ValueError(f"minutes must be in 0.1 .. 10000, got {self.minutes}")
        at_least("settings", self.settings, 4, most=256)
        at_least("jobs", self.jobs, 0)


@dataclass(frozen=True)
class Trial:
    """A short training with one setting, and where it is kept."""

    setting: Setting
    config: Config
    """At a trial's size, with its setting."""
    reference: AugmentConfig
    """The views that all trials are judged with."""
    ids: np.ndarray
    """The images that it trains on."""
    total: int
    """Steps of its schedule."""
    folder: Path

    @property
    def schedule(self) -> Schedule:
        """Batches of the images, in as many epochs as the steps need."""
        size = self.config.data.batch_size
        order = PartOrder(self.ids, batch_size=size, seed=self.config.seed)
        return Schedule(order, -(-self.total // order.steps_per_epoch))

    def read(self) -> dict:
        """Its curve of (step, loss, collapse meter) and its judgements, in the order of steps."""
        path = self.folder / "trial.json"
        return json.loads(path.read_text()) if path.exists() else {"curve": [], "judged": []}

    def write(self, known: dict) -> None:
        """Replace what is known of it."""
        path = self.folder / "trial.json"
        path.with_suffix(".tmp").write_text(json.dumps(known))
        path.with_suffix(".tmp").replace(path)


def start_worker(places: Any, event: Any) -> None:
    """Give a worker process its cores and GPU, and have it end with its parent."""
    global stop_event
    place: Place = places.get()
    os.sched_setaffinity(0, place.cores)  # torch and DALI follow it
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sets the event
    follow_launcher()
    stop_event = event


@lru_cache(maxsize=1)
def opened(config: DataConfig, seed: int, precision: Precision, device: str, out: Path):
    """This worker's world of one, and the images, listed once."""
    world = World(0, 1, 0, 1, take_device(device, 0, 1, precision), None)
    return world, open_data(config, out=out, seed=seed, world=world)


def advance(trial: Trial, to_step: int, until: float) -> dict:
    """Train to a step and judge, in a worker; returns seconds a step, and those of the rest.

    Ends early at the time `until` or when the pilot stops, without a judgement. What was trained is
    saved in any case.
    """
    began, config, known = time.monotonic(), trial.config, trial.read()
    out = trial.folder.parent / "data"
    world, data = opened(config.data, config.seed, config.precision, config.device, out)
    trial.folder.mkdir(parents=True, exist_ok=True)
    current = build_state(config, world, len(trial.ids))
    saved = checkpoint.load_newest(trial.folder / "checkpoints", log=print)
    if saved is not None:
        state.restore(current, saved)
    first, step_s = current.step, 0.0
    try:
        step_s = train_steps(trial, current, data.train, known["curve"], to_step, until)
        if current.step == to_step:
            ids = evenly(len(data.train.source), JUDGED)
            found = judge(current.model, data, ids, trial.reference, config, world)
            known["judged"].append({"step": to_step, **found})
    except FloatingPointError as error:
        known["judged"].append({"step": to_step, "diverged": str(error), **NOTHING})
    facts = state.run_facts(config, data.train.source.fingerprint, world)
    state.save(current, trial.folder / "checkpoints", facts)
    trial.write(known)
    seconds = time.monotonic() - began
    return {"step_s": step_s, "fixed_s": seconds - step_s * (current.step - first)}


def train_steps(
    trial: Trial,
    current: TrainState,
    reader: ImageReader,
    curve: list,
    to_step: int,
    until: float,
) -> float:
    """Train to a step, with points of loss and collapse meter; returns seconds a step."""
    config, schedule, steps = trial.config, trial.schedule, range(current.step, to_step)
    every = max(1, trial.total // CURVE_POINTS)
    options: dict = {"views": config.views, "options": config.dali}
    device, marks = current.guard.device, []
    for batch in view_loader(reader, schedule.order, steps, device=device, **options):
        loss, scalars, _, _ = train_step(current, config, schedule, batch)
        if current.step % every == 0 or current.step == to_step:
            current.guard.check(current.step)  # waits for the device
            curve.append([current.step, loss.item(), scalars["z_std"].item()])
        marks.append(time.monotonic())
        if stop_event.is_set() or time.time() > until:
            break
    timed = marks[WARM_UP:] or marks
    return (timed[-1] - timed[0]) / max(1, len(timed) - 1) if timed else 0.0


class Workers:
    """Processes that advance trials, one in each place."""

    def __init__(self, places: Sequence[Place]):
        context = multiprocessing.get_context("spawn")  # CUDA cannot be used after a fork
        self.event, queue = context.Event(), context.Queue()
        for place in places:
            queue.put(place)
        self.pool = ProcessPoolExecutor(
            len(places), mp_context=context, initializer=start_worker, initargs=(queue, self.event)
        )

    def advance(self, trials: Sequence[Trial], to_step: int, until: float) -> Iterator[tuple]:
        """Advance trials; yields (trial, what `advance` returned) as each is done."""
        jobs = {self.pool.submit(advance, trial, to_step, until): trial for trial in trials}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:  # Ctrl-C, or a worker failed: the others save
            self.event.set()
            self.pool.shutdown(cancel_futures=True)
            raise


def run_pilot(own: PilotConfig, base: Config, words: Sequence[str], out: Path, log: Log) -> dict:
    """Look, try, judge and write; returns the result.

    Raises: ValueError for images that cannot be used; KeyboardInterrupt after what is known was
    written.
    """
    began, device = time.time(), resolve_device(base.device)
    until = began + 60 * own.minutes - RESERVE_S
    alone = World(0, 1, 0, 1, torch.device("cpu"), None)
    data = open_data(base.data, out=out / "run", seed=base.seed, world=alone)
    seen = look(data.train, base.dali, alone.device, budget_s=SHARE * 60 * own.minutes)
    log(summary(seen))
    suggested = out / "images.yaml"
    suggested.write_text(yaml.safe_dump(settings_for(seen, on_gpu=device == "cuda")))
    config = parse_config([f"--config={suggested}", *words])
    tried = trial_config(config, on_gpu=device == "cuda")
    places = plan_places(own.jobs, with_gpus=device == "cuda")
    workers = Workers(places)
    make = partial(make_trial, base=tried, count=len(data.train.source), out=out / "trials")
    try:
        trials = try_settings(own, make, workers, places, until=until, log=log)
    except KeyboardInterrupt:
        log("stopped; the same command continues. What is known:")
        conclude(config, tried, seen, out, log, is_over=False)
        raise
    return conclude(config, tried, seen, out, log, is_over=True) | {"trials": len(trials)}
