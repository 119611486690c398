"""Write the backbone for other tools: `python train/export.py RUN --to TOOL`.

Takes the newest valid checkpoint of a run folder. torchvision: one safetensors file with the names
of torchvision.models. timm: a folder in Hugging Face's layout (config.json, model.safetensors) for
timm.create_model("local-dir:FOLDER"), also read by transformers' AutoModel. detectron2: a pickle
for MODEL.WEIGHTS and a YAML file with its settings. None has a classifier: build the network with
num_classes=0 (timm) or load with strict=False (torchvision).
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import pickle
import re
from pathlib import Path

import torch
import yaml
from safetensors.torch import save  # save_file makes files that only their owner can read
from torch import Tensor

from pipeline.sources.paths import named_path
from pipeline.streams import print_result, protect_output
from train.network.resnet import LAYERS, ResNet
from train.run.folder import CONFIG, newest_checkpoint
from train.run.program import exit_on_error, first_line

PREFIX = "backbone."
CIFAR_STEM = (
    "the stem is CIFAR's: before loading, model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)"
    " and model.maxpool = torch.nn.Identity()"
)
DETECTRON2_NOTE = (
    "RGB in 0..255, stride on the 3x3 convolution: merge the settings after those of the detector; "
    "the paper's transfer also has NORM SyncBN, FREEZE_AT 0 (MoCo's detection/)"
)
Files = dict[str, bytes]  # by name


def backbone_weights(run: Path) -> tuple[dict[str, Tensor], dict]:
    """The backbone's tensors under torchvision's names, and the run's configuration with its step.

    Raises: ValueError if `run` is no run folder; CheckpointError if no checkpoint is valid.
    """
    saved = newest_checkpoint(run, log=lambda line: print(line, file=sys.stderr))
    try:
        config = yaml.safe_load((run / CONFIG).read_text())
        model = {name: config["model"][name] for name in ("arch", "stem", "width")}
        for part, name in ("data", "mean"), ("data", "std"), ("eval", "size"), ("eval", "resize"):
            config[part][name]
        with torch.device("meta"):
            expected = ResNet(**model).state_dict()
    except (yaml.YAMLError, AttributeError, ValueError, LookupError, TypeError, RuntimeError) as e:
        raise ValueError(f"{run / CONFIG} is not a training's ({first_line(e)}): restore it") from e
    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in saved.tensors["model"].items()
        if name.startswith(PREFIX)
    }
    wanted, given = ({n: tuple(t.shape) for n, t in part.items()} for part in (expected, tensors))
    if odd := [name for name in {**wanted, **given} if wanted.get(name) != given.get(name)]:
        raise ValueError(
            f"{saved.path} holds another network than {run / CONFIG} names: {odd[0]} is "
            f"{given.get(odd[0], 'missing')} and must be {wanted.get(odd[0], 'absent')}: restore it"
        )
    return tensors, config | {"step": saved.step}


def check_exchangeable(config: dict, tool: str) -> None:
    """Raise ValueError if the tool does not have this network."""
    model = config["model"]
    if model["width"] != 64:
        raise ValueError(
            f"this run has --model.width {model['width']}: {tool} has {', '.join(LAYERS)} of width "
            "64 only; train with --model.width 64, or load it with train/network/resnet.py"
        )
    if model["stem"] == "cifar" and tool != "torchvision":
        raise ValueError(
            f"{tool}'s {model['arch']} has no CIFAR stem: export --to torchvision, and replace "
            "conv1 and maxpool"
        )


def for_torchvision(tensors: dict[str, Tensor], config: dict, target: Path) -> tuple[Files, dict]:
    """<arch>.safetensors."""
    arch, stem = config["model"]["arch"], config["model"]["stem"]
    name = f"{arch}.safetensors"
    note = {"note": CIFAR_STEM} if stem == "cifar" else {}
    weights = save(tensors, {"format": "pt", "arch": arch, "stem": stem})
    return {name: weights}, {"file": str(target / name)} | note


def for_timm(tensors: dict[str, Tensor], config: dict, target: Path) -> tuple[Files, dict]:
    """config.json and model.safetensors in the layout of timm's save_for_hf."""
    size, data = config["eval"]["size"], config["data"]
    last = "conv3" if "layer4.0.conv3.weight" in tensors else "conv2"
    pretrained = {"tag": "twinturbo", "custom_load": False, "input_size": [3, size, size]}
    pretrained |= {"interpolation": "bilinear", "crop_pct": size / config["eval"]["resize"]}
    pretrained |= {"mean": data["mean"], "std": data["std"], "num_classes": 0}
    pretrained |= {"pool_size": [7, 7], "first_conv": "conv1", "classifier": "fc"}
    settings = {
        "architecture": config["model"]["arch"],
        "num_classes": 0,
        "num_features": tensors[f"layer4.0.{last}.weight"].shape[0],
        "pretrained_cfg": pretrained,
    }
    text = json.dumps(settings, indent=2) + "\n"
    files = {"model.safetensors": save(tensors, {"format": "pt"}), "config.json": text.encode()}
    return files, {"folder": str(target)}


