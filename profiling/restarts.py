"""Whether every restart works: `python profiling/restarts.py --save restarts`.

Trains the embedded digits on two hosts (profiling/stand_ins/cluster.py, needs root) twice:
undisturbed, and with a rank killed (kill -9) again and again, on one host and the other in turn, at
a moment that a seed draws. train/launch.py restarts it from the last checkpoint. Counts the
restarts and the lines that name the rank and its host, measures the seconds from a kill to the next
step, and compares weights, statistics and momentum bit for bit.
A newcomer's mistake: one kill that went well. With torchrun's defaults some restarts do.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import argparse
import json
import random
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from measure.results import check_save, save_json
from stand_ins.cluster import Cluster, why_not
from train.run.folder import environment
from train.run.program import refuse

ROOT = Path(__file__).parent.parent
LIMIT_S = 300
FLAGS = [
    "--data.root=digits", "--model.arch=resnet18", "--model.stem=cifar", "--model.width=8",
    "--model.projector_dim=32", "--model.projector_hidden=32", "--model.predictor_hidden=8",
    "--augment.size=16", "--eval.size=16", "--eval.resize=16", "--eval.every_epochs=1000",
    "--data.batch_size=32", "--epochs=4", "--precision=fp32", "--log_every=1",
    "--checkpoint_every=2", "--device=cpu",
]  # fmt: skip
STEPS = 20
"""For each kill, so that none comes after the end: 200 of the 224 steps for ten."""
DELAY_S = 0.2
"""After the first step of an attempt a rank is killed within this time: in a step or a save."""


class Run:
    """One training on both hosts of a cluster."""

    def __init__(self, cluster: Cluster, folder: Path, *, steps: int, max_restarts: int):
        folder.mkdir()
        self.cluster, self.out = cluster, folder / "run"
        self.logs = [folder / f"{name}.log" for name in cluster.names]
        command = [
            sys.executable, "train/launch.py", "--nnodes=2", "--nproc-per-node=1",
            "--rdzv-endpoint=node0:29500", f"--max-restarts={max_restarts}", "train/main.py",
            *FLAGS, f"--max_steps={steps}", f"--out={self.out}",
        ]  # fmt: skip
        quiet = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.launchers = [
            cluster.start(host, command, log=log, cwd=ROOT, env=quiet)
            for host, log in enumerate(self.logs)
        ]

    def has_stepped(self, attempt: int) -> bool:
        """Whether the attempt (0: the first) has done a step; rank 0 says where each begins."""
        attempts = self.logs[0].read_text().split(" steps an epoch, ")[1:]
        return len(attempts) > attempt and "  loss " in attempts[attempt]

    def wait_for_step(self, attempt: int) -> None:
        """Until has_stepped. Raises: RuntimeError with the output when it will not."""
        limit = time.monotonic() + LIMIT_S
        while not self.has_stepped(attempt):
            has_ended = any(launcher.poll() is not None for launcher in self.launchers)
            if has_ended or time.monotonic() > limit:
                raise RuntimeError(f"restart {attempt} failed:\n{self.output()}")
            time.sleep(0.02)

    def lines(self, host: int) -> int:
        """How many lines named the host's rank as the one that is gone."""
        lines = (line for line in self.output().splitlines() if line.startswith("error: "))
        return sum(f"rank {host} on host {self.cluster.names[host]}" in line for line in lines)

    def kill(self, host: int) -> None:
        """Kill the host's rank."""
        (rank,) = set(self.cluster.processes(host)) - {self.launchers[host].pid}
        os.kill(rank, signal.SIGKILL)

    def end(self) -> dict[str, str]:
        """SHA-256 of the newest checkpoint's tensors. Raises: RuntimeError if the run failed."""
        try:
            codes = [launcher.wait(LIMIT_S) for launcher in self.launchers]
        except subprocess.TimeoutExpired:
            codes = None
        if codes != [0, 0]:
            raise RuntimeError(f"exit codes {codes}:\n{self.output()}")
        newest = max((self.out / "checkpoints").glob("step-*"))
        files = json.loads((newest / "manifest.json").read_text())["files"]
        return {n: facts["sha256"] for n, facts in files.items() if n.endswith(".safetensors")}

    def output(self) -> str:
        """All hosts' logs."""
        return "\n".join(f"== {log.stem}\n{log.read_text()}" for log in self.logs)


def measure(kills: int, seed: int, folder: Path) -> dict:
    """Kill so many ranks; what came of it."""
    draw, seconds, steps = random.Random(seed), [], STEPS * kills
    with Cluster(2) as cluster:
        undisturbed = Run(cluster, folder / "undisturbed", steps=steps, max_restarts=0).end()
        run = Run(cluster, folder / "killed", steps=steps, max_restarts=kills)
        run.wait_for_step(0)
        for number in range(kills):
            time.sleep(draw.uniform(0, DELAY_S))
            run.kill(number % 2)
            begin = time.monotonic()
            run.wait_for_step(number + 1)
            seconds.append(round(time.monotonic() - begin, 2))
            print(f"restart {number + 1} of {kills}: {seconds[-1]} s to the next step", flush=True)
        disturbed, named = run.end(), run.lines(0) + run.lines(1)
    return {
        "n": kills, "restarts": len(seconds), "named": named,
        "same_bits": disturbed == undisturbed,
        "seconds_p50": round(statistics.median(seconds), 2), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Read the flags, measure, print one JSON line."""
    parser = argparse.ArgumentParser(description="Kill ranks and count the restarts that work.")
    parser.add_argument("--kills", type=int, default=10, help="at most 11: the images' four epochs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--save", default="", help="name of a result in profiling/results/")
    arguments = parser.parse_args()
    if (reason := why_not()) is not None:
        refuse(reason, code=1)
    try:
        check_save(arguments.save)
        if not 1 <= arguments.kills <= 11:
            raise ValueError(f"--kills must lie in 1 .. 11, got {arguments.kills}")
        with tempfile.TemporaryDirectory(prefix="restarts-") as folder:
            found = measure(arguments.kills, arguments.seed, Path(folder))
    except (RuntimeError, ValueError) as error:
        refuse(str(error), code=1)
    found["environment"] = environment(2, torch.device("cpu"))
    if arguments.save:
        found["files"] = [save_json(arguments.save, found)]
    print(json.dumps(found))
    sys.exit(not (found["same_bits"] and found["named"] == arguments.kills))


if __name__ == "__main__":
    main()
