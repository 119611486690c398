"""The prediction for many GPUs: its formula by hand, its limits, what it was held against."""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

import scaling
from measure import results
from predict.fabric import Fabric, Protocol
from predict.limit import count
from predict.scaling_checks import MLPERF_EFFICIENCY
from predict.step_model import BUCKET, FIRST_BUCKET, Work, predict
from predict.step_time import launches, step_time
from train.config import MethodConfig, ModelConfig

ROOT = Path(__file__).parent.parent
MB = 1 << 20
RING = Protocol(False, base_us=5.0, node_us=1.0, net_us=10.0, share=1.0)
TREE = dataclasses.replace(RING, is_tree=True)
FREE = Protocol(False, 0.0, 0.0, 0.0, 1.0)  # no latency
DEFAULTS = argparse.Namespace(measured=[], gpu="h200", overlap=True)


@pytest.fixture(scope="module")
def found() -> dict:
    """The prediction as the program prints it."""
    return json.loads(json.dumps(scaling.forecast_ranks(DEFAULTS, Fabric())))


def link(seconds_of_2_mb: float) -> Fabric:
    """Two ranks, no latency; an all-reduce of two sends each byte once."""
    return Fabric(1, net_gb_per_s=2 * MB / 1e9 / seconds_of_2_mb, protocols=(FREE,))


@pytest.mark.parametrize(
    ("fabric", "ranks", "num_bytes", "microseconds"),
    [
        (Fabric(8, node_gb_per_s=100, protocols=(RING,)), 4, 1e6, 5 + 6 * 1 + 1.5 * 10),
        (Fabric(1, net_gb_per_s=1, protocols=(RING,)), 4, 1e6, 5 + 6 * 10 + 1.5 * 1000),
        # two nodes of four: six hops within them, one between, there and back
        (Fabric(4, 100, 10, protocols=(RING,)), 8, 1e6, 5 + 2 * (6 + 10) + 1.75 * 100),
        (Fabric(4, 100, 10, net_us=7, protocols=(RING,)), 8, 0, 5 + 2 * (6 + 17)),
        # four nodes of four: three hops within one, two levels of the tree
        (Fabric(4, 100, 10, protocols=(TREE,)), 16, 1e6, 5 + 2 * (3 + 2 * 10) + 2 * 100),
        # the faster of the two: the tree with few bytes, the ring with many
        (Fabric(4, 100, 10, protocols=(RING, TREE)), 16, 0, 5 + 2 * (3 + 2 * 10)),
        (Fabric(4, 100, 10, protocols=(RING, TREE)), 16, 1e9, 5 + 2 * 42 + 1.875 * 1e5),
    ],
)
def test_an_all_reduce_takes_what_is_worked_out_by_hand(fabric, ranks, num_bytes, microseconds):
    assert 1e6 * fabric.all_reduce_s(ranks, num_bytes) == pytest.approx(microseconds)


def test_one_gpu_communicates_nothing():
    work = Work((0.5, 0.5), (5 * MB, 5 * MB), (7, 1e5), (7, 1e5))
    for overlap in (True, False):
        step = predict(work, Fabric(), 1, compute_s=0.25, overlap=overlap)
        assert step.seconds == pytest.approx(0.25) and step.sums_s == 0
        assert step.gradients_s == pytest.approx(0, abs=1e-12)


def test_gradients_travel_during_the_backward_pass_and_the_last_are_waited_for():
    # forward 1 s, backward 1 s for each of two layers; 2 MB take 1 s: sent from 2 to 3, from 3 to 4
    work = Work((0.5, 0.5), (2 * MB, 2 * MB))
    step = predict(work, link(1.0), 2, compute_s=3.0, overlap=True)
    assert step.seconds == pytest.approx(4) and step.gradients_s == pytest.approx(1)
    assert predict(work, link(1.0), 2, compute_s=3.0, overlap=False).seconds == pytest.approx(5)
    # 2 s each: the second waits for the first, from 4 to 6
    assert predict(work, link(2.0), 2, compute_s=3.0, overlap=True).seconds == pytest.approx(6)


def test_a_batch_norm_waits_for_the_gradients_sent_before_it():
    # three layers of 1 s after a forward pass of 1.5 s; the last one's 2 MB travel from 2.5 to 4.5
    silent = Work((1 / 3,) * 3, (0.0, 0.0, 2 * MB))
    assert predict(silent, link(2.0), 2, compute_s=4.5, overlap=True).seconds == pytest.approx(4.5)
    summed = dataclasses.replace(silent, backward_sums=(3, 0.0))
    # the middle layer's sums at 3.5 wait until 4.5; the first layer ends at 5.5
    assert predict(summed, link(2.0), 2, compute_s=4.5, overlap=True).seconds == pytest.approx(5.5)


