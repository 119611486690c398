"""The pilot: what it sees of images, the settings that it tries, its verdict, one on the digits."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from forked import forked
from pipeline.decode import DecodeOptions
from pipeline.sources.folder import list_images
from pipeline.sources.reader import ImageReader
from train.config import Config, DataConfig
from train.config.parser import parse_config
from train.pilot import Pilot
from train.pilots.judge import retrieval, scored
from train.pilots.look import Images, look, near_pairs, settings_for, view_side
from train.pilots.space import LEAST_STEPS, Plan, Setting, plan, settings_around, trial_config
from train.pilots.trial import Standing, Trial, ranking, verdict, write_whole
from train.run.optim import build_optimizer, set_lr

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def photo(seed: int, *, side: int = 48, gray: bool = False) -> Image.Image:
    """Smooth random colours."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    picture = small.resize((side, side), Image.Resampling.BICUBIC)
    return picture.convert("L").convert("RGB") if gray else picture


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> Images:
    """30 different images, 3 equal copies, 2 that look alike, a blank one, a broken one."""
    root = tmp_path_factory.mktemp("look")
    for seed in range(30):
        photo(seed, gray=seed < 6).save(root / f"{seed:02d}.png")
    for seed in range(3):
        (root / f"copy-{seed}.png").write_bytes((root / f"{seed + 10:02d}.png").read_bytes())
    for seed in (20, 21):
        photo(seed).save(root / f"like-{seed}.jpg", quality=80)
    Image.new("RGB", (48, 48), (200, 10, 10)).save(root / "red.png")
    (root / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    reader = ImageReader(list_images(str(root)))
    return look(reader, DecodeOptions(), CPU, budget_s=60)


def test_formats_sizes_and_bad_images_are_counted(seen):
    assert (seen.count, seen.read, seen.bad, seen.classes) == (37, 37, 1, 0)
    assert seen.formats == {"PNG": 34, "JPEG": 2} and set(seen.sides.values()) == {48}
    assert sum(seen.reasons.values()) == 1


def test_equal_files_and_images_that_look_alike_are_found_and_no_others(seen):
    assert sorted(map(sorted, seen.exact)) == [[f"1{i}.png", f"copy-{i}.png"] for i in range(3)]
    assert seen.near == [["20.png", "like-20.jpg"], ["21.png", "like-21.jpg"]]
    assert seen.distinct == round(37 * (1 - 3 / 37 - 2 / seen.seen) * 36 / 37)


def test_gray_and_blank_images_are_shares_of_those_seen(seen):
    assert seen.seen == 33  # one of each group of equal files
    assert seen.gray == pytest.approx(6 / 33) and seen.blank == pytest.approx(1 / 33)


def test_a_thumbnail_is_compared_whatever_its_brightness():
    thumbnails = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 100
    darker = thumbnails[1:2] * 0.5 + 20
    assert near_pairs(torch.cat([thumbnails, darker])) == [[1, 4]]


def test_all_images_bad_is_refused_with_the_first_by_name(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"no image")
    reader = ImageReader(list_images(str(tmp_path)))
    with pytest.raises(ValueError, match=r"none of 1 images .* can be used: .*x\.jpg"):
        look(reader, DecodeOptions(), CPU, budget_s=10)


def images(**changes) -> Images:
    known: dict = {
        "count": 1000, "read": 1000, "seen": 1000, "classes": 0, "formats": {"JPEG": 1000},
        "sides": {"p5": 300, "p50": 375, "p95": 500}, "bad": 0, "reasons": {}, "gray": 0.0,
        "blank": 0.0, "exact": [], "near": [], "duplicates": 0.0, "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.2, 0.2], "contrast": 0.2,
    }  # fmt: skip
    return Images(**known | changes)


def test_settings_follow_from_the_images():
    small = settings_for(images(sides={"p5": 30, "p50": 33, "p95": 40}), on_gpu=False)
    assert small["augment"] == {"size": 32, "blur": 0.0} and small["model"]["stem"] == "cifar"
    assert small["data"]["batch_size"] == 32  # of 1,000 images: at least 20 steps an epoch
    gray = settings_for(images(gray=1.0), on_gpu=True)
    assert gray["augment"] == {"size": 224, "hue": 0.0, "saturation": 0.0, "gray": 0.0}
    assert gray["model"] == {"arch": "resnet50", "stem": "imagenet"}
    assert gray["data"]["mean"] == [0.4, 0.5, 0.6] and gray["precision"] == "bf16"
    assert [view_side(side) for side in (8, 31, 32, 100, 5000)] == [16, 16, 32, 96, 224]


BASE = Config(data=DataConfig(root=""))


def test_the_first_setting_is_the_base_and_all_are_distinct_and_repeatable():
    settings = settings_around(BASE, 16)
    assert settings[0] == Setting(BASE.optim.lr, BASE.augment.scale[0], 1.0)
    assert len(set(settings)) == 16 and settings == settings_around(BASE, 16)
    lrs = sorted(setting.lr for setting in settings)
    assert lrs[0] < 0.03 and lrs[-1] > 1  # the range is covered
    for setting in settings:
        config = setting.apply(BASE)  # no value that the configuration refuses
        assert config.optim.lr == setting.lr and config.augment.scale[0] == setting.crop
    assert Setting(0.1, 0.3, 1.5).apply(BASE).augment.brightness == pytest.approx(0.6)
    assert trial_config(BASE).augment.size == 112 and trial_config(BASE).eval.size == 112


@pytest.mark.parametrize("workers", [1, 2, 16, 64])
@pytest.mark.parametrize(("seconds", "step_s"), [(90, 0.02), (600, 0.02), (600, 1.0), (36000, 0.1)])
def test_a_plan_takes_the_time_given_and_halves(seconds, step_s, workers):
    made = plan(16, workers=workers, seconds=seconds, step_s=step_s, fixed_s=1.0)
    done, needed = 0, 0.0
    for count, step in zip(made.counts, made.steps, strict=True):
        needed += -(-count // workers) * (1.0 + (step - done) * step_s)  # so many turns
        done = step
    assert needed <= seconds and made.counts[0] <= 16
    if made.steps[0] > 2 * LEAST_STEPS:
        assert needed > 0.8 * seconds and made.counts[0] == 16
    assert all(later == count // 2 for count, later in itertools.pairwise(made.counts))


def test_in_each_part_of_a_trial_the_learning_rate_decays_anew(tmp_path):
    made, optim = trial(tmp_path, "parts"), BASE.optim
    optimizer = build_optimizer(torch.nn.Linear(2, 2), optim, lr=BASE.lr, device=CPU)
    for begin, end in ((0, 20), (20, 40), (40, 80)):
        schedule = made.schedule(begin, end)
        options: dict = {"lr": BASE.lr, "steps_per_epoch": schedule.steps_per_epoch}
        lrs = [
            set_lr(optimizer, optim, step - schedule.begin, total=end - begin, **options)
            for step in (begin, end - 1)
        ]
        assert schedule.total == end and lrs[0] == BASE.lr and lrs[1] < 0.01 * BASE.lr


def test_the_score_is_100_for_one_place_low_for_chance_and_hardly_moved_by_one_large_dimension():
    rng = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, 1000, 16, generator=rng)
    assert retrieval(first, first) == pytest.approx(100, abs=1e-6)
    assert retrieval(first, noise) == pytest.approx(100 / np.log(1000), abs=1.5)
    near = first + noise
    assert 30 < retrieval(first, near) < 90
    scale = torch.ones(16)
    scale[3] = 3.0  # of it the views share nothing
    near[:, 3] = torch.randn(1000, generator=rng)
    assert retrieval(first * scale, near * scale) > retrieval(first, near) - 3
    turn = torch.linalg.qr(torch.randn(16, 16, generator=rng)).Q
    assert retrieval(first @ turn, near @ turn) == pytest.approx(retrieval(first, near), abs=1e-3)
    collapsed = torch.ones(1000, 16)
    assert retrieval(collapsed, collapsed) < 100 / np.log(1000)


def trial(tmp_path, name: str, *judged: dict) -> Trial:
    folder = tmp_path / name
    folder.mkdir()
    config = BASE
    made = Trial(Setting(0.1, 0.2, 1.0), config, config.augment, np.arange(999), 100, folder)
    made.write({"curve": [], "judged": [{"collapsed": False, **each} for each in judged]})
    return made


def test_a_low_rank_of_z_lowers_the_score_and_one_of_six_or_more_leaves_it():
    assert scored(40.0, 6.0) == scored(40.0, 300.0) == 40.0
    assert scored(40.0, 1.0) == 0.0 and abs(scored(40.0, 6**0.5) - 20.0) < 1e-9


def test_who_reached_a_later_part_is_ahead_then_who_scores_more_collapsed_ones_last(tmp_path):
    a = trial(tmp_path, "a", {"step": 10, "score": 50.0})
    b = trial(tmp_path, "b", {"step": 10, "score": 20.0}, {"step": 20, "score": 30.0})
    c = trial(tmp_path, "c", {"step": 10, "score": 10.0}, {"step": 20, "score": 40.0})
    never = trial(tmp_path, "d")
    best = trial(tmp_path, "e", {"step": 20, "score": 90.0, "collapsed": True})
    all_trials = [a, b, c, never, best]
    assert [standing.trial for standing in ranking(all_trials, 20)] == [c, b, a, best]
    # the second part is not complete: it does not count
    assert [standing.trial for standing in ranking(all_trials, 10)] == [a, b, c]


def test_a_part_counts_when_all_of_its_trials_are_judged_or_diverged(tmp_path):
    pilot = Pilot(BASE, 1000, "fingerprint", tmp_path)
    plan = Plan([4, 2], [10, 20])
    write_whole(pilot.path, json.dumps({"key": "", "counts": plan.counts, "steps": plan.steps}))
    trials = pilot.trials()
    folders = [each.folder for each in trials]

    def ranked() -> list[Path]:
        return [standing.trial.folder for standing in pilot.ranking()]

    for number, each in enumerate(trials):
        judged = [{"step": 10, "score": 10.0 + number, "collapsed": False}]
        each.write({"curve": [], "judged": judged})
    assert ranked() == folders[::-1]
    known = trials[2].read()
    later = {"step": 20, "score": 99.0, "collapsed": False}
    trials[2].write(known | {"judged": [*known["judged"], later]})
    assert ranked()[0] == folders[3]  # whose second part goes on
    known = trials[3].read()
    later = {"step": 20, "score": 0.0, "collapsed": True, "diverged": "loss"}
    trials[3].write(known | {"judged": [*known["judged"], later]})
    assert ranked() == [folders[2], folders[1], folders[0], folders[3]]


def test_a_part_is_complete_though_most_trials_diverged_before_it(tmp_path):
    pilot = Pilot(BASE, 1000, "fingerprint", tmp_path)
    write_whole(pilot.path, json.dumps({"key": "", "counts": [4, 2], "steps": [10, 20]}))
    lost = {"step": 10, "score": 0.0, "collapsed": True, "diverged": "loss"}
    *diverged, left = pilot.trials()
    for each in diverged:
        each.write({"curve": [], "judged": [lost]})
    judged = [{"step": step, "score": 30.0, "collapsed": False} for step in (10, 20)]
    left.write({"curve": [], "judged": judged})
    assert pilot.ranking()[0].judgement["step"] == 20


def test_trials_of_other_images_or_settings_have_other_folders(tmp_path):
    setting = settings_around(BASE, 1)[0]
    pilots = [Pilot(BASE, 1000, mark, tmp_path) for mark in ("a", "b")]
    pilots.append(Pilot(replace(BASE, epochs=7), 1000, "a", tmp_path))
    folders = {p.trial(setting, 64, name).folder for p in pilots for name in ("", "untrained")}
    assert len(folders) == 6


def test_a_trial_has_small_views_of_swav_in_proportion_and_no_warm_up():
    flags = ["--method.name=swav", "--method.swav.small_views=4", "--method.swav.small_size=96"]
    tried = trial_config(parse_config([*flags, "--data.root=x", "--optim.warmup_epochs=10"]))
    assert (tried.augment.size, tried.method.swav.small_size) == (112, 48)
    assert tried.optim.warmup_epochs == 0 and tried.device in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("score", "collapsed", "step", "expected"),
    [
        (50.0, False, 100, "learns"),
        (11.0, False, 1000, "does not learn"),
        (11.0, False, 100, "too little time"),
        (5.0, True, 100, "collapses"),
    ],
)
def test_the_verdict_follows_from_the_best_trial(tmp_path, score, collapsed, step, expected):
    best = trial(tmp_path, "x", {"step": step, "score": score, "collapsed": collapsed})
    found = verdict(images(), {"score": 10.0}, [Standing(best, best.read()["judged"][-1])])
    assert found.name == expected and found.learns == (expected == "learns")
    few = verdict(images(count=1000, duplicates=0.95), {"score": 10.0}, ranking([best], step))
    assert few.name == "too few images" and "50 different images" in few.evidence


@pytest.mark.parametrize(("before", "after", "warns"), [(18.0, 15.6, True), (15.0, 15.6, False)])
def test_a_best_setting_whose_knn_is_below_the_untrained_encoders_is_warned_of(
    tmp_path, before, after, warns
):
    judged = {"step": 9, "score": 50.0, "knn": after, "collapsed": False}
    standing = Standing(trial(tmp_path, "x", judged), judged)
    for known in (before, None):  # None: no class labels
        found = verdict(images(), {"score": 10.0, "knn": known}, [standing])
        assert ("warning: its kNN is 15.6 %" in found.evidence) is (warns and known is not None)


SMALL = ["--data.root=digits", "--model.width=8", "--model.projector_hidden=32", "--device=cpu"]
SMALL += ["--model.projector_dim=32", "--model.predictor_hidden=8", "--settings=4", "--jobs=2"]


def pilot(*flags: str, program: Sequence[str] = ("train/pilot.py",), **options) -> subprocess.Popen:
    """The program, on its way."""
    words = [sys.executable, *program, *SMALL, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, **pipes, **options)


# with a plan that does not depend on how fast the machine is
SHORT = """
from train import pilot
from train.pilots.space import Plan
pilot.plan = lambda *_, **__: Plan([4, 2], [30, 60])
pilot.protect_output()
pilot.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pilot_stopped_with_its_workers_says_what_it_knows_and_goes_on(tmp_path, number):
    out, settings = tmp_path / "pilot", tmp_path / "pilot.yaml"
    settings.write_text("minutes: 10\nseed: 3\n")
    words, short = [f"--config={settings}", f"--out={out}"], ("-c", SHORT)
    process = pilot(*words, program=short, start_new_session=True)
    assert process.stderr is not None
    printed = []
    for line in process.stderr:
        printed.append(line)
        if ": score " in line:
            break
    assert ": score " in printed[-1], "".join(printed)
    os.killpg(process.pid, number)  # as a terminal or a scheduler does
    _, stderr = process.communicate(timeout=60)
    saved = [path for path in out.glob("trials/lr*/checkpoints/*")]
    assert process.returncode == 130, stderr
    assert "error: stopped; the same command continues" in stderr
    before = json.loads((out / "result.json").read_text())["ranking"]
    assert 1 <= len(before) < 4 and (out / "report.html").exists()
    assert len({path.parent for path in saved}) > len(before)  # those that were running too
    if number == signal.SIGTERM:
        return

    process = pilot(*words, program=short)
    stdout, _ = process.communicate(timeout=240)
    found = json.loads(stdout.splitlines()[-1])
    assert len(found["ranking"]) == 4 and found["images"]["count"] == 1437
    assert not list(out.glob("trials/*/checkpoints"))
    files = [json.loads(path.read_text()) for path in out.glob("trials/*/trial.json")]
    judged = [each for known in files for each in known["judged"]]
    for each in before:  # what was judged before the stop was kept and not made again
        assert {k: v for k, v in each.items() if k not in ("lr", "crop", "color")} in judged
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and found["evidence"] in page
    assert (out / "config.yaml").exists() == (found["verdict"] == "learns")


def test_bad_flags_and_folders_are_refused_in_one_line(tmp_path):
    (tmp_path / "few").mkdir()
    for seed in range(20):
        photo(seed).save(tmp_path / "few" / f"{seed}.png")
    cases = [
        (["--minutes=0"], 2, "minutes must be in 0.1 .. 10000, got 0"),
        (["--settings=2"], 2, "settings must be"),
        (["--init=runs/x"], 2, "--init is not for trials"),
        (["--method.target_steps=4"], 2, "--method.target_steps has no trials"),
        ([f"--data.root={tmp_path}/none"], 1, "none"),
        ([f"--data.root={tmp_path}/few", "--data.batch_size=8"], 1, "too few images: about 20"),
    ]
    for flags, code, words in cases:
        done = forked(["train/pilot.py", *SMALL, *flags, f"--out={tmp_path}/out"])
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == code and len(errors) == 1 and words in errors[0], done.stderr


@pytest.mark.slow
def test_two_minutes_on_the_digits_end_in_time_with_a_better_encoder_in_front(tmp_path):
    began = time.monotonic()
    out = tmp_path / "pilot"
    words = [sys.executable, "train/pilot.py", "--data.root=digits", "--minutes=2", f"--out={out}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert time.monotonic() - began < 150
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (found["verdict"] != "learns") and len(found["ranking"]) >= 4
    assert found["ranking"][0]["score"] > found["untrained"]["score"]
    assert found["ranking"][0]["knn"] > found["untrained"]["knn"]
    if found["verdict"] != "learns":  # beside other tests
        assert found["verdict"] == "too little time" and not (out / "config.yaml").exists()
        return
    config = parse_config([f"--config={out}/config.yaml"])  # what train/main.py will read
    assert config.optim.lr == found["setting"]["lr"] and config.augment.hue == 0  # gray images
