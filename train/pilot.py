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

import hashlib
import json
import shlex
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml

from pipeline.loader import view_loader
from pipeline.machine import usable_cores
from pipeline.order import SampleOrder
from pipeline.sources.reader import ImageReader
from pipeline.sources.splits import split_root
from pipeline.streams import print_result, protect_output
from train.config import Config, DataConfig
from train.distributed import World, resolve_device, stop_at_once, take_device
from train.distributed.world import stop_signals
from train.loop import train_step
from train.main import build_state
from train.network.model import Precision
from train.pilots import report, workers
from train.pilots.flags import PilotConfig, parse, read_flags
from train.pilots.judge import judge, sampled
from train.pilots.look import Images, evenly, look, settings_for
from train.pilots.space import Plan, Setting, plan, settings_around, trial_config
from train.pilots.trial import FEW_IMAGES, Standing, Trial, ranking, verdict, write_whole
from train.pilots.workers import Workers
from train.run import checkpoint, state
from train.run.data import RunData, check_apart, open_data
from train.run.folder import CONFIG, Log, RunFolder, environment
from train.run.program import exit_on_error, refuse
from train.run.state import TrainState, comparable
from train.studies.runs import plan_places

JUDGED = 1024  # images that trials are judged on
CURVE_POINTS = 40  # of loss and collapse meter, of a whole trial
CALIBRATION, WARM_UP = 8, 2  # steps; the first ones are not timed
LOOK_SHARE, RESERVE_S = 0.1, 5.0  # of the time for looking; seconds for the report
VIEWS_SHOWN = 8
UNTRAINED = "untrained"  # the folder of the encoder at step 0
DIVERGED = {"score": 0.0, "collapsed": True}


@lru_cache(maxsize=1)
def opened(
    config: DataConfig, seed: int, precision: Precision, device: str, out: Path
) -> tuple[World, RunData]:
    """This worker as a world of one, and the images, listed once."""
    world = World(0, 1, 0, 1, take_device(device, 0, 1, precision), None)
    return world, sampled(open_data(config, out=out, seed=seed, world=world))


def advance(trial: Trial, part: tuple[int, int], until: float) -> tuple[float, float]:
    """Train a part and judge, in a worker; returns seconds a step, and those of the rest.

    part: the steps at which it begins and ends.

    Ends without a judgement at the time `until`, or when the pilot stops; what was trained is
    saved in any case.
    """
    began, config, known = time.monotonic(), trial.config, trial.read()
    world, data = opened(
        config.data, config.seed, config.precision, config.device, trial.folder.parent / "run"
    )
    current = build_state(config, world, len(data.train.source))
    saved = checkpoint.load_newest(trial.folder / "checkpoints", log=trial.warn)
    if saved is not None:
        state.restore(current, saved)
    first, step_s = current.step, 0.0
    try:
        step_s = train_steps(trial, current, data.train, known["curve"], part, until)
        if current.step == part[1]:
            ids = evenly(len(data.train.source), JUDGED)
            found = judge(current.model, data, ids, trial.reference, config, world)
            known["judged"].append({"step": part[1], **found})
    except FloatingPointError as error:
        known["judged"].append({"step": part[1], "diverged": str(error), **DIVERGED})
    facts = state.run_facts(config, data.train.source.fingerprint, world)
    state.save(current, trial.folder / "checkpoints", facts)
    trial.write(known)
    return step_s, time.monotonic() - began - step_s * (current.step - first)


