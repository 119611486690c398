"""Checkpoints come back bit for bit; damage is named; no kill, full disk or forgery loses a run."""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from train.run import checkpoint
from train.run.checkpoint import CheckpointError

FILES = ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"]


def write(folder: Path, step: int, *, num_values: int = 60, keep: int = 2) -> Path:
    values = torch.randn(num_values, generator=torch.Generator().manual_seed(step))
    tensors = {"model": {"conv.weight": values}, "optimizer": {"count": torch.tensor(step)}}
    return checkpoint.save(folder, step, tensors, {"images": step}, facts={"world": 1}, keep=keep)


def load(folder: Path) -> tuple[int | None, list[str]]:
    """The step that is loaded, after a look at its content, and the log."""
    lines: list[str] = []
    found = checkpoint.load_newest(folder, log=lines.append)
    if found is None:
        return None, lines
    values = found.tensors["model"]["conv.weight"]
    draw = torch.Generator().manual_seed(found.step)
    assert torch.equal(values, torch.randn(len(values), generator=draw))
    assert (found.state, found.facts) == ({"images": found.step}, {"world": 1})
    return found.step, lines


def valid_steps(folder: Path) -> list[int]:
    """Every step that would be loaded if the newer ones were gone."""
    copy, steps = folder.with_name("copy"), []
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    with contextlib.suppress(CheckpointError):
        while found := checkpoint.load_newest(copy, log=lambda line: None):
            steps.append(found.step)
            shutil.rmtree(found.path)
    return steps


def reseal(path: Path, **changes: object) -> None:
    """Give a checkpoint the manifest that a forger would: every size and hash is right."""
    manifest = json.loads((path / "manifest.json").read_text())
    for file in manifest["files"]:
        data = (path / file).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][file] = {"size": len(data), "sha256": digest}
    del manifest["sha256"]
    body = json.dumps(manifest | changes, indent=1).encode()
    seal = {"sha256": hashlib.sha256(body).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest | changes | seal, indent=1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's checkpoint folder with steps 10 and 20."""
    write(tmp_path / "checkpoints", 10)
    return write(tmp_path / "checkpoints", 20).parent


def test_every_value_comes_back_bitwise(tmp_path: Path):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model = {
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "odd floats": torch.tensor([-0.0, float("nan"), float("inf"), 1e-45]),
        "nan with a payload": torch.tensor([0x7FC12345, -1]).int().view(torch.float32),
        "0-d": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "one storage": base[1],
        "transposed": base.t(),
        "expanded": torch.tensor([1.5]).expand(4),
        "trained": torch.nn.Parameter(torch.randn(3)),
        "bf16": torch.randn(7).bfloat16(),
        "fp64": torch.randn(2, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
    }
    state = {"a": [float("nan"), -0.0, 0.1 + 0.2, 2**70, None, True], "b": 'J\u00f8rgen\udcff"'}
    facts = {"versions": {"torch": torch.__version__}, "world": 4}
    checkpoint.save(tmp_path / "c", 7, {"model": model, "none": {}}, state, facts=facts)
    found = checkpoint.load_newest(tmp_path / "c", log=pytest.fail)
    assert found is not None and found.path == tmp_path / "c" / "step-00000007"
    assert (found.step, found.facts, repr(found.state)) == (7, facts, repr(state))
    assert found.tensors.keys() == {"model", "none"} and found.tensors["none"] == {}
    assert found.tensors["model"].keys() == model.keys()
    for name, value in found.tensors["model"].items():
        assert (value.dtype, value.shape) == (model[name].dtype, model[name].shape), name
        saved = model[name].detach().contiguous().flatten()
        assert torch.equal(value.flatten().view(torch.uint8), saved.view(torch.uint8)), name


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, np.float64(1)], ids=["tuple", "key", "numpy"])
def test_what_json_would_change_is_refused_before_it_is_lost(folder: Path, value: object):
    with pytest.raises(ValueError, match=r"state\.json: JSON would change it"):
        checkpoint.save(folder, 30, {}, {"value": value}, facts={})
    assert load(folder) == (20, []) and not list(folder.glob(".*"))


@pytest.mark.parametrize("file", FILES)
def test_any_damage_to_any_file_is_named_and_the_one_before_used(folder: Path, file: str):
    path, draw = folder / "step-00000020" / file, random.Random(1)
    good = path.read_bytes()
    damaged = [bytearray(good) for _ in range(60)]
    for data in damaged:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    cut = [good[: int(part * len(good))] for part in (0, 0.01, 0.5, 0.99)]
    lines = []
    for data in [*damaged, *cut, None]:
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        step, lines = load(folder)
        assert step == 10 and len(lines) == 1
        assert lines[0].startswith(f"Checkpoint step-00000020 rejected: {file} ")
        assert lines[0].endswith(" Trying the one before.")
        assert data not in cut or file == "manifest.json" or "cut off or edited" in lines[0]
    assert "is missing" in lines[0]


