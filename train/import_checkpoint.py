"""Take over another tool's weights: `python train/import_checkpoint.py FILE --out RUN`.

FILE is a checkpoint of the official SimSiam or MoCo, of lightly or of solo-learn with a ResNet, or
a state dict with torchvision's names: of torchvision, of timm, or what train/export.py wrote. The
names in it tell which. It may be of torch.save or of safetensors; only tensors are read, never
code. RUN becomes a run folder of step 0 for train/export.py and for `train/main.py --init RUN` with
another --out; its other settings come from train/main.py's flags, e.g. --config.

Heads are imported if they compute what ours do. A bias before a batch norm, which cancels in
training, goes into the running mean: norm(W x + b; mean) = norm(W x; mean - b). Equal names are not
equal networks: a projector whose last batch norm has a weight and a bias (the paper's baseline) is
another one, and is left out with that reason.

Sources: facebookresearch/simsiam@a7bc177, facebookresearch/moco@132aea9, lightly@e8d317f,
solo-learn@9187ea3 and 1.0.2.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import hashlib
import pickle
import re
import zipfile
import zlib
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentError
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.streams import print_result, protect_output
from train.config import Config
from train.config.parser import build_parser, explain
from train.methods.simsiam import SimSiam
from train.network.resnet import LAYERS, Layers
from train.run import checkpoint, state
from train.run.checkpoint import Tensors
from train.run.folder import RunFolder, environment
from train.run.program import exit_on_error, first_line, refuse

MAX_GIB = 8  # a wide ResNet with heads, momentum encoder and optimizer takes less than 1
DAMAGED = RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError
DAMAGED += zipfile.BadZipFile, zlib.error, SafetensorError  # raised for truncated and foreign files


class Layout(NamedTuple):
    """The prefixes of a tool's names, without the "module." of DataParallel."""

    tool: str
    backbone: str
    projector: str
    predictor: str


LAYOUTS = (
    Layout("SimSiam", "encoder.", "encoder.fc.", "predictor."),
    Layout("MoCo", "encoder_q.", "encoder_q.fc.", "predictor."),
    Layout("lightly", "backbone.", "projection_head.layers.", "prediction_head.layers."),
    Layout("lightly", "backbone.", "projection_mlp.layers.", "prediction_mlp.layers."),
    Layout("solo-learn", "backbone.", "projector.", "predictor."),
    Layout("solo-learn", "encoder.", "projector.", "predictor."),  # up to 1.0.2
)
PLAIN = Layout("torchvision's names", "", "", "")
"""A ResNet by itself."""
NOT_NEEDED = (
    (r"encoder_k\.|momentum_|\w+_momentum\.", "momentum encoder"),
    (r"queue", "queue of negatives"),
    (r"(online_)?classifier\.|(\w+\.)?fc\.", "classifier trained on labels"),
)


@dataclass
class Imported:
    """The tensors of a file under our names, and those left out."""

    tool: str
    network: dict[str, Any]
    """Fields of ModelConfig."""
    tensors: Tensors
    left_out: dict[str, str] = field(default_factory=dict)
    """Why, by prefix in the file."""
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_tensors(path: Path) -> Tensors:
    """The state dict in a file, without "module.". Raises: ValueError."""
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
            is_safe = path.suffix == ".safetensors"
            load = partial(torch.load, map_location="cpu", weights_only=True)
            content = (load_file if is_safe else load)(path)
    except pickle.UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", str(error))
        if needed is None:
            raise ValueError(f"{path} is no file of torch.save, or is damaged") from error
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
            f"{path} is no file of torch.save or safetensors, or is damaged: {reason}"
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


