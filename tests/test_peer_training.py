"""Other programs' SimSiam beside ours: the same start, the same steps, curves that resume."""

import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import learning
import train_peer
from forked import forked
from kernels.normalize import normalize_views
from learning import Turn, compare, keep_settings, read_flags, summarize, take_turns
from measure import peers
from measure.peer_training import (
    PEERS,
    build_peer,
    check_peer,
    lightly_epochs,
    lightly_transform,
    train_epoch,
)
from pipeline.loader import Batch
from pipeline.order import SampleOrder
from train.config import Config
from train.config.parser import parse_config
from train.distributed import World
from train.loop import train_step
from train.main import build_state
from train.network.model import autocast
from train.run.folder import Log, RunFolder, read_metrics
from train.run.optim import Schedule
from train.studies.runs import Run, plan_places

TINY = ["--data.batch_size=16", "--epochs=2", "--augment.size=16", "--eval.size=16"]
TINY += ["--eval.resize=16", "--model.width=16", "--model.projector_hidden=32"]
TINY += [
    "--precision=fp32",
    "--eval.every_epochs=1",
    "--model.projector_dim=32",
    "--model.predictor_hidden=16",
    "--device=cpu",
]
ALONE = World(0, 1, 0, 1, torch.device("cpu"), None)


@pytest.fixture(params=PEERS)
def peer(request, torchvision) -> str:
    if request.param == "lightly":
        pytest.importorskip("lightly.data", reason=peers.WHAT_TO_INSTALL["lightly"])
    return request.param


def tiny_config(*words: str, root: object = "x") -> Config:
    return parse_config([f"--config={learning.PRESET}", f"--data.root={root}", *TINY, *words])


@pytest.mark.parametrize("constant", ["true", "false"])
def test_a_peers_first_steps_are_ours_on_the_same_views(peer, constant):
    config = tiny_config(f"--optim.constant_predictor_lr={constant}")
    schedule = Schedule(SampleOrder(64, batch_size=16, seed=0), config.epochs)
    ours = build_state(config, ALONE, 64)
    theirs = build_peer(peer, config, ALONE, images=64)
    for model in (ours.model, theirs.model):  # zero at the start: its block would not count
        for name, parameter in model.named_parameters():
            if name.endswith("bn2.weight"):
                torch.nn.init.constant_(parameter, 0.5)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        images = torch.randint(0, 256, (2, 16, 16, 16, 3), dtype=torch.uint8, generator=generator)
        loss, *_ = train_step(ours, config, schedule, Batch(step, images, torch.arange(16)))
        values = config.data.mean, config.data.std, torch.float32
        one, two = (normalize_views(view, *values, kernels="plain") for view in images)
        views = one.contiguous(), two.contiguous()
        assert train_epoch(theirs, config, schedule, [views]) == pytest.approx(
            loss.item(), abs=2e-4
        )
        names = "name", "lr", "momentum", "weight_decay"
        ours_groups, groups = (
            [[group[name] for name in names] for group in of.optimizer.param_groups]
            for of in (ours, theirs)
        )
        assert groups == ours_groups
    assert theirs.step == 3 and theirs.train_s > 0
    trunk = theirs.ddp.trunk.state_dict()
    for name, value in ours.model.backbone.state_dict().items():
        torch.testing.assert_close(trunk[name], value, rtol=1e-2, atol=1e-3)


def test_the_loss_of_a_peer_is_fp32_where_its_network_is_bf16(peer):
    config = tiny_config("--precision=bf16")
    theirs = build_peer(peer, config, ALONE, images=64)
    with autocast(config.precision, ALONE.device):
        assert theirs.ddp(*torch.randn(2, 8, 3, 16, 16)).dtype == torch.float32


