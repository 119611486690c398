"""Other tools' checkpoints: a network with their keys and its import give the same f, z and p."""

import argparse
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from train import export, import_checkpoint
from train.config import Config, DataConfig, MethodConfig, ModelConfig
from train.import_checkpoint import (
    convert,
    describe_backbone,
    import_file,
    linear_norm,
    read_tensors,
)
from train.methods.simsiam import MovingAverage, SimSiam
from train.network.model import LinearNorm
from train.network.resnet import LAYERS, ResNet
from train.run import checkpoint, state


def mlp(*widths: int, bias: bool = True, norm_at_end: bool = True) -> nn.Sequential:
    """Linear, norm, ReLU, ...; the last linear layer has the bias, its norm no weight."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    layers.append(nn.Linear(*widths[-2:], bias=bias))
    return nn.Sequential(*layers, *[nn.BatchNorm1d(widths[-1], affine=False)] * norm_at_end)


def official(resnet, projector, predictor) -> nn.Module:
    """simsiam/builder.py: the projector is fc; "module" is DistributedDataParallel's."""
    resnet.fc = projector
    return nn.ModuleDict({"module": nn.ModuleDict({"encoder": resnet, "predictor": predictor})})


def lightly(resnet, projector, predictor) -> nn.Module:
    """Its examples: children of a torchvision ResNet, heads with `layers`."""
    return nn.ModuleDict(
        {
            "backbone": nn.Sequential(*list(resnet.children())[:-1]),
            "projection_head": nn.ModuleDict({"layers": projector}),
            "prediction_head": nn.ModuleDict({"layers": predictor}),
        }
    )


def lightly_cifar(resnet, projector, predictor) -> nn.Module:
    """Its benchmarks: ResNetGenerator has neither ReLU nor max-pool among its children."""
    children = [c for c in resnet.children() if not isinstance(c, nn.ReLU | nn.Identity)]
    network = lightly(resnet, projector, predictor)
    network["backbone"] = nn.Sequential(*children)
    return network


def solo_learn(resnet, projector, predictor, name: str = "backbone") -> nn.Module:
    """The online classifier is of no use here."""
    classifier = nn.Linear(512, 10)
    parts = {"projector": projector, "predictor": predictor, "classifier": classifier}
    return nn.ModuleDict({name: resnet} | parts)


def solo_learn_old(resnet, projector, predictor) -> nn.Module:
    """Up to 1.0.2."""
    return solo_learn(resnet, projector, predictor, name="encoder")