def detect(names: list[str]) -> Layout:
    """The layout of the names in a file. Raises: ValueError if it is none of LAYOUTS."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if "conv1.weight" in names:
        return PLAIN
    fitting = [layout for layout in LAYOUTS if has(layout.backbone)]
    if not fitting:
        known = [*sorted({f"{layout.backbone}*" for layout in LAYOUTS}), "conv1.weight"]
        raise ValueError(
            f"it has no tensors named {', '.join(known)}, but {', '.join(names[:3]) or 'none'}"
        )
    headless = fitting[0]._replace(tool="a backbone without heads")
    return next((layout for layout in fitting if has(layout.projector)), headless)


def convert(source: Tensors) -> Imported:
    """Another tool's tensors under our names. Raises: ValueError if the backbone is not ours."""
    layout = detect(list(source))
    parts: dict[str, Tensors] = {"projector": {}, "predictor": {}, "backbone": {}}
    rest = []
    for name, tensor in source.items():
        owner = next((part for part in parts if name.startswith(getattr(layout, part))), None)
        owner = "backbone" if layout is PLAIN else owner
        if owner is None or re.match(r"((backbone|encoder)\.)?fc\.\w+$", name):
            rest.append(name)
        else:
            parts[owner][name.removeprefix(getattr(layout, owner))] = tensor
    backbone = torchvision_names(parts["backbone"])
    network = describe_backbone(backbone)
    tensors = {f"backbone.{name}": tensor for name, tensor in backbone.items()}
    imported = Imported(layout.tool, network, tensors)
    for name in rest:  # of none of the three networks
        reason = next((text for pattern, text in NOT_NEEDED if re.match(pattern, name)), None)
        if reason is None:
            imported.unexpected.append(name)
        else:
            owner, dot, _ = name.partition(".")
            imported.left_out[owner + dot + "*" * len(dot)] = reason
    try:
        take_heads(imported, parts["projector"], parts["predictor"])
    except ValueError as error:
        for part in ("projector", "predictor"):
            if parts[part]:
                imported.left_out[f"{getattr(layout, part)}*"] = str(error)
    if layout.tool == "solo-learn" and network["stem"] == "cifar":
        imported.notes.append("solo-learn pads its 3x3 stem by 2, ours by 1: features differ")
    return imported


def torchvision_names(backbone: Tensors) -> Tensors:
    """Undo lightly's nn.Sequential(*list(resnet.children())[:-1]) and its own ResNet's names."""
    children = {}
    if "0.weight" in backbone:  # conv1, bn1, (relu, maxpool,) layer1 ...
        first = 4 if any(name.startswith("7.") for name in backbone) else 2
        children = {"0": "conv1", "1": "bn1"}
        children |= {str(first + index): f"layer{index + 1}" for index in range(4)}
    renamed: Tensors = {}
    for name, tensor in backbone.items():
        child, _, rest = name.partition(".")
        full = f"{children.get(child, child)}.{rest}"
        renamed[full.replace(".shortcut.", ".downsample.")] = tensor
    norms = [name.removesuffix("running_mean") for name in renamed if name.endswith("running_mean")]
    # weights from before PyTorch 0.4.1 lack it, torchvision's first ones among them
    return {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms} | renamed


def describe_backbone(backbone: Tensors) -> dict[str, Any]:
    """Architecture, stem and width, from names and shapes. Raises: ValueError."""
    kind = "bottleneck" if "layer1.0.conv3.weight" in backbone else "basic"
    blocks = {tuple(name.split(".")[:2]) for name in backbone if name.startswith("layer")}
    depths = tuple(sum(layer == f"layer{i}" for layer, _ in blocks) for i in range(1, 5))
    names = "conv1.weight", "layer1.0.conv2.weight"
    stem, inner = (tuple(backbone.get(name, torch.empty(0)).shape) for name in names)
    is_stem = len(stem) == 4 and stem[2] in (3, 7)

    def is_same(known: Layers) -> bool:
        same_inner = kind == "basic" or inner[:2] == known.inner(stem[0])
        return (known.block, known.depths) == (kind, depths) and same_inner

    arch = next((name for name, known in LAYERS.items() if is_stem and is_same(known)), None)
    if arch is None:
        raise ValueError(
            f"its backbone has {kind} blocks {depths}, a first convolution of shape {stem} and "
            f"layer1.0.conv2 of {inner}: known are {', '.join(LAYERS)} with a 7x7 or 3x3 stem"
        )
    return {"arch": arch, "stem": {7: "imagenet", 3: "cifar"}[stem[2]], "width": stem[0]}


