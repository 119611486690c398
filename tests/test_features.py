"""train/features.py on pictures cut from photos: rows, resume, ranks, neighbours, duplicates."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.pack import pack_root
from test_evaluate import TINY, call
from test_records import of_bytes, record, write_recordio, write_tfrecord
from train import features as program
from train.config.parser import parse_config
from train.evaluation import feature_report, feature_rounds, similar
from train.run import checkpoint
from train.run.state import build_method

CHANNELS_LAST = torch.channels_last
SIZE = 16
FLAGS = ["--k=5", f"--eval.size={SIZE}", f"--eval.resize={SIZE}", "--eval.batch_size=8"]
COPY, NEAR, BAD = "sky/copy.png", "sky/near.png", "sky/05.png"


def write_run(out: Path, seed: int = 0) -> Path:
    """A run folder with random weights, and statistics that are no longer those of the start."""
    config = parse_config(["--data.root=x", *TINY])
    torch.manual_seed(seed)
    method = build_method(config, images=100, device=torch.device("cpu"))
    state = {
        name: torch.rand_like(tensor) + 0.5 if name.endswith("running_var") else tensor
        for name, tensor in method.state_dict().items()
    }
    checkpoint.save(out / "checkpoints", 8, {"model": state}, {}, facts={})
    (out / "config.yaml").write_text(json.dumps(dataclasses.asdict(config)))  # is YAML too
    return out


@pytest.fixture(autouse=True)
def without_neighbours_png(monkeypatch) -> None:
    """It takes seconds: drawn once, for `straight`."""
    monkeypatch.setattr(feature_report.pictures, "draw_neighbours", lambda *_, first: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, photos) -> Path:
    """20 pictures in two folders, a copy and a near copy of one, and one that is cut off."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(20):
        photo, label = photos[number % 2], ("sky", "tree")[number % 2]
        y, x = rng.integers(photo.shape[0] - SIZE), rng.integers(photo.shape[1] - SIZE)
        (root / label).mkdir(exist_ok=True)
        pixels = photo[y : y + SIZE, x : x + SIZE]
        Image.fromarray(pixels).save(root / label / f"{number // 2:02d}.png")
    original = root / "tree" / "03.png"
    shutil.copy(original, root / COPY)
    pixels = np.array(Image.open(original)) // 2 * 2  # invisible
    Image.fromarray(pixels).save(root / NEAR)
    (root / BAD).write_bytes((root / BAD).read_bytes()[:90])
    return root


def result(capfd, run: Path, *flags: object) -> dict:
    capfd.readouterr()
    call(program, run, *FLAGS, *flags)
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def refusal(capfd, *arguments: object, code: int = 1) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(program, *arguments)
    assert stop.value.code == code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def straight(run, pictures, tmp_path_factory) -> Path:
    """The folder of an undisturbed call."""
    out = tmp_path_factory.mktemp("straight") / "features"
    call(program, run, *FLAGS, f"--data.root={pictures}", f"--out={out}")
    return out


def arrays(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path) for path in sorted(out.glob("*.npy"))}


def names(out: Path) -> list[str]:
    return (out / "names.txt").read_text().splitlines()


def test_each_row_is_the_encoders_output_for_the_picture_of_its_name(run, pictures, straight):
    config = parse_config(["--config", str(run / "config.yaml")])
    method = build_method(config, images=100, device=torch.device("cpu")).eval()
    saved = checkpoint.load_newest(run / "checkpoints", log=print)
    assert saved is not None
    method.load_state_dict(saved.tensors["model"])
    found = np.load(straight / "features.npy", mmap_mode="r")
    listed = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png"))
    assert names(straight) == [name for name in listed if name != BAD]
    assert found.shape == (21, 64) and found.dtype == np.float32
    for name, row in zip(names(straight), found, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(pictures / name))) / 255
        x = (pixels - torch.tensor(config.data.mean)) / torch.tensor(config.data.std)
        with torch.no_grad():
            expected = method.backbone(x.permute(2, 0, 1)[None].to(memory_format=CHANNELS_LAST))[0]
        torch.testing.assert_close(torch.from_numpy(row.copy()), expected, rtol=1e-4, atol=1e-5)
    labels = (straight / "labels.txt").read_text().splitlines()
    assert labels == [name.split("/")[0] for name in names(straight)]


def test_an_unreadable_picture_has_no_row_and_is_listed_with_the_reason(straight):
    (entry,) = map(json.loads, (straight / "bad_files.jsonl").read_text().splitlines())
    assert entry["name"] == BAD and entry["reason"]
    found = json.loads((straight / "features.json").read_text())
    assert (found["images"], found["bad_images"]) == (21, 1)
    assert json.loads((straight / "status.json").read_text())["state"] == "finished"
    assert not (straight / "checkpoints").exists() and not list(straight.glob("*.part"))


