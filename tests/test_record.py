"""Results are recorded from finished runs of one revision; the docs' figures are in those files."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from measure import results

ROOT = Path(__file__).parent.parent
before = list(sys.path)
record = runpy.run_path(str(ROOT / "profiling" / "record.py"))
sys.path[:] = before  # the script puts its root first, in place of tests/, which spawned ranks need


def make_run(folder: Path, *, state: str = "finished", revision: str = "abc", **env) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"state": state, "knn_top1": 50.0}))
    (folder / "env.json").write_text(json.dumps({"revision": revision, "device": "A CPU", **env}))
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "command.txt").write_text("/some/where/bin/python train/main.py --seed 0\n")
    row = {"step": 1, "train/loss": -0.5, "train/z_std": 1.0, "throughput/images_per_sec": 7.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_a_finished_run_is_kept_whole_without_this_machines_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    path = record["record"]("name", [make_run(tmp_path / "a")])
    assert re.fullmatch(r"name_a-cpu_\d{6}\.json", path.name)
    kept = json.loads(path.read_text())
    assert kept["n"] == 1 and kept["runs"][0]["images_per_s_p50"] == 7.0
    assert kept["runs"][0]["command"] == "python train/main.py --seed 0"


@pytest.mark.parametrize("kind", ["evaluation", "features"])
def test_an_evaluation_and_features_are_kept_too(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    folder = make_run(tmp_path / "a")
    (folder / "result.json").unlink()
    (folder / f"{kind}.json").write_text(json.dumps({"knn_top1": 50.0, "data": f"{ROOT}/runs/x"}))
    (folder / "metrics.jsonl").unlink()
    kept = json.loads(record["record"]("name", [folder]).read_text())
    assert set(kept["runs"][0]) == {"result", "env", "config", "command"}
    assert kept["runs"][0]["result"] == {"knn_top1": 50.0, "data": "runs/x"}


def test_unfinished_or_unlike_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no result\.json"):
        record["read_run"](tmp_path)
    with pytest.raises(ValueError, match="preempted, not finished"):
        record["read_run"](make_run(tmp_path / "a", state="preempted"))
    runs = [make_run(tmp_path / "b"), make_run(tmp_path / "c", revision="def")]
    with pytest.raises(ValueError, match="differ in revision: abc, def"):
        record["record"]("name", runs)
    runs[1] = make_run(tmp_path / "d", cpu_capability="AVX2")
    with pytest.raises(ValueError, match="differ in cpu_capability: AVX2, None"):
        record["record"]("name", runs)


# README's first screen and the tables behind it
FIGURES = (ROOT / "README.md").read_text() + (ROOT / "docs" / "measured.md").read_text()


def test_every_result_that_readme_links_to_exists_and_every_result_is_json():
    links = re.findall(r"\((?:\.\./)?(profiling/results/[^)]+)\)", FIGURES)
    assert links
    assert all((ROOT / link).is_file() for link in links)
    for path in (ROOT / "profiling" / "results").glob("*.json"):
        assert json.loads(path.read_text())["n"] >= 1


def test_readmes_counted_figures_are_those_of_the_results():
    results, text = ROOT / "profiling/results", FIGURES
    kept = json.loads(next(results.glob("compiled-resnet50_*.json")).read_text())
    ours, plain, less = kept["ours"], kept["plain"], kept["recompute"]
    assert f"[{ours['mb_per_image']:.1f} MB]" in text and f"{plain['mb_per_image']:.1f} MB" in text
    assert f"| {ours['launches']} | {plain['launches']:,} |" in text
    assert f"{ours['mb_per_image'] / plain['mb_per_image']:.2f}x of plain PyTorch's" in text
    saved = [one["saved_mb_per_image"] for one in (ours, less, plain)]
    assert "| {:.1f} ({:.1f}) MB | {:.1f} MB |".format(*saved) in text
    found = json.loads(next(results.glob("collectives-resnet50_*.json")).read_text())
    counts = f"[{found['collectives']}, {found['graph_breaks']}]"
    assert counts in text and f"| {found['two_pass_sync_batch_norm']} |" in text


def test_readmes_knn_figures_are_those_of_the_recorded_runs():
    kept = json.loads(next((ROOT / "profiling/results").glob("demo-digits_*.json")).read_text())
    text = FIGURES
    for run in kept["runs"]:
        found = run["result"]
        assert f"{found['knn_top1_untrained']:.1f} -> {found['knn_top1']:.1f}" in text
        assert found["knn_top1"] - found["knn_top1_untrained"] >= 20


def test_readmes_throughput_figures_are_those_of_the_results_and_hold_the_loaders_goals():
    kept = ROOT / "profiling/results"
    text = FIGURES
    large, small, growth = (
        json.loads(next(kept.glob(f"{name}_*.json")).read_text())
        for name in ("throughput-resnet50-224", "throughput-resnet18-32", "growth")
    )
    ratios = large["ratios"]
    assert ratios["loader/torchvision"] >= 2.5 and ratios["loader/dali_example"] >= 1.2
    assert "{:.2f}x; {:.2f}x".format(*list(ratios.values())[:2]) in text
    rates = [one["images_per_s"]["loader"] for one in (large, small)]
    assert f"| {rates[0]:.0f} |" in text and f"| {rates[1]:.0f}; " in text
    steps = [one["ratios"]["step/official"] for one in (large, small)]
    assert "{:.2f}x; {:.2f}x".format(*steps) in text
    spread = growth["images_slowest_by_fastest"], growth["batch_slowest_by_fastest"]
    assert max(spread) <= 1.15 and growth["memory_growth"] <= 0.05
    assert "| {:.2f}; {:.2f}; ".format(*spread) in text
    assert growth["list"]["open_s"] < 5 and growth["list"]["open_peak_gib"] < 1
