"""The GPU suite: its verdicts, what fits into the minutes, and that a stage costs no other stage.

Nothing here needs a GPU: the lines that it would run there are held against the rehearsed ones.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_suite
from gpu_suite import ALL, EXTRAS, choose, read, run_all, summary
from measure.harness import read_flags
from measure.kernel_times import Site, measure
from predict.limit import GPUS, count, describe
from suite.checks import OutOfTime, StageFailed, Suite, count_tests
from suite.extras import KERNEL_TESTS
from suite.stages import STAGES, Stage, judge_sites, share_of_h200
from train.config import MethodConfig, ModelConfig
from train.config.parser import parse_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def suite(tmp_path) -> Suite:
    made = Suite(tmp_path, None, rehearse=False)
    made.stage, made.begin, made.deadline = "s", time.monotonic(), time.monotonic() + 30
    return made


@pytest.fixture
def stages(monkeypatch) -> dict[str, Stage]:
    """Stages that a test makes up, in their order."""
    made: dict[str, Stage] = {}
    monkeypatch.setattr(gpu_suite, "ALL", made)
    return made


@pytest.mark.parametrize(
    ("value", "goal", "verdict"),
    [
        (0.81, {"at_least": 0.8}, "pass"),
        (0.79, {"at_least": 0.8}, "fail"),
        (16.0, {"at_most": 15}, "fail"),
        (15.0, {"at_most": 15}, "pass"),
        (None, {"at_least": 1.0}, "fail"),
        (3.0, {}, ""),
    ],
)
def test_a_figure_is_held_against_its_goal(value, goal, verdict, suite):
    suite.check("x", value, **goal)
    assert suite.checks[0].verdict == verdict


def test_the_goal_is_the_share_of_its_roofline_that_3200_images_per_s_are_on_an_h200():
    counts = count(ModelConfig(), MethodConfig(), images=256, size=224)
    h200, h100 = (describe(counts, *GPUS[name], itemsize=2)["images_per_s"] for name in
                  ("h200", "h100"))  # fmt: skip
    assert share_of_h200(3200) == pytest.approx(3200 / h200, abs=1e-3)
    assert 2000 < share_of_h200(3200) * h100 < 3200  # the slower memory is not held against it


def test_a_stage_that_fails_is_written_down_with_what_it_had_and_the_next_one_runs(suite, stages):
    def broken(s: Suite) -> None:
        s.check("before", 1.0)
        s.run("program", "-c", "import sys; print('{\"a\": 2}'); sys.exit('no such file: x')")

    def good(s: Suite) -> None:
        found = s.run("program", "-c", "print('text'); print('{\"images_per_s\": 3300}')")
        s.check("images/s", found["images_per_s"], at_least=3200)
        s.check("ratio", 0.5, at_least=3.0)

    stages |= {"broken": Stage(broken, 1), "good": Stage(good, 1)}
    assert run_all(["broken", "good"], suite, 60) == {}
    found = summary(suite.out)
    assert found["failed"] == {"broken": "program ended with 1: no such file: x"}
    assert found["missed"] == ["good: ratio"]
    written = read(suite.out, "broken")
    assert [check["what"] for check in written["checks"]] == ["before"]
    assert written["found"] == {"program": {"a": 2}} and written["attempts"] == 2
    assert read(suite.out, "good")["attempts"] == 1


def test_a_program_that_judges_is_heard_out_and_one_that_crashes_is_not(suite):
    says = "print('{\"failed\": [1]}'); raise SystemExit(%d)"
    assert suite.run("doctor", "-c", says % 1, judges=True) == {"failed": [1]}
    for line, how in ((says % 1, {}), (says % 9, {"judges": True}), ("1 / 0", {"judges": True})):
        with pytest.raises(StageFailed, match=r"ended with|no JSON line .* division by zero"):
            suite.run("doctor", "-c", line, **how)


def test_figures_are_in_the_file_before_the_stage_ends(suite, stages):
    def slow(s: Suite) -> None:
        s.check("first", 7.0)
        seen.append(json.loads((s.out / "slow.json").read_text()))

    seen: list[dict] = []
    stages["slow"] = Stage(slow, 1)
    run_all(["slow"], suite, 60)
    assert not seen[0]["ended"] and seen[0]["checks"][0]["value"] == 7.0
    assert read(suite.out, "slow")["ended"]


def test_what_does_not_fit_or_lacks_something_waits_and_says_why(tmp_path, stages):
    def nothing(s: Suite) -> None: ...

    stages |= {
        "dear": Stage(nothing, 100), "views": Stage(nothing, 5, ("dali", "imagenet")),
        "cheap": Stage(nothing, 5), "next": Stage(nothing, 5),
    }  # fmt: skip
    name, waiting = choose(list(stages), tmp_path, 50.0, {"imagenet"})
    assert name == "cheap"
    assert waiting == {"dear": "takes 100 s, 50 are left", "views": "needs dali"}
    failed = {"ended": True, "error": "x", "attempts": 1}
    (tmp_path / "cheap.json").write_text(json.dumps(failed))
    assert choose(list(stages), tmp_path, 50.0, set())[0] == "next"  # tried again behind the others
    (tmp_path / "next.json").write_text(json.dumps(failed | {"error": None}))
    assert choose(list(stages), tmp_path, 50.0, set())[0] == "cheap"
    (tmp_path / "cheap.json").write_text(json.dumps(failed | {"attempts": 2}))
    assert choose(list(stages), tmp_path, 50.0, set())[0] is None


HANGS = """
import subprocess, time
print(subprocess.Popen(["sleep", "99"]).pid, flush=True)
time.sleep(99)
"""
SAVES = """
import json, signal, sys, time
def stop(*_):
    print(json.dumps({"state": "preempted"}))
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1], "w").close()
time.sleep(99)
"""


def test_a_hang_costs_its_own_stage_alone_and_leaves_no_process(suite, stages):
    stages |= {
        "hangs": Stage(lambda s: s.check("x", s.run("p", "-c", HANGS)["x"]), -14),
        "good": Stage(lambda s: s.check("y", 1.0), 1),
    }
    begin = time.monotonic()
    run_all(["hangs", "good"], suite, 60)
    assert time.monotonic() - begin < 30
    assert "took longer than 2 s" in summary(suite.out)["failed"]["hangs"]
    assert read(suite.out, "good")["error"] is None
    pid = (suite.out / "hangs-p.log").read_text().split()[0]
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_a_training_saves_at_the_limit_and_is_resumed_by_the_next_call(suite, stages, monkeypatch):
    monkeypatch.setattr("suite.checks.TO_SAVE_S", 3.0)
    ready = str(suite.out / "ready")
    suite.deadline = time.monotonic() + 6
    assert suite.run("t", "-c", SAVES, ready, saves=True) == {"state": "preempted"}
    is_ready = lambda: os.path.exists(suite.out / "again")  # noqa: E731
    suite.deadline = time.monotonic() + 60
    found = suite.run("t", "-c", SAVES, str(suite.out / "again"), until=is_ready)
    assert found == {"state": "preempted"} and time.monotonic() < suite.deadline - 40
    suite.deadline = time.monotonic() + 0.5
    with pytest.raises(OutOfTime, match=r"took longer than"):
        suite.run("hangs", "-c", SAVES, ready)
    states = iter(["preempted", "finished"])
    stages["long"] = Stage(
        lambda s: s.found.update(t={"state": next(states)}), 1, takes_the_rest=True
    )
    for _ in range(3):  # a third call finds it finished
        run_all(["long"], suite, 60)
    assert next(states, None) is None and read(suite.out, "long")["found"]["t"]["state"] == (
        "finished"
    )


SOMETHING = {
    "images_per_s": {"step": 1.0, "loader": 1.0}, "ratios": {}, "memory": {}, "kernels": {},
    "limit": {"share_of_roofline": 0.5, "copy_gb_per_s": 1.0, "matmul_tflop_per_s": 1.0},
    "failed": [], "max_error_by_allowed": 0.5, "end_to_end": {}, "checks": [],
    "state": "finished", "steps": 1, "train_s": 1.0,
    "knn_top1": 1.0, "knn_top1_untrained": 0.5, "loss": 1.0, "memory_growth": 0.0,
    "images_slowest_by_fastest": 1.0, "batch_slowest_by_fastest": 1.0,
}  # fmt: skip

# what a CPU cannot run at all, and resume, which reads the checkpoints of its runs
UNREHEARSED = ("launches", "growth", "apex", "resume")


def lines_of(name: str, out: Path, monkeypatch, *, rehearse: bool) -> list[tuple[str, ...]]:
    """The programs with flags that a stage would run."""
    ran = []

    def run(self: Suite, name: str, *line: str, tiny: tuple[str, ...] = (), **how: object) -> dict:
        ran.append((*line, *(tiny if self.rehearse else ())))
        return SOMETHING | ({"state": "preempted"} if "until" in how else {})

    monkeypatch.setattr(Suite, "run", run)
    monkeypatch.setattr(Suite, "pytest", lambda self, name, *line: ran.append(line))
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    suite = Suite(out, None, rehearse)
    suite.stage = name
    ALL[name].run(suite)
    return ran


@pytest.mark.parametrize("name", [name for name in ALL if name not in UNREHEARSED])
def test_a_rehearsal_runs_the_gpu_lines_with_flags_that_are_flags(name, tmp_path, monkeypatch):
    real, rehearsed = (lines_of(name, tmp_path, monkeypatch, rehearse=r) for r in (False, True))
    if name == "variants":  # what needs Triton is refused on a CPU
        refused = {"--model.recompute=true", "--model.conv_stats=true"}
        real = [line for line in real if not refused & set(line)]
    assert real and len(real) == len(rehearsed)
    for line, tiny in zip(real, rehearsed, strict=True):
        assert tiny[: len(line)] == line
        for program, *flags in (line, tiny):
            if program == "train/main.py":
                parse_config(flags)
            elif program in ("profiling/throughput.py", "profiling/trace.py"):
                monkeypatch.setattr(sys, "argv", [program, *flags])
                read_flags(program, "")


def test_what_the_sites_are_judged_by_is_what_kernels_py_measures(suite):
    sites = [Site("relu", (4, 8, 3, 3))]
    found = measure(sites, torch.device("cpu"), kernels="plain", compiled=False, n=1)
    judge_sites(suite, found)
    by_name = {check.what: check.value for check in suite.checks}
    assert by_name["eager_bf16/ours, sum of sites"] == found["ratios"]["eager_bf16/ours"]
    assert by_name["share of copy bandwidth, 5 heaviest shapes"] == min(
        found["sites"][0]["share_of_copy"]
    )


@pytest.mark.slow
def test_a_rehearsal_of_the_demo_is_stopped_resumed_and_finished_within_its_minutes(tmp_path):
    """The whole program: what a first call with DALI would do for its first minute."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "profiling/gpu_suite.py", str(tmp_path), "--minutes=2", "--rehearse",
         "--stages=demo,step-peers"], cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 120
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["failed"] == {} and list(answer["waiting"]) == ["step-peers"]
    found = read(tmp_path, "demo")["found"]
    assert found["stopped"]["state"] == "preempted" and found["resumed"]["state"] == "finished"
    assert 0 < found["stopped"]["steps"] < found["resumed"]["steps"]


