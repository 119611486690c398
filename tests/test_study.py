"""Studies: their variants, the runs they plan and start, what is made of the results."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from train import distributed
from train.distributed.startup import PR_SET_PDEATHSIG
from train.run.folder import Log
from train.run.program import read_config
from train.studies import runs as study_runs
from train.studies.report import (
    draw,
    markdown,
    outcome,
    spread,
    summarize,
    thresholds,
    unlike_paper,
)
from train.studies.runs import Place, Run, plan_places, plan_runs, run_all
from train.studies.variants import Row, Study, left_out, studies
from train.study import ALL, StudyConfig, choose, read_flags, run_studies

ROOT = Path(__file__).parent.parent
DIGITS = ["--config=configs/study.yaml"]
CIFAR = ["--config=configs/cifar10.yaml", "--data.root=x"]


def settings(config) -> dict[str, str]:
    from train.run.state import comparable

    return comparable(config)


@pytest.mark.parametrize("preset", [DIGITS, CIFAR], ids=["digits", "cifar10"])
def test_every_variant_is_the_baseline_but_for_the_flags_it_names(preset):
    base = read_config(preset)
    flags = {}
    for study in studies(base).values():
        assert len({row.name for row in study.rows}) == len(study.rows)
        for row in study.rows:
            assert flags.setdefault(row.name, row.flags) == row.flags, row.name
    assert flags.pop("baseline") == () and len(flags) > 15
    for name, words in flags.items():
        named = [word for word in words if word.startswith("--method.name=")]
        start = read_config([*preset, *named]) if named else base
        before = settings(start) | {"method.name": base.method.name}
        after = settings(read_config([*preset, *words]))
        changed = {f"--{key}={value}" for key, value in after.items() if value != before[key]}
        assert len(changed) == len(words), name
        assert {word.split("=")[0] for word in changed} == {word.split("=")[0] for word in words}


def test_batches_and_dimensions_are_the_papers_multiples():
    of_cifar, of_digits = (studies(read_config(preset)) for preset in (CIFAR, DIGITS))
    batches = [row.name for row in of_cifar["batch-size"].rows]
    assert batches == ["baseline", *(f"batch-{n}" for n in (64, 128, 256, 1024, 2048, 4096))]
    dimensions = [row.name for row in of_digits["dimension"].rows]
    assert dimensions == ["baseline", "dimension-256", "dimension-128", "dimension-64"]
    assert of_cifar["batch-size"].rows[-1].flags[1] == "--optim.warmup_epochs=80"


@pytest.mark.parametrize(
    ("flags", "images", "reason"),
    [
        (["--data.batch_size=8"], 1437, "8 images are too few for the statistics of batch norm"),
        (["--data.batch_size=2048"], 1437, "there are 1437 images"),
        (["--method.target_steps=100"], 1437, "an epoch has 22 steps"),
        (["--method.target_steps=100"], 6400, None),
        (["--method.target_steps=0"], 1437, None),
        (["--method.name=moco"], 1437, "there are 1437 images, fewer than its queue holds"),
        (["--method.name=moco", "--method.moco.queue=1024"], 1437, None),
    ],
)
def test_what_so_many_images_do_not_allow_is_left_out(flags, images, reason):
    assert left_out(read_config([*DIGITS, *flags]), images) == reason


def row(name: str, *flags: str, paper: float | None = 50.0, says="worse") -> Row:
    return Row(name, name.upper(), paper, says, f"|says| {name}", flags)


def test_variants_of_one_setting_share_their_runs_and_other_flags_are_other_runs(tmp_path):
    rows = [row("a"), row("b", "--data.batch_size=64"), row("c", "--data.batch_size=32"),
            row("d", "--data.batch_size=4096")]  # fmt: skip
    plan = {"out": tmp_path, "root": "somewhere", "images": 1437, "seeds": range(2)}
    runs, reasons = plan_runs(rows, read_config(DIGITS), **plan)
    assert reasons == {"d": "there are 1437 images"} and set(runs) == {"a", "b", "c"}
    folders = {name: [run.folder for run in of] for name, of in runs.items()}
    assert folders["a"] == folders["b"] and not set(folders["a"]) & set(folders["c"])
    assert [folder.name for folder in folders["c"]] == ["seed-0", "seed-1"]
    config = read_config(runs["c"][1].command[2:])
    assert (config.data.batch_size, config.seed, config.data.root) == (32, 1, "somewhere")
    assert config.out == str(folders["c"][1])
    longer, _ = plan_runs(rows, read_config([*DIGITS, "--epochs=99"]), **plan)
    assert longer["a"][0].folder != runs["a"][0].folder
    assert read_config(longer["a"][0].command[2:]).epochs == 99


def test_a_variant_that_its_baseline_makes_impossible_is_named(tmp_path):
    plan = {"out": tmp_path, "root": "somewhere", "images": 1437, "seeds": range(1)}
    with pytest.raises(
        ValueError, match=r"variant b \(--data.batch_size=1\): data.batch_size must"
    ):
        plan_runs([row("a"), row("b", "--data.batch_size=1")], read_config(DIGITS), **plan)


@pytest.mark.parametrize("name", ["result.json", "env.json"])
@pytest.mark.parametrize("content", ["", '{"state": "fin', "[]"])
def test_a_file_that_a_power_cut_damaged_ends_no_study(name, content, tmp_path):
    run = Run("a", 0, tmp_path, ())
    result = {"state": "finished", "collapsed": False, "collapse_threshold": 0.5, "train_s": 1.0,
              "knn_top1": 50.0, "knn_top1_untrained": 40.0, "loss": -0.5, "z_std": 1.0}  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "env.json").write_text(json.dumps({"revision": "abc"}))
    assert run.result() == result
    (tmp_path / name).write_text(content)
    study = Study("s", "S", "section 0", (row("a"),))
    found = summarize(study, {"a": [run]}, reasons={}, failed={})
    assert (run.result() is None) == (name == "result.json")
    assert found["revisions"] == ([] if name == "result.json" else ["None"])


def test_a_study_without_a_variant_to_run_or_among_the_images_is_refused(tmp_path):
    out, base = tmp_path / "out", read_config([*DIGITS, f"--data.root={tmp_path}/images"])
    out.mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"one")
    chosen, own = choose("stop-gradient", studies(base)), StudyConfig()
    with pytest.raises(ValueError, match="no variant can be run: there are 1 images"):
        run_studies(chosen, own, base, out)
    with pytest.raises(ValueError, match="is in the images' folder"):
        run_studies(chosen, own, base, tmp_path / "images")


def test_places_share_out_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(study_runs.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert plan_places(0, with_gpus=False) == [Place(frozenset({i}), None) for i in range(5)]
    assert plan_places(1, with_gpus=False) == [Place(frozenset(range(5)), None)]
    on_gpus = [Place(frozenset({0, 1}), "4"), Place(frozenset({2, 3}), "7")]
    assert plan_places(0, with_gpus=True) == on_gpus
    packed = plan_places(7, with_gpus=True)
    assert [place.gpu for place in packed] == ["4", "7", "4", "7", "4", "7", "4"]
    assert [min(place.cores) for place in packed] == [0, 1, 2, 3, 4, 0, 1]


FINISHES = """
import json, os, sys, time
time.sleep(0.3)
result = {"state": "finished", "knn_top1": 50.0, "loss": -0.5, "z_std": 1.0,
          "cores": sorted(os.sched_getaffinity(0)), "pid": os.getpid(),
          "ranks": os.environ["WORLD_SIZE"], "end": time.time(), "begin": time.time() - 0.3}
