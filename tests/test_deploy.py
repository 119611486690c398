"""The SLURM script with stand-ins for SLURM's commands, and the TrainJob against Kubeflow's API."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "deploy" / "slurm.sh"
TRAINJOB = ROOT / "deploy" / "trainjob.yaml"

STAND_INS = {
    "srun": """#!/bin/bash
        while [[ $1 == --* ]]; do echo "$1" >> "$STAND_INS/srun-flags"; shift; done
        "$@" &
        echo $! > "$STAND_INS/step"
        trap 'kill -KILL $!' TERM # as srun does
        wait $!""",
    "scontrol": """#!/bin/bash
        case $1 in
            show) printf 'node-a\\nnode-b\\n' ;;
            requeue) echo "$2" >> "$STAND_INS/requeued" ;;
        esac""",
    "scancel": """#!/bin/bash
        [[ $* == "--signal=TERM 77" ]] && kill -TERM "$(cat "$STAND_INS/step")" """,
    "python": """#!/bin/bash
        printf '%s\\n' "$@" > "$STAND_INS/arguments"
        say() { echo "{
         \\"state\\": \\"$1\\"
        }" > "$OUT/status.json"; }
        case $ENDS in
            at-once) exit 3 ;;
            failed) say failed; exit 1 ;;
            finished) say finished; exit 0 ;;
        esac
        trap 'say preempted; exit 1' TERM
        say running
        while :; do sleep 0.05; done""",
}


class Job:
    """One start of deploy/slurm.sh."""

    def __init__(self, folder: Path, ends: str):
        self.folder, self.out = folder, folder / "run"
        for name, text in STAND_INS.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}", "STAND_INS": str(folder), "ENDS": ends,
            "PYTHON": str(folder / "python"), "OUT": str(self.out), "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "8",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", str(SLURM), "--config", "a b.yaml"], env=environment, text=True,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def end(self) -> int:
        self.process.communicate(timeout=30)
        return self.process.returncode

    def words(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []


def wait_until(happened) -> None:
    limit = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_slurms_warning_stops_all_tasks_and_requeues_the_job(tmp_path):
    job = Job(tmp_path, "when-told")
    wait_until((job.out / "status.json").exists)
    job.process.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@180 sends, to the script alone
    assert job.end() == 1
    assert job.words("requeued") == ["77"]


@pytest.mark.parametrize(("ends", "code"), [("finished", 0), ("failed", 1)])
def test_a_run_that_ended_by_itself_is_not_requeued(tmp_path, ends, code):
    job = Job(tmp_path, ends)
    assert job.end() == code
    assert job.words("requeued") == []


def test_a_start_that_fails_is_not_requeued_for_the_status_of_the_start_before(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "status.json").write_text('{\n "state": "preempted"\n}\n')
    time.sleep(0.02)  # file times tick
    job = Job(tmp_path, "at-once")
    assert job.end() == 3
    assert job.words("requeued") == []


def test_each_node_gets_the_launch_line_and_the_users_arguments_unchanged(tmp_path):
    job = Job(tmp_path, "finished")
    job.end()
    words = job.words("arguments")
    assert words[-2:] == ["--config", "a b.yaml"]
    main = words.index("train/main.py")
    assert words[main + 1 : main + 3] == ["--out", str(job.out)]
    launch = dict(zip(words[1:main:2], words[2:main:2], strict=True))
    host = subprocess.run(["hostname"], capture_output=True, text=True, check=True).stdout.strip()
    assert words[0] == "train/launch.py" and launch == {
        "--nnodes": "2", "--nproc-per-node": "gpu", "--rdzv-endpoint": "node-a:20077",
        "--rdzv-id": "77", "--log-dir": f"{job.out}/logs/{host}", "--tee": "3",
    }  # fmt: skip
    assert "--cpus-per-task=8" in job.words("srun-flags")


def test_slurm_reads_every_directive():
    lines = SLURM.read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(line in lines[:first_command] for line in directives)  # later ones are ignored
    given = dict(re.match(r"#SBATCH --([\w-]+)=?(\S*)", line).groups() for line in directives)
    assert given["signal"].startswith("B:USR1@") and "requeue" in given
    assert given["ntasks-per-node"] == "1"


def left_out(given, understood, path: str = "") -> list[str]:
    """Fields of a manifest that the API's own model does not know."""
    if isinstance(given, dict):
        return [
            found
            for key, value in given.items()
            for found in (
                left_out(value, understood[key], f"{path}.{key}")
                if key in understood
                else [f"{path}.{key}"]
            )
        ]
    if isinstance(given, list):
        pairs = enumerate(zip(given, understood, strict=True))
        return [found for i, (a, b) in pairs for found in left_out(a, b, f"{path}[{i}]")]
    return []


def test_kubeflow_understands_every_field_of_the_trainjob():
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob as TrainJob

    job = yaml.safe_load(TRAINJOB.read_text())
    assert left_out(job, TrainJob.from_dict(job).to_dict()) == []
    job["spec"]["trainer"]["numNodez"] = 4
    assert left_out(job, TrainJob.from_dict(job).to_dict()) == [".spec.trainer.numNodez"]


def test_the_trainjob_runs_as_the_images_user_on_a_root_that_cannot_be_written():
    job = yaml.safe_load(TRAINJOB.read_text())
    (patch,) = job["spec"]["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    user = re.search(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert pod["securityContext"]["runAsUser"] == int(user[1])
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert {"/tmp", "/dev/shm", "/runs"} <= set(mounted.values())
    (out,) = [word for word in job["spec"]["trainer"]["args"] if word.startswith("--out=")]
    assert out.startswith("--out=/runs/")


def test_the_trainjob_keeps_the_images_entry_point():
    entry = re.findall(r'^ENTRYPOINT \["([^"]+)"', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    words = yaml.safe_load(TRAINJOB.read_text())["spec"]["trainer"]["command"]
    assert set(entry) == {words[0]} and words[1:] == ["python3", "train/launch.py"]
    file = ROOT / Path(words[0]).relative_to("/opt/twinturbo")
    assert os.access(file, os.X_OK)


def test_each_training_in_deploy_has_flags_that_the_program_knows():
    from train.run.program import read_config

    words = yaml.safe_load(TRAINJOB.read_text())["spec"]["trainer"]["args"]
    assert read_config(words[words.index("train/main.py") + 1 :]).data.batch_size > 0
    usage = re.search(r"sbatch deploy/slurm.sh (.*)", SLURM.read_text())[1]
    assert read_config(usage.split()).data.batch_size > 0


def test_no_nccl_variable_is_set_in_deploy():
    for file in (SLURM, TRAINJOB):
        code = "\n".join(line.split("#")[0] for line in file.read_text().splitlines())
        assert "NCCL_" not in code