def test_copies_and_near_copies_are_found_and_are_neighbours(straight):
    listed, found = names(straight), json.loads((straight / "duplicates.json").read_text())
    assert found["exact"] == [[COPY, "tree/03.png"]]
    pairs = {tuple(pair["images"]) for pair in found["near"]}
    assert {(COPY, NEAR), (NEAR, "tree/03.png")} <= pairs
    assert (COPY, "tree/03.png") not in pairs  # already among the exact ones
    assert len(found["near"]) == found["near_pairs"]
    near, cosines = (np.load(straight / f"{name}.npy") for name in ("neighbours", "cosines"))
    features = np.load(straight / "features.npy")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    plain = unit @ unit.T
    for pair in found["near"]:
        a, b = map(listed.index, pair["images"])
        assert pair["cosine"] == pytest.approx(plain[a, b], abs=1e-5) and plain[a, b] > 0.99
    assert near[listed.index(COPY), 0] == listed.index("tree/03.png")
    assert set(near[listed.index("tree/03.png"), :2]) == {listed.index(COPY), listed.index(NEAR)}
    assert cosines[listed.index(COPY), 0] == pytest.approx(1, abs=1e-6)


def test_pictures_show_the_map_and_the_neighbours(straight):
    for name in ("map.png", "neighbours.png"):
        with Image.open(straight / name) as picture:
            assert min(picture.size) > 500
            assert np.asarray(picture.convert("RGB")).std() > 20


