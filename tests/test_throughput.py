"""The throughput harness: what it counts, that peers do the same work, and what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from compare import compare, numbers
from compare import main as compare_files
from growth import link_folder, open_list
from measure import peers
from measure.charts import draw
from measure.harness import MeasureConfig, read_flags, write_photos
from measure.kernel_times import resnet50_sites
from measure.loader_times import OfficialViews, measure_loader, measure_stages
from measure.peers import Official, peer_step
from measure.step_times import measure_end_to_end, measure_step
from measure.step_trace import collectives, timeline
from measure.turns import Timing, ratios, take_turns
from pipeline.augment import AugmentConfig
from pipeline.machine import usable_cores
from pipeline.sources.folder import list_images
from pipeline.sources.reader import ImageReader
from predict.forecast import forecast
from predict.limit import GPUS, count, describe, most_times
from train import distributed
from train.config import Config, DataConfig, MethodConfig, ModelConfig
from train.methods.simsiam import SimSiam
from train.methods.swav import SwAVConfig

ROOT = Path(__file__).parent.parent
ONCE = MeasureConfig(steps=1, warmup=1, repeats=1, budget_s=60, loader_images=16)
SMALL = {"arch": "resnet18", "stem": "cifar", "projector_dim": 64, "predictor_hidden": 16}


@pytest.fixture
def world():
    with distributed.start("cpu") as world:
        yield world


@pytest.fixture
def reader(tmp_path) -> ImageReader:
    return ImageReader(list_images(str(write_photos(tmp_path / "photos", count=24))))


def small_config(root="photos", **model) -> Config:
    return Config(
        data=DataConfig(root=str(root), batch_size=8), model=ModelConfig(**SMALL | model),
        augment=AugmentConfig(size=32), precision="fp32",
    )  # fmt: skip


def test_flops_bytes_and_sites_are_those_counted_by_hand():
    found = count(ModelConfig(), MethodConfig(), images=2, size=224)
    # a view: convolutions of 4.087 GMAC, heads of 14.7 MMAC; three passes each, two for the stem
    assert abs(found.flops / 2 / 1e9 - 48.75) < 0.01
    assert abs(found.product_bytes(2) / 4 / 1e6 - 128.8) < 0.1
    assert found.parameters == 38_199_360
    assert Counter(found.sites) == Counter(resnet50_sites(2))


def test_the_roofline_of_an_h200_is_the_hand_counted_one():
    found = count(ModelConfig(), MethodConfig(), images=256, size=224)
    limit = describe(found, *GPUS["h200"], itemsize=2)
    assert abs(limit["images_per_s"] - 5575) < 0.03 * 5575  # best two-pass scheme, by hand
    # nothing but bytes where products are free
    slow = found.seconds(1e30, 4.3e12)
    weights = sum(2 * p.elements[2] * p.passes for p in found.products)
    moved = found.product_bytes(2) + weights + found.site_bytes(2) + 28 * found.parameters
    assert abs(slow - moved / 4.3e12) < 1e-9


def test_the_official_model_computes_our_loss_from_the_same_weights(torchvision):
    config = small_config(projector_layers=3)
    torch.manual_seed(0)
    ours, official = SimSiam(config.model, config.method), Official(config)
    weights = ours.state_dict()
    renamed = {}
    for name in official.state_dict():
        part, rest = name.split(".", 1)
        if part == "trunk":
            renamed[name] = weights[f"backbone.{rest}"]
        else:
            number, leaf = rest.split(".")
            block, place = divmod(int(number), 3)
            is_last = f"{part}.{block}.linear.weight" not in weights
            inner = leaf if is_last else f"{'linear' if place == 0 else 'norm'}.{leaf}"
            renamed[name] = weights[f"{part}.{block}.{inner}"]
    official.load_state_dict(renamed)
    for model in (ours, official):  # zero at the start: its block would not be in the loss
        for name, parameter in model.named_parameters():
            if name.endswith("bn2.weight"):
                torch.nn.init.constant_(parameter, 0.5)
    views = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(views)[0], official(*views.chunk(2)), rtol=1e-4, atol=1e-5)


def test_a_peers_step_trains(torchvision, world):
    views = (torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32))
    step = peer_step("official", small_config(), world, views)
    losses = [step().item() for _ in range(6)]
    assert losses[-1] < losses[0] - 0.005


def test_solo_learns_loss_is_read_without_the_rest_of_its_package(
    torchvision, world, tmp_path, monkeypatch
):
    package = tmp_path / "solo"
    (package / "losses").mkdir(parents=True)
    (package / "__init__.py").write_text("import pytorch_lightning")  # as the real one does
    (package / "losses" / "simsiam.py").write_text(
        "def simsiam_loss_func(p, z):\n    return (p - z.detach()).square().mean()\n"
    )
    views = (torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32))
    with pytest.raises(ImportError, match="pip install --no-deps solo-learn"):
        peer_step("solo_learn", small_config(), world, views)
    monkeypatch.syspath_prepend(tmp_path)
    assert peer_step("solo_learn", small_config(), world, views)() > 0  # no cosine: the file's


def test_variants_take_turns_and_one_that_fails_is_named(world):
    calls = []

    def variant(name: str, seconds: float):
        def repeat() -> float:
            calls.append(name)
            if name == "broken":
                raise RuntimeError("no such device\nand more")
            return seconds

        return repeat

    variants = {"ours": variant("ours", 0.5), "broken": variant("broken", 1), "b": variant("b", 2)}
    found = take_turns(variants, images=10, warmup=1, n=2, budget_s=60, world=world)
    assert calls == ["ours", "broken", "b", "ours", "b", "ours", "b"]
    assert (
        found["ours"].summary()["images_per_s"]["p50"] == 20 and found["ours"].summary()["n"] == 2
    )
    assert found["broken"].summary() == {"not_measured": "RuntimeError: no such device"}
    assert ratios("step", found) == {"step/b": 4.0}
    assert ratios("step", {"ours": found["broken"], "b": found["b"]}) == {}


def test_a_spent_budget_ends_with_one_repetition(world):
    found = take_turns({"ours": lambda: 1.0}, images=1, warmup=1, n=50, budget_s=0, world=world)
    assert found["ours"].summary()["n"] == 1


def test_percentiles_of_rates_are_ordered_and_exact():
    timing = Timing(100, seconds=[1.0, 2.0, 4.0])
    assert timing.summary()["images_per_s"]["p50"] == 50
    assert timing.rate(0.1) < timing.rate(0.5) < timing.rate(0.9)
    timing = Timing(1, seconds=[float(i) for i in range(101)])
    assert 1 / timing.rate(0.1) == pytest.approx(90)


def test_the_loader_its_stages_and_both_peers_are_measured(torchvision, reader, world):
    config = small_config(reader.source.root)
    found = measure_loader(reader, config, ONCE, world)
    assert {name: one.not_measured for name, one in found.items()} == dict.fromkeys(found)
    assert set(ratios("loader", found)) == {"loader/torchvision", "loader/dali_example"}
    stages = measure_stages(reader, config, world, n=1)
    assert list(stages) == ["read", "decode", "crop", "color", "blur"]
    # a view of the peer is the recipe's: normalised floats
    view, other = OfficialViews(reader, config)[0]
    assert view.shape == (3, 32, 32) and view.dtype == torch.float32 and not view.equal(other)


def test_step_and_end_to_end_are_measured_and_missing_peers_say_what_to_do(reader, world):
    config = small_config(reader.source.root, width=16)
    found = measure_step(config, ONCE, world)
    assert found["ours"].rate() > 0
    assert "--model.width" in (found["official"].not_measured or "")
    timing, wait = measure_end_to_end(reader, config, ONCE, world)
    assert timing.rate() > 0 and 0 <= wait <= 100


def test_a_step_of_small_views_and_of_four_views_is_measured(world):
    swav = SwAVConfig(prototypes=10, small_views=2, small_size=16)
    for method in (MethodConfig(name="swav", swav=swav), MethodConfig(views=4)):
        config = dataclasses.replace(small_config(width=8), method=method)
        found = measure_step(config, dataclasses.replace(ONCE, peers=False), world)
        assert found["ours"].rate() > 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--method.name=byol", "--dry-run"), ("--dry-run: for SimSiam's step of two", "leave it")),
        (("--method.name=byol",),
         ("--peers true and --what limit: for SimSiam's step of two views alone, --method.name is "
          "byol", "give --peers false and give --what loader,step,end_to_end,ranks")),
        (("--method.views=4",), ("is simsiam, with 4 views: give --peers false",)),
    ],
)  # fmt: skip
def test_what_measures_simsiams_two_views_alone_is_refused_for_others(flags, parts):
    done = run_script("profiling/throughput.py", *flags)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert all(part in line for part in parts)


def test_named_ranges_and_collectives_are_read_from_a_trace():
    def event(name: str, ts: float, dur: float, **args) -> dict:
        return {"name": name, "cat": "user_annotation", "ts": ts, "dur": dur, "args": args}

    first = [event("forward", 0, 5), event("backward", 5, 5)]
    last = [event("forward", 1000, 2000), event("backward", 3000, 4000)]
    sums = {"Input Dims": [[3, 4], []], "Input type": ["double", ""]}
    trace = {"traceEvents": [*first, *last, *[event("gloo:all_reduce", 1, 1, **sums)] * 4]}
    assert timeline(trace) == [
        {"name": "forward", "begin_ms": 0.0, "ms": 2.0},
        {"name": "backward", "begin_ms": 2.0, "ms": 4.0},
    ]
    assert collectives(trace) == {"gloo:all_reduce": {"number": 2.0, "bytes": 2 * 12 * 8.0}}


def test_a_forecast_says_memory_time_and_checkpoint_of_a_batch():
    config = Config(data=DataConfig(root="none", batch_size=2048))
    found = forecast(config, gpu="h200", gpus=8)
    assert found["images_per_gpu"] == 256 and found["checkpoint_mb"] == pytest.approx(305.6)
    assert abs(found["kept_for_backward_mb_per_image"] - 82.9) < 1  # compiled.py counts 82.2
    assert found["step_ms"][0] < found["step_ms"][1] and found["measured"] is False
    assert found["dali_reserve"].startswith("training 2.00 GiB of device memory, 2.00 GiB pinned")
    with pytest.raises(ValueError, match=r"--gpus 3 does not divide"):
        forecast(config, gpu="h200", gpus=3)


def test_a_forecast_refuses_a_batch_that_no_gpu_or_data_set_holds(capsys):
    def of(images: int, gpus: int) -> dict:
        config = Config(
            data=DataConfig(root="none", batch_size=images), model=ModelConfig(arch="resnet18"),
            augment=AugmentConfig(size=64), precision="bf16",
        )  # fmt: skip
        return forecast(config, gpu="a100", gpus=gpus)

    with pytest.raises(ValueError, match="--gpu a100 has 80 GiB, 131072 images need ") as refused:
        of(262_144, 2)
    assert "memory a GPU" in capsys.readouterr().err  # the table is there all the same
    most = int(str(refused.value).split("batch_size to ")[1].split()[0])
    assert 79 < of(most, 2)["memory_gib"] <= 80
    with pytest.raises(ValueError, match="25600000 on --gpus 100000 is more than all 1281167"):
        of(25_600_000, 100_000)
    assert min(of(262_144, 1024)["epoch_minutes"]) > 0


def test_comparing_knows_which_direction_is_worse():
    before = {"launches": 577, "ratios": {"step/official": 3.0}, "config": {"n": 1}}
    worse, _ = compare(before, {"launches": 600, "ratios": {"step/official": 2.0}}, tolerance=0.0)
    assert [(row[0], row[-1]) for row in worse] == [
        ("launches", "worse"),
        ("ratios.step/official", "worse"),
    ]
    better, _ = compare(before, {"launches": 500, "ratios": {"step/official": 4}}, tolerance=0.0)
    assert not any(bad for *_, bad in better)
    within, _ = compare(before, {"launches": 600, "ratios": {"step/official": 3}}, tolerance=0.05)
    assert [bad for *_, bad in within] == [""]
    lost, _ = compare(before, {"launches": 577, "more": 1}, tolerance=0.0)
    assert lost == [("more", None, 1.0, "new"), ("ratios.step/official", 3.0, None, "missing")]
    with pytest.raises(ValueError, match="none of the numbers"):
        compare(before, {"other": 1}, tolerance=0.0)
    for broken in (float("nan"), float("-inf")):
        rows, _ = compare(before, before | {"ratios": {"step/official": broken}}, tolerance=9.0)
        assert [bad for *_, bad in rows] == ["worse"]
    assert numbers({"a": [1, {"b": 2.5}], "c": True, "d": "x"}) == {"a.0": 1.0, "a.1.b": 2.5}


def test_a_linked_folder_has_as_many_images_and_its_list_opens(reader, tmp_path):
    folder = link_folder(reader, tmp_path / "linked", 50)
    assert len(list_images(str(folder))) == 50
    found = open_list(folder, tmp_path / "list.pickle")
    assert found["entries"] == 50 and 0 < found["open_peak_gib"] < 0.5


def test_the_photos_are_the_same_on_every_machine_and_of_many_sizes(tmp_path):
    folder = write_photos(tmp_path / "a", count=6)
    again = write_photos(tmp_path / "b", count=6)
    files = sorted(folder.iterdir())
    assert [f.read_bytes() for f in files] == [(again / f.name).read_bytes() for f in files]
    assert len({f.stat().st_size for f in files}) == 6
    assert 40e3 < np.mean([f.stat().st_size for f in files]) < 250e3


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False, env=environment,
    )  # fmt: skip


TINY = ["--model.arch", "resnet18", "--model.stem", "cifar", "--model.width", "8",
        "--augment.size", "32", "--data.batch_size", "8", "--precision", "fp32"]  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "panels"),
    [((), 1), (("loader",), 1), (("step",), 1), (("limit",), 1), (("loader", "limit"), 2)],
)
def test_a_picture_has_panels_for_what_was_measured_with_bars_from_0(
    parts, panels, tmp_path, monkeypatch
):
    one = {"ours": {"images_per_s": {"p10": 99.0, "p50": 100.0, "p90": 101.0}, "n": 1}}
    measured = {"loader": one, "step": one, "limit": {"images_per_s": 4.0}}
    found = {"environment": {"device": "none"}, "n": 1} | {part: measured[part] for part in parts}
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw(found, tmp_path / "not-written.png")
    assert len(drawn[0].axes) == panels
    for axis in drawn[0].axes:
        assert axis.get_yscale() == "linear"
        assert not axis.patches or axis.get_ylim()[0] == 0


def test_the_limit_is_told_as_a_multiple_of_each_measured_peer():
    step = {
        "ours": {"images_per_s": {"p50": 6.0}},
        "official": {"images_per_s": {"p50": 2.5}},
        "lightly": {"not_measured": "not installed"},
    }
    assert most_times(7.5, step) == {"at_most_times_official": 3.0}


def test_the_program_ends_in_one_json_line_with_every_part(reader):
    threads = str(usable_cores() + 1)
    done = run_script(
        "profiling/throughput.py", "--data.root", reader.source.root, *TINY, "--peers",
        "false", "--repeats", "1", "--loader_images", "64", "--dali.threads", threads,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"loader", "stages", "step", "end_to_end", "limit", "memory", "timeline"} <= found.keys()
    assert found["ratios"]["end_to_end/slower"] > 0
    names = [part["name"] for part in found["timeline"]]
    assert names == ["normalize", "forward", "backward", "optimizer"]
    assert found["limit"]["share_of_roofline"] > 0
    assert "images/s" in done.stderr
    assert f"warning: --dali.threads {threads} on" in done.stderr


@pytest.mark.dist
def test_under_torchrun_it_tells_ranks_scaling_and_collectives():
    done = run_script(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "profiling/throughput.py", *TINY, "--what", "step,ranks", "--peers", "false",
        "--repeats", "1", "--steps", "1", "--warmup", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ranks = found["ranks"]
    assert len(ranks["images_per_s"]) == 2
    assert ranks["total_images_per_s"] == pytest.approx(sum(ranks["images_per_s"]))
    assert ranks["images_per_s"][ranks["slowest_rank"]] == min(ranks["images_per_s"])
    alone = ranks["one_rank_alone_images_per_s"]
    assert ranks["scaling_efficiency"] == pytest.approx(
        ranks["total_images_per_s"] / 2 / alone, abs=1e-3
    )
    model = SimSiam(ModelConfig(arch="resnet18", stem="cifar", width=8), MethodConfig())
    weights = sum(p.numel() for p in model.parameters())
    assert ranks["gradient_bytes_per_step"] == 4 * weights
    moved = sum(one["bytes"] for one in ranks["collectives_per_step"].values())
    assert moved > 4 * weights  # the gradients, and the statistics of batch norm


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgt_s", "3"], "perhaps you meant --budget_s"),
        (["--modle.arch", "resnet18"], "perhaps you meant --model.arch"),
        (["--save", "../x"], "save is a name for profiling/results/"),
        (["--what", ""], "what names no part: leave it out"),
        (["--gpus", "0"], "gpus must be at least 1"),
        (["--data.batch_size", "1"], "data.batch_size must be at least 2"),
    ],
)
def test_a_mistaken_flag_gets_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        read_flags("profiling/throughput.py", "Measure.")
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("words", [["--what", "loader,limit"], ["--what=loader,limit"]])
def test_parts_are_named_between_commas(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["throughput.py", *words])
    assert read_flags("profiling/throughput.py", "Measure.")[1].what == ("loader", "limit")


def test_no_images_get_one_line_and_exit_code_1():
    done = run_script("profiling/throughput.py", "--data.root", "/nowhere/at/all", *TINY)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "no such folder" in lines[0]
    assert "Traceback" not in done.stderr


def test_comparing_files_fails_beyond_the_tolerance_and_names_a_bad_file(
    tmp_path, monkeypatch, capsys
):
    for name, launches in (("a", 577), ("b", 578)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"launches": launches}))

    def run(*names: str) -> object:
        files = [str(tmp_path / f"{name}.json") for name in names]
        monkeypatch.setattr(sys, "argv", ["compare.py", *files, "--tolerance", "0"])
        compare_files()
        return json.loads(capsys.readouterr().out)

    with pytest.raises(SystemExit) as stop:
        run("a", "b")
    assert stop.value.code == 1 and '"worse": ["launches"]' in capsys.readouterr().out
    assert run("b", "a") == {"compared": 1, "differ": 1, "worse": [], "missing": []}
    with pytest.raises(SystemExit):
        run("a", "c")
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(SystemExit):
        run("a", "c")
    assert "c.json is no result file" in capsys.readouterr().err


def test_results_that_were_not_made_alike_are_compared_with_a_warning(
    tmp_path, monkeypatch, capsys
):
    for name, device, precision in (("a", "CPU", "fp32"), ("b", "GPU", "bf16")):
        one = {"environment": {"device": device, "revision": name}, "launches": 577,
               "config": {"precision": precision, "out": name}}  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(one))

    def told(*names: str) -> str:
        files = [str(tmp_path / f"{name}.json") for name in names]
        monkeypatch.setattr(sys, "argv", ["compare.py", *files])
        compare_files()
        return capsys.readouterr().err

    differ = "config.precision (fp32, bf16); environment.device (CPU, GPU). Times"
    assert f"warning: the settings differ: {differ}" in told("a", "b")
    assert "warning" not in told("a", "a")


def test_equal_results_and_missing_numbers_are_called_so(tmp_path, monkeypatch, capsys):
    for name, values in (("a", {"launches": 577, "bytes": 2}), ("b", {"bytes": 2})):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))

    def run(*names: str) -> tuple[str, dict]:
        files = [str(tmp_path / f"{name}.json") for name in names]
        monkeypatch.setattr(sys, "argv", ["compare.py", *files])
        try:
            compare_files()
        finally:
            printed = capsys.readouterr()
            answers.append((printed.err, json.loads(printed.out)))

    answers: list = []
    run("a", "a")
    with pytest.raises(SystemExit) as stop:
        run("a", "b")
    assert stop.value.code == 1
    (equal, nothing), (table, lost) = answers
    assert equal == "2 numbers compared: no difference\n" and nothing["differ"] == 0
    assert "missing" in table and "worse" not in table
    assert lost == {"compared": 2, "differ": 1, "worse": [], "missing": ["launches"]}


def test_a_result_that_cannot_be_kept_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    MeasureConfig()
    with pytest.raises(ValueError, match=r"--save mine: .*results cannot be written"):
        MeasureConfig(save="mine")


def test_a_torchvision_whose_library_loads_gets_no_operators_of_ours(monkeypatch):
    """Its library defines them when it is imported; of a name that is taken the process ends."""
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setattr(torch.ops, "torchvision", types.SimpleNamespace(), raising=False)
    monkeypatch.setattr(peers, "_declare_ops", lambda: pytest.fail("declared before it was tried"))
    assert peers.import_torchvision() is sys.modules["torchvision"]