def test_tests_that_failed_and_that_were_skipped_are_told_apart(tmp_path):
    report = tmp_path / "x.xml"
    report.write_text(
        '<testsuites><testsuite tests="7" skipped="2" failures="1" errors="1"/></testsuites>'
    )
    assert count_tests(report) == {"ran": 5, "failed": 2, "skipped": 2}


def test_a_stage_of_tests_fails_where_none_ran(suite):
    with pytest.raises(StageFailed, match="no test ran"):
        suite.pytest("none", "tests/test_gpu.py", "-k", "no_such_test")


def test_the_five_come_in_the_order_of_what_they_tell_and_fit_a_quarter_of_an_hour():
    assert list(STAGES)[:3] == ["kernels", "demo", "doctor"] and list(STAGES)[-1] == "cifar10"
    assert sum(stage.seconds for stage in STAGES.values()) < 900 - 120
    assert not STAGES.keys() & EXTRAS.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "stp"], "--stages stp is unknown"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--images", "/nowhere"], "--images /nowhere is no folder"),
        ([], "no CUDA device: give --rehearse"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", str(tmp_path / "out"), *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main()
    assert stopped.value.code in (1, 2)
    assert message in capsys.readouterr().err


def test_make_test_gpu_runs_the_kernel_tests_of_the_suite():
    words = ["make", "--dry-run", "test-gpu"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"tests/test_{name}.py" in done.stdout for name in KERNEL_TESTS.split())