os.mkdir(sys.argv[1])
json.dump(result, open(os.path.join(sys.argv[1], "result.json"), "w"))
"""
FAILS = "import sys; sys.exit('progress\\nerror: no such flag\\nmore')"
SAVES = """
import os, signal, sys, time
def save(*_):
    os.mkdir(sys.argv[1])
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + ".started", "w").close()
time.sleep(60)
"""


def fake(folder: Path, script: str) -> Run:
    return Run(folder.name, 0, folder, (sys.executable, "-S", "-c", script, str(folder)))


def test_runs_go_on_beside_a_failed_one_no_more_than_there_are_places(tmp_path, capsys):
    cores = sorted(os.sched_getaffinity(0))
    places = [Place(frozenset({cores[0]}), None), Place(frozenset({cores[-1]}), None)]
    runs = [fake(tmp_path / "bad", FAILS), *(fake(tmp_path / f"{i}", FINISHES) for i in range(4))]
    failed, stopped = run_all(runs, places, Log(tmp_path / "log.txt"))
    assert not stopped
    assert failed == {runs[0]: f"no such flag ({tmp_path}/bad.out)"}
    assert "bad, seed 0 failed: no such flag" in capsys.readouterr().err
    assert os.sched_getaffinity(0) == set(cores)
    found = [run.result() for run in runs[1:]]
    assert {tuple(one["cores"]) for one in found} == {(cores[0],), (cores[-1],)}
    assert {one["ranks"] for one in found} == {"1"}
    for one in found:  # never three at a time
        assert sum(other["begin"] < one["end"] <= other["end"] for other in found) <= 2


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import os; os.abort()", "ended by SIGABRT"),
        ("print('done')", "stopped by a signal; the same command resumes"),
        ("print('half'); raise SystemExit(3)", "exit code 3: half"),
    ],
)
def test_a_run_without_result_says_how_it_ended(tmp_path, script, reason):
    run = fake(tmp_path / "run", script)
    failed, _ = run_all([run], [Place(frozenset(os.sched_getaffinity(0)), None)], Log(None))
    assert failed == {run: f"{reason} ({run.output})"}


def test_a_signal_is_handed_on_and_nothing_more_is_started(tmp_path):
    runs = [fake(tmp_path / name, SAVES) for name in ("first", "second")]
    before = signal.getsignal(signal.SIGTERM)

    def stop() -> None:
        limit = time.monotonic() + 30
        while not (tmp_path / "first.started").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    place = Place(frozenset(os.sched_getaffinity(0)), None)
    failed, stopped = run_all(runs, [place], Log(tmp_path / "log.txt"))
    thread.join()
    assert stopped and not failed
    assert runs[0].folder.exists()  # it had the time to save
    assert not (tmp_path / "second.started").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_launched_run_ends_with_its_launcher(monkeypatch):
    libc, now = ctypes.CDLL(None), ctypes.c_int()
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    try:
        for environment, expected in ({}, 0), (study_runs.AS_TORCHRUN, signal.SIGTERM):
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            with distributed.start("cpu"):
                libc.prctl(2, ctypes.byref(now))  # PR_GET_PDEATHSIG
            assert now.value == expected
    finally:
        libc.prctl(PR_SET_PDEATHSIG, 0)


def kept(
    folder: Path, knn: float, *, untrained=40.0, loss=-0.8, std=0.9, collapsed=False, below=0.5
) -> Run:
    """A finished run."""
    run = Run(folder.parent.name, int(folder.name[-1]), folder, ())
    folder.mkdir(parents=True)
    result = {
        "state": "finished", "knn_top1": knn, "knn_top1_untrained": untrained, "loss": loss,
        "z_std": std, "collapsed": collapsed, "collapse_threshold": below,
        "train_s": 10.0,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "env.json").write_text(json.dumps({"revision": "abc"}))
    rows = [
        {"step": 0, "epoch": 0.0, "eval/knn_top1": untrained},
        {"step": 2, "epoch": 1.0, "train/loss": loss, "train/z_std": std},
        {"step": 2, "epoch": 1.0, "eval/knn_top1": knn},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return run


def runs_of(folder: Path, name: str, knns, **options) -> list[Run]:
    return [kept(folder / name / f"seed-{i}", knn, **options) for i, knn in enumerate(knns)]


def small_study(tmp_path) -> dict:
    """A reference, a collapse, a variant beside it, one cut short, one left out, one failed."""
    study = Study(
        "small", "Small", "nowhere",
        (
            row("base", says="learns", paper=60.0), row("gone", says="collapse", paper=0.1),
            row("like", says="worse"), row("apart", says="same"), row("few"), row("not"),
            row("bad", paper=None, says=None),
        ),
    )  # fmt: skip
    runs = {
        "base": runs_of(tmp_path, "base", (70.0, 76.0, 73.0)),
        "gone": runs_of(tmp_path, "gone", (30.0, 36.0, 33.0), loss=-1.0, std=0.2, collapsed=True),
        "like": runs_of(tmp_path, "like", (60.0, 70.0, 65.0)),
        "apart": runs_of(tmp_path, "apart", (60.0, 69.9, 65.0)),
        "few": runs_of(tmp_path, "few", (10.0,)),
        "bad": [Run("bad", 0, tmp_path / "bad" / "seed-0", ())],
    }
    return summarize(
        study, runs, reasons={"not": "too few images"}, failed={runs["bad"][0]: "no memory"}
    )  # fmt: skip


def test_means_ranges_and_outcomes_are_those_worked_out_by_hand(tmp_path):
    found = small_study(tmp_path)
    rows = {one["name"]: one for one in found["rows"]}
    assert rows["base"]["knn_top1"] == {"mean": 73.0, "min": 70.0, "max": 76.0}
    assert [one["outcome"] for one in found["rows"]] == [
        "learns", "collapse", "same", "worse", None, None, None,
    ]  # fmt: skip
    assert [one["verdict"] for one in found["rows"]] == [
        "yes", "yes", "within the spread", "no", "", "", "",
    ]  # fmt: skip
    assert unlike_paper(found) == [rows["apart"]] and found["n"] == 3
    assert found["revisions"] == ["abc"]
    assert rows["gone"]["runs"][1]["curves"]["eval/knn_top1"] == [[0.0, 40.0], [1.0, 36.0]]
    lines = markdown(found).splitlines()
    assert lines[2] == "| untrained encoder | | | 40.0 | | | | |"
    assert lines[3] == (
        "| BASE | 60.0 | \\|says\\| base | 73.0 (70.0 to 76.0) | -0.800 | 0.90 | learns | yes |"
    )
    assert "| NOT | 50.0 | \\|says\\| not | left out: too few images |" in lines[8]
    assert "(n = 1)" in lines[7] and "(1 failed)" in lines[9]
    assert lines[-1] == "Unlike the paper: APART (worse; in the paper the same)."
    draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_outcomes_tell_seeds_that_collapse_and_encoders_that_do_not_learn(tmp_path):
    def one(name, knns, **options):
        return summarize(
            Study("s", "S", "", (row(name),)), {name: runs_of(tmp_path, name, knns, **options)},
            reasons={}, failed={},
        )["rows"][0]  # fmt: skip

    assert one("flat", (41.0, 39.0))["outcome"] == "fails"
    mixed = one("mixed", (41.0, 39.0)) | {"collapsed": 1}
    assert outcome(mixed, None) == "mixed"
    high, low = one("high", (71.0, 72.0)), one("low", (69.0, 70.0))
    assert (outcome(high, low), outcome(low, high)) == ("better", "worse")
    assert spread([None, 1.0, 4.0]) == {"mean": 2.5, "min": 1.0, "max": 4.0}
    assert spread([None]) is None


def test_rows_behind_a_reference_are_compared_with_it(tmp_path):
    second = Row("second", "SECOND", None, None, "", is_reference=True)
    rows = row("base", says="learns"), row("like"), second, row("low", says="worse")
    knns = {"base": (70.0, 76.0), "like": (71.0, 75.0), "second": (90.0, 92.0), "low": (70.0, 76.0)}
    runs = {name: runs_of(tmp_path, name, values) for name, values in knns.items()}
    found = summarize(Study("s", "S", "", rows), runs, reasons={}, failed={})["rows"]
    assert [one["outcome"] for one in found] == ["learns", "same", "learns", "worse"]


def test_four_views_stand_beside_two_of_as_many_images_and_of_as_many_views():
    base = read_config(DIGITS)
    rows = studies(base)["views"].rows
    seen = []
    for of_row in rows:
        config = read_config([*DIGITS, *of_row.flags])
        seen.append((config.data.batch_size, config.epochs, config.epochs * len(config.views)))
    for size, of_size in (16, seen[:3]), (32, seen[3:]):
        assert of_size == [(size, 25, 50), (size, 25, 100), (size, 50, 100)]
    assert [of_row.is_reference for of_row in rows] == [True, False, False] * 2


def test_rows_that_collapse_below_another_std_are_named_and_have_a_line(tmp_path):
    rows = row("base", says="learns"), row("plain"), row("moco")
    runs = {
        "base": runs_of(tmp_path, "base", (70.0, 76.0)),
        "plain": runs_of(tmp_path, "plain", (70.0, 76.0), std=0.3, below=0.1),
        "moco": runs_of(tmp_path, "moco", (70.0, 76.0), std=0.3, below=0.1),
    }

    def found(names: int) -> dict:
        return summarize(Study("s", "S", "", rows[:names]), runs, reasons={}, failed={})

    assert thresholds(found(1)) == {0.5: ["BASE"]} and "A run collapses" not in markdown(found(1))
    assert thresholds(found(3)) == {0.5: ["BASE"], 0.1: ["PLAIN", "MOCO"]}
    note = "A run collapses where the std is below 0.50 for BASE; below 0.10 for PLAIN, MOCO.\n"
    assert markdown(found(3)).endswith(note)
    assert [one["outcome"] for one in found(3)["rows"]] == ["learns", "same", "same"]


def test_an_unknown_study_or_flag_names_the_nearest_one(capsys):
    known = studies(read_config(DIGITS))
    with pytest.raises(SystemExit) as stop:
        choose("predictr", known)
    assert stop.value.code == 2 and "perhaps you meant predictor" in capsys.readouterr().err
    assert [study.name for study in choose("all", known)] == list(known)
    for flag, near in ("--job=2", "--jobs"), ("--method.predicter=none", "--method.predictor"):
        with pytest.raises(SystemExit) as stop:
            read_flags(["predictor", flag])
        assert stop.value.code == 2 and f"perhaps you meant {near}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        read_flags(["--help"])
    told = capsys.readouterr().out.split("positional arguments:")[1].split("options:")[0]
    assert [one for one in [*known, ALL] if not re.search(rf"\b{one}[,.]", told)] == []
    for flag in "--method.predictor=none", "--model.head_norm=all", "--method.name=byol":
        with pytest.raises(SystemExit) as stop:
            read_flags(["predictor", flag])
        assert stop.value.code == 2 and "around SimSiam as it is" in capsys.readouterr().err
    name, own, base = read_flags(["predictor", "--seeds=2", "--epochs=7"])
    assert (name, own.seeds, base.epochs, base.data.root) == ("predictor", 2, 7, "digits")


def test_a_study_leaves_tables_and_figures_and_is_not_run_again(tmp_path):
    words = [
        sys.executable, "train/study.py", "stop-gradient", "--seeds=1", f"--out={tmp_path}/study",
        "--max_steps=2", "--model.width=8", "--device=cpu", "--eval.batch_size=512",
    ]  # fmt: skip

    def go() -> dict:
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
        )
        assert "| without stop-gradient | 0.1 | the loss reaches -1, the std 0 |" in done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    first = go()
    assert (first["state"], first["runs"], first["run_now"]) == ("finished", 2, 2)
    assert sorted(Path(path).name for path in first["files"]) == [
        "study-stop-gradient.json", "study-stop-gradient.md", "study-stop-gradient.png",
    ]  # fmt: skip
    results = sorted((tmp_path / "study").glob("*/seed-0/result.json"))
    before = [path.stat().st_mtime_ns for path in results]
    assert len(results) == 2 and go()["run_now"] == 0
    assert [path.stat().st_mtime_ns for path in results] == before


@pytest.mark.parametrize("before", ["of before\n", ""])
def test_recording_a_study_puts_its_table_between_the_marks_of_the_docs(
    before, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts its root first
    import record_study
    from measure import results

    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record_study, "DOCS", tmp_path / "study.md")
    mark = "a\n<!-- study-small -->\n{}<!-- end -->\nb\n<!-- study-other -->\n<!-- end -->\n"
    record_study.DOCS.write_text(mark.format(before))
    found = small_study(tmp_path / "runs") | {"environment": {"device": "A CPU"}}
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="run train/study.py --out"):
        record_study.record_study(out)
    (out / "study-small.png").write_bytes(b"png")
    (out / "study-small.json").write_text(json.dumps(found))
    data, picture = record_study.record_study(out)
    assert json.loads(data.read_text())["study"] == "small" and picture.read_bytes() == b"png"
    assert data.name.startswith("study-small_a-cpu_") and data.stem == picture.stem
    block = record_study.block(found, [data, picture])
    assert markdown(found) in block and f"(../profiling/results/{picture.name})" in block
    assert record_study.DOCS.read_text() == mark.format(block)
    (out / "study-small.json").write_text(json.dumps(found | {"revisions": ["a", "b"]}))
    with pytest.raises(ValueError, match="are of 2 revisions"):
        record_study.record_study(out)