def test_sums_of_batch_norm_are_never_hidden():
    fabric = Fabric(8, protocols=(RING,))
    work = Work((1.0,), (0.0,), (50, 0.0), (50, 0.0))
    step = predict(work, fabric, 8, compute_s=1.0, overlap=True)
    one_s = fabric.all_reduce_s(8, 0)
    assert step.sums_s == pytest.approx(100 * one_s)
    assert step.seconds == pytest.approx(1 + 101 * one_s)  # and the empty bucket


def test_the_buckets_are_those_of_distributed_data_parallel():
    import torch.distributed as dist

    assert FIRST_BUCKET == dist._DEFAULT_FIRST_BUCKET_BYTES and BUCKET == 25 << 20


def test_a_step_never_gets_shorter_by_more_gpus_a_slower_network_or_less_overlap(found):
    for rows in found["images_per_gpu"].values():
        steps = [one["step_ms"][0] for one in rows.values()]
        assert steps == sorted(steps) and steps[-1] > steps[0]
        rates = [one["images_per_s"][0] for one in rows.values()]
        assert rates == sorted(rates)  # and more GPUs are never slower together
    work = Work((0.3, 0.7), (30 * MB, 9 * MB), (53, 1e6), (53, 5e5))

    def seconds(overlap=True, **given) -> float:
        return predict(work, Fabric(**given), 64, compute_s=0.02, overlap=overlap).seconds

    for name, values in (("net_us", (0, 5, 50)), ("net_gb_per_s", (376, 50, 1))):
        several = [seconds(**{name: value}) for value in values]
        assert several == sorted(several) and several[-1] > several[0]
    assert seconds(overlap=False) > seconds()


def test_mlperfs_strong_scaling_comes_out_within_two_points_and_not_from_messages_alone(found):
    efficiency = found["mlperf"]["efficiency_64"]
    assert efficiency["published"] == MLPERF_EFFICIENCY
    assert efficiency["predicted"] == pytest.approx(MLPERF_EFFICIENCY, abs=0.02)
    assert efficiency["by_messages_alone"] > 0.95
    gpus = found["mlperf"]["gpus"]
    assert gpus["3584"]["predicted"] == pytest.approx(gpus["3584"]["published"], rel=0.05)
    for n in ("8", "512"):  # fitted to these
        assert gpus[n]["predicted"] == pytest.approx(gpus[n]["published"], rel=1e-3)


def result_of(folder: Path, *, images=256, world=1, arch="resnet50", rate=3500.0, cuda="13.0"):
    one = {"step": {"ours": {"images_per_s": {"p50": rate}}}, 
           "environment": {"world": world, "cuda": cuda},
           "config": {"model": {"arch": arch}, "augment": {"size": 224},
                      "data": {"batch_size": images}}}  # fmt: skip
    path = folder / f"{images}-{world}-{arch}.json"
    path.write_text(json.dumps(one))
    return path


def test_a_measured_step_is_taken_as_it_is_and_gives_that_of_other_batches(tmp_path):
    given = scaling.read_measured([result_of(tmp_path), result_of(tmp_path, images=64, rate=3000)])
    assert given == {256: 256 / 3500, 64: 64 / 3000}
    known = {images: [seconds] for images, seconds in given.items()}
    assert scaling.step_seconds(64, known, fixed_s=0.004) == [64 / 3000]
    (seconds,) = scaling.step_seconds(64, {256: [0.084]}, fixed_s=0.004)
    assert seconds == pytest.approx(0.004 + 0.080 / 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"world": 8}, "of 8 ranks"),
        ({"cuda": None}, "of a CPU, the network is that of GPUs"),
        ({"arch": "resnet18"}, "resnet18 at 224 pixels"),
    ],
)
def test_a_result_that_does_not_fit_is_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        scaling.read_measured([result_of(tmp_path, **changed)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--measured", "/nowhere.json"], "--measured /nowhere.json: no step of"),
        (["--net-gb-per-s", "0"], "--net-gb-per-s must be above 0, got 0.0"),
        (["--net-us", "-1"], "--net-us must be 0 or more"),
        (["--save", "../x"], "save is a name for profiling/results/, not a path"),
    ],
)
def test_a_mistake_gets_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags])
    with pytest.raises(SystemExit) as stop:
        scaling.main()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and message in lines[0]


