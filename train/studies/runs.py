"""The runs of a study: each a process of train/main.py, one at a time in each place.

A place is a share of this machine's cores, with a GPU if the runs use one. A run whose folder holds
a finished result is not started again; a stopped one resumes from its checkpoint.
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
        """Stdout and stderr of its last start."""
        return self.folder.with_suffix(".out")

    def result(self) -> dict | None:
        """Its result, if it is finished."""
        result = self.read("result.json")
        return result if result.get("state") == "finished" else None

    def read(self, name: str) -> dict:
        """A JSON file of the run; {} if it is missing or damaged: the next start writes it."""
        try:
            content = json.loads((self.folder / name).read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Place:
    """Cores of one run, and its GPU, if any, as CUDA_VISIBLE_DEVICES names it."""

    cores: frozenset[int]
    gpu: str | None


def plan_runs(
    rows: Iterable[Row], base: Config, *, out: Path, root: str, images: int, seeds: Sequence[int]
) -> tuple[dict[str, list[Run]], dict[str, str]]:
    """The runs of each variant, by seed, and why others are left out.

    root: the folder of the images. Variants of the same settings share their runs. A folder's name
    holds a hash of the settings, so that runs of other flags are not mistaken for these.
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
    """Eight hex digits of a hash of all settings but folder and seed."""
    settings = {**dataclasses.asdict(config), "out": None, "seed": None}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def plan_places(jobs: int, *, with_gpus: bool) -> list[Place]:
    """Places for `jobs` runs at once; 0: one for each GPU, or each core without GPUs."""
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
    """Execute the runs; the reasons of those that failed, and whether a signal stopped the rest.

    SIGTERM and Ctrl-C are passed to the runs, which save.
    """
    log.start_bar(len(runs), 0)
    stop, stopping = StopSignal(ALONE), False
    waiting, free = deque(runs), list(places)
    busy: dict[subprocess.Popen, tuple[Run, Place, float]] = {}
    failed: dict[Run, str] = {}
    seconds: list[float] = []
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
            for process in [process for process in busy if process.poll() is not None]:
                run, place, since = busy.pop(process)
                free.append(place)
                reason = failure(run, process.returncode)
                if reason is not None and stopping:
                    continue
                seconds.append(time.monotonic() - since)
                line = f"{len(seconds)}/{len(runs)}  {run.variant}, seed {run.seed}"
                if reason is not None:
                    failed[run] = reason
                    log.warn(f"{line} failed: {reason}")
                else:
                    left = sum(seconds) / len(seconds) * (len(runs) - len(seconds)) / len(places)
                    took = f"{seconds[-1]:.0f} s; about {left / 60:.0f} min left"
                    log(f"{line}: {figures(run)}, {took}")
                log.advance(len(seconds))
    finally:
        log.stop_bar()
        for process in busy:
            process.kill()
        stop.close()
    return failed, stopping


def start(run: Run, place: Place) -> subprocess.Popen:
    """The run's process, in its place.

    It counts as started by a launcher, so that it ends when this process is killed, and starts a
    new session: a Ctrl-C in the terminal reaches it once, through us.
    """
    environment = os.environ | AS_TORCHRUN
    if place.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = place.gpu
    run.output.parent.mkdir(parents=True, exist_ok=True)
    all_cores = os.sched_getaffinity(0)
    with run.output.open("w") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        os.sched_setaffinity(0, place.cores)  # inherited by the child; torch and DALI follow it
        try:
            return subprocess.Popen(run.command, **streams, env=environment, start_new_session=True)
        finally:
            os.sched_setaffinity(0, all_cores)


def figures(run: Run) -> str:
    """The figures of a finished run in one line."""
    result = run.result()
    assert result is not None
    knn = "no kNN" if result["knn_top1"] is None else f"kNN {result['knn_top1']:.1f} %"
    return f"{knn}, loss {result['loss']:.3f}, std {result['z_std']:.2f}"


def failure(run: Run, code: int) -> str | None:
    """Why a run that ended has no result, and the file with its output; None if it has one."""
    if code == 0 and run.result() is not None:
        return None
    lines = run.output.read_text(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        reason = errors[-1]
    elif code < 0:
        reason = f"ended by {signal.Signals(-code).name}"
    elif code == 0:
        reason = "stopped by a signal; the same command resumes"
    else:
        reason = f"exit code {code}: {lines[-1] if lines else 'no output'}"
    return f"{reason} ({run.output})"