@pytest.mark.parametrize(
    ("file", "forged", "reason"),
    [
        ("manifest.json", b"step: 20", "JSONDecodeError"),
        ("manifest.json", b"\xff" * 9, "UnicodeDecodeError"),
        ("manifest.json", b"[]", "TypeError"),
        ("manifest.json", b"[" * 10**6, "RecursionError"),
        ("manifest.json", b" " * (checkpoint.MAX_JSON_BYTES + 1), "more than 16777216"),
        ("manifest.json", {"step": 30}, "is of format 1, step 30"),
        ("manifest.json", {"version": 2}, "is of format 2, step 20"),
        ("manifest.json", {"files": {}}, "KeyError"),
        ("state.json", b'{"a":' * 10**6, "RecursionError"),
        ("state.json", b" " * (checkpoint.MAX_JSON_BYTES + 1), "more than 16777216"),
        ("model.safetensors", struct.pack("<Q", 2**62) + b"{}", "SafetensorError"),
        ("model.safetensors", struct.pack("<Q", 10**6) + b"[" * 10**6, "SafetensorError"),
    ],
)
def test_a_forged_file_is_rejected_with_its_reason(folder: Path, file, forged, reason):
    path = folder / "step-00000020"
    reseal(path)
    assert load(folder) == (20, []), "the seal itself is right"
    if isinstance(forged, bytes):
        (path / file).write_bytes(forged)
    if file != "manifest.json" or isinstance(forged, dict):
        reseal(path, **(forged if isinstance(forged, dict) else {}))
    step, lines = load(folder)
    assert step == 10 and f"rejected: {file} " in lines[0] and reason in lines[0]


def test_a_pickle_under_a_checkpoint_name_never_runs(folder: Path, tmp_path: Path):
    class Canary:
        def __reduce__(self):
            return Path.touch, (tmp_path / "canary",)

    for file in FILES[1:]:
        (folder / "step-00000020" / file).write_bytes(pickle.dumps(Canary()))
    reseal(folder / "step-00000020")
    assert load(folder)[0] == 10 and not (tmp_path / "canary").exists()
    pickle.loads((folder / "step-00000020" / FILES[2]).read_bytes())
    assert (tmp_path / "canary").exists(), "the canary was alive"


def test_all_invalid_refuses_in_one_line_with_every_reason_and_the_remedy(folder: Path):
    (folder / "step-00000020" / "state.json").unlink()
    (folder / "step-00000010" / "manifest.json").write_text("{}")
    lines: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_newest(folder, log=lines.append)
    assert "step-00000020: state.json is missing" in str(caught.value)
    assert "step-00000010: manifest.json cannot be parsed" in str(caught.value)
    assert str(caught.value).startswith(f"No checkpoint in {folder} can be used (step-00000020: ")
    assert str(caught.value).endswith("choose another --out, or delete that folder")
    assert "\n" not in str(caught.value)
    assert len(lines) == 2 and lines[1].endswith("No older is left.")


def test_none_is_returned_only_where_there_is_no_checkpoint(tmp_path: Path, folder: Path):
    assert load(tmp_path / "nowhere") == (None, [])
    for step in (10, 20):
        (folder / f"step-000000{step}").rename(folder / f".tmp-step-000000{step}")
    assert load(folder) == (None, []), "a half written folder is none"


def test_leftovers_are_never_loaded_and_go_with_the_next_save(folder: Path):
    for name in (".tmp-step-00000030", ".del-step-00000040", ".del-step-00000030"):
        shutil.copytree(folder / "step-00000020", folder / name)
    assert load(folder) == (20, [])
    write(folder, 30)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]


def test_the_highest_step_is_the_newest_whatever_the_clock_says(folder: Path):
    write(folder, 10**8 - 1)
    write(folder, 10**8)  # as text, it sorts before
    os.utime(folder / f"step-{10**8}", (1, 1))
    assert load(folder) == (10**8, [])