def test_a_stopped_call_saves_what_is_done_and_ends_as_if_it_had_not_been_stopped(
    run, pictures, straight, tmp_path, capfd, monkeypatch
):
    whole, seen, out = feature_rounds.features_of, [], tmp_path / "out"

    def stopping(backbone, images, config):
        seen.append(len(images))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(backbone, images, config)

    monkeypatch.setattr(feature_rounds, "features_of", stopping)
    flags = [run, *FLAGS, "--map=none", f"--data.root={pictures}", f"--out={out}"]
    assert "the same command continues" in refusal(capfd, *flags, code=130)
    assert seen == [8, 8] and not (out / "features.npy").exists()
    done = json.loads((out / "progress.json").read_text())
    assert (done["images"], done["rows"], done["bad"]) == (16, 15, 1)
    assert json.loads((out / "status.json").read_text())["state"] == "preempted"
    with (out / "features.npy.part").open("ab") as file:
        file.write(b"of a killed process")
    with (out / "bad_files.jsonl").open("a") as file:
        file.write('{"name": "read by a killed process"}\n')
    call(program, *flags)
    assert seen == [8, 8, 6]
    assert same(arrays(out), arrays(straight)) and names(out) == names(straight)
    for name in ("bad_files.jsonl", "duplicates.json"):
        assert (out / name).read_text() == (straight / name).read_text()


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_neighbours_are_resumed_and_only_they_are_computed_for_another_k(
    run, pictures, straight, tmp_path, capfd, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    monkeypatch.setattr(feature_rounds, "features_of", None)
    monkeypatch.setitem(similar.QUERIES, "cpu", 6)
    whole, starts = similar.nearest_others, []

    def stopping(*arguments, start, **options):
        starts.append(start)
        for number, part in enumerate(whole(*arguments, start=start, **options)):
            if len(starts) == 1 and number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield part

    monkeypatch.setattr(similar, "nearest_others", stopping)
    flags = [run, *FLAGS, "--k=7", "--map=none", f"--data.root={pictures}", f"--out={out}"]
    refusal(capfd, *flags, code=130)
    assert not (out / "neighbours.npy").exists()
    call(program, *flags)
    assert starts == [0, 12]
    found, before = arrays(out), arrays(straight)
    assert found["neighbours"].shape == (21, 7)
    np.testing.assert_allclose(found["cosines"][:, :5], before["cosines"], atol=1e-6)
    assert json.loads((out / "features.json").read_text())["k"] == 7
    call(program, *flags, "--k=0")
    assert not (out / "neighbours.npy").exists()
    assert json.loads((out / "duplicates.json").read_text())["near"] == []


@pytest.mark.dist
def test_two_ranks_give_what_one_gives(run, pictures, straight, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            program.__file__, run, *FLAGS, "--eval.batch_size=3", "--map=none",
            f"--data.root={pictures}", f"--out={out}",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, expected = arrays(out), arrays(straight)
    for name in ("features", "cosines"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert np.array_equal(found["content"], expected["content"])
    assert names(out) == names(straight)
    for name in ("bad_files.jsonl", "labels.txt"):
        assert (out / name).read_text() == (straight / name).read_text()
    assert json.loads(done.stdout.splitlines()[-1])["near_duplicates"] >= 2


def pack(kind: str, folder: Path, shards: Path) -> None:
    """The folder's images, in its order, as shards."""
    if kind == "tar":
        pack_root(str(folder), shards, shard_bytes=4_000)
        return
    shards.mkdir()
    images = [path.read_bytes() for path in sorted(folder.rglob("*.png"))]
    if kind == "TFRecord":
        examples = [{"image/encoded": of_bytes(image)} for image in images]
        write_tfrecord(shards / "train-00000-of-00001", examples)
    else:
        records = [record(image, 0, number) for number, image in enumerate(images)]
        write_recordio(shards / "train.rec", records)


@pytest.mark.parametrize("kind", ["tar", "TFRecord", "RecordIO"])
def test_shards_and_a_folder_give_the_same_rows(kind, run, pictures, straight, tmp_path, capfd):
    good = tmp_path / "good"
    shutil.copytree(pictures, good)
    (good / BAD).unlink()
    pack(kind, good, tmp_path / "shards")
    flags = [f"--data.root={tmp_path}/shards", f"--out={tmp_path}/out", "--map=none"]
    found = result(capfd, run, *flags)
    assert found["images"] == 21 and found["exact_duplicates"] == 1
    assert same(
        {name: a for name, a in arrays(tmp_path / "out").items() if name != "ids"},
        {name: a for name, a in arrays(straight).items() if name != "ids"},
    )
    if kind == "tar":
        inside = [name.split(": ")[1] for name in names(tmp_path / "out")]
        assert inside == names(straight)


def test_a_folder_without_classes_has_features_and_no_labels(run, pictures, tmp_path, capfd):
    found = result(capfd, run, f"--data.root={pictures}/tree", f"--out={tmp_path}/out")
    assert found["images"] == 10 and not (tmp_path / "out" / "labels.txt").exists()
    assert (tmp_path / "out" / "map.png").exists()


def test_what_belongs_to_other_images_or_another_encoder_is_refused(
    run, pictures, straight, tmp_path, capfd
):
    out, before = tmp_path / "out", arrays(straight)
    shutil.copytree(straight, out)
    line = refusal(capfd, run, *FLAGS, f"--data.root={pictures}/tree", f"--out={out}")
    assert f"--out {out} holds features of something else: images was" in line
    other = write_run(tmp_path / "other", seed=1)
    line = refusal(capfd, other, *FLAGS, f"--data.root={pictures}", f"--out={out}")
    assert "encoder was" in line and "Give another folder" in line
    flags = [run, *FLAGS, f"--data.root={pictures}", f"--out={out}"]
    assert "eval.size was 16 and is 8" in refusal(capfd, *flags, "--eval.size=8")
    assert same(arrays(out), before)
    (out / "progress.json").unlink()
    assert "has a features.npy of another program" in refusal(capfd, *flags)


def test_bad_input_is_refused_in_one_line_and_leaves_nothing(run, pictures, tmp_path, capfd):
    out = tmp_path / "out"
    flags = [f"--data.root={pictures}", f"--out={out}"]
    assert "is not a run folder" in refusal(capfd, tmp_path, *flags)
    assert "No images under" in refusal(capfd, run, f"--data.root={tmp_path}/no", f"--out={out}")
    line = refusal(capfd, run, f"--data.root={pictures}", f"--out={pictures}/sky/out")
    assert "is in the images' folder" in line
    line = refusal(capfd, run, f"--data.root={pictures}", f"--out={run}")
    assert "is the folder of a training" in line
    (tmp_path / "bad").mkdir()
    shutil.copy(pictures / BAD, tmp_path / "bad")
    line = refusal(capfd, run, *FLAGS, f"--data.root={tmp_path}/bad", f"--out={out}")
    assert f"no image under {tmp_path}/bad can be read" in line
    shutil.rmtree(out, ignore_errors=True)
    saved = checkpoint.load_newest(run / "checkpoints", log=print)
    assert saved is not None
    diverged = shutil.copytree(run, tmp_path / "diverged")
    model = saved.tensors["model"]
    model["backbone.conv1.weight"] *= np.nan
    checkpoint.save(diverged / "checkpoints", 9, {"model": model}, {}, facts={})
    assert "are not finite" in refusal(capfd, diverged, *FLAGS, *flags)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--data.roof=x"], "perhaps you meant --data.root"),
        (["--k=-1"], "k must be at least 0"),
        (["--duplicate_cosine=1.5"], "duplicate_cosine must be in -1 .. 1"),
        (["--map=tsne"], "expected pca or umap or none, got tsne"),
        (["--format=parquet"], "--format parquet needs pyarrow: pip install pyarrow"),
        (["--map=umap"], "--map umap needs umap-learn: pip install umap-learn"),
        (["--out="], "--out is empty"),
    ],
)
def test_impossible_flags_are_refused(run, tmp_path, capfd, monkeypatch, flags, part):
    find = importlib.util.find_spec
    missing = {"pyarrow": None, "umap": None}
    monkeypatch.setattr(
        importlib.util, "find_spec",
        lambda name, *more: missing[name] if name in missing else find(name, *more),
    )  # fmt: skip
    assert part in refusal(capfd, run, "--data.root=x", f"--out={tmp_path}/o", *flags, code=2)


def test_what_is_missing_is_asked_for(run, capfd):
    line = refusal(capfd, run, code=2)
    assert "--data.root" in line and "--out" in line


def test_parquet_has_names_labels_and_features(run, pictures, straight, tmp_path, capfd):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    out = tmp_path / "out"
    shutil.copytree(straight, out)
    result(capfd, run, "--format=parquet", f"--data.root={pictures}", f"--out={out}")
    table = parquet.read_table(out / "features.parquet").to_pydict()
    assert table["name"] == names(out)
    assert table["label"] == (out / "labels.txt").read_text().splitlines()
    assert np.array_equal(np.float32(table["features"]), np.load(out / "features.npy"))
