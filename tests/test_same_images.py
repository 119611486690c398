"""A continued run tells, or refuses, images that are others of the same names and sizes."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.sources.folder import list_images
from train import distributed
from train.distributed import World
from train.main import run
from train.run import data
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


def test_the_hash_of_all_images_is_the_same_for_any_number_of_ranks(images, monkeypatch):
    source, hashes = list_images(str(images)), []
    monkeypatch.setattr(data, "PART", 7)

    def collect(_world: World, value: list) -> list:
        hashes.append(value)
        if len(hashes) < 3:
            raise InterruptedError  # the others have not called yet
        return hashes

    alone = data.content_hash(source, World(0, 1, 0, 1, torch.device("cpu"), None), print)
    monkeypatch.setattr(data, "gather", collect)
    for rank in range(3):
        world = World(rank, 3, rank, 3, torch.device("cpu"), None)
        if rank < 2:
            with pytest.raises(InterruptedError):
                data.content_hash(source, world, print)
        else:
            assert data.content_hash(source, world, print) == alone
    assert sum(map(len, hashes)) == 14  # parts of 96 images, each read once