def take_heads(imported: Imported, projector: Tensors, predictor: Tensors) -> None:
    """Add both heads under our names, or neither. Raises: ValueError if they are not SimSiam's."""
    if not (projector and predictor):
        raise ValueError("SimSiam's heads are a projector and a predictor; this file has only one")
    layers, end = split_layers(projector), split_layers(predictor)
    if len(layers) % 2 or len(end) != 3 or end[2].keys() != {"weight", "bias"}:
        raise ValueError("not SimSiam's: linear, norm, ..., norm and linear, norm, linear")
    pairs = list(zip(layers[::2], layers[1::2], strict=True))
    tensors = linear_norm("predictor.0", end[0], end[1], affine=True)
    for index, (linear, norm) in enumerate(pairs):
        is_last = index == len(pairs) - 1
        tensors |= linear_norm(f"projector.{index}", linear, norm, affine=not is_last)
    tensors |= {f"predictor.1.{name}": tensor for name, tensor in end[2].items()}
    imported.tensors |= tensors
    imported.network |= {
        "head_norm": "default",
        "projector_layers": len(pairs),
        "projector_hidden": len(layers[0]["weight"]),
        "projector_dim": len(layers[-2]["weight"]),
        "predictor_hidden": len(end[0]["weight"]),
    }
    biased = {f"projector.{index}": "bias" in linear for index, (linear, _) in enumerate(pairs)}
    biased["predictor.0"] = "bias" in end[0]
    if names := [name for name, is_biased in biased.items() if is_biased]:
        imported.notes.append(
            f"bias of {', '.join(names)}: moved into the batch norm's running mean"
        )


def split_layers(head: Tensors) -> list[Tensors]:
    """Tensors by layer of linear, norm, (ReLU,) linear, ... Raises: ValueError if it is not."""
    layers: dict[int, Tensors] = {}
    for name, tensor in head.items():
        index, _, leaf = name.partition(".")
        if not index.isdecimal() or "." in leaf:
            raise ValueError(f"{name} is not in a plain sequence of layers")
        layers.setdefault(int(index), {})[leaf] = tensor
    if sorted(layers) != [place // 2 * 3 + place % 2 for place in range(len(layers))]:
        raise ValueError(f"its layers {sorted(layers)} are not linear, norm, (ReLU,) linear, ...")
    return [layers[index] for index in sorted(layers)]


def linear_norm(name: str, linear: Tensors, norm: Tensors, *, affine: bool) -> Tensors:
    """A linear layer and its batch norm as train.network.heads.LinearNorm. Raises: ValueError."""
    if linear.get("weight", torch.empty(0)).ndim != 2 or "running_mean" not in norm:
        raise ValueError("in SimSiam a batch norm follows each linear layer but the last")
    if affine != ("weight" in norm):
        has = "no" if affine else "a"
        raise ValueError(f"the batch norm of {name} has {has} weight and bias, unlike SimSiam's")
    norm = dict(norm)
    if "bias" in linear:
        if linear["bias"].shape != norm["running_mean"].shape:
            raise ValueError(f"the bias of {name} does not have the length of its batch norm")
        norm["running_mean"] = norm["running_mean"].double() - linear["bias"].double()
    tensors = {f"{name}.norm.{leaf}": tensor for leaf, tensor in norm.items()}
    return {f"{name}.linear.weight": linear["weight"]} | tensors


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
    print_result(report, kept=Path(config.out))


if __name__ == "__main__":
    protect_output()
    main()
