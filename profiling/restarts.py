"""Whether every restart works: `python profiling/restarts.py --save restarts`.

Trains the embedded digits on two hosts (profiling/stand_ins/cluster.py, needs root) twice:
undisturbed, and with a rank killed (kill -9) repeatedly, alternating between the hosts, at a moment
that a seed draws. train/launch.py restarts it from the last checkpoint. Counts the restarts and the
lines that name the rank and its host, measures the seconds from a kill to the next step, and
compares weights, statistics and momentum bit for bit. With torchrun's defaults some restarts work,
so a single kill shows nothing.
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
import tempfile
import time
from pathlib import Path

import torch

from measure.results import check_save, save_json
from pipeline.streams import print_result, protect_output
from stand_ins.cluster import Cluster, Job, why_not
from train.run.folder import environment
from train.run.program import refuse

MODEL = ["--model.arch=resnet18", "--model.stem=cifar", "--model.width=8"]
MODEL += ["--model.projector_dim=32", "--model.projector_hidden=32", "--model.predictor_hidden=8"]
FLAGS = [*MODEL, "--augment.size=16", "--eval.size=16", "--eval.resize=16"]
FLAGS += ["--data.root=digits", "--data.batch_size=32", "--epochs=4", "--eval.every_epochs=1000"]
FLAGS += ["--precision=fp32", "--log_every=1", "--checkpoint_every=2", "--device=cpu"]
STEPS = 20
"""For each kill, so that none comes after the end: 200 of the 224 steps for ten."""
DELAY_S = 0.2
"""After the first step of an attempt a rank is killed within this time: in a step or a save."""


def start(cluster: Cluster, folder: Path, *, steps: int, max_restarts: int) -> Job:
    """One training on both hosts."""
    command = [sys.executable, "train/launch.py", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--rdzv-endpoint=node0:29500", f"--max-restarts={max_restarts}", "train/main.py"]
    command += [*FLAGS, f"--max_steps={steps}", f"--out={folder / 'run'}"]
    return Job(cluster, folder, command, num_hosts=2)


def wait_for_step(job: Job, attempt: int) -> None:
    """Until the attempt (0: the first) has done a step; rank 0 logs where each begins."""

    def has_stepped() -> bool:
        attempts = job.logs[0].read_text().split(" steps an epoch, ")[1:]
        return len(attempts) > attempt and "  loss " in attempts[attempt]

    job.wait_for(has_stepped, f"restart {attempt}")


def digests(job: Job) -> dict[str, str]:
    """SHA-256 of the newest checkpoint's tensors, once the job has succeeded."""
    job.succeed()
    newest = max((job.out / "checkpoints").glob("step-*"))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {n: facts["sha256"] for n, facts in files.items() if n.endswith(".safetensors")}


def measure(kills: int, seed: int, folder: Path) -> dict:
    """Kill this many ranks; the restarts that worked."""
    draw, seconds, steps = random.Random(seed), [], STEPS * kills
    with Cluster(2) as cluster:
        undisturbed = digests(start(cluster, folder / "undisturbed", steps=steps, max_restarts=0))
        job = start(cluster, folder / "killed", steps=steps, max_restarts=kills)
        wait_for_step(job, 0)
        for number in range(kills):
            time.sleep(draw.uniform(0, DELAY_S))
            (rank,) = job.ranks(number % 2)
            os.kill(rank, signal.SIGKILL)
            begin = time.monotonic()
            wait_for_step(job, number + 1)
            seconds.append(round(time.monotonic() - begin, 2))
            print(f"restart {number + 1} of {kills}: {seconds[-1]} s to the next step", flush=True)
        same_bits = digests(job) == undisturbed
        names = [f"rank {rank} on host {name}" for rank, name in enumerate(cluster.names)]
    return {
        "n": kills,
        "restarts": len(seconds),
        "named": sum(name in line for name in names for line in job.lines()),
        "same_bits": same_bits,
        "seconds_p50": round(statistics.median(seconds), 2),
        "seconds": seconds,
    }


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
            raise ValueError(f"--kills must be 1 to 11, got {arguments.kills}")
        with tempfile.TemporaryDirectory(prefix="restarts-") as folder:
            result = measure(arguments.kills, arguments.seed, Path(folder))
    except (RuntimeError, ValueError) as error:
        refuse(str(error), code=1)
    result["environment"] = environment(2, torch.device("cpu"))
    if arguments.save:
        result["files"] = [save_json(arguments.save, result)]
    print_result(result, kept=result.get("files"))
    sys.exit(not (result["same_bits"] and result["named"] == arguments.kills))


if __name__ == "__main__":
    protect_output()
    main()
