"""Take over another tool's weights: `python train/import_checkpoint.py FILE --out RUN`.

FILE is a checkpoint of the official SimSiam or MoCo, of lightly or of solo-learn with a ResNet; the
names in it tell which (train/run/layouts.py). Only tensors are read, never code. RUN becomes a run
folder of step 0 for train/export.py and for `train/main.py --init RUN` with another --out; its
other settings come from train/main.py's flags, e.g. --config.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import hashlib
import json
import pickle
import re
import zipfile
import zlib
from collections import Counter
from contextlib import closing
from pathlib import Path

import torch
from jsonargparse import ArgumentError
from safetensors import SafetensorError

from train.config import Config
from train.config.parser import build_parser, explain
from train.methods.simsiam import SimSiam
from train.run import checkpoint, state
from train.run.checkpoint import Tensors
from train.run.folder import RunFolder, environment
from train.run.layouts import Imported, convert
from train.run.program import exit_on_error, first_line, refuse

MAX_GIB = 8  # a ResNet-101 with heads, momentum encoder and optimizer takes less than 1
DAMAGED = RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError
DAMAGED += zipfile.BadZipFile, zlib.error, SafetensorError  # raised for truncated and foreign files


def read_tensors(path: Path) -> Tensors:
    """The state dict in a file of torch.save, without "module.". Raises: ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.stat().st_size > MAX_GIB << 30:
        raise ValueError(f"{path} has more than {MAX_GIB} GiB: keep its state_dict alone")
    try:
        if zipfile.is_zipfile(path):  # torch.load does not notice flipped bits
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged} in it differs, copy it again")
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain attributes
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
        if needed is None:
            raise ValueError(f"{path} is no checkpoint of torch.save, or is damaged") from error
        if needed[2] == "whose module":  # torch has a list of modules such as os
            raise ValueError(f"{path} would call {needed[1]}: do not trust it") from error
        raise ValueError(
            f"{path} holds a {needed[1]} beside its tensors, and only tensors are read. If you "
            f'trust the file, extract them: python -c "import torch; torch.save('
            f"torch.load('{path}', weights_only=False)['state_dict'], 'tensors.pt')\""
        ) from error
    except DAMAGED as error:
        reason = first_line(error)
        raise ValueError(
            f"{path} is no checkpoint of torch.save, or is damaged: {reason}"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} has a state_dict that is a {type(content).__name__}, not a dict")
    tensors = {
        name.removeprefix("module."): tensor
        for name, tensor in content.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(
                f"{path} has a {name} that is sparse, quantized or without data: save plain tensors"
            )
    return tensors


def fitted(imported: Imported, config: Config) -> Tensors:
    """The tensors in our dtypes, every name and shape checked. Raises: ValueError."""
    with torch.device("meta"):
        expected = SimSiam(config.model, config.method).state_dict()
    state.check_fits(expected, imported.tensors)
    for name, tensor in imported.tensors.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype} and must be of {expected[name].dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite: that training diverged")
    return {name: tensor.to(expected[name].dtype) for name, tensor in imported.tensors.items()}


def import_file(path: Path, config: Config) -> dict:
    """Write the run folder config.out; returns what was matched. Raises: ValueError, OSError."""
    if not config.out:
        raise ValueError("--out RUN is missing: the run folder to write")
    source = read_tensors(path)
    try:
        imported = convert(source)
        model = dataclasses.replace(config.model, **imported.network)
        config = dataclasses.replace(config, model=model)
        tensors = fitted(imported, config)
    except ValueError as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    if model.stem == "cifar" and config.eval.size > 64:
        imported.notes.append(
            f"a 3x3 stem is for small images, but eval.size is {config.eval.size}: "
            "--config configs/cifar10.yaml has CIFAR's size, mean and std"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = {"file": str(path), "sha256": digest, "tool": imported.tool}
    write_run(config, tensors, origin)
    parts = Counter(name.split(".")[0] for name in tensors)
    report = {"run": config.out, "tool": imported.tool, "network": imported.network}
    report["matched"] = dict(parts)
    report["missing"] = [part for part in ("projector", "predictor") if part not in parts]
    report |= {"left_out": imported.left_out, "unexpected": imported.unexpected}
    return report | {"notes": imported.notes}


def write_run(config: Config, tensors: Tensors, origin: dict) -> None:
    """A run folder that holds the tensors as its step 0. Raises: ValueError if it has a run."""
    with closing(RunFolder(config.out)) as folder:
        if any(folder.checkpoints.iterdir()):
            raise ValueError(f"--out {config.out} holds checkpoints already: choose another folder")
        folder.describe(dataclasses.asdict(config), environment(1, torch.device("cpu")))
        checkpoint.save(folder.checkpoints, 0, {"model": tensors}, {}, facts={"imported": origin})
        folder.status("finished", 0)


def print_report(report: dict) -> None:
    """For people, on stderr."""
    network = ", ".join(f"{name} {value}" for name, value in report["network"].items())
    lines = [
        f"{report['tool']}: {network}",
        *[f"  matched     {count} tensors of {part}" for part, count in report["matched"].items()],
        *[f"  missing     {part}: random with --init" for part in report["missing"]],
        *[f"  left out    {name}: {reason}" for name, reason in report["left_out"].items()],
        *[f"  unexpected  {name}" for name in report["unexpected"]],
        *[f"  note        {note}" for note in report["notes"]],
    ]
    print("\n".join(lines), file=sys.stderr)


def main() -> None:
    """Read the flags, import, print the report as the last line of stdout."""
    description = "Import another tool's checkpoint as a run folder."
    parser = build_parser("train/import_checkpoint.py", description, usage="[flags] FILE", root="")
    parser.add_argument("file", help="checkpoint; it decides the --model flags")
    try:
        flags = vars(parser.instantiate(parser.parse_args()))
        path = Path(flags.pop("file"))
        flags.pop("config", None)
        config = Config(**flags)
        if config.init:
            raise ValueError(
                "--init is for train/main.py: the weights come from FILE, leave it out"
            )
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        refuse(explain(str(error)))
    with exit_on_error(Path(config.out)):
        report = import_file(path, config)
    print_report(report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
