"""Checkpoints: write, verify and read back named tensors and plain values, of any model.

    <run>/checkpoints/step-00000120/
        model.safetensors, optimizer.safetensors, ...   one file for each name in `tensors`
        state.json      plain values
        manifest.json   format version, step, size and SHA-256 of each file, `facts`, own SHA-256

A folder that exists is not yet a valid checkpoint: safetensors and torch.load do not detect a
flipped bit, so every byte must hash to the manifest's value. Nothing is ever unpickled: a file is
JSON or safetensors, or it is rejected.
A kill may leave .tmp-step-N, half written, or .del-step-N, half deleted: both are never read. Or
.old-step-N, complete, renamed while a new step-N replaced it: it is read where that is missing.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

FORMAT_VERSION = 1
MANIFEST, STATE = "manifest.json", "state.json"
MAX_JSON_BYTES = 16 * 2**20  # SGD over 170 parameters takes 40 kB
DAMAGE = (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, RecursionError, KeyError)
DAMAGE += (TypeError, AttributeError)  # what parsing a damaged file raises

Tensors = dict[str, torch.Tensor]
Plain = dict[str, Any]  # values that JSON gives back as they were
Names = dict[Any, str]  # parameter -> its name


class CheckpointError(OSError):
    """A checkpoint could not be written, or none of the existing ones can be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte was verified; its tensors are contiguous, on the CPU."""

    path: Path
    step: int
    tensors: dict[str, Tensors]
    state: Plain
    facts: Plain


@torch.no_grad()
def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensors],
    state: Plain,
    *,
    facts: Plain,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step`, rename it when complete, delete old ones; return its path.

    Tensors of any device and layout are stored as contiguous copies: values, dtypes and shapes
    are kept, channels-last strides and shared storage are not; load by `copy_`.
    The newest `keep` valid checkpoints stay, at least 2: one may be damaged later.
    One writer at a time. Disk: keep + 1 checkpoints. Host memory: up to twice the checkpoint.
    Raises   CheckpointError when the disk is full or refuses; earlier checkpoints are unchanged.
             ValueError when JSON would change a value of `state` or `facts`.
    """
    live, unfinished = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}"
    num_bytes = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder)
        free_mb, needed_mb = shutil.disk_usage(folder).free / 1e6, 1.2 * num_bytes / 1e6
        if free_mb < needed_mb:
            raise OSError(f"{free_mb:.1f} MB free, {needed_mb:.1f} MB needed")
        unfinished.mkdir()
        files = {STATE: _write(unfinished / STATE, _encode(STATE, state))}
        for name, group in tensors.items():
            file = f"{name}.safetensors"
            copies = {k: torch.empty(t.shape, dtype=t.dtype).copy_(t) for k, t in group.items()}
            files[file] = _write(unfinished / file, safetensors.torch.save(copies))
        manifest = {"version": FORMAT_VERSION, "step": step, "files": files, "about": facts}
        manifest["sha256"] = hashlib.sha256(_encode(MANIFEST, manifest)).hexdigest()
        _write(unfinished / MANIFEST, _encode(MANIFEST, manifest))
        _sync(unfinished)
        if live.exists():
            os.rename(live, folder / f".old-{live.name}")
        os.rename(unfinished, live)
        _sync(folder)
        _clear_leftovers(folder)
        _prune(folder, max(keep, 2), live)
    except OSError as error:
        raise CheckpointError(
            f"Checkpoint {live} was not written: {error}. Free space, or choose another --out"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # renamed away when all went well
    return live


def load_newest(folder: Path, *, log: Callable[[str], None]) -> Checkpoint | None:
    """Return the valid checkpoint of the highest step; None only where there are none at all.

    `log` is called with a line for each rejected checkpoint.
    Raises   CheckpointError when some exist and none is valid: a run never silently starts over.
    """
    candidates = _newest_first(folder) if folder.exists() else []
    reasons: list[str] = []
    for step, path in candidates:
        try:
            return _open(path, step)
        except ValueError as error:
            reasons.append(f"{path.name}: {error}")
            then = "Trying the one before." if candidates[len(reasons) :] else "No older is left."
            log(f"Checkpoint {path.name} rejected: {error}. {then}")
    if not reasons:
        return None
    raise CheckpointError(
        f"No checkpoint in {folder} can be used ({'; '.join(reasons)}): restore one from a copy; "
        "to start over, choose another --out, or delete that folder"
    )


def flatten_optimizer(optimizer: torch.optim.Optimizer, names: Names) -> tuple[Tensors, Plain]:
    """Return an optimizer's state as named tensors (not copied) and values that JSON keeps exactly.

    Keyed by parameter name. A value may be a tensor, a number, text, None or a tuple of the last
    three; `save` refuses the lists of tensors of LBFGS.
    """
    tensors: Tensors = {}

    def pack(owner: str, values: Plain) -> Plain:
        packed = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for key, value in values.items():
            assert not isinstance(value, dict), f"{owner}/{key} is a dict: it would not come back"
            if isinstance(value, torch.Tensor):
                tensors[f"{owner}/{key}"] = value.detach()
                packed[key] = {"tensor": f"{owner}/{key}"}
        return packed

    groups = []
    for index, group in enumerate(optimizer.param_groups):
        params = [names[param] for param in group["params"]]
        groups.append(pack(f"group/{index}", group | {"params": params}))
    state = {names[p]: pack(f"state/{names[p]}", values) for p, values in optimizer.state.items()}
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "state": state}


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Names, tensors: Tensors, scalars: Plain
) -> None:
    """Load what `flatten_optimizer` returned; the next step is the same bit for bit.

    Not by load_state_dict: that leaves the momentum of a channels-last weight contiguous, which
    the fused optimizers silently misread, and casts state to the parameter's dtype.
    Raises   ValueError when class, groups or names differ: resume with the run's own options.
    """
    groups, saved_groups = optimizer.param_groups, scalars["groups"]
    current, stored = [type(optimizer).__name__], [scalars["class"]]
    current += [f"{names[p]} in group {i}" for i, g in enumerate(groups) for p in g["params"]]
    stored += [f"{name} in group {i}" for i, g in enumerate(saved_groups) for name in g["params"]]
    for ours, theirs in zip_longest(current, stored):
        if ours != theirs:
            raise ValueError(
                f"The checkpoint's optimizer has {theirs} where this run has {ours}. Resume with "
                "the model and optimizer options of that run, or choose another --out."
            )
    optimizer.state.clear()
    for group, packed in zip(groups, saved_groups, strict=True):
        for key, value in packed.items():
            live = group.get(key)
            if isinstance(value, dict):  # in place: a compiled step holds this very tensor
                saved = tensors[value["tensor"]]
                group[key] = live.copy_(saved) if isinstance(live, torch.Tensor) else saved.clone()
            elif key != "params":
                group[key] = tuple(value) if isinstance(live, tuple) else value
        is_step_on_host = not (group.get("capturable") or group.get("fused"))  # as torch has it
        for param in group["params"]:
            for key, value in scalars["state"].get(names[param], {}).items():
                if isinstance(value, dict):
                    saved, on_host = tensors[value["tensor"]], key == "step" and is_step_on_host
                    value = saved.clone() if on_host else _placed(saved, param)
                optimizer.state[param][key] = value