def test_a_peers_network_has_our_width_and_torchvisions_names(torchvision):
    config = tiny_config("--model.arch=resnet50", "--model.width=32")
    ours = build_state(config, ALONE, 64).model.backbone
    theirs = peers.Official(config).trunk
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert {name: value.shape for name, value in theirs.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--method.name=byol"], "official has no --method"),
        (["--model.width=8"], "no --model.width below 16"),
        (["--optim.name=lars", "--precision=fp16"], "no --optim.name lars, no --precision fp16"),
        (["--model.arch=resnext50_32x4d"], "no groups and wider blocks"),
    ],
)
def test_what_a_peer_has_not_is_refused_by_its_flag(flags, text, torchvision):
    with pytest.raises(ValueError, match=re.escape(text)):
        check_peer("official", tiny_config(*flags))
    check_peer("official", tiny_config())


def test_a_peer_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="torchvision is not installed: pip install --no-deps"):
        check_peer("lightly", tiny_config())
    found = {"torchvision", "lightly", "tqdm"}
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name in found or None)
    with pytest.raises(ValueError, match="lightning_utilities is not installed: pip install"):
        check_peer("lightly", tiny_config())


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--programs=ours,ours"], "programs must name at least one, and each once"),
        (["--programs=ours,others"], "others"),
        (["--minutes=-1"], "minutes must be at least 0"),
        (["--seed_count=3"], "perhaps you meant --"),
        (["--max_steps=3"], "--max_steps is set for each turn"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(flags, text, capsys):
    with pytest.raises(SystemExit) as end:
        read_flags(["--data.root=x", *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and text in error and error.count("\n") == 1


def test_lightlys_views_have_our_settings_and_an_epoch_is_the_same_again(tiny_images, torchvision):
    pytest.importorskip("lightly.data", reason=peers.WHAT_TO_INSTALL["lightly"])
    config = tiny_config("--augment.hue=0.2", root=tiny_images)
    check_peer("lightly", config)
    view = lightly_transform(config).transforms[0].transform
    by_name = {type(step).__name__: step for step in view.transforms}
    crop, a = by_name["RandomResizedCrop"], config.augment
    assert (crop.size, crop.scale, crop.ratio) == ((16, 16), a.scale, a.ratio)
    jitter = by_name["RandomApply"].transforms[0]
    assert (jitter.brightness, jitter.hue) == ((1 - a.brightness, 1 + a.brightness), (-0.2, 0.2))
    assert by_name["RandomApply"].p == a.jitter and by_name["RandomGrayscale"].p == a.gray
    assert by_name["RandomHorizontalFlip"].p == a.flip and by_name["GaussianBlur"].prob == 0
    assert list(by_name["Normalize"].mean) == list(config.data.mean)
    batches = lightly_epochs(config, str(tiny_images), torch.device("cpu"))
    (first, again, other) = ([*batches(number)] for number in (0, 0, 1))
    assert len(first) == 3 and first[0][0].shape == (16, 3, 16, 16)
    assert all(torch.equal(*pair) for pair in zip(first[2], again[2], strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    with pytest.raises(ValueError, match="lightly has no --augment.ratio"):
        check_peer("lightly", tiny_config("--augment.ratio=[1,1]"))


class Ended:
    """A process that has ended."""

    def __init__(self, code: int):
        self.returncode = code

    def poll(self) -> int:
        return self.returncode


def run_here(run: Run, place: object) -> Ended:
    """In place of a new process for each turn: ours forked, a peer in this one."""
    script, *words = run.command[1:]
    if script == str(learning.MAIN):
        return Ended(forked([script, *words]).returncode)
    name, config = train_peer.read_flags(words)
    with RunFolder(config.out) as folder:
        train_peer.run_peer(name, config, ALONE, folder, Log(folder.path / "log.txt"))
    return Ended(0)


def curves(out: Path, run: str) -> list[dict]:
    """What was logged, without clocks."""
    rows = read_metrics(out / run / "metrics.jsonl")
    kept = "step", "epoch", "eval/knn_top1", "train/loss", "train/lr"
    return [{key: row[key] for key in kept if key in row} for row in rows]


def test_turns_that_pause_and_resume_are_each_programs_straight_run(
    tiny_images, tmp_path, torchvision, monkeypatch
):
    monkeypatch.setattr(learning, "start", run_here)
    words = [f"--data.root={tiny_images}", "--programs=ours,official", "--seeds=1", *TINY]
    words += ["--log_every=3"]
    own, config = read_flags([*words, "--minutes=1e-9"])
    log, out = Log(None), tmp_path / "out"
    out.mkdir()
    paused = compare(own, config, out, log)
    assert (paused["state"], list(paused["programs"])) == ("paused", ["ours"])
    own, config = read_flags(words)
    result = compare(own, config, out, log)
    assert result["state"] == "finished" and (out / "learning.png").stat().st_size > 10_000
    kept = json.loads((out / "learning.json").read_text())
    assert kept["programs"] == result["programs"]
    starts = []
    for name in ("ours", "official"):
        (run,) = result["programs"][name]["runs"]
        epochs, hours, knn = zip(*run["knn"], strict=True)
        assert epochs == (0, 1, 2) and hours[0] == 0 < hours[1] < hours[2]
        assert result["programs"][name]["knn_top1"]["mean"] == knn[-1]
        assert run["images_per_s"] == pytest.approx(96 / (3600 * hours[2]), rel=0.01)
        starts.append(knn[0])
        script = [str(learning.MAIN)] if name == "ours" else [str(learning.TRAIN_PEER), name]
        preset, straight = f"--config={out / 'settings.yaml'}", tmp_path / name
        run_here(Run(name, 0, straight, ("", *script, preset, f"--out={straight}")), None)
        assert curves(tmp_path, name) == curves(out, f"{name}/seed-0")
        assert any("train/loss" in row for row in curves(tmp_path, name))
    assert starts[0] == starts[1]  # the same weights
    assert result["images_per_s_ratios"]["ours/official"]["mean"] > 0
    with pytest.raises(ValueError, match=r"other settings \(--optim.lr was 0.12\)"):
        keep_settings(
            dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1)), out
        )


def python_run(folder: Path, code: str) -> Run:
    return Run("ours", 0, folder, (sys.executable, "-c", code))


def test_a_signal_is_passed_on_and_ends_the_turns(tmp_path):
    code = "import pathlib, time; pathlib.Path('{}').touch(); time.sleep(100)"
    runs = [python_run(tmp_path / name, code.format(tmp_path / name)) for name in ("a", "b")]

    def signal_once_it_runs() -> None:
        while not (tmp_path / "a").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_once_it_runs, daemon=True).start()
    (place,) = plan_places(1, with_gpus=False)
    turns = [Turn(run, 1) for run in runs]
    assert take_turns(turns, place, minutes=0, log=Log(None)) == "paused"
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_run_that_fails_ends_the_comparison_with_its_reason(tmp_path):
    run = python_run(tmp_path / "a", "raise SystemExit('error: no such image')")
    (place,) = plan_places(1, with_gpus=False)
    with pytest.raises(ValueError, match=r"ours, seed 0: no such image \(.*a.out\)"):
        take_turns([Turn(run, 1)], place, minutes=0, log=Log(None))


def test_ratios_pair_runs_of_one_seed_and_hours_are_of_whole_runs(tmp_path):
    runs = []
    whole, half = ("ours", 0, 30.0, 2), ("official", 1, 10.0, 1)
    none = [(name, 2, None, 0) for name in ("ours", "official")]  # stopped before the first step
    rest = ("ours", 1, 20.0, 2), ("official", 0, 10.0, 2), half, *none
    for name, seed, rate, epochs in (whole, *rest):
        run = Run(name, seed, tmp_path / name / str(seed), ())
        run.folder.mkdir(parents=True)
        row = {"step": 3, "epoch": float(epochs), "eval/knn_top1": 40.0 + seed, "train_s": 3600.0}
        (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        result = {"steps": 3, "train_s": 3600.0 * bool(rate), "images_per_s": rate}
        (run.folder / "result.json").write_text(json.dumps(result))
        runs.append(run)
    found = summarize(runs, 2)
    assert found["images_per_s_ratios"]["ours/official"] == {"mean": 2.5, "min": 2.0, "max": 3.0}
    assert found["programs"]["ours"]["knn_top1"] == {"mean": 40.5, "min": 40.0, "max": 41.0}
    assert found["programs"]["official"]["hours"] == {"mean": 1.0, "min": 1.0, "max": 1.0}
    assert found["programs"]["official"]["n"] == 3