def test_the_program_ends_in_one_json_line_and_keeps_table_and_picture(
    found, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling, "forecast_ranks", lambda *_: dict(found))
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--save", "scaling"])
    scaling.main()
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["measured"] is False and "step of one GPU: predicted" in printed.err
    kept, picture = map(Path, told["files"])
    assert json.loads(kept.read_text())["images_per_gpu"] == found["images_per_gpu"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_documents_figures_are_those_of_the_result_which_the_code_still_gives(found):
    text = (ROOT / "docs/scaling.md").read_text()
    (path,) = (ROOT / "profiling/results").glob("scaling_h200*.json")
    kept = json.loads(path.read_text())
    assert path.name in text and path.with_suffix(".png").name in text
    for name in ("one_gpu", "published", "images_per_gpu", "mlperf", "hosts"):
        assert found[name] == kept[name], name
    (other,) = (ROOT / "profiling/results").glob("scaling_h100*.json")
    assert other.name in text
    steps = [file["one_gpu"]["256"] for file in (kept, json.loads(other.read_text()))]
    ms = {name: [step["parts_ms"][name] for step in steps] for name in steps[0]["parts_ms"]}
    for name, pairs in (ms | {"step": [step["step_ms"] for step in steps]}).items():
        cells = [name, *("{:.1f} to {:.1f} ms".format(*pair) for pair in pairs)]
        assert "| " + " | ".join(cells) + " |" in text
    for run in kept["published"]:
        cells = "{1:,} to {0:,}".format(*run["predicted"]), f"{run['published']:,}"
        assert f"| {run['program']} | {run['gpu'].upper()} | {' | '.join(cells)} |" in text
    for ranks in kept["images_per_gpu"]["256"]:
        cells = [f"{int(ranks):,}"]
        for images in ("256", "64"):
            one = kept["images_per_gpu"][images][ranks]
            cells.append("{:,.0f} to {:,.0f}".format(*one["images_per_s"]))
            low, high = (round(100 * value) for value in one["efficiency"])
            cells.append(f"{low} %" if low == high else f"{high} to {low} %")
        assert "| " + " | ".join(cells) + " |" in text
    for row in kept["hosts"]["steps"]:
        rate = "none" if row["mbit_per_s"] is None else f"{row['mbit_per_s']:,}"
        cells = [rate, row["ranks"], *(f"{row[name]:.2f}" for name in
                 ("compute_s", "step_s", "predicted_s", "predicted_by_measured"))]  # fmt: skip
        assert "| " + " | ".join(map(str, cells)) + " |" in text


def test_steps_over_slow_links_come_out_within_the_documents_error(found):
    text = (ROOT / "docs/scaling.md").read_text()
    stated = re.search(r"within (\d+) % of the measured step at 10 and 100 Mbit/s", text)
    assert stated is not None
    slow = [r for r in found["hosts"]["steps"] if (r["mbit_per_s"] or 1000) <= 100]
    assert len(slow) == 4
    for row in slow:
        assert abs(row["predicted_by_measured"] - 1) <= int(stated[1]) / 100


def test_the_step_of_one_gpu_is_made_of_what_compiled_py_counts():
    counted = results.newest("compiled-resnet50")
    assert counted is not None
    counts = count(ModelConfig(), MethodConfig(), images=counted["images"], size=224)
    assert launches(counts) == pytest.approx(counted["ours"]["launches"], rel=0.02)
    moved = (counts.product_bytes(2) + counts.site_bytes(2)) / counts.images / 1e6
    assert moved == pytest.approx(counted["ours"]["mb_per_image"], rel=0.03)
    step = step_time(counts, "h200")
    for end in (0, 1):
        parts_ms = sum(part[end] for part in step["parts_ms"].values())
        assert parts_ms == pytest.approx(step["step_ms"][end], abs=0.03)


def test_published_speeds_of_resnet50_are_within_the_range_of_the_formula(found):
    assert len(found["published"]) >= 4
    for run in found["published"]:
        best, worst = run["predicted"]
        assert worst < run["published"] < best < 1.5 * worst  # a range that says something


@pytest.mark.parametrize(("ms", "holds"), [(60, True), (40, False), (90, False)])
def test_a_measured_step_outside_of_the_range_is_said_to_be(tmp_path, capsys, ms, holds):
    path = result_of(tmp_path, rate=256e3 / ms)
    given = argparse.Namespace(**vars(DEFAULTS) | {"measured": [path]})
    result = scaling.forecast_ranks(given, Fabric())
    assert result["one_gpu"][256]["holds"] is holds
    scaling.print_one_gpu(result)
    assert ("OUTSIDE the range" in capsys.readouterr().err) is not holds