def rng_state() -> Tensors:
    """Return the state of this process's torch generators: CPU and, where a GPU is used, GPU."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state()} | cuda


def restore_rng(states: Tensors) -> None:
    """Load `rng_state`; the GPU's only where both runs use one."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def _placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if value.shape == like.shape:
        return torch.empty_like(like, dtype=value.dtype).copy_(value)
    return value.to(like.device, copy=True)


def _encode(name: str, value: Plain) -> bytes:
    data = json.dumps(value, indent=1).encode()
    if repr(json.loads(data)) != repr(value):  # repr: True is not 1, and nan is nan
        raise ValueError(f"{name}: JSON would change it; no tuples, number keys or numpy numbers")
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{name}: {len(data)} bytes, over {MAX_JSON_BYTES}; store it as a tensor")
    return data


def _write(path: Path, data: bytes) -> Plain:
    path.write_bytes(data)
    _sync(path)
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # of a folder: without it a power cut can undo the rename
    finally:
        os.close(descriptor)


def _clear_leftovers(folder: Path) -> None:
    for kind in (".del-", ".tmp-", ".old-"):  # .del- first: _discard needs its name free
        for path in folder.glob(f"{kind}step-*"):
            live = path.with_name(path.name.removeprefix(".old-"))
            if live.exists():  # the path itself when it is no .old-
                _discard(path)
            else:
                os.rename(path, live)


def _discard(path: Path) -> None:
    """Rename to a name that is never read, then delete: a kill leaves no half checkpoint."""
    doomed = path.with_name(".del-" + path.name[path.name.index("step-") :])
    try:
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        warnings.warn(f"Delete {path} by hand, it only takes space: {error}", stacklevel=2)


def _prune(folder: Path, keep: int, written: Path) -> None:
    num_valid = 0
    for step, path in _newest_first(folder):
        if num_valid < keep:
            with contextlib.suppress(ValueError):
                _open(path, step)
                num_valid += 1
        elif path != written:
            _discard(path)


def _newest_first(folder: Path) -> list[tuple[int, Path]]:
    names = (re.fullmatch(r"(\.old-)?step-([0-9]{8,})", path.name) for path in folder.iterdir())
    steps = sorted(((int(name[2]), not name[1], name[0]) for name in names if name), reverse=True)
    return [(step, folder / name) for step, _, name in steps]


def _read(path: Path, size: int | None = None) -> bytes:
    if not path.is_file():  # opening a FIFO would block
        raise ValueError("is missing")
    num_bytes = path.stat().st_size
    if size not in (None, num_bytes):
        raise ValueError(f"has {num_bytes} bytes, not {size} (cut off or edited)")
    if path.suffix == ".json" and num_bytes > MAX_JSON_BYTES:
        raise ValueError(f"has {num_bytes} bytes, more than {MAX_JSON_BYTES}")
    return path.read_bytes()


def _open(path: Path, step: int) -> Checkpoint:
    """Read and verify a checkpoint; ValueError names the file that differs, and why."""
    file, contents = MANIFEST, {}
    try:
        manifest = json.loads(_read(path / file))
        if manifest.pop("sha256") != hashlib.sha256(_encode(file, manifest)).hexdigest():
            raise ValueError("sha256 differs (disk damage or edit)")
        if (manifest["version"], manifest["step"]) != (FORMAT_VERSION, step):
            raise ValueError(f"is of format {manifest['version']}, step {manifest['step']}")
        for file, entry in manifest["files"].items():
            data = _read(path / file, entry["size"])
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise ValueError("sha256 differs (disk damage or edit)")
            parse = json.loads if file == STATE else safetensors.torch.load
            contents[file.removesuffix(".safetensors")] = parse(data)
        state = contents.pop(STATE)
        return Checkpoint(path, step, contents, state, manifest["about"])
    except DAMAGE as error:
        raise ValueError(f"{file} cannot be parsed ({error!r})") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} {error}") from error