def train_steps(
    trial: Trial,
    current: TrainState,
    reader: ImageReader,
    curve: list,
    part: tuple[int, int],
    until: float,
) -> float:
    """Train to the part's end and add points of loss and collapse meter; returns seconds a step."""
    config, schedule, marks = trial.config, trial.schedule(*part), []
    options: dict = {"options": config.dali, "device": current.guard.device}
    steps, every = range(current.step, part[1]), max(1, trial.total // CURVE_POINTS)
    for batch in view_loader(reader, schedule.order, steps, views=config.views, **options):
        loss, scalars, _, _ = train_step(current, config, schedule, batch)
        if current.step % every == 0 or current.step == part[1]:
            current.guard.check(current.step)  # waits for the device
            curve.append([current.step, loss.item(), scalars["z_std"].item()])
        marks.append(time.monotonic())
        if workers.is_stopping() or time.monotonic() > until:
            break
    timed = marks[WARM_UP:]
    return (timed[-1] - timed[0]) / (len(timed) - 1) if len(timed) > 1 else 0.0


@dataclass(frozen=True)
class Pilot:
    """The trials of one pilot, a folder each."""

    base: Config
    """What the chosen setting will be trained with."""
    images: int
    fingerprint: str
    """Of the set of images."""
    folder: Path

    def trial(self, setting: Setting, total: int, name: str = "") -> Trial:
        """A trial with a schedule of `total` steps; its folder's name is a hash of all settings."""
        tried = trial_config(self.base)
        config = setting.apply(tried)
        key = self.key(comparable(config), total)[:8]
        folder = self.folder / f"{name or setting.key}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        ids = evenly(self.images, total * config.data.batch_size)
        return Trial(setting, config, tried.augment, ids, total, folder)

    def planned(self, own: PilotConfig, pool: Workers, *, until: float, log: Log) -> Plan:
        """The plan of a pilot that was stopped, or one for the time left, after a few steps."""
        key = self.key(comparable(self.base), own.settings, own.minutes, pool.count)
        if self.path.exists() and json.loads(self.path.read_text())["key"] == key:
            return self.saved_plan()
        setting = settings_around(self.base, 1)[0]
        first, second = CALIBRATION, 2 * CALIBRATION
        timed = [self.trial(setting, second, f"speed-{i}") for i in range(pool.count)]
        for trial in timed:  # of a pilot that was stopped
            shutil.rmtree(trial.folder)
            trial.folder.mkdir()
        list(pool.map(advance, timed, (0, first), until))  # lists the images, among others
        times = [took for _, took in pool.map(advance, timed, (first, second), until)]
        step_s, fixed_s = (max(part) for part in zip(*times, strict=True))
        if any(trial.judged(second) is None for trial in timed):
            raise TimeoutError("the first steps took all of the time")
        made = plan(
            own.settings,
            workers=pool.count,
            seconds=until - time.monotonic(),
            step_s=max(step_s, 1e-4),
            fixed_s=fixed_s,
        )
        write_whole(self.path, json.dumps({"key": key, **asdict(made)}))
        log(
            f"{step_s:.3f} s a step and {fixed_s:.1f} s beside them: {made.counts[0]} settings for "
            f"{made.steps[0]} steps, the better half for as many again, to {made.total}"
        )
        return made

    def run(self, own: PilotConfig, pool: Workers, *, until: float, log: Log) -> None:
        """Successive halving, to the last part or to the time `until`."""
        try:
            plan = self.planned(own, pool, until=until, log=log)
        except TimeoutError:
            return
        settings = settings_around(self.base, plan.counts[0])
        alive = [self.trial(setting, plan.total) for setting in settings]
        untrained = self.trial(settings[0], plan.total, UNTRAINED)
        list(pool.map(advance, [untrained] if untrained.judged(0) is None else [], (0, 0), until))
        began, done, skipped = time.monotonic(), 0, 0  # steps of all trials
        log.start_bar(plan.all_steps, 0)
        try:
            for kept, (begin, to_step) in zip(plan.counts, plan.parts, strict=True):
                alive, steps = alive[:kept], to_step - begin
                left = [trial for trial in alive if trial.judged(to_step) is None]
                skipped += steps * (len(alive) - len(left))
                for trial, _ in pool.map(advance, left, (begin, to_step), until):
                    if (found := trial.judged(to_step)) is None:
                        return  # the time is over
                    done += steps
                    log.advance(skipped + done, "steps")
                    share = done / (plan.all_steps - skipped)
                    eta = (time.monotonic() - began) * (1 / share - 1) / 60
                    log(
                        f"{trial.setting}: score {found['score']:.1f} at step {to_step}; "
                        f"about {eta:.1f} min left"
                    )
                ranked = ranking(alive, to_step)
                alive = [each.trial for each in ranked if "diverged" not in each.judgement]
        finally:
            log.stop_bar()

    def trials(self) -> list[Trial]:
        """Those of the plan, as far as they are known."""
        if not self.path.exists():
            return []
        plan = self.saved_plan()
        return [self.trial(each, plan.total) for each in settings_around(self.base, plan.counts[0])]

    def ranking(self) -> list[Standing]:
        """Those that were judged, best first, by the parts that are complete."""
        trials, last = self.trials(), 0
        if not trials:
            return []
        plan, alive = self.saved_plan(), len(trials)
        for count, step in zip(plan.counts, plan.steps, strict=True):
            judged = [found for trial in trials if (found := trial.judged(step)) is not None]
            if last and len(judged) < min(count, alive):
                break
            last, alive = step, sum("diverged" not in found for found in judged)
        return ranking(trials, last)

    def key(self, *facts: object) -> str:
        """A hash of facts and of the images."""
        return hashlib.sha256(repr((self.fingerprint, *facts)).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """Of the plan."""
        return self.folder / "plan.json"

    def saved_plan(self) -> Plan:
        """The plan that was made."""
        saved = json.loads(self.path.read_text())
        return Plan(saved["counts"], saved["steps"])


def conclude(pilot: Pilot, images: Images, folder: RunFolder, log: Log) -> dict:
    """Write report.html and report.txt, and config.yaml where a setting learns; the result."""
    trials, out, untrained = pilot.trials(), folder.path, None
    if trials:
        untrained = pilot.trial(trials[0].setting, trials[0].total, UNTRAINED).judged(0)
    ranked = pilot.ranking()
    found = verdict(images, untrained, ranked)
    command, chosen = None, None
    if found.learns:
        chosen = ranked[0].trial.setting
        config = asdict(chosen.apply(pilot.base)) | {"out": ""}
        write_whole(out / CONFIG, yaml.safe_dump(config, sort_keys=False))
        words = ["python", "train/main.py", "--config", str(out / CONFIG)]
        command = shlex.join([*words, "--out", f"runs/{out.name}-chosen"])
    else:
        (out / CONFIG).unlink(missing_ok=True)
    text = report.as_text(images, found, report.rows_of(untrained, ranked), command)
    pictures = {"Two views of some images": report.draw_views(some_views(pilot))}
    if ranked and untrained is not None:
        pictures["The best and the worst settings"] = report.draw_trials(untrained, ranked)
    (out / "report.txt").write_text(text)
    (out / "report.html").write_text(report.as_html(text, pictures))
    for line in text.splitlines():
        log(line)
    result = {
        "verdict": found.name,
        "evidence": found.evidence,
        "command": command,
        "setting": None if chosen is None else asdict(chosen),
        "complete": bool(ranked) and ranked[0].judgement["step"] == ranked[0].trial.total,
        "images": asdict(images) | {"exact": len(images.exact), "near": len(images.near)},
        "untrained": untrained,
        "ranking": [{**asdict(each.trial.setting), **each.judgement} for each in ranked],
        "report": str(out / "report.html"),
    }
    folder.write("result.json", result)
    return result


def some_views(pilot: Pilot) -> np.ndarray:
    """What training would see of some images: (V, N, S, S, 3) uint8."""
    config = pilot.base
    world = World(0, 1, 0, 1, torch.device("cpu"), None)
    reader = open_data(config.data, out=pilot.folder / "run", seed=config.seed, world=world).train
    order = SampleOrder(pilot.images, batch_size=min(VIEWS_SHOWN, pilot.images), seed=config.seed)
    options: dict = {"options": config.dali, "device": world.device}
    (batch,) = view_loader(reader, order, range(1), views=config.views[:2], **options)
    return batch.images.numpy()


def prepare(words: Sequence[str], folder: RunFolder, log: Log) -> tuple[Pilot, Images]:
    """Look at the images, or recall what was seen; the pilot with the settings that follow.

    words: the command line. Raises: ValueError for images that cannot be used.
    """
    own, first = parse(words)
    alone = World(0, 1, 0, 1, torch.device("cpu"), None)
    check_apart(folder.path, *split_root(first.data.root), first.data.val)
    trials = folder.path / "trials"
    trials.mkdir(exist_ok=True)
    data = open_data(first.data, out=trials / "run", seed=first.seed, world=alone)
    for line in data.notes:
        log(line)
    reader = data.train
    fingerprint = reader.source.fingerprint
    seen = trials / f"images-{fingerprint[:12]}-{own.minutes:g}.json"
    if seen.exists():
        images = Images(**json.loads(seen.read_text()))
    else:
        budget_s = LOOK_SHARE * 60 * own.minutes
        images = look(reader, first.dali, alone.device, budget_s=budget_s)
        write_whole(seen, json.dumps(asdict(images)))
    suggested, on_gpu = trials / "images.yaml", resolve_device(first.device) == "cuda"
    suggested.write_text(yaml.safe_dump(settings_for(images, on_gpu=on_gpu)))
    _, base = parse([f"--config={suggested}", *words])
    return Pilot(base, images.count, fingerprint, trials), images


def run_pilot(own: PilotConfig, words: Sequence[str], folder: RunFolder, log: Log) -> dict:
    """Look, try, judge, write; returns the result.

    words: the command line. Raises: ValueError for images that cannot be used;
    KeyboardInterrupt once running trials were saved and what is known was written.
    """
    began = time.monotonic()
    pilot, images = prepare(words, folder, log)
    device = resolve_device(pilot.base.device)
    folder.write("env.json", environment(1, torch.device(device)))
    folder.status("running", 0)
    if images.distinct >= FEW_IMAGES:
        until = began + 60 * own.minutes - RESERVE_S
        on_gpu = device == "cuda"
        jobs = own.jobs or (0 if on_gpu else usable_cores())
        with Workers(plan_places(jobs, with_gpus=on_gpu)[: own.settings]) as pool:
            try:
                pilot.run(own, pool, until=until, log=log)
            except (KeyboardInterrupt, OSError, ValueError, RuntimeError):
                for number in stop_signals():  # until what is known was written
                    signal.signal(number, signal.SIG_IGN)
                pool.stop()
                conclude(pilot, images, folder, log)
                raise
    result = conclude(pilot, images, folder, log)
    folder.status("finished", 0)
    return result


def main() -> None:
    """Read the flags, run, print the result as the last line of stdout."""
    words = sys.argv[1:]
    own, config = read_flags(words)
    out = Path(config.out or "runs/pilot")
    remedy = "lower --data.batch_size or --jobs"
    stop_at_once()
    with exit_on_error(out, memory_remedy=remedy, stopped="stopped; the same command continues"):
        if any((out / "checkpoints").glob("*")) or (
            (out / CONFIG).exists() and not (out / "trials").exists()
        ):
            raise ValueError(f"--out {out} is the folder of another program: give a new one")
        with RunFolder(str(out)) as folder:
            folder.checkpoints.rmdir()
            result = run_pilot(own, words, folder, Log(out / "log.txt"))
            if result["complete"]:
                for weights in out.glob("trials/*/checkpoints"):
                    shutil.rmtree(weights)  # nothing continues from them
    print_result(result, kept=out / "result.json")
    if result["verdict"] != "learns":
        refuse(f"{result['verdict']}: {result['evidence']} ({result['report']})", code=1)


if __name__ == "__main__":
    protect_output()
    main()