def detectron2_name(name: str) -> str:
    """torchvision's layer1.0.bn2.bias is detectron2's res2.0.conv2.norm.bias.

    Source: detectron2@02b5c4e2 modeling/backbone/resnet.py.
    """
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def for_detectron2(tensors: dict[str, Tensor], config: dict, target: Path) -> tuple[Files, dict]:
    """<arch>.pkl, in the pickle of detectron2's model zoo, and <arch>.yaml."""
    arch, data = config["model"]["arch"], config["data"]
    path, settings_path = target / f"{arch}.pkl", target / f"{arch}.yaml"
    layers, is_basic = LAYERS[arch], LAYERS[arch].block == "basic"
    depth = 2 + (2 if is_basic else 3) * sum(layers.depths)  # convolutions and the classifier
    resnets = {"DEPTH": depth, "RES2_OUT_CHANNELS": 64 if is_basic else 256}
    resnets |= {"NUM_GROUPS": layers.groups, "WIDTH_PER_GROUP": layers.group_width}
    model = {
        "WEIGHTS": str(path.absolute()),
        "PIXEL_MEAN": [255 * value for value in data["mean"]],
        "PIXEL_STD": [255 * value for value in data["std"]],
        "RESNETS": resnets | {"STRIDE_IN_1X1": False},
    }
    settings = yaml.safe_dump({"VERSION": 2, "MODEL": model, "INPUT": {"FORMAT": "RGB"}})
    weights: dict = {"model": {detectron2_name(name): t.numpy() for name, t in tensors.items()}}
    weights |= {"__author__": "TwinTurbo", "matching_heuristics": True}
    files = {path.name: pickle.dumps(weights), settings_path.name: settings.encode()}
    about = {"file": str(path), "settings": str(settings_path), "note": DETECTRON2_NOTE}
    return files, about


TOOLS = {"torchvision": for_torchvision, "timm": for_timm, "detectron2": for_detectron2}


def export(run: Path, target: Path, tool: str) -> dict:
    """Write the tool's files into `target`, each complete or not at all; returns their names."""
    tensors, config = backbone_weights(run)
    check_exchangeable(config, tool)
    files, about = TOOLS[tool](tensors, config, target)
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = target / f".{name}.{os.getpid()}"
        try:
            temporary.write_bytes(content)
            temporary.replace(target / name)
        finally:
            temporary.unlink(missing_ok=True)
    return about | {"tensors": len(tensors), "step": config["step"]}


def main() -> None:
    """Read the flags, export, print what was written as one JSON line."""
    parser = argparse.ArgumentParser(description="Export the backbone of a run.")
    parser.add_argument("run", type=named_path, help="the --out folder of a training")
    parser.add_argument("--to", choices=tuple(TOOLS), required=True)
    parser.add_argument(
        "--out", type=named_path, help="folder to write into; default RUN/export-<to>"
    )
    arguments = parser.parse_args()
    target = arguments.out or arguments.run / f"export-{arguments.to}"
    with exit_on_error(target):
        about = export(arguments.run, target, arguments.to)
        if "note" in about:
            print(f"note: {about['note']}", file=sys.stderr)
        print_result(about, kept=target)


if __name__ == "__main__":
    protect_output()
    main()
