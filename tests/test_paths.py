"""Paths as people type them, and the folder that a run's own config.yaml means."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from forked import forked
from pipeline.sources.paths import expanded, named_path
from pipeline.sources.shards import find_shards
from test_train import TINY
from train.config.parser import build_parser, parse_config
from train.evaluation.config import EvaluateConfig, FeaturesConfig, read_flags, run_config
from train.pilots.flags import read_flags as pilot_flags
from train.run.report import print_on_stderr

TRAIN = [*TINY, "--eval.rank_images=0"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_tilde_is_the_home_folder_in_every_path_of_flags_and_of_yaml(home):
    written = {"data": {"root": "~/images", "val": "~/val"}, "out": "~/run", "init": "~/first"}
    (home / "preset.yaml").write_text(yaml.safe_dump(written))
    flags = ["--data.root=~/images", "--data.val", "~/val", "--out=~/run", "--init", "~/first"]
    for config in parse_config(flags), parse_config(["--config=~/preset.yaml"]):
        paths = config.data.root, config.data.val, config.out, config.init
        assert paths == tuple(f"{home}/{name}" for name in ("images", "val", "run", "first"))
    own = ["~/run", "--data.root=~/images", "--out=~/eval"]
    for kind in EvaluateConfig, FeaturesConfig:
        run, options = read_flags("x", "x", kind, own)
        assert (run, options.data.root, options.out) == (
            home / "run", f"{home}/images", f"{home}/eval",
        )  # fmt: skip
    assert pilot_flags(["--data.root=~/images", "--out=~/pilot"])[1].out == f"{home}/pilot"
    assert named_path("~/file") == home / "file"


def test_a_tilde_with_a_name_is_that_users_home_and_an_unknown_user_is_refused(home, monkeypatch):
    import pwd

    user = pwd.getpwuid(os.getuid())
    assert expanded(f"~{user.pw_name}/x") == f"{user.pw_dir}/x"
    with pytest.raises(ValueError, match=r"no home folder of ~nobody-here is known; \./~nobody-h"):
        parse_config(["--data.root=~nobody-here/images"])
    monkeypatch.chdir(home)
    for _ in range(2):  # what an expanded path is given to expands it again
        found = parse_config(["--data.root=./~/x", "--out", expanded("./~/run")])
        assert (found.data.root, found.out) == (f"{home}/~/x", f"{home}/~/run")
    (home / "~nobody-here").mkdir()
    assert parse_config(["--data.root=~nobody-here"]).data.root == "~nobody-here"


def test_what_exists_goes_before_a_glob_and_only_the_rest_of_a_path_is_one(tmp_path, monkeypatch):
    for name in ("set[1]/a-0.tar", "set[1]/a-1.tar", "set[1]/b[0].tar", "set1/wrong.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for root in str(tmp_path), ".", "":
        folder = os.path.join(root, "set[1]")
        inside = [str(tmp_path / "set[1]" / f"a-{i}.tar") for i in range(2)]
        assert find_shards(f"{folder}/a-*.tar") == inside
        assert find_shards(f"{folder}/b[0].tar") == [str(tmp_path / "set[1]" / "b[0].tar")]
        assert find_shards(os.path.join(root, "set[0-9]/*.tar")) == [
            str(tmp_path / "set1/wrong.tar")
        ]
        assert find_shards(f"{folder}/none") == []  # no glob: list_images says what is wrong
        with pytest.raises(ValueError, match="No shards match"):
            find_shards(f"{folder}/none-*.tar")


def test_a_path_with_brackets_is_printed_as_it_is(capsys):
    print_on_stderr("pictures and evaluation.json: runs/[red]a[/b]")
    assert capsys.readouterr().err == "pictures and evaluation.json: runs/[red]a[/b]\n"


def written_run(folder: Path, **settings: object) -> Path:
    """The files by which a run folder is known."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "command.txt").touch()
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"root": "x"}, **settings}))
    return config


def test_a_config_that_names_another_folder_than_its_runs_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = written_run(tmp_path / "copy", out="runs/a")  # as it was written until November 2026
    with pytest.raises(ValueError, match=r"its `out` is runs/a: give --out .*/copy to continue"):
        parse_config([f"--config={config}"])
    assert run_config(config.parent, EvaluateConfig()).data.root == "x"  # reads, and may be a copy
    config = written_run(tmp_path / "runs" / "a", out="runs/a")
    assert parse_config([f"--config={config}"]).out == str(config.parent)


def test_a_config_beside_a_folder_of_checkpoints_alone_is_no_runs(tmp_path):
    config = written_run(tmp_path / "project", out="runs/x")
    (tmp_path / "project" / "command.txt").unlink()
    assert parse_config([f"--config={config}"]).out == "runs/x"


def test_of_two_runs_settings_the_last_ones_and_their_folder_hold(tmp_path):
    configs = [written_run(tmp_path / name, seed=number) for number, name in enumerate("ab")]
    found = parse_config([f"--config={config}" for config in configs])
    assert (found.seed, found.out) == (1, str(tmp_path / "b"))


def test_an_out_on_the_command_line_wins_wherever_it_stands(tmp_path):
    for out in {}, {"out": "elsewhere"}:
        config = written_run(tmp_path / f"run{len(out)}", **out)
        for words in ([f"--config={config}", "--out=b"], ["--out", "b", f"--config={config}"]):
            assert parse_config(words).out == "b"
    preset = tmp_path / "preset.yaml"
    preset.write_text("out: c\n")
    assert parse_config([f"--config={config}", f"--config={preset}"]).out == "c"


def test_a_program_that_continues_no_run_takes_the_settings_of_one_and_not_its_folder(tmp_path):
    for out in {}, {"out": "runs/a"}:
        config = written_run(tmp_path / f"run{len(out)}", **out)
        assert build_parser().parse_args([f"--config={config}"]).out == ""


def test_a_run_does_not_start_from_its_own_folder(tmp_path):
    config = written_run(tmp_path / "run")
    with pytest.raises(
        ValueError, match="--init .*run is this run's own folder: give another --out"
    ):
        parse_config([f"--config={config}", f"--init={config.parent}"])


def test_a_copied_run_and_a_renamed_one_are_continued_where_they_lie(tiny_images, tmp_path):
    first, copy, renamed = (tmp_path / name for name in ("first", "copy", "renamed"))

    def train(*words: str) -> None:
        done = forked(["train/main.py", *words])
        assert done.returncode == 0, done.stderr[-2000:]

    def steps(run: Path) -> list[str]:
        return sorted(path.name for path in (run / "checkpoints").iterdir())

    train(f"--data.root={tiny_images}", f"--out={first}", *TRAIN, "--max_steps=2")
    assert "out" not in yaml.safe_load((first / "config.yaml").read_text())
    shutil.copytree(first, copy)
    train(f"--config={copy}/config.yaml", "--max_steps=3")
    assert steps(first) == ["step-00000002"] and "step-00000003" in steps(copy)
    assert json.loads((copy / "result.json").read_text())["run"] == str(copy)
    first.rename(renamed)
    train(f"--config={renamed}/config.yaml", "--max_steps=3")
    assert not first.exists() and "step-00000003" in steps(renamed)
