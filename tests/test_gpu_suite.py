"""The suite's verdicts, and that a stage that fails or runs long costs no other stage."""

import json
import sys
import time

import pytest

import gpu_suite
from gpu_suite import STAGES, Check, StageFailed, Suite, count_tests, run_stage, summary
from harness import read_flags
from train.cli import parse_config


@pytest.fixture
def suite(tmp_path) -> Suite:
    return Suite(tmp_path, tmp_path, rehearse=False, apex=None)


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
def test_a_figure_is_held_against_its_goal(value, goal, verdict):
    assert Check("x", value, **goal).verdict == verdict


def test_a_failed_stage_is_written_down_and_the_next_one_runs(suite, monkeypatch):
    def broken(s: Suite) -> None:
        s.run("program", "-c", "import sys; print('half', flush=True); sys.exit('no such file: x')")

    def good(s: Suite) -> None:
        found = s.run("program", "-c", "print('text'); print('{\"images_per_s\": 3300}')")
        s.check("images/s", found["images_per_s"], at_least=3200)
        s.check("ratio", 0.5, at_least=3.0)

    monkeypatch.setattr(gpu_suite, "STAGES", {"broken": broken, "good": good})
    for name in ("broken", "good"):
        run_stage(name, suite)
    found = summary(suite.out)
    assert found["failed"] == {"broken": "program ended with 1: no such file: x"}
    assert found["missed"] == ["good: ratio"]
    assert json.loads((suite.out / "good.json").read_text())["found"]["program"] == {
        "images_per_s": 3300
    }


SAVES = """
import json, signal, sys, time
def stop(*_):
    print(json.dumps({"state": "preempted"}))
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
time.sleep(60)
"""


def test_at_the_limit_a_training_may_save_and_another_program_is_ended(suite, monkeypatch):
    monkeypatch.setattr(gpu_suite, "TO_SAVE_S", 5.0)
    suite.stage, suite.deadline = "s", time.monotonic() + 7
    assert suite.run("saves", "-c", SAVES, ends_itself=False) == {"state": "preempted"}
    suite.deadline = time.monotonic() + 0.5
    with pytest.raises(StageFailed, match=r"took longer than"):
        suite.run("hangs", "-c", SAVES)


SOMETHING = {
    "images_per_s": {"step": 1.0, "loader": 1.0}, "ratios": {}, "limit": {}, "memory": {},
    "end_to_end": {}, "state": "finished", "steps": 1, "train_s": 1.0, "knn_top1": 1.0, "loss": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("rehearse", [False, True])
@pytest.mark.parametrize(
    "stage",
    ["step", "step-variants", "loader", "decoder-load", "end-to-end", "cifar10", "precision"],
)
def test_the_flags_that_a_stage_gives_are_flags(stage, rehearse, suite, monkeypatch):
    ran = []

    def run(self: Suite, name: str, program: str, *flags: str, ends_itself: bool = True) -> dict:
        if program == "train/main.py":
            parse_config(flags)
        else:
            monkeypatch.setattr(sys, "argv", [program, *flags])
            read_flags(program, "")
        ran.append(name)
        return SOMETHING

    monkeypatch.setattr(Suite, "run", run)
    suite.rehearse, suite.out = rehearse, suite.out.resolve()
    STAGES[stage](suite)
    assert ran


def test_tests_that_failed_and_that_were_skipped_are_told_apart(tmp_path):
    report = tmp_path / "x.xml"
    report.write_text(
        '<testsuites><testsuite tests="7" skipped="2" failures="1" errors="1"/></testsuites>'
    )
    assert count_tests(report) == {"ran": 5, "failed": 2, "skipped": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "stp"], "--stages stp is unknown"),
        (["--images", "/nowhere"], "no CUDA device: give --rehearse"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", str(tmp_path / "out"), *arguments])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main()
    assert stopped.value.code in (1, 2)
    assert message in capsys.readouterr().err
