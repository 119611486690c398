"""The runs of a study: each a process of train/main.py, as many at once as there are places.

A place is a share of this machine's cores, with a GPU where the runs use one. A run whose folder
holds a finished result is not started again; one that was stopped goes on from its checkpoint.
A newcomer's mistake: two studies in one folder at the same time. The second one's runs that the
first has open fail with that reason.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from train.config import Config
from train.config.parser import parse_config
from train.distributed import StopSignal, World
from train.run.folder import Log
from train.studies.variants import Row, left_out

MAIN = Path(__file__).parent.parent / "main.py"
POLL_S = 0.1
ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)
AS_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@dataclass(frozen=True)
class Run:
    """A variant with one seed."""

    variant: str
    seed: int
    folder: Path
    command: tuple[str, ...]

    @property
    def output(self) -> Path:
        """What the process of its last start wrote."""
        return self.folder.with_suffix(".out")

    def result(self) -> dict | None:
        """What it found, if it is finished."""
        found = self.read("result.json")
        return found if found.get("state") == "finished" else None

    def read(self, name: str) -> dict:
        """A file of the run; nothing where it is missing or damaged: a new start writes it."""
        try:
            found = json.loads((self.folder / name).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Place:
    """Where a run may work."""

    cores: frozenset[int]
    gpu: str | None
    """As CUDA_VISIBLE_DEVICES names it; None: the run has none."""


def plan_runs(
    rows: Iterable[Row], base: Config, *, out: Path, root: str, images: int, seeds: Sequence[int]
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """The runs of each variant, by seed, and why others are left out.

    root: the folder of the images. Variants of the same settings share their runs. A folder's name
    holds a hash of the settings, so that no run of other flags is taken for one of these.
    Raises: ValueError for a variant whose flags are impossible with the baseline's.
    """
    preset = out / f"baseline-{settings_key(base)}.yaml"
    preset.write_text(yaml.safe_dump(dataclasses.asdict(base), sort_keys=False))
    runs, reasons, folders = {}, {}, {}
    for row in rows:
        try:
            config = parse_config([f"--config={preset}", *row.flags])
        except ValueError as error:
            raise ValueError(f"variant {row.name} ({' '.join(row.flags)}): {error}") from error
        if (reason := left_out(config, images)) is not None:
            reasons[row.name] = reason
            continue
        key = settings_key(config)
        folder = folders.setdefault(key, out / f"{row.name}-{key}")
        command = sys.executable, str(MAIN), f"--config={preset}", *row.flags, f"--data.root={root}"
        runs[row.name] = [
            Run(row.name, seed, place, (*command, f"--seed={seed}", f"--out={place}"))
            for seed in seeds
            for place in [folder / f"seed-{seed}"]
        ]
    return runs, reasons


def settings_key(config: Config) -> str:
    """Eight hex digits that stand for all settings but folder and seed."""
    settings = {**dataclasses.asdict(config), "out": None, "seed": None}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def plan_places(jobs: int, *, with_gpus: bool) -> list[Place]:
    """Places for so many runs at once; 0: one for each GPU, or each core where there is none."""
    cores = sorted(os.sched_getaffinity(0))
    gpus: list[str | None] = [None]
    if with_gpus:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [*named.split(",")] if named else [str(i) for i in range(torch.cuda.device_count())]
    jobs = jobs or (len(gpus) if with_gpus else len(cores))
    share = max(1, len(cores) // jobs)
    shares = [cores[at : at + share] for at in range(0, share * (len(cores) // share), share)]
    return [Place(frozenset(shares[i % len(shares)]), gpus[i % len(gpus)]) for i in range(jobs)]


def run_all(runs: Sequence[Run], places: Sequence[Place], log: Log) -> tuple[dict[Run, str], bool]:
    """Do the runs; why those failed that did, and whether a signal stopped the rest.

    SIGTERM and Ctrl-C are handed on to the runs, which save.
    """
    progress = Progress(len(runs), at_once=len(places), log=log)
    stop = StopSignal(ALONE)
    waiting, free = deque(runs), list(places)
    busy: dict[subprocess.Popen, tuple[Run, Place, float]] = {}
    failed: dict[Run, str] = {}
    stopping = False
    try:
        while waiting or busy:
            if stop.agreed() and not stopping:
                stopping = True
                waiting.clear()
                log(f"stopping: {len(busy)} runs save their state")
                for process in busy:
                    process.terminate()
            while waiting and free:
                run, place = waiting.popleft(), free.pop()
                busy[start(run, place)] = run, place, time.monotonic()
            time.sleep(POLL_S)
            for process in [one for one in busy if one.poll() is not None]:
                run, place, since = busy.pop(process)
                free.append(place)
                reason = failure(run, process.returncode)
                if reason is not None and stopping:
                    continue
                if reason is not None:
                    failed[run] = reason
                progress(run, time.monotonic() - since, reason)
    finally:
        log.stop_bar()
        for process in busy:
            process.kill()
        stop.close()
    return failed, stopping


def start(run: Run, place: Place) -> subprocess.Popen:
    """The run's process, in its place.

    It counts as started by a launcher, so that it ends when this process is killed, and is in a
    session of its own: a Ctrl-C in the terminal reaches it once, through us.
    """
    environment = {**os.environ, **AS_TORCHRUN}
    if place.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = place.gpu
    run.output.parent.mkdir(parents=True, exist_ok=True)
    everywhere = os.sched_getaffinity(0)
    with run.output.open("w") as output:
        os.sched_setaffinity(0, place.cores)  # a child has its parent's; torch and DALI follow it
        try:
            return subprocess.Popen(
                run.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip
        finally:
            os.sched_setaffinity(0, everywhere)


class Progress:
    """Counts the runs that ended and says what came of each."""

    def __init__(self, total: int, *, at_once: int, log: Log):
        self.total, self.at_once, self.log = total, at_once, log
        self.seconds: list[float] = []
        log.start_bar(total, 0)

    def __call__(self, run: Run, seconds: float, reason: str | None) -> None:
        """A run ended after so many seconds; reason: why it failed, if it did."""
        self.seconds.append(seconds)
        done = len(self.seconds)
        left_min = sum(self.seconds) / done * (self.total - done) / self.at_once / 60
        line = f"{done}/{self.total}  {run.variant}, seed {run.seed}"
        result = run.result()
        if result is None:
            self.log.warn(f"{line} failed: {reason}")
        else:
            knn = result["knn_top1"]
            self.log(
                f"{line}: {'no kNN' if knn is None else f'kNN {knn:.1f} %'}, "
                f"loss {result['loss']:.3f}, std {result['z_std']:.2f}, {seconds:.0f} s; "
                f"about {left_min:.0f} min left"
            )
        self.log.advance(done)


def failure(run: Run, code: int) -> str | None:
    """One line that says why a run that ended has no result, and where to read on."""
    if code == 0 and run.result() is not None:
        return None
    lines = run.output.read_text(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        reason = errors[-1]
    elif code < 0:
        reason = f"ended by {signal.Signals(-code).name}"
    elif code == 0:
        reason = "stopped by a signal; the same command goes on"
    else:
        reason = f"exit code {code}: {lines[-1] if lines else 'no word'}"
    return f"{reason} ({run.output})"
