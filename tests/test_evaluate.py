"""train/evaluate.py on a tiny trained run: results, files, refusals, the linear probe's resume."""

import dataclasses
import errno
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.pack import pack_root
from pipeline.sources.digits import write_digits
from train import evaluate, main
from train.evaluation import linear_probe
from train.evaluation.config import EvaluateConfig, ImagesConfig, read_flags, run_config
from train.evaluation.encoded import accuracy, load_encoder
from train.evaluation.pictures import confusions, draw_confusion
from train.run import checkpoint
from train.run.folder import newest_checkpoint
from train.run.state import build_method

TINY = [
    "--model.arch=resnet18", "--model.stem=cifar", "--model.width=8", "--model.projector_layers=2",
    "--model.projector_dim=32", "--model.projector_hidden=32", "--model.predictor_hidden=8",
    "--augment.size=8", "--augment.flip=0", "--eval.size=8", "--eval.resize=8", "--eval.k=20",
    "--precision=fp32", "--data.batch_size=50", "--epochs=2", "--device=cpu",
]  # fmt: skip
FAST = ["--k=10,20", "--fast.epochs=20", "--linear.epochs=2"]
LINEAR = [
    "--k=[]", "--probe=linear", "--linear.batch_size=100", "--linear.epochs=2",
    "--eval.batch_size=60",
]  # fmt: skip


def call(program, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program.__file__, *map(str, arguments)])
        program.main()


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """20 training and 6 test images of each digit."""
    whole = write_digits(tmp_path_factory.mktemp("all") / "digits")
    root = tmp_path_factory.mktemp("some")
    for part, count in (("train", 20), ("val", 6)):
        for folder in (whole / part).iterdir():
            (root / part / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, root / part / folder.name)
    return root


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory) -> Path:
    """The folder of a short training."""
    out = tmp_path_factory.mktemp("runs") / "run"
    call(main, f"--data.root={digits}", f"--out={out}", *TINY)
    return out


