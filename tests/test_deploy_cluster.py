"""deploy/slurm.sh on four hosts, and the doctor on hosts of which one has a slow link."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launched import TINY
from stand_ins.cluster import ENVIRONMENT, Cluster
from test_deploy import ROOT, SLURM

pytestmark = pytest.mark.cluster

SRUN = """#!/bin/bash
    while [[ $1 == --* ]]; do shift; done
    printf '%s\\0' "$@" > "$STAND_INS/.step" && mv "$STAND_INS/.step" "$STAND_INS/step"
    until [[ -e $STAND_INS/code ]] || ! kill -0 $PPID; do sleep 0.05; done
    exit "$(cat "$STAND_INS/code")" """
SCONTROL = """#!/bin/bash
    case $1 in
        show) printf 'node%d\\n' 0 1 2 3 ;;
        requeue) echo "$2" >> "$STAND_INS/requeued" ;;
    esac"""
SCANCEL = """#!/bin/bash
    [[ $* == "--signal=TERM 77" ]] && touch "$STAND_INS/cancelled" """


def wait_until(happened: Callable[[], object], seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.05)


def steps(out: Path) -> int:
    """How far metrics.jsonl is."""
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


class Slurm:
    """What SLURM does for a job: runs its script, its step on all hosts, and passes signals on."""

    def __init__(self, cluster: Cluster, folder: Path, out: Path, arguments: list[str]):
        self.cluster, self.folder, self.out, self.arguments = cluster, folder, out, arguments
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(self, *, warn_after: int | None) -> int:
        """Start the job once and return its script's exit code; warn it after so many metrics."""
        for name in ("step", "code", "cancelled"):
            (self.folder / name).unlink(missing_ok=True)
        environment = ENVIRONMENT | {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "STAND_INS": str(self.folder),
            "PYTHON": sys.executable, "RANKS_PER_NODE": "1", "OUT": str(self.out),
            "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[0-3]", "SLURM_NNODES": "4",
            "SLURM_CPUS_PER_TASK": "1", "SLURM_SUBMIT_DIR": str(ROOT),
        }  # fmt: skip
        script = subprocess.Popen(["bash", str(SLURM), *self.arguments], env=environment)
        try:
            self.run_step(script, warn_after, environment)
            return script.wait(timeout=30)
        finally:
            script.kill()

    def run_step(
        self, script: subprocess.Popen, warn_after: int | None, environment: dict[str, str]
    ) -> None:
        """What srun runs on all hosts, to its end."""
        wait_until((self.folder / "step").exists)
        command = (self.folder / "step").read_text().split("\0")[:-1]
        tasks = [
            self.cluster.start(
                host, command, log=self.folder / f"node{host}.log", cwd=ROOT, env=environment
            )
            for host in range(4)
        ]
        if warn_after is not None:
            before = steps(self.out)
            wait_until(lambda: steps(self.out) >= before + warn_after)
            script.send_signal(signal.SIGUSR1)  # --signal=B:USR1@180: the script alone
            wait_until((self.folder / "cancelled").exists)
            for host in range(4):
                for pid in self.cluster.processes(host):
                    os.kill(pid, signal.SIGTERM)
        code = max(abs(task.wait(timeout=600)) for task in tasks)
        (self.folder / "code").write_text(str(code))


def test_a_slurm_job_on_four_hosts_is_requeued_when_warned_and_then_finishes(
    clusters, tiny_images, tmp_path
):
    out = tmp_path / "run"
    training = [
        f"--data.root={tiny_images}", *TINY, "--epochs=8", "--checkpoint_every=100"
    ]  # fmt: skip
    slurm = Slurm(clusters(4), tmp_path, out, training)
    assert slurm.start(warn_after=3) != 0
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "preempted" and 3 <= status["step"] < 48
    assert (tmp_path / "requeued").read_text() == "77\n"
    assert slurm.start(warn_after=None) == 0
    assert json.loads((out / "status.json").read_text()) == {"state": "finished", "step": 48}
    assert (tmp_path / "requeued").read_text() == "77\n"  # not once more
    assert "continuing" in (out / "log.txt").read_text()
    for host in range(4):
        logs = list((out / "logs" / f"node{host}").glob("*/attempt_0/0/stderr.log"))
        assert len(logs) == 2, host  # one a start


def test_the_doctor_names_the_host_with_the_slow_link(clusters, tmp_path):
    command = [
        sys.executable, "train/launch.py", "--nnodes=4", "--nproc-per-node=1",
        "--rdzv-endpoint=node0:29500", "--max-restarts=0", "--redirects=3",
        f"--log-dir={tmp_path}/logs",
        "train/doctor.py", "--device=cpu", "--seconds=0.5",
    ]  # fmt: skip
    cluster = clusters(4)
    cluster.throttle(2, mbit_per_s=40)
    tasks = [
        cluster.start(host, command, log=tmp_path / f"node{host}.log", cwd=ROOT, env=ENVIRONMENT)
        for host in range(4)
    ]
    for task in tasks:
        task.wait(timeout=600)
    told = [line for file in tmp_path.glob("logs/*/attempt_0/0/stdout.log")
            for line in file.read_text().splitlines()]  # fmt: skip
    (result,) = map(json.loads, told)  # rank 0 alone
    (link,) = [check for check in result["checks"] if check["name"] == "all-reduce"]
    assert link["ok"] is False and [rate["host"] for rate in result["ranks"]].count("node2") == 1
    assert " on node2 sent at less than half" in link["remedy"]
    assert link["remedy"].count(" on node") == 1
