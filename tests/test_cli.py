"""Flags and YAML: strict names, the nearest one named, exit code 2, presets that load."""

from pathlib import Path

import pytest
import yaml

from train.config import Config, DataConfig
from train.config.parser import build_parser
from train.run.program import read_config

ROOT = Path(__file__).parent.parent


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        read_config(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--data.batch_sise=4", "--data.batch_size"),
        ("--epoch=4", "--epochs"),
        ("--method.stopgradient=false", "--method.stop_gradient"),
        ("--lr=0.1", "--optim.lr"),
    ],
)
def test_a_typo_in_a_flag_names_the_nearest_one(capsys, flag, nearest):
    name = flag.split("=")[0]
    line = refusal(capsys, "--data.root=x", flag)
    assert line == f"error: {name} is unknown: perhaps you meant {nearest}"


def test_a_glob_that_the_shell_expanded_is_told_by_its_first_file(capsys):
    told = "a-1.tar, and more, follows no flag: quote a glob"
    assert told in refusal(capsys, "--data.root", *(f"a-{n}.tar" for n in range(99)))


def test_help_calls_the_root_required_only_where_there_is_no_default():
    assert "[--config FILE]" in build_parser().format_usage()
    assert "(required" in build_parser().format_help()
    assert "(required" not in build_parser("x.py", "X.", root="digits").format_help()


def test_a_methods_switches_are_flags_of_a_group_of_its_name(capsys, tmp_path):
    assert "--method.byol.momentum MOMENTUM" in build_parser().format_help()
    line = refusal(capsys, "--data.root=x", "--method.name=byol", "--method.byol.momentum=x")
    assert "--method.byol.momentum: expected a number, got x" in line
    line = refusal(capsys, "--data.root=x", "--method.name=byol", "--method.byol.momentm=0.9")
    assert "--method.byol.momentm is unknown: perhaps you meant --method.byol.momentum" in line
    (tmp_path / "byol.yaml").write_text("momentum: 0.9\n")
    file = f"--method.byol={tmp_path}/byol.yaml"
    config = read_config(["--data.root=x", "--method.name=byol", file])
    assert config.method.byol.momentum == 0.9
    with pytest.raises(SystemExit):
        read_config(["--data.root=x", "--method.name=byol", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["method"]["byol"]["momentum"] == 0.99


def test_a_typo_in_a_yaml_key_names_the_nearest_one(capsys, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  root: x\n  batch_sise: 4\n")
    assert "perhaps you meant --data.batch_size" in refusal(capsys, f"--config={file}")
    file.write_text("data:\n  root: x\nepoch: 4\n")
    assert "perhaps you meant --epochs" in refusal(capsys, f"--config={file}")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "required: --data.root"),
        (
            ["--data.root=x", "--data.batch_size=foo"],
            "--data.batch_size: expected a whole number, got foo",
        ),
        (["--data.root=x", "--method.stop_gradient=7"], "expected true or false, got 7"),
        (["--data.root=x", "--data.batch_size=0"], "data.batch_size must be at least 2"),
        (["--data.root=x", "--model.arch=resnet5"], "model.arch"),
        (["--data.root=x", "--precision=fp8"], "expected bf16 or fp16 or tf32 or fp32, got fp8"),
        (["--data.root=x", "--eval.size=300"], "eval.size 300 exceeds eval.resize 256"),
        (["--data.root=x", "--optim.lr=-1"], "optim.lr must be >= 0"),
        (["--data.root=x", "--augment.flip=2"], "augment.flip is a probability"),
        (["--data.root=x", "--data.std=[.nan, 1, 1]"], "data.std must be positive"),
        (["--data.root=x", "--data.mean=[0, .inf, 0]"], "data.mean takes three numbers"),
        (["--data.root=x", "--optim.momentum=1.5"], "optim.momentum must be in 0 .. 1"),
        (["--data.root=x", "--eval.temperature=.nan"], "eval.temperature must be at least 0.02"),
        (["--data.root=x", "--eval.temperature=0.01"], "eval.temperature must be at least 0.02"),
        (["--data.root=x", f"--seed={1 << 64}"], "seed must be less than 2^64"),
        (["--data.root=x", "--epochs=999999999999"], "epochs must be at most 1000000"),
        (["--data.root=x", "--augment.ratio=[1, .inf]"], "augment.ratio needs"),
        (["--data.root=x", "--augment.blur_sigma=[0.1, 1e9]"], "augment.blur_sigma needs"),
        (["--data.root=x", "--dali.threads=100000"], "dali.threads must be in 0 .. 1024"),
        (["--config=/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_impossible_values_name_the_flag(capsys, arguments, part):
    assert part in refusal(capsys, *arguments)


def test_a_yaml_file_runs_no_code(capsys, tmp_path):
    canary, file = tmp_path / "canary", tmp_path / "a.yaml"
    file.write_text(f"data: !!python/object/apply:os.system ['touch {canary}']\n")
    refusal(capsys, f"--config={file}", "--data.root=x")
    assert not canary.exists()


def test_a_flag_after_a_file_wins():
    config = read_config(["--config=configs/cifar10.yaml", "--data.root=x", "--optim.lr=0.5"])
    assert config.optim.lr == 0.5 and config.model.stem == "cifar" and config.augment.blur == 0


def test_learning_rate_follows_the_global_batch():
    config = Config(data=DataConfig(root="x", batch_size=512))
    assert config.lr == pytest.approx(0.1)


def test_presets_hold_the_papers_recipes():
    imagenet = read_config(["--config=configs/imagenet.yaml", "--data.root=x"])
    assert (imagenet.lr, imagenet.optim.weight_decay, imagenet.epochs) == (0.1, 1e-4, 100)
    a = imagenet.augment
    assert (a.size, a.scale, a.jitter, a.gray, a.blur, a.flip) == (
        224,
        (0.2, 1.0),
        0.8,
        0.2,
        0.5,
        0.5,
    )
    assert (a.brightness, a.contrast, a.saturation, a.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (imagenet.model.arch, imagenet.model.projector_layers) == ("resnet50", 3)
    cifar = read_config(["--config=configs/cifar10.yaml", "--data.root=x"])
    assert (cifar.lr, cifar.optim.weight_decay, cifar.epochs) == (pytest.approx(0.06), 5e-4, 800)
    assert (cifar.augment.size, cifar.augment.blur, cifar.model.projector_layers) == (32, 0, 2)


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_says_hardware_and_what_was_measured(preset):
    head = [line for line in preset.read_text().splitlines() if line.startswith("#")]
    text = " ".join(head)
    assert "Hardware:" in text and "measured" in text
    assert yaml.safe_load(preset.read_text())["epochs"] > 0