def result(capfd, run: Path, *flags: object) -> dict:
    capfd.readouterr()
    call(evaluate, run, *flags)
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def refusal(capfd, run: Path, *flags: object, code: int = 1) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(evaluate, run, *flags)
    assert stop.value.code == code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_is_evaluated_with_figures_and_pictures(run, tmp_path, capfd):
    found = result(capfd, run, *FAST, f"--out={tmp_path}/out")
    out = tmp_path / "out"
    assert json.loads((out / "evaluation.json").read_text()) == found
    assert (found["train_images"], found["test_images"], found["classes"]) == (200, 60, 10)
    trained = json.loads((run / "result.json").read_text())
    assert found["knn"]["20"]["top1"] == pytest.approx(trained["knn_top1"], abs=1e-4)
    assert found["step"] == trained["steps"] == 8
    for figures in (*found["knn"].values(), found["fast_probe"]):
        assert 20 < figures["top1"] < figures["top5"] <= 100  # chance is 10 and 50 %
    assert 1 < found["rankme"] < 32 and 1 < found["rankme_features"] < 64
    assert 0.1 < found["collapse_meter"] < 1.2 and not found["collapsed"]
    assert set(found["linear_probe"]["by_lr"]) == {"0.02", "0.1"}
    assert found["linear_probe"]["batch_size"] == 128  # of 200 images, instead of 4,096
    for name in ("confusion.png", "confusion_linear.png", "neighbours.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 500
            assert np.asarray(picture).std() > 20


def test_accuracy_with_few_labels_is_beside_that_with_all(run, tmp_path, capfd):
    flags = ["--k=[]", "--probe=fast", "--fast.epochs=10", f"--out={tmp_path}/out"]
    found = result(capfd, run, *flags, "--fast.label_fractions=0.01,0.5", "--fast.label_draws=3")
    one, half = found["few_labels"]
    assert (one["fraction"], one["labels"], one["labels_per_class"]) == (0.01, 10, [1, 1])
    assert (half["labels"], half["labels_per_class"], half["draws"]) == (100, [10, 10], 3)
    assert 10 < one["top1"]["mean"] < half["top1"]["mean"] < one["top5"]["mean"]
    assert len(half["top1"]["values"]) == 3 and half["top1"]["std"] > 0
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "1 % is less than one image of a class with 20: one is taken of it, 10 labels" in log
    assert "50 % is less" not in log
    words = [str(run), "--fast.label_fractions=[]"]
    _, none = read_flags("train/evaluate.py", "", EvaluateConfig, words)
    assert none.fast.label_fractions == ()


def test_an_evaluation_replaces_the_one_before_and_a_line_of_each_is_kept(run, tmp_path, capfd):
    out = tmp_path / "out"
    first = result(capfd, run, "--k=[20]", "--probe=none", f"--out={out}")
    assert (out / "confusion.png").exists()
    second = result(capfd, run, "--k=[]", "--probe=none", f"--out={out}")
    assert not (out / "confusion.png").exists()  # it would be taken for one of the second
    lines = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    assert [line.pop("evaluation")["k"] for line in lines] == [[20], []]
    assert lines == [first, second]


def test_neighbours_are_thumbnails_of_the_nearest_images(run, digits, tmp_path, capfd, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        evaluate.pictures, "draw_neighbours", lambda *arguments: shown.update(arguments=arguments)
    )
    val = tmp_path / "val"
    for path in sorted((digits / "train").rglob("*.jpg"))[::40]:  # test images that are in the bank
        (val / path.parent.name).mkdir(parents=True)
        shutil.copy(path, val / path.parent.name)
    result(
        capfd, run, "--k=[]", "--probe=none", f"--out={tmp_path}/out",
        f"--data.root={digits}/train", f"--data.val={val}",
    )  # fmt: skip
    queries, neighbours, names, neighbour_names, _ = shown["arguments"]
    assert queries.shape == (5, 96, 96, 3) and neighbours.shape == (5, 8, 96, 96, 3)
    assert (queries == neighbours[:, 0]).all()  # an image is its own nearest neighbour
    assert names == [row[0] for row in neighbour_names] == ["0", "2", "4", "6", "8"]


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory) -> tuple[Path, dict, list]:
    """An undisturbed linear probe: folder, result, and (epoch, features, labels) of each pass."""
    out, seen = tmp_path_factory.mktemp("straight"), []
    whole = linear_probe.augmented_features

    def watched(probe, backbone, images, config):
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        for features, labels in whole(probe, backbone, images, config):
            seen.append((probe.epochs_done, features, labels))
            yield features, labels
        assert all(torch.equal(t, before[name]) for name, t in backbone.state_dict().items())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe, "augmented_features", watched)
        call(evaluate, run, *LINEAR, f"--out={out}")
    return out, json.loads((out / "evaluation.json").read_text()), seen


def test_linear_probe_gives_both_learning_rates_and_is_not_trained_twice(straight, run, capfd):
    out, expected, _ = straight
    before = newest(out)
    assert before["heads/0.weight"].shape == (10, 64)
    assert (before["heads/0.weight"] != before["heads/1.weight"]).any()
    assert set(expected["linear_probe"]["by_lr"]) == {"0.02", "0.1"} and expected["knn"] == {}
    found = result(capfd, run, *LINEAR, f"--out={out}")
    assert found["linear_probe"] == expected["linear_probe"]
    assert same(newest(out), before)
    line = refusal(capfd, run, *LINEAR, "--linear.epochs=3", f"--out={out}")
    assert "of other settings: epochs was 2 and is 3" in line
    assert json.loads((out / "evaluation.json").read_text()) == found  # as it was


def test_linear_probe_sees_other_crops_each_epoch_with_the_labels_of_their_images(straight):
    _, _, seen = straight
    # batches of 100 in passes of 50: --eval.batch_size 60 does not divide them
    assert [(epoch, len(x)) for epoch, x, _ in seen] == [(0, 50)] * 4 + [(1, 50)] * 4
    for epoch in (0, 1):
        labels = torch.cat([y for e, _, y in seen if e == epoch])
        assert labels.bincount().tolist() == [20] * 10
    first, second = (torch.cat([x for e, x, _ in seen if e == epoch]) for epoch in (0, 1))
    assert not any((row == second).all(1).any() for row in first)