def trained(torchvision, *, cifar: bool = False, bias: bool = True, layers: int = 3):
    """A torchvision ResNet-18 and heads whose statistics are not the initial ones."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    resnet.fc = nn.Identity()
    if cifar:
        resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        resnet.maxpool = nn.Identity()
    projector = mlp(512, *[32] * (layers - 1), 16, bias=bias)
    predictor = mlp(16, 8, 16, norm_at_end=False)
    with torch.no_grad():
        for _ in range(2):
            predictor(projector(resnet(torch.randn(8, 3, 16, 16))))
    return resnet.eval(), projector.eval(), predictor.eval()


def built(network: dict, tensors: dict) -> SimSiam:
    """Our network in evaluation mode, all its tensors given."""
    model = SimSiam(ModelConfig(**network), MethodConfig())
    model.load_state_dict(tensors)
    return model.to(memory_format=torch.channels_last).eval()


def config(out: Path) -> Config:
    return Config(data=DataConfig(root=""), out=str(out))


@pytest.fixture(scope="module")
def official_file(torchvision, tmp_path_factory) -> tuple[Path, list]:
    """As main_simsiam.py saves it, and the network in it."""
    parts = trained(torchvision)
    network = official(*parts)
    sgd = torch.optim.SGD(network.parameters(), 0.1)
    path = tmp_path_factory.mktemp("official") / "checkpoint_0099.pth.tar"
    content = {"epoch": 100, "arch": "resnet18", "state_dict": network.state_dict()}
    torch.save(content | {"optimizer": sgd.state_dict()}, path)
    return path, list(parts)


@pytest.mark.parametrize(
    ("build", "settings", "tool"),
    [
        (official, {}, "SimSiam"),
        (lightly, {"bias": False}, "lightly"),
        (lightly_cifar, {"bias": False, "cifar": True, "layers": 2}, "lightly"),
        (solo_learn, {}, "solo-learn"),
        (solo_learn_old, {}, "solo-learn"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_features_z_and_p_are_those_of_the_source(torchvision, build, settings, tool):
    resnet, projector, predictor = trained(torchvision, **settings)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = resnet(x)
        z = projector(features)
        p = predictor(z)
    theirs = build(resnet, projector, predictor).state_dict()
    if build is lightly_cifar:  # its own ResNet's name for the projection of a shortcut
        theirs = {name.replace("downsample", "shortcut"): t for name, t in theirs.items()}
    found = convert({name.removeprefix("module."): t for name, t in theirs.items()})
    ours = built(found.network, found.tensors)
    with torch.no_grad():
        got = ours.backbone(x.to(memory_format=torch.channels_last))
        got_z = ours.projector(got)
        got_p = ours.predictor(got_z)
    torch.testing.assert_close(got, features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_z, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_p, p, rtol=1e-4, atol=1e-5)
    assert (found.tool, found.unexpected) == (tool, [])
    assert found.network["stem"] == ("cifar" if settings.get("cifar") else "imagenet")
    assert any("bias of projector" in note for note in found.notes) == settings.get("bias", True)
    assert set(found.left_out) == ({"classifier.*"} if tool == "solo-learn" else set())


def test_a_bias_before_batch_norm_cancels_in_training_and_in_its_statistics():
    torch.manual_seed(0)
    theirs = mlp(6, 4)
    theirs[0].bias.data += 3  # far from what the statistics begin with
    theirs(torch.randn(9, 6))
    tensors = linear_norm("0", theirs[0].state_dict(), theirs[1].state_dict(), affine=False)
    ours = nn.ModuleDict({"0": LinearNorm(6, 4, relu=False, affine=False)})
    ours.load_state_dict(tensors)
    x, y = torch.randn(9, 6), torch.randn(5, 6)
    for training, batch in ((True, x), (False, y)):
        ours.train(training)
        torch.testing.assert_close(
            ours["0"](batch), theirs.train(training)(batch), rtol=1e-4, atol=1e-5
        )


def test_the_official_file_becomes_a_run_that_exports_and_starts_a_training(
    torchvision, official_file, tmp_path
):
    path, (resnet, projector, _) = official_file
    report = import_file(path, config(tmp_path / "run"))
    assert report["matched"] == {"backbone": 120, "projector": 16, "predictor": 8}
    assert (report["missing"], report["unexpected"], report["left_out"]) == ([], [], {})
    written = export.export(tmp_path / "run", tmp_path / "out", "torchvision")
    theirs = torchvision.models.resnet18()
    missing, unexpected = theirs.load_state_dict(load_file(written["file"]), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    assert torch.equal(theirs.layer4[1].bn2.running_var, resnet.layer4[1].bn2.running_var)
    again = import_file(Path(written["file"]), config(tmp_path / "again"))  # our own export
    assert (again["tool"], again["matched"]) == ("torchvision's names", {"backbone": 120})
    first, second = (
        checkpoint.load_newest(tmp_path / name / "checkpoints", log=pytest.fail)
        for name in ("run", "again")
    )
    for name, tensor in second.tensors["model"].items():
        assert torch.equal(tensor, first.tensors["model"][name]), name

    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]
    model, lines = SimSiam(ModelConfig(**settings), MethodConfig()), []
    state.start_from(model, tmp_path / "run", log=lines.append)
    assert torch.equal(model.projector[1].linear.weight, projector[3].weight)
    assert len(lines) == 1 and lines[0].startswith("backbone, projector, predictor from")
    found = checkpoint.load_newest(tmp_path / "run" / "checkpoints", log=pytest.fail)
    with pytest.raises(ValueError, match="start from them with --init"):
        state.check_same_run(found.facts, {}, tmp_path / "run")
    with pytest.raises(ValueError, match="holds checkpoints already"):
        import_file(path, config(tmp_path / "run"))


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_with_torchvisions_names_are_a_backbone_and_its_classifier_stays_behind(
    torchvision, tmp_path, suffix
):
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18().eval()
    # torchvision's first weights are older than num_batches_tracked
    weights = {k: v for k, v in resnet.state_dict().items() if not k.endswith("_tracked")}
    path = tmp_path / f"resnet18.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(weights, path)
    report = import_file(path, config(tmp_path / "run"))
    assert report["left_out"] == {"fc.*": "classifier trained on labels"}
    assert (report["matched"], report["unexpected"]) == ({"backbone": 120}, [])
    found = convert(read_tensors(path))
    ours = SimSiam(ModelConfig(**found.network), MethodConfig()).eval()
    ours.load_state_dict(found.tensors, strict=False)
    resnet.fc, x = nn.Identity(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = ours.backbone(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(got, resnet(x), rtol=1e-4, atol=1e-5)


def test_moco_gives_its_backbone_and_the_reason_for_what_is_left_out(torchvision, tmp_path):
    torch.manual_seed(0)
    encoders = {name: torchvision.models.resnet18() for name in ("encoder_q", "encoder_k")}
    for encoder in encoders.values():
        encoder.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    network = nn.ModuleDict({"module": nn.ModuleDict(encoders)})
    network["module"].register_buffer("queue", torch.randn(128, 16))
    network["module"].register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    path = tmp_path / "moco.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": network.state_dict()}, path)
    report = import_file(path, config(tmp_path / "run"))
    assert (report["tool"], report["matched"]) == ("MoCo", {"backbone": 120})
    assert (report["missing"], report["unexpected"]) == (["projector", "predictor"], [])
    assert report["left_out"].keys() == {"encoder_q.fc.*", "encoder_k.*", "queue", "queue_ptr"}
    assert "a projector and a predictor" in report["left_out"]["encoder_q.fc.*"]
    tensors, _ = export.backbone_weights(tmp_path / "run")
    assert torch.equal(tensors["conv1.weight"], encoders["encoder_q"].conv1.weight)

    torch.manual_seed(1)
    model, lines = SimSiam(ModelConfig(arch="resnet18"), MethodConfig()), []
    drawn = model.projector[0].linear.weight.clone()
    state.start_from(model, tmp_path / "run", log=lines.append)
    assert torch.equal(model.backbone.conv1.weight, encoders["encoder_q"].conv1.weight)
    assert torch.equal(model.projector[0].linear.weight, drawn)
    assert lines[0].endswith("; random: projector, predictor")


def small(**changes) -> dict:
    """A solo-learn state dict of width 8, with changed tensors; None takes one away."""
    torch.manual_seed(0)
    backbone = ResNet("resnet18", stem="imagenet", width=8)
    heads = nn.ModuleDict(
        {"projector": mlp(64, 8, 4), "predictor": mlp(4, 2, 4, norm_at_end=False)}
    )
    tensors = {f"backbone.{name}": t for name, t in backbone.state_dict().items()}
    tensors |= heads.state_dict() | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"projector.4.weight": torch.ones(4), "projector.4.bias": torch.ones(4)},
         "the batch norm of projector.1 has a weight and bias"),
        ({"predictor.3.bias": None}, "not SimSiam's"),
        ({"projector.0.bias": torch.ones(1)}, "bias of projector.0 does not have the length"),
        ({"projector.5.weight": torch.ones(4, 4)}, "layers [0, 1, 3, 4, 5] are not"),
        ({"projector.0.weight": None, "projector.0.weight_v": torch.ones(8, 64)},
         "a batch norm follows each linear layer"),
        ({"projector.last.weight": torch.ones(4)}, "last.weight is not in a plain sequence"),
        ({f"predictor.{name}": None for name in mlp(4, 2, 4, norm_at_end=False).state_dict()},
         "this file has only one"),
    ],
)  # fmt: skip
def test_heads_that_compute_something_else_are_left_out_with_the_reason(changes, reason):
    assert convert(small()).left_out == {}
    found = convert(small(**changes))
    assert reason in found.left_out["projector.*"]
    assert {name.split(".")[0] for name in found.tensors} == {"backbone"}
    assert found.network == {"arch": "resnet18", "stem": "imagenet", "width": 8}


@pytest.mark.parametrize("arch", LAYERS)
@pytest.mark.parametrize(("stem", "width"), [("imagenet", 64), ("cifar", 8)])
def test_every_network_is_told_by_its_shapes(arch, stem, width):
    with torch.device("meta"):
        backbone = ResNet(arch, stem=stem, width=width).state_dict()
    assert describe_backbone(backbone) == {"arch": arch, "stem": stem, "width": width}


def test_a_network_with_other_groups_is_refused(torchvision):
    with torch.device("meta"):
        backbone = torchvision.models.resnext101_32x8d().state_dict()
    with pytest.raises(ValueError, match=r"layer1.0.conv2 of \(256, 8, 3, 3\): known are resnet18"):
        describe_backbone(backbone)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"backbone.layer3.2.conv1.weight": torch.ones(1)}, r"basic blocks \(2, 2, 3, 2\)"),
        ({"backbone.conv1.weight": torch.ones(8, 3, 5, 5)}, r"shape \(8, 3, 5, 5\)"),
        ({"backbone.conv1.weight": None}, r"shape \(0,\)"),
        ({"backbone.bn1.weight": torch.full((8,), float("nan"))}, "bn1.weight has values that are"),
        ({"backbone.bn1.weight": torch.ones(8, dtype=torch.int8)}, "is of torch.int8 and must be"),
        ({"backbone.bn1.weight": torch.ones(8).to_sparse()}, "bn1.weight that is sparse"),
        ({"queue": torch.ones(8, device="meta")}, "a queue that is sparse, quantized or without"),
        ({"backbone.bn1.bias": None}, "backbone.bn1.bias is missing and must be"),
        ({"backbone.bn1.se.weight": torch.ones(3)}, r"bn1.se.weight is \(3,\) and must be absent"),
        ({"backbone.layer2.0.conv1.weight": torch.ones(32, 8, 3, 3)},
         r"layer2.0.conv1.weight is \(32, 8, 3, 3\) and must be \(16, 8, 3, 3\)"),
        ({"predictor.0.weight": torch.ones(2, 5)}, r"predictor.0.linear.weight is \(2, 5\)"),
    ],
)  # fmt: skip
def test_a_network_that_is_not_ours_is_refused_and_nothing_written(changes, reason, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(small(**changes), path)
    with pytest.raises(ValueError, match=reason) as refusal:
        import_file(path, config(tmp_path / "run"))
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_solo_learns_other_stem_padding_and_unknown_tensors_are_told(tmp_path):
    stem = torch.ones(8, 3, 3, 3)
    torch.save(small(**{"backbone.conv1.weight": stem, "prototypes.w": stem}), tmp_path / "a.pt")
    report = import_file(tmp_path / "a.pt", config(tmp_path / "run"))
    assert report["unexpected"] == ["prototypes.w"]
    assert any("pads its 3x3 stem by 2" in note for note in report["notes"])
    assert any("eval.size is 224" in note for note in report["notes"])


class Canary:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments: str):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_code_in_a_file_is_never_run_and_the_way_to_its_tensors_is_told(tmp_path):
    def refusal(function, *arguments: str, save=torch.save) -> str:
        content = {"state_dict": small(), "hyper_parameters": Canary(function, *arguments)}
        save(content, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"a\.ckpt") as found:
            read_tensors(tmp_path / "a.ckpt")
        return str(found.value)

    def plain(content, path: Path) -> None:
        path.write_bytes(pickle.dumps(content["hyper_parameters"], protocol=2))  # as torch

    told = refusal(shutil.copy, __file__, str(tmp_path / "canary"))
    assert "holds a shutil.copy beside its tensors" in told and "'tensors.pt'" in told
    for save in (torch.save, plain):
        told = refusal(os.system, f"touch {tmp_path / 'canary'}", save=save)
        assert "would call posix.system: do not trust it" in told
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before torch 1.6"])
def test_arguments_beside_the_tensors_and_old_files_are_read(tmp_path, new_format):
    content = {"args": argparse.Namespace(lr=0.05), "state_dict": {"module.a": torch.arange(3)}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new_format)
    assert {k: v.tolist() for k, v in read_tensors(tmp_path / "a.pth").items()} == {"a": [0, 1, 2]}


def test_files_that_are_no_checkpoint_are_refused_by_name(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1000)}}, tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    files = {"empty": b"", "text": b"hello\n", "html": b"<html>", "gzip": b"\x1f\x8b\x08\x00",
             "zeros": bytes(5000), "tar": b"a" * 257 + b"ustar" + bytes(1000)}  # fmt: skip
    files |= {f"cut-{share}": data[: len(data) * share // 10] for share in (1, 5, 9)}
    ones = data.index(torch.ones(8).numpy().tobytes())  # torch.load takes a flipped bit
    files["flipped"] = data[: ones + 5] + b"\x01" + data[ones + 6 :]
    save_file({"a": torch.ones(9)}, tmp_path / "a.safetensors")
    files["cut.safetensors"] = (tmp_path / "a.safetensors").read_bytes()[:-1]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no file of torch.save") as refusal:
            read_tensors(tmp_path / name)
        assert "\n" not in str(refusal.value)
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="is not a file"):
            read_tensors(path)
    torch.save({"state_dict": [1]}, tmp_path / "odd")
    with pytest.raises(ValueError, match="odd has a state_dict that is a list"):
        read_tensors(tmp_path / "odd")
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(ValueError, match="list cannot be imported: it has no tensors named"):
        import_file(tmp_path / "list", config(tmp_path / "run"))


def test_the_program_takes_trainings_flags_and_ends_with_one_json_line(
    tmp_path, capsys, monkeypatch
):
    torch.save(small(), tmp_path / "a.pt")

    def call(*flags: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["import_checkpoint.py", *flags])
        import_checkpoint.main()
        return capsys.readouterr()

    preset = str(Path(__file__).parent.parent / "configs" / "cifar10.yaml")
    out, err = call(str(tmp_path / "a.pt"), "--config", preset, "--out", str(tmp_path / "run"))
    assert json.loads(out)["matched"]["projector"] == 10 and "matched     10 tensors" in err
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (settings["eval"]["size"], settings["model"]["projector_dim"]) == (32, 4)
    assert (settings["model"]["stem"], settings["model"]["width"]) == ("imagenet", 8)
    for flags, part in (
        ([str(tmp_path / "a.pt")], "--out RUN is missing"),
        (["a.pt", "--ot=x"], "perhaps you meant --out"),
        (["a.pt", f"--out={tmp_path}/x", "--init=y"], "--init is for train/main.py"),
        ([str(tmp_path / "none.pt"), f"--out={tmp_path}/x"], "none.pt is not a file"),
    ):
        with pytest.raises(SystemExit):
            call(*flags)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and part in lines[0]


def test_a_run_of_another_network_is_no_start(tmp_path):
    torch.save(small(), tmp_path / "a.pt")
    import_file(tmp_path / "a.pt", config(tmp_path / "run"))
    model = SimSiam(ModelConfig(arch="resnet18", width=8, projector_dim=16), MethodConfig())
    with pytest.raises(ValueError, match=r"another network: projector\..* --config .*config.yaml"):
        state.start_from(model, tmp_path / "run", log=pytest.fail)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        state.start_from(model, tmp_path / "nothing", log=pytest.fail)


def test_parts_that_a_method_lacks_and_targets_of_other_images_stay_behind(tmp_path):
    settings = {"arch": "resnet18", "width": 8, "projector_dim": 4, "predictor_hidden": 2}
    theirs = SimSiam(ModelConfig(**settings), MethodConfig())
    tensors = theirs.state_dict() | {"memory": torch.ones(5, 4)}
    checkpoint.save(tmp_path / "checkpoints", 3, {"model": tensors}, {}, facts={})
    method = MethodConfig(predictor="none", moving_average=0.8)
    ours, lines = MovingAverage(ModelConfig(**settings), method, images=5), []
    state.start_from(ours, tmp_path, log=lines.append)
    assert torch.equal(ours.projector[2].linear.weight, theirs.projector[2].linear.weight)
    assert ours.memory.abs().max() == 0 and lines[0].startswith("backbone, projector from")
    assert "random" not in lines[0]
