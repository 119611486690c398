"""Write the backbone for other tools: `python train/export.py RUN --to TOOL`.

Takes the newest valid checkpoint of a run folder. torchvision: one safetensors file with the names
of torchvision.models (without fc). timm: a folder in Hugging Face's layout (config.json,
model.safetensors) for timm.create_model("local-dir:FOLDER"), also read by transformers' AutoModel.
detectron2: a pickle for MODEL.WEIGHTS and a YAML file with the settings that go with it.
A newcomer's mistake: loading with strict=True into a network that has a classifier. There is none:
build it with num_classes=0 (timm) or ignore fc.* (torchvision).
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import pickle
import re
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import save  # save_file makes files that only their owner can read
from torch import Tensor

from pipeline.sources.folder import named_path
from train.network.resnet import LAYERS, ResNet
from train.run.folder import CONFIG, newest_checkpoint
from train.run.program import error_text, first_line, refuse

PREFIX = "backbone."
NEEDED = ("data", "mean"), ("data", "std"), ("eval", "size"), ("eval", "resize")
CIFAR_STEM = (
    "the stem is CIFAR's: before loading, model.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)"
    " and model.maxpool = torch.nn.Identity()"
)


def backbone_weights(run: Path) -> tuple[dict[str, Tensor], dict]:
    """The backbone's tensors under torchvision's names, and the run's configuration.

    Raises: ValueError if `run` is no run folder; CheckpointError if no checkpoint is valid.
    """
    found = newest_checkpoint(run, log=lambda line: print(line, file=sys.stderr))
    try:
        config = yaml.safe_load((run / CONFIG).read_text())
        model = {name: config["model"][name] for name in ("arch", "stem", "width")}
        for part, name in NEEDED:
            config[part][name]
        with torch.device("meta"):
            expected = ResNet(**model).state_dict()
    except (
        yaml.YAMLError,
        AttributeError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
    ) as error:
        raise ValueError(
            f"{run / CONFIG} is not a training's ({first_line(error)}): restore it"
        ) from error
    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in found.tensors["model"].items()
        if name.startswith(PREFIX)
    }
    here, there = ({n: tuple(t.shape) for n, t in part.items()} for part in (expected, tensors))
    if odd := [name for name in {**here, **there} if here.get(name) != there.get(name)]:
        raise ValueError(
            f"{found.path} holds another network than {run / CONFIG} names: {odd[0]} is "
            f"{there.get(odd[0], 'missing')} and must be {here.get(odd[0], 'absent')}: restore it"
        )
    return tensors, config | {"step": found.step}


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


def export_torchvision(run: Path, target: Path) -> dict:
    """Write target/<arch>.safetensors, complete or not at all."""
    tensors, config = backbone_weights(run)
    check_exchangeable(config, "torchvision")
    path = target / f"{config['model']['arch']}.safetensors"
    about = {"format": "pt", "arch": config["model"]["arch"], "stem": config["model"]["stem"]}
    write_whole(path, lambda temporary: temporary.write_bytes(save(tensors, about)))
    found = {"file": str(path), "tensors": len(tensors), "step": config["step"]}
    return found | ({"note": CIFAR_STEM} if config["model"]["stem"] == "cifar" else {})


def export_timm(run: Path, target: Path) -> dict:
    """Write target/{config.json,model.safetensors} in the layout of timm's save_for_hf."""
    tensors, config = backbone_weights(run)
    check_exchangeable(config, "timm")
    size = config["eval"]["size"]
    last = "conv3" if "layer4.0.conv3.weight" in tensors else "conv2"
    settings = {
        "architecture": config["model"]["arch"],
        "num_classes": 0,
        "num_features": tensors[f"layer4.0.{last}.weight"].shape[0],
        "pretrained_cfg": {
            "tag": "twinturbo",
            "custom_load": False,
            "input_size": [3, size, size],
            "interpolation": "bilinear",
            "crop_pct": size / config["eval"]["resize"],
            "mean": config["data"]["mean"],
            "std": config["data"]["std"],
            "num_classes": 0,
            "pool_size": [7, 7],
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
    write_whole(
        target / "model.safetensors",
        lambda temporary: temporary.write_bytes(save(tensors, {"format": "pt"})),
    )
    write_whole(
        target / "config.json",
        lambda temporary: temporary.write_text(json.dumps(settings, indent=2) + "\n"),
    )
    return {"folder": str(target), "tensors": len(tensors), "step": config["step"]}


def detectron2_name(name: str) -> str:
    """torchvision's layer1.0.bn2.bias is detectron2's res2.0.conv2.norm.bias.

    Source: detectron2@02b5c4e2 modeling/backbone/resnet.py.
    """
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def export_detectron2(run: Path, target: Path) -> dict:
    """Write target/<arch>.pkl, in the pickle of detectron2's model zoo, and target/<arch>.yaml."""
    tensors, config = backbone_weights(run)
    check_exchangeable(config, "detectron2")
    arch = config["model"]["arch"]
    path, settings_path = target / f"{arch}.pkl", target / f"{arch}.yaml"
    is_basic = LAYERS[arch][0] == "basic"
    settings = {
        "VERSION": 2,
        "MODEL": {
            "WEIGHTS": str(path.absolute()),
            "PIXEL_MEAN": [255 * value for value in config["data"]["mean"]],
            "PIXEL_STD": [255 * value for value in config["data"]["std"]],
            "RESNETS": {
                "DEPTH": int(arch.removeprefix("resnet")),
                "STRIDE_IN_1X1": False,
                "RES2_OUT_CHANNELS": 64 if is_basic else 256,
            },
        },
        "INPUT": {"FORMAT": "RGB"},
    }
    weights = {
        "model": {detectron2_name(name): tensor.numpy() for name, tensor in tensors.items()},
        "__author__": "TwinTurbo",
        "matching_heuristics": True,
    }
    write_whole(path, lambda temporary: temporary.write_bytes(pickle.dumps(weights)))
    write_whole(settings_path, lambda temporary: temporary.write_text(yaml.safe_dump(settings)))
    return {
        "file": str(path),
        "settings": str(settings_path),
        "tensors": len(tensors),
        "step": config["step"],
        "note": "RGB in 0..255, stride on the 3x3 convolution: merge the settings after those of "
        "the detector; the paper's transfer also has NORM SyncBN, FREEZE_AT 0 (MoCo's detection/)",
    }


def write_whole(path: Path, write) -> None:
    """Write beside `path` and rename, so that a kill leaves the file absent or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        shutil.move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


EXPORTS = {
    "torchvision": export_torchvision,
    "timm": export_timm,
    "detectron2": export_detectron2,
}


def main() -> None:
    """Read the flags, export, print what was written as one JSON line."""
    parser = argparse.ArgumentParser(description="Export the backbone of a run.")
    parser.add_argument("run", type=Path, help="the --out folder of a training")
    parser.add_argument("--to", choices=tuple(EXPORTS), required=True)
    parser.add_argument(
        "--out", type=named_path, help="folder to write into; default RUN/export-<to>"
    )
    arguments = parser.parse_args()
    target = arguments.out or arguments.run / f"export-{arguments.to}"
    try:
        found = EXPORTS[arguments.to](arguments.run, target)
        if "note" in found:
            print(f"note: {found['note']}", file=sys.stderr)
        print(json.dumps(found))
    except (ValueError, OSError) as error:
        refuse(error_text(error, target), code=1)


if __name__ == "__main__":
    main()