def test_a_linear_probe_stopped_by_ctrl_c_ends_as_if_it_had_not_been(
    straight, run, tmp_path, capfd, monkeypatch
):
    whole = linear_probe.train_epoch

    def stopped(probe, *arguments):
        if probe.epochs_done == 1:
            raise KeyboardInterrupt
        return whole(probe, *arguments)

    monkeypatch.setattr(linear_probe, "train_epoch", stopped)
    line = refusal(capfd, run, *LINEAR, f"--out={tmp_path}/out", code=130)
    assert "the same command" in line
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["rankme"] > 1 and written["linear_probe"] is None
    monkeypatch.setattr(linear_probe, "train_epoch", whole)
    found = result(capfd, run, *LINEAR, f"--out={tmp_path}/out")
    out, expected, _ = straight
    assert found["linear_probe"] == expected["linear_probe"]
    assert same(newest(tmp_path / "out"), newest(out))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def newest(out: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint of a linear probe holds."""
    folder = max((out / "checkpoints").glob("encoder-*/step-*"))
    return {
        f"{name}/{key}": value
        for name in ("heads", "optimizer")
        for key, value in load_file(folder / f"{name}.safetensors").items()
    }


def test_missing_labels_are_refused_where_needed_and_only_there(run, digits, tmp_path, capfd):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((digits / "train").rglob("*.jpg"))[::4]):
        shutil.copy(path, flat / f"{number}.jpg")
    flags = [f"--data.root={flat}", f"--out={tmp_path}/out"]
    for probe in ("--probe=fast", "--probe=none"):
        line = refusal(capfd, run, *flags, probe)
        assert f"{flat} has no class folders" in line and "--probe none" in line
    found = result(capfd, run, *flags, "--k=[]", "--probe=none")
    assert found["rankme"] > 1 and found["fast_probe"] is None
    assert (tmp_path / "out" / "neighbours.png").exists()
    assert not (tmp_path / "out" / "confusion.png").exists()
    line = refusal(capfd, run, f"--data.root={digits}/train", f"--data.val={flat}")
    assert f"--data.val {flat} has no class labels" in line
    line = refusal(capfd, run, *flags, f"--data.val={digits}/val", "--k=[]", "--probe=none")
    assert f"{flat} has no class labels to vote with" in line
    for path in sorted(flat.iterdir())[1:]:
        path.unlink()
    line = refusal(capfd, run, *flags, "--k=[]", "--probe=none")
    assert f"{flat} has one image, which is held out" in line


def test_pictures_are_not_written_among_the_images(run, digits, capfd):
    before = sorted(digits.rglob("*"))
    line = refusal(capfd, run, f"--data.root={digits}", f"--out={digits}/val/out")
    assert f"--out {digits}/val/out is in the images' folder {digits}/val" in line
    assert sorted(digits.rglob("*")) == before


def test_too_large_a_size_ends_in_one_line(run, tmp_path, capfd, monkeypatch):
    def full(*_):
        raise RuntimeError("Critical error in pipeline:\nstd::bad_alloc")

    monkeypatch.setattr(evaluate.encoded, "encode", full)
    line = refusal(capfd, run, "--k=20", f"--out={tmp_path}/out")
    assert "out of memory (std::bad_alloc): lower --eval.batch_size" in line


def test_a_full_disk_is_named(run, tmp_path, capfd, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(evaluate, "evaluate", full)
    line = refusal(capfd, run, "--k=20", f"--out={tmp_path}/out")
    assert line == f"error: [Errno 28] No space left on device (--out {tmp_path}/out)"


def test_too_many_neighbours_are_refused_before_the_first_forward_pass(
    run, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(evaluate.encoded, "encode", None)
    line = refusal(capfd, run, "--k=10,20,201", f"--out={tmp_path}/out")
    assert "--k 201 exceeds the 200 training images" in line and "--k 10,20" in line


def test_unreadable_images_are_left_out_and_do_not_count_as_neighbours(
    run, digits, tmp_path, capfd
):
    root = tmp_path / "data"
    shutil.copytree(digits, root)
    bad = sorted((root / "train" / "3").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:200])
    flags = [f"--data.root={root}", "--probe=none", f"--out={tmp_path}/out"]
    assert "--k 200 exceeds the 199 training" in refusal(capfd, run, *flags, "--k=200")
    assert result(capfd, run, *flags, "--k=199")["train_images"] == 199
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"1 unreadable images of {root}/train are left out, such as 3/{bad.name}" in log


def test_other_images_do_not_keep_the_runs_validation_folder(run, tmp_path):
    saved = tmp_path / "config.yaml"
    saved.write_text((run / "config.yaml").read_text().replace("val: null", "val: /its/val"))
    own = run_config(tmp_path, EvaluateConfig())
    assert own.data.val == "/its/val" and own.eval.k == 20
    other = run_config(tmp_path, EvaluateConfig(data=ImagesConfig(root="/other"), device="cpu"))
    assert (other.data.root, other.data.val, other.data.mean) == ("/other", None, own.data.mean)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--data.roof=x"], "perhaps you meant --data.root"),
        (["--model.width=3"], "--model.width"),
        (["--k=0"], "k must be at least 1"),
        (["--fast.lrs=0.1,-1"], "fast.lrs takes learning rates > 0"),
        (["--probe=slow"], "probe"),
        (["--fast.label_fractions=0.1,2"], "fast.label_fractions takes shares of the labels"),
        (["--fast.label_draws=0"], "fast.label_draws must be at least 1"),
        (["--probe=none", "--fast.label_draws=2"], "--fast.* has no effect with --probe none"),
        (["--probe=fast", "--linear.epochs=2"], "--linear.* has no effect with --probe fast"),
        (["--probe=none", "--fast.epochs=2"], "--fast.* has no effect with --probe none"),
        (["--k=[]", "--eval.temperature=0.2"], "--eval.temperature has no effect with --k []"),
        (["--linear.epochs=0"], "linear.epochs must be at least 1"),
    ],
)
def test_impossible_flags_are_refused(run, capfd, flags, part):
    assert part in refusal(capfd, run, *flags, code=2)


def test_the_run_that_is_missing_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        read_flags("train/evaluate.py", "", EvaluateConfig, [])
    assert capsys.readouterr().err == "error: required: RUN\n"


def test_what_is_no_run_or_does_not_fit_it_is_refused(run, tmp_path, capfd):
    assert "is not a run folder" in refusal(capfd, tmp_path)
    assert "No images under" in refusal(capfd, run, f"--data.root={tmp_path}")
    assert "eval.size 32 exceeds eval.resize 8" in refusal(capfd, run, "--eval.size=32")
    before = (run / "config.yaml").read_text()
    assert "is the folder of a training" in refusal(capfd, run, f"--out={run}")
    assert (run / "config.yaml").read_text() == before


def changed(run: Path, copy: Path, change) -> Path:
    """A copy of the run whose newest checkpoint has what `change` makes of its tensors."""
    shutil.copytree(run, copy)
    found = newest_checkpoint(copy, log=print)
    model = change(found.tensors["model"])
    checkpoint.save(copy / "checkpoints", 99, {"model": model}, found.state, facts=found.facts)
    return copy


def test_a_diverged_encoder_is_refused(run, tmp_path, capfd):
    name = "backbone.conv1.weight"
    copy = changed(run, tmp_path / "run", lambda model: model | {name: model[name] * math.nan})
    assert "not finite" in refusal(capfd, copy)


def test_a_checkpoint_of_another_network_is_refused_with_what_differs(run, tmp_path, capfd):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("arch: resnet18", "arch: resnet50"))
    line = refusal(capfd, copy)
    assert str(max((copy / "checkpoints").iterdir())) in line
    assert "backbone.layer1.0.conv1.weight is (8, 8, 3, 3) and must be (8, 8, 1, 1)" in line
    (copy / "config.yaml").write_text(config.replace("arch: resnet18", "arch: resnet19"))
    line = refusal(capfd, copy)
    assert f"{copy}/config.yaml is not a training's" in line and "resnet19" in line


def test_test_images_of_a_class_that_the_training_images_lack_are_refused(
    run, digits, tmp_path, capfd
):
    shutil.copytree(digits / "val" / "3", tmp_path / "val" / "three")
    shutil.copytree(digits / "val" / "4", tmp_path / "val" / "4")
    line = refusal(capfd, run, f"--data.root={digits}/train", f"--data.val={tmp_path}/val")
    assert f"{tmp_path}/val has classes that {digits}/train lacks, such as three" in line


def test_an_imported_backbone_without_a_projector_or_images_is_evaluated(
    run, digits, tmp_path, capfd
):
    copy = changed(
        run, tmp_path / "run",
        lambda model: {name: t for name, t in model.items() if name.startswith("backbone.")},
    )  # fmt: skip
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace(f"root: {digits}", "root: ''"))
    assert "give --data.root" in refusal(capfd, copy)
    flags = ["--k=20", "--probe=none", f"--data.root={digits}"]
    found, whole = result(capfd, copy, *flags), result(capfd, run, *flags, f"--out={tmp_path}/out")
    assert (found["knn"], found["rankme_features"]) == (whole["knn"], whole["rankme_features"])
    assert found["rankme"] is found["collapse_meter"] is found["collapsed"] is None


@pytest.mark.parametrize("switch", [{"target_steps": 3}, {"moving_average": 0.8}])
def test_targets_that_a_run_keeps_are_no_part_of_its_encoder(run, switch):
    config = run_config(run, EvaluateConfig())
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, **switch))
    trained = build_method(config, images=200, device=torch.device("cpu"))
    found = checkpoint.Checkpoint(run, 1, {"model": dict(trained.state_dict())}, {}, {})
    backbone, projector = load_encoder(found, config, device=torch.device("cpu"))
    assert projector is not None
    trained.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    expected = trained.eval().get_submodule("projector")(trained.backbone(x))
    torch.testing.assert_close(projector(backbone(x)), expected)


def test_a_part_of_a_folder_packed_in_shards_gives_the_same_linear_probe(
    run, digits, tmp_path, capfd
):
    pack_root(str(digits / "train"), tmp_path / "shards", shard_bytes=30_000)
    folder, shards = (
        result(
            capfd, run, *LINEAR, "--linear.epochs=1", f"--data.root={root}",
            f"--out={tmp_path}/{number}",
        )
        for number, root in enumerate((digits / "train", tmp_path / "shards"))
    )  # fmt: skip
    assert folder["train_images"] == 180  # a tenth is held out
    assert shards["linear_probe"] == folder["linear_probe"]
    assert same(newest(tmp_path / "0"), newest(tmp_path / "1"))


def test_top_5_counts_hits_in_the_first_five_and_needs_five_classes():
    guesses = torch.tensor([[3, 1, 2, 0, 4, 5], [0, 1, 2, 3, 4, 5], [5, 0, 1, 2, 3, 4]])
    labels = torch.tensor([3, 4, 4])
    assert accuracy(guesses, labels) == {
        "top1": pytest.approx(100 / 3), "top5": pytest.approx(200 / 3)
    }  # fmt: skip
    assert accuracy(guesses[:, :3] % 3, labels % 3)["top5"] is None


@pytest.mark.parametrize("classes", [3, 40, 300])
def test_confusion_is_drawn_for_few_and_for_many_classes(classes, tmp_path):
    counts = np.diag(np.full(classes, 9))
    counts[1, 2] = 7
    counts[0, 1] = 3
    names = [f"class number {number} with a name" for number in range(classes)]
    draw_confusion(counts, names, tmp_path / "a.png", title="probe")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[1] >= 700
    lines = confusions(counts, names).splitlines()
    assert lines[1:] == [
        "class number 1 wi... -> class number 2 wi...: 7 (44%)",
        "class number 0 wi... -> class number 1 wi...: 3 (25%)",
    ]