def test_pruning_keeps_the_newest_valid_ones_and_what_was_just_written(folder: Path):
    write(folder, 30, keep=3)
    assert valid_steps(folder) == [30, 20, 10]
    (folder / "step-00000030" / "state.json").write_text("{}")
    write(folder, 40, keep=1)  # 1 counts as 2, and the damaged 30 is none of them
    assert valid_steps(folder) == [40, 20] and (folder / "step-00000030").exists()
    write(folder, 5)  # a step lower than those kept
    assert valid_steps(folder) == [40, 20, 5]


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning_not_a_failure(folder, monkeypatch):
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", lambda path, **keys: keys or refuse(path))
    with pytest.warns(UserWarning, match=r"Delete .*step-00000010 by hand"):
        write(folder, 30)
    assert load(folder) == (30, []) and not (folder / "step-00000010").exists()


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(folder: Path):
    (folder / "step-00000020" / "model.safetensors").write_bytes(b"")
    write(folder, 20)
    assert load(folder) == (20, []) and not list(folder.glob(".*"))


def test_each_byte_is_on_disk_before_the_rename_and_the_rename_before_the_end(folder, monkeypatch):
    calls, rename = [], os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: calls.append(Path(f"/proc/self/fd/{fd}").readlink().name)
    )
    monkeypatch.setattr(
        os, "rename", lambda a, b: (calls.append(f"{a.name} -> {b.name}"), rename(a, b))
    )
    write(folder, 30, keep=3)
    tmp = ".tmp-step-00000030"
    assert calls[-4:] == ["manifest.json", tmp, f"{tmp} -> step-00000030", "checkpoints"]
    assert sorted([*calls[:-4], "manifest.json"]) == sorted(FILES)


def test_a_full_disk_keeps_what_was_there_and_leaves_no_rest(folder: Path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))  # the kernel refuses in mid-file
    try:
        with pytest.raises(CheckpointError, match=r"step-00000030 was not written: .*too large"):
            write(folder, 30, num_values=10**5)
        with pytest.raises(CheckpointError):
            write(folder, 20, num_values=10**5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder.glob(".*")) and valid_steps(folder) == [20, 10]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=479_000))
    with pytest.raises(CheckpointError, match=r"0\.5 MB free, 0\.5 MB needed"):
        write(folder, 30, num_values=10**5)  # 1.2 x 400 008 bytes
    assert valid_steps(folder) == [20, 10]


def kill_before_every_change(folder: Path) -> None:
    """SIGKILL a save before its first change of the disk, its second, ... until it gets through."""
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    for before, saved in (([10], 10), ([10, 20], 30)):
        start = folder.with_name(f"before-{saved}")
        for step in before:
            write(start, step)
        num_changes, is_through = 0, False
        while not is_through:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(start, folder)
            child = os.fork()
            if child == 0:
                left = iter(range(num_changes))

                def hook(event: str, args: tuple, left=left) -> None:
                    is_change = event in changes or (event == "open" and args[2] & os.O_WRONLY)
                    if is_change and next(left, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)

                sys.addaudithook(hook)
                write(folder, saved)
                os._exit(0)
            is_through = os.waitpid(child, 0)[1] == 0
            assert load(folder) in ((before[-1], []), (saved, []))
            num_live = len(list(folder.glob("step-*")))
            assert len(valid_steps(folder)) >= max(num_live, len(before))
            write(folder, 40)
            assert load(folder) == (40, []) and not list(folder.glob(".*"))
            num_changes += 1
        assert num_changes > 10


def kill_at_random(folder: Path) -> None:
    """SIGKILL a process that does nothing but save, eight times, at 0 to 60 ms after a save."""
    draw, newest = random.Random(8), 0
    for _ in range(8):
        has_saved, tell = os.pipe()
        child = os.fork()
        if child == 0:
            for step in itertools.count(newest + 1):
                write(folder, step, num_values=10**5)
                os.write(tell, b".")
        os.read(has_saved, 1)
        time.sleep(draw.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step, lines = load(folder)
        assert step is not None and step > newest and not lines
        newest = step


def test_kill_9_at_any_moment_leaves_a_checkpoint_to_load(tmp_path: Path):
    """In a fresh process of one thread, where fork is safe: this file as a script."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    ended = subprocess.run(command, env=env, stderr=subprocess.PIPE, timeout=60)
    assert ended.returncode == 0, ended.stderr.decode()


def optimizer_for(kind: str, model: torch.nn.Sequential) -> torch.optim.Optimizer:
    encoder, predictor = ({"params": list(part.parameters())} for part in (model[:2], model[2:]))
    groups = [encoder | {"name": "encoder"}, predictor | {"name": "predictor", "lr": 0.03}]
    match kind:
        case "sgd":  # without momentum the second group has no state at all
            groups[1]["momentum"] = 0.0
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4)
        case "fused sgd":
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, fused=True)
        case "tensor lr":
            return torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), foreach=False)
    return {"adamw": torch.optim.AdamW, "nadam": torch.optim.NAdam,
            "adafactor": torch.optim.Adafactor}[kind](groups, lr=0.01)  # fmt: skip


def train(
    kind: str, steps: range, *, found: checkpoint.Checkpoint | None = None, device: str = "cpu"
):
    """Model and optimizer after some steps, from the seed or from a checkpoint."""
    torch.manual_seed(0 if found is None else 1)
    parts = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 2)
    model = torch.nn.Sequential(*parts).to(device)
    torch.nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = optimizer_for(kind, model)
    if found is not None:
        model.load_state_dict(found.tensors["model"])
        scalars, lr = found.state["optimizer"], optimizer.param_groups[0]["lr"]
        checkpoint.restore_optimizer(optimizer, names, found.tensors["optimizer"], scalars)
        assert kind != "tensor lr" or optimizer.param_groups[0]["lr"] is lr  # a compiled step's own
    for step in steps:
        images = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
    return model, optimizer, names


@pytest.fixture
def one_thread():
    """Threads cost these tiny convolutions a second a test on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["sgd", "fused sgd", "adamw", "tensor lr", "nadam", "adafactor"])
