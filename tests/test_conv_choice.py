"""--model.conv_stats auto: what is measured, checked, chosen, kept and shared; a fake clock."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kernels import conv_times
from kernels.conv_times import Site, Times, compare
from kernels.gpu import norm_conv
from train.config import Config, DataConfig, MethodConfig, ModelConfig
from train.distributed import World
from train.main import build_state
from train.methods.simsiam import SimSiam
from train.network.norm import Conv
from train.network.resnet import ResNet
from train.run import conv_choice
from train.run.conv_choice import choose, conv_sites, label

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, 1, CPU, None)
MODEL = ModelConfig(
    width=4, projector_hidden=8, projector_dim=8, predictor_hidden=4, conv_stats="auto"
)
CONFIG = Config(data=DataConfig(root="none", batch_size=8), model=MODEL, precision="fp32")


@pytest.mark.parametrize(("arch", "stem"), [("resnet50", "imagenet"), ("resnet50", "cifar")])
def test_the_shapes_that_are_measured_are_those_that_the_convolutions_read(arch, stem):
    net = ResNet(arch, stem=stem, width=16)
    read = {}
    for conv in net.modules():
        if isinstance(conv, Conv):
            conv.register_forward_hook(lambda m, x, y: read.update({m: (tuple(x[0].shape), y)}))
    net(torch.randn(2, 3, 41, 41).to(memory_format=torch.channels_last))
    sites = list(conv_sites(net, 1, 2, 41, torch.float32))
    for conv, _, site in sites:
        shape, y = read[conv]
        assert site.shape == shape and site.outputs == y.shape[1]
    for name, count in (("statistics", 33), ("reduce", 31)):
        convs = [conv for conv, field, _ in sites if field == name]
        assert len(set(convs)) == len(convs) == count
    assert not list(conv_sites(ResNet("resnet18", stem=stem, width=4), 1, 2, 41, torch.float32))


@pytest.mark.parametrize("kind", ["statistics", "relu", "residual", "norm"])
def test_a_fused_pass_that_is_faster_gains_and_a_wrong_one_does_not(kind, monkeypatch):
    pytest.importorskip("triton")
    ms = iter([3.0, 1.0] * 2)
    monkeypatch.setattr(conv_times, "median_ms", lambda call: next(ms))
    site = Site(kind, 2, (4, 24, 5, 7), 40, torch.float32)
    times = compare(site, CPU)
    assert times == Times(1.0, 3.0, agrees=True) and times.gain_ms == 2.0
    name = "conv_statistics" if kind == "statistics" else "conv_reduce"
    real = getattr(norm_conv, name)

    def with_a_wrong_element(*args):
        first, *others = real(*args)
        first[17, 3] += 0.3
        return first, *others

    monkeypatch.setattr(norm_conv, name, with_a_wrong_element)
    times = compare(site, CPU)
    assert not times.agrees and times.gain_ms == 0


@pytest.fixture
def measured(monkeypatch) -> list[Site]:
    """On a pretended GPU the sites that are measured; forward is faster fused, backward slower."""
    sites = []

    def compare(site, device):
        sites.append(site)
        return Times(1.0, 1.5 if site.kind == "statistics" else 0.5, agrees=site.outputs != 16)

    monkeypatch.setattr(conv_choice, "compare", compare)
    monkeypatch.setattr(conv_choice, "use_triton", lambda kernels, x: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return sites


def options_of(model: nn.Module) -> dict[str, tuple[bool, bool]]:
    convs = {name: m.options for name, m in model.named_modules() if isinstance(m, Conv)}
    return {name: (options.statistics, options.reduce) for name, options in convs.items()}


def test_what_is_faster_and_right_is_chosen_and_measured_once(measured, tmp_path, monkeypatch):
    cache, lines = tmp_path / conv_choice.FILE, []
    chosen = []
    for name in ("a GPU", "a GPU", "another"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        model, before = SimSiam(MODEL, MethodConfig()), len(measured)
        choose(model, CONFIG, WORLD, cache, lines.append)
        chosen.append(options_of(model))
        assert (len(measured) > before) is (len(chosen) != 2)  # the second reads the file
    assert chosen[0] == chosen[1] == chosen[2]
    for name, module in model.named_modules():
        if isinstance(module, Conv):
            is_chosen = module.can_sum and module.out_channels != 16
            assert chosen[0][name] == (is_chosen, False), name
    assert len(measured) == 2 * len({label(site) for site in measured})
    assert lines[0] == lines[1] and lines[0].startswith("conv_stats: 23 of 64 passes of 1x1")
    assert "11.50 ms a step" in lines[0] and "failed the check" in lines[0]


def test_every_rank_runs_what_rank_0_chose(measured, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(conv_choice, "from_main", lambda world, value: sent.append(value) or value)
    first, second = (SimSiam(MODEL, MethodConfig()) for _ in range(2))
    choose(first, CONFIG, replace(WORLD, size=2), tmp_path / "times", print)
    monkeypatch.setattr(conv_choice, "from_main", lambda world, value: sent[0])
    before = len(measured)
    choose(second, CONFIG, replace(WORLD, rank=1, size=2), tmp_path / "none", print)
    assert options_of(first) == options_of(second) and len(measured) == before
    assert not (tmp_path / "none").exists()
    assert {site.shape[0] for site in measured} == {8}  # two views of half a batch of 8


def test_on_a_cpu_auto_measures_nothing_and_true_is_refused(tmp_path):
    current = build_state(CONFIG, WORLD, 100)
    choose(current.model, CONFIG, WORLD, tmp_path / "times", pytest.fail)
    assert not any(map(any, options_of(current.model).values()))
    always = replace(CONFIG, model=replace(MODEL, conv_stats="true"))
    with pytest.raises(ValueError, match="--model.conv_stats true needs the Triton kernels"):
        build_state(always, WORLD, 100)
