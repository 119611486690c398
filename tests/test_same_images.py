"""A continued run tells, or refuses, images that are others of the same names and sizes."""

import os
import shutil
from pathlib import Path

import pytest

from train import distributed
from train.main import run
from train.run.folder import Log, RunFolder
from train.run.program import read_config

SMALL = ["--model.arch=resnet18", "--model.stem=cifar", "--model.width=8", "--device=cpu"]
SMALL += ["--model.projector_layers=2", "--model.projector_dim=32", "--model.projector_hidden=32"]
SMALL += ["--model.predictor_hidden=8", "--augment.size=16", "--eval.size=16", "--eval.resize=16"]
SMALL += ["--eval.k=5", "--precision=fp32", "--data.batch_size=16", "--epochs=9", "--compile=false"]


@pytest.fixture
def own(images, tmp_path) -> Path:
    shutil.copytree(images, tmp_path / "own")
    for path in (tmp_path / "own").rglob("*.jpg"):
        os.utime(path, (1, 1))
    return tmp_path / "own"


def edit(root: Path) -> Path:
    path = sorted(root.rglob("*.jpg"))[5]
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    return path


def train(root: Path, steps: int, *flags: str) -> str:
    """Continue the run beside the images; returns its log."""
    out = root.parent / "run"
    words = [*SMALL, f"--data.root={root}", f"--out={out}", f"--max_steps={steps}", *flags]
    config = read_config(words)
    with distributed.start("cpu", config) as world, RunFolder(str(out)) as folder:
        before = (out / "log.txt").read_text() if (out / "log.txt").exists() else ""
        run(config, world, out, folder, Log(out / "log.txt"))
    return (out / "log.txt").read_text().removeprefix(before)


def test_images_written_to_after_the_checkpoint_are_told_when_the_run_continues(own):
    train(own, 1)
    assert "written to" not in train(own, 2)
    path = edit(own)
    os.utime(path, (4e9, 4e9))
    told = f"images of {own} were written to after the checkpoint, such as {path.parent.name}/"
    assert told + path.name in train(own, 3)


@pytest.mark.slow
def test_with_verify_a_run_refuses_images_of_the_same_size_and_other_content(own):
    train(own, 1, "--data.verify=true")
    train(own, 2)  # keeps the hash
    assert "not compared" not in train(own, 3, "--data.verify=true")
    path = edit(own)
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match="was trained on other images"):
        train(own, 4, "--data.verify=true")


def test_a_run_begun_without_verify_says_that_nothing_is_compared(own):
    train(own, 1)
    assert "begun without --data.verify" in train(own, 2, "--data.verify=true")