def test_five_steps_equal_three_a_checkpoint_and_two(tmp_path: Path, kind: str):
    model, optimizer, names = train(kind, range(3))
    tensors, scalars = checkpoint.flatten_optimizer(optimizer, names)
    files = {"model": model.state_dict(), "optimizer": tensors}
    checkpoint.save(tmp_path, 3, files, {"optimizer": scalars}, facts={})
    found = checkpoint.load_newest(tmp_path, log=pytest.fail)
    _, optimizer, names = train(kind, range(0), found=found)
    assert checkpoint.flatten_optimizer(optimizer, names)[1] == scalars
    model, optimizer, names = train(kind, range(3, 5), found=found)
    straight_model, straight_optimizer, straight_names = train(kind, range(5))
    tensors, scalars = checkpoint.flatten_optimizer(optimizer, names)
    expected, expected_scalars = checkpoint.flatten_optimizer(straight_optimizer, straight_names)
    assert scalars == expected_scalars and tensors.keys() == expected.keys()
    tensors |= model.state_dict()
    for name, value in (expected | straight_model.state_dict()).items():
        assert torch.equal(tensors[name], value), name
        assert tensors[name].dtype == value.dtype and tensors[name].stride() == value.stride(), name
    for group, straight in zip(
        optimizer.param_groups, straight_optimizer.param_groups, strict=True
    ):
        assert {k: type(v) for k, v in group.items()} == {k: type(v) for k, v in straight.items()}


@pytest.mark.parametrize(
    ("kind", "difference"),
    [
        ("sgd", "has AdamW where this run has SGD"),
        ("tensor lr", r"has 2\.weight in group 1 where this run has 2\.weight in group 0"),
    ],
)
def test_the_state_of_another_optimizer_or_other_groups_is_refused(kind: str, difference: str):
    _, saved, saved_names = train("adamw", range(1))
    _, optimizer, names = train(kind, range(0))
    with pytest.raises(ValueError, match=difference):
        checkpoint.restore_optimizer(
            optimizer, names, *checkpoint.flatten_optimizer(saved, saved_names)
        )


@pytest.mark.parametrize(("capturable", "device"), [(False, "cpu"), (True, "meta")])
def test_state_keeps_its_dtype_and_the_step_count_torchs_device(capturable: bool, device: str):
    _, saved, names = train("adamw", range(1))
    model, optimizer, names_there = train("adamw", range(0), device="meta")
    tensors, scalars = checkpoint.flatten_optimizer(saved, names)
    tensors["state/0.weight/exp_avg"] = tensors["state/0.weight/exp_avg"].double()
    scalars["groups"][0]["capturable"] = capturable
    scalars["state"]["0.weight"] |= {"none": None, "count": 3, "scale": 0.1}
    checkpoint.restore_optimizer(optimizer, names_there, tensors, scalars)
    state = optimizer.state[model.get_parameter("0.weight")]
    assert (state["step"].device.type, state["exp_avg"].device.type) == (device, "meta")
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.float64, torch.float32)
    assert (state["none"], state["count"], state["scale"]) == (None, 3, 0.1)


def test_the_generator_goes_on_where_it_was(tmp_path: Path):
    torch.randn(5)
    checkpoint.save(tmp_path, 1, {"rng": checkpoint.rng_state()}, {}, facts={})
    expected = torch.randn(100)
    found = checkpoint.load_newest(tmp_path, log=pytest.fail)
    assert found is not None
    checkpoint.restore_rng(found.tensors["rng"])
    assert torch.equal(torch.randn(100), expected)


if __name__ == "__main__":  # the kill test
    torch.set_num_threads(1)
    kill_before_every_change(Path(sys.argv[1], "every"))
    kill_at_random(Path(sys.argv[1], "random"))
