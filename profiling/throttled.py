"""Steps of a small model on 1, 2 and 4 hosts of one machine whose links are slowed down by `tc`.

    python profiling/throttled.py --save throttled

What profiling/scaling.py's formula is held against. The hosts are network namespaces
(profiling/stand_ins/cluster.py) and share the cores, rank r on core r modulo their number, so three
things are measured apart: a hop's latency, from an all-reduce of 16 bytes; before each rate the
step of as many processes at once that exchange nothing; at each rate the step of the ranks
together. tc's tbf limits what each host sends. Needs root.
A newcomer's mistake: one compute time for all. Four ranks on two cores take twice as long.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # profiling/ is no package

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from measure.results import check_save, save_json
from stand_ins.cluster import Cluster, why_not
from train import distributed
from train.run.folder import environment
from train.run.program import refuse

ROOT = Path(__file__).resolve().parent.parent
HOSTS = (1, 2, 4)
MBIT_PER_S = (None, 1000, 100, 10)  # None: as the kernel passes it on
IMAGES = 8  # of a rank
LIMIT_S = 900  # of one run
PINGS = 300
MODEL = [
    "--model.arch=resnet18", "--model.stem=cifar", "--model.width=32", "--model.projector_dim=256",
    "--model.projector_hidden=256", "--model.predictor_hidden=64", "--augment.size=32",
    "--precision=fp32", "--device=cpu", "--peers=false",
]  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def ping() -> float:
    """Seconds of an all-reduce of 16 bytes over the ranks of torchrun: the median."""
    with distributed.start("cpu") as world:
        times, value = [], torch.zeros(2, dtype=torch.float64)
        for _ in range(PINGS):
            begin = time.perf_counter()
            dist.all_reduce(value, group=world.group)
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def run_on(hosts: Cluster, folder: Path, num: int, program: list[str], *, joined: bool) -> list:
    """The last line of what the program prints on each of the first `num` hosts, as JSON.

    joined: as ranks of one torchrun, of which the first alone prints; else each by itself.
    Raises: RuntimeError with the end of a host's log where one fails.
    """
    words = [sys.executable]
    if joined:
        words += ["-m", "torch.distributed.run", "--nnodes", str(num), "--nproc-per-node", "1",
                  "--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500"]  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    logs = [folder / f"{name}.log" for name in hosts.names[:num]]
    for log in logs:
        log.unlink(missing_ok=True)
    started = [
        hosts.start(
            host, ["taskset", "-c", str(cores[host % len(cores)]), *words, *program],
            log=log, cwd=ROOT, env=ENVIRONMENT,
        )
        for host, log in enumerate(logs)
    ]  # fmt: skip
    for process, log in zip(started, logs, strict=True):
        if process.wait(LIMIT_S) != 0:
            raise RuntimeError(f"{' '.join(program)} failed:\n{log.read_text()[-2000:]}")
    texts = [log.read_text().splitlines() for log in (logs[:1] if joined else logs)]
    return [json.loads(lines[-1]) for lines in texts]


def throughput(
    hosts: Cluster, folder: Path, num: int, *, joined: bool, what: str, repeats: int
) -> dict:
    """profiling/throughput.py on the hosts; of processes that are not joined, rates of each."""
    program = [
        "profiling/throughput.py", *MODEL, f"--data.batch_size={IMAGES * (num if joined else 1)}",
        f"--what={what}", "--steps=1", "--warmup=1", f"--repeats={repeats}", "--budget_s=60",
    ]  # fmt: skip
    each = run_on(hosts, folder, num, program, joined=joined)
    rates = [rate for one in each for rate in one["ranks"]["images_per_s"]]
    return each[0] | {"step_s": IMAGES / statistics.median(rates)}


def measure(hosts: Cluster, folder: Path, *, repeats: int) -> dict:
    """All of it. Units: seconds a step, microseconds a hop."""
    found: dict = {"images_per_rank": IMAGES, "hop_us": {}, "steps": []}
    for num in HOSTS[1:]:
        ours = [str(Path(__file__).resolve()), "--ping"]
        (seconds,) = run_on(hosts, folder, num, ours, joined=True)
        found["hop_us"][num] = round(1e6 * seconds / (2 * (num - 1)), 1)
        print(f"{num}: {found['hop_us'][num]} us a hop", file=sys.stderr, flush=True)
    counted = throughput(hosts, folder, 2, joined=True, what="step,ranks", repeats=1)
    found |= {"collectives_per_step": counted["ranks"]["collectives_per_step"],
              "gradient_bytes": counted["ranks"]["gradient_bytes_per_step"],
              "model": counted["config"]["model"], "size": counted["config"]["augment"]["size"],
              }  # fmt: skip
    for mbit_per_s in MBIT_PER_S:
        if mbit_per_s is not None:
            for host in range(len(hosts.names)):
                hosts.throttle(host, mbit_per_s=mbit_per_s)
        for num in HOSTS if mbit_per_s is None else HOSTS[1:]:
            # right before: on a machine that others use, cores are not as fast at all times
            alone = throughput(hosts, folder, num, joined=False, what="step", repeats=repeats)
            one = throughput(hosts, folder, num, joined=True, what="step", repeats=repeats)
            row = {"ranks": num, "mbit_per_s": mbit_per_s, "compute_s": round(alone["step_s"], 4),
                   "step_s": round(one["step_s"], 4), "n": one["step"]["ours"]["n"]}  # fmt: skip
            found["steps"].append(row)
            print(row, file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Read the flags, measure, print one JSON line."""
    parser = argparse.ArgumentParser(description="Measure steps over throttled links.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", default="", help="profiling/results/<this>_<device>_<yyyymm>")
    parser.add_argument("--ping", action="store_true", help="what it starts on the hosts")
    arguments = parser.parse_args()
    if arguments.ping:
        print(json.dumps(ping()))
        return
    if (reason := why_not()) is not None:
        refuse(f"no hosts can be made here: {reason}", code=1)
    try:
        check_save(arguments.save)
        if arguments.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {arguments.repeats}")
        with Cluster(max(HOSTS)) as hosts, tempfile.TemporaryDirectory() as folder:
            found = measure(hosts, Path(folder), repeats=arguments.repeats)
    except (RuntimeError, ValueError, OSError) as error:
        refuse(str(error), code=1)
    found |= {"n": arguments.repeats, "environment": environment(1, torch.device("cpu"))}
    if arguments.save:
        found["file"] = save_json(arguments.save, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
