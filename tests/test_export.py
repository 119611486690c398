"""Exported backbones load into other tools and compute the same features."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from train import export
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.run import checkpoint


@pytest.fixture
def run(tmp_path):
    """A run folder with a ResNet-50 checkpoint whose statistics are not the initial ones."""

    def make(**model):
        torch.manual_seed(0)
        config = ModelConfig(**({"projector_dim": 16, "predictor_hidden": 4} | model))
        net = SimSiam(config, MethodConfig()).to(memory_format=torch.channels_last)
        with torch.no_grad():
            net(torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last))
        checkpoint.save(tmp_path / "checkpoints", 7, {"model": net.state_dict()}, {}, facts={})
        settings = {
            "model": {"arch": config.arch, "stem": config.stem, "width": config.width},
            "eval": {"size": 224, "resize": 256},
            "data": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        return tmp_path, net.backbone.eval()

    return make


@pytest.mark.parametrize("arch", ["resnet50", "resnext50_32x4d"])
def test_torchvision_loads_the_export_and_agrees(torchvision, run, arch):
    folder, ours = run(arch=arch)
    written = export.export(folder, folder / "out", "torchvision")
    theirs = torchvision.models.get_model(arch)
    missing, unexpected = theirs.load_state_dict(load_file(written["file"]), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_timm_create_model_loads_the_export_and_agrees(torchvision, run, arch):
    import timm

    folder, ours = run(arch=arch)
    written = export.export(folder, folder / "out", "timm")
    theirs = timm.create_model(f"local-dir:{written['folder']}", pretrained=True)
    assert theirs.num_features == ours.num_features and theirs.num_classes == 0
    assert theirs.pretrained_cfg["mean"] == pytest.approx([0.485, 0.456, 0.406])
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(x), ours(x), rtol=1e-4, atol=1e-4)


def detectron2_shapes(resnets: dict) -> dict[str, tuple]:
    """What build_resnet_backbone makes of MODEL.RESNETS, as its source says.

    Source: detectron2@02b5c4e2, modeling/backbone/resnet.py.
    """
    shapes: dict[str, tuple] = {}
    depth, groups = resnets["DEPTH"], resnets["NUM_GROUPS"]
    inner = groups * resnets["WIDTH_PER_GROUP"]

    def conv(name: str, outputs: int, inputs: int, kernel: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{leaf}"] = (outputs,)
        shapes[f"{name}.norm.num_batches_tracked"] = ()

    conv("stem.conv1", 64, 3, 7)
    inputs, outputs = 64, resnets["RES2_OUT_CHANNELS"]
    for stage, num_blocks in enumerate({18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth], start=2):
        for index in range(num_blocks):
            block = f"res{stage}.{index}"
            if inputs != outputs:
                conv(f"{block}.shortcut", outputs, inputs, 1)
            if depth < 50:
                conv(f"{block}.conv1", outputs, inputs, 3)
                conv(f"{block}.conv2", outputs, outputs, 3)
            else:
                conv(f"{block}.conv1", inner, inputs, 1)
                conv(f"{block}.conv2", inner, inner // groups, 3)
                conv(f"{block}.conv3", outputs, inner, 1)
            inputs = outputs
        outputs, inner = 2 * outputs, 2 * inner
    return shapes


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_the_pickle_has_all_of_detectron2s_backbone_and_nothing_else(run, arch):
    folder, ours = run(arch=arch)
    written = export.export(folder, folder / "out", "detectron2")
    content = pickle.loads((folder / "out" / f"{arch}.pkl").read_bytes())
    assert content["matching_heuristics"] is True and content["__author__"]
    weights = content["model"]
    settings = yaml.safe_load((folder / "out" / f"{arch}.yaml").read_text())
    expected = detectron2_shapes(settings["MODEL"]["RESNETS"])
    assert {name: value.shape for name, value in weights.items()} == expected
    for theirs, mine in (
        ("stem.conv1.norm.running_var", ours.bn1.running_var),
        ("res3.0.shortcut.weight", ours.layer2[0].downsample[0].weight),
        ("res3.0.shortcut.norm.running_mean", ours.layer2[0].downsample[1].running_mean),
        ("res5.1.conv2.norm.running_mean", ours.layer4[1].bn2.running_mean),
    ):
        assert torch.equal(torch.from_numpy(weights[theirs]), mine), theirs
    assert settings["MODEL"]["WEIGHTS"] == written["file"] and settings["INPUT"]["FORMAT"] == "RGB"
    assert settings["MODEL"]["PIXEL_MEAN"] == pytest.approx([123.675, 116.28, 103.53])
    assert settings["MODEL"]["PIXEL_STD"] == pytest.approx([58.395, 57.12, 57.375])
    assert settings["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is False


@pytest.mark.filterwarnings("default")  # detectron2's own
def test_detectron2_loads_the_export_and_agrees(torchvision, run):
    pytest.importorskip("detectron2", reason="not on PyPI: its source tree on PYTHONPATH will do")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    folder, ours = run(arch="resnet50")
    written = export.export(folder, folder / "out", "detectron2")
    settings = get_cfg()
    settings.merge_from_file(written["settings"])
    settings.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    theirs = build_backbone(settings)
    left = DetectionCheckpointer(theirs).load(settings.MODEL.WEIGHTS)
    assert left["matching_heuristics"] is True
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        features = theirs.eval()(x)["res5"].mean((2, 3))
        torch.testing.assert_close(features, ours(x), rtol=1e-4, atol=1e-4)


def test_what_other_tools_do_not_have_is_refused(run):
    folder, _ = run(arch="resnet18", width=16)
    with pytest.raises(ValueError, match=r"model.width 16: .* train with --model.width 64"):
        export.export(folder, folder / "out", "torchvision")
    folder, _ = run(arch="resnet18", stem="cifar")
    for tool in ("timm", "detectron2"):
        with pytest.raises(ValueError, match="no CIFAR stem"):
            export.export(folder, folder / "out", tool)
    assert not (folder / "out").exists()


def test_a_cifar_stem_comes_with_what_to_do_in_torchvision(torchvision, run):
    folder, ours = run(arch="resnet18", stem="cifar")
    written = export.export(folder, folder / "out", "torchvision")
    model = torchvision.models.resnet18()
    exec(written["note"].partition("before loading, ")[2].replace(" and ", "; "))
    missing, unexpected = model.load_state_dict(load_file(written["file"]), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    model.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), ours(x), rtol=1e-4, atol=1e-4)


def test_whoever_reads_other_files_reads_an_export(run):
    folder, _ = run(arch="resnet18")
    plain = folder / "plain"
    plain.write_text("")
    for write, name in (("timm", "model.safetensors"), ("torchvision", "resnet18.safetensors")):
        export.export(folder, folder / write, write)
        assert (folder / write / name).stat().st_mode == plain.stat().st_mode


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        export.backbone_weights(tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="no checkpoint yet"):
        export.backbone_weights(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"- 1\n", b"a: [}", b"\xff\xfe", b"model: {}\n", b"model: 3\n",
                b"model: {arch: resnet18, stem: cifar, width: 8}\ndata: {mean: 0}\neval: {}\n",
                b"model: {arch: resnet99, stem: cifar, width: 8}\n"],
)  # fmt: skip
def test_a_damaged_config_is_named(run, content):
    folder, _ = run(arch="resnet18", width=8)
    (folder / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match="config.yaml is not a training's .*: restore it"):
        export.backbone_weights(folder)


@pytest.mark.parametrize("change", [{"width": 64}, {"arch": "resnet50"}, {"stem": "cifar"}])
@pytest.mark.parametrize("tool", export.TOOLS)
def test_a_config_of_another_network_is_no_name_for_these_weights(run, change, tool):
    folder, _ = run(arch="resnet18", width=8)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["model"] |= change
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="holds another network than .*config.yaml names: "):
        export.export(folder, folder / "out", tool)
    assert not (folder / "out").exists()


def test_a_failed_export_leaves_no_half_file(run, monkeypatch):
    folder, _ = run(arch="resnet18")

    def full_disk(path, data):
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export.export(folder, folder / "out", "torchvision")
    assert list((folder / "out").iterdir()) == []
