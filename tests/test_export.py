"""Exported backbones load into torchvision and timm and compute the same features."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from train import checkpoint, export
from train.config import MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam


@pytest.fixture
def run(tmp_path):
    """A run folder with a ResNet-50 checkpoint whose statistics are not the initial ones."""

    def make(**model):
        torch.manual_seed(0)
        config = ModelConfig(**({"projector_dim": 16, "predictor_hidden": 4} | model))
        net = SimSiam(config, MethodConfig()).to(memory_format=torch.channels_last)
        with torch.no_grad():
            net(torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last))
        checkpoint.save(tmp_path / "checkpoints", 7, {"model": net.state_dict()}, {}, about={})
        settings = {
            "model": {"arch": config.arch, "stem": config.stem, "width": config.width},
            "eval": {"size": 224, "resize": 256},
            "data": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        return tmp_path, net.backbone.eval()

    return make


def test_torchvision_resnet50_loads_the_export_and_agrees(torchvision, run):
    folder, ours = run(arch="resnet50")
    written = export.export_torchvision(folder, folder / "out")
    theirs = torchvision.models.resnet50()
    missing, unexpected = theirs.load_state_dict(load_file(written["file"]), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["resnet50", "resnet18"])
def test_timm_create_model_loads_the_export_and_agrees(torchvision, run, arch):
    import timm

    folder, ours = run(arch=arch)
    written = export.export_timm(folder, folder / "out")
    theirs = timm.create_model(f"local-dir:{written['folder']}", pretrained=True)
    assert theirs.num_features == ours.num_features and theirs.num_classes == 0
    assert theirs.pretrained_cfg["mean"] == pytest.approx([0.485, 0.456, 0.406])
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(x), ours(x), rtol=1e-4, atol=1e-4)


def test_what_other_tools_do_not_have_is_refused(run):
    folder, _ = run(arch="resnet18", width=16)
    with pytest.raises(ValueError, match="model.width 16"):
        export.export_torchvision(folder, folder / "out")
    folder, _ = run(arch="resnet18", stem="cifar")
    with pytest.raises(ValueError, match="no CIFAR stem"):
        export.export_timm(folder, folder / "out")
    assert not (folder / "out").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        export.backbone_weights(tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="no checkpoint yet"):
        export.backbone_weights(tmp_path)


def test_a_failed_export_leaves_no_half_file(run, monkeypatch):
    folder, _ = run(arch="resnet18")

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export.export_torchvision(folder, folder / "out")
    assert list((folder / "out").iterdir()) == []
