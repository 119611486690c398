"""Steps of a small model on 1, 2 and 4 hosts of one machine whose links are slowed down by `tc`.

    python profiling/throttled.py --save throttled

profiling/scaling.py's formula is compared with it. The hosts are network namespaces
(profiling/stand_ins/cluster.py) and share the cores, rank r on core r modulo their number: four
ranks on two cores take twice as long. So three things are measured separately: a hop's latency,
from an all-reduce of 16 bytes; before each rate the step of as many processes at once that exchange
nothing; at each rate the step of the ranks together. tc's tbf limits what each host sends. Needs
root.
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
from pipeline.streams import print_result, protect_output
from stand_ins.cluster import Cluster, Job, why_not
from train import distributed
from train.run.folder import environment
from train.run.program import refuse

HOSTS = (1, 2, 4)
MBIT_PER_S = (None, 1000, 100, 10)  # None: as fast as the kernel forwards
IMAGES = 8  # of a rank
LIMIT_S = 900  # of one run
PINGS = 300
MODEL = ["--model.arch=resnet18", "--model.stem=cifar", "--model.width=32", "--augment.size=32"]
MODEL += ["--model.projector_dim=256", "--model.projector_hidden=256"]
MODEL += ["--model.predictor_hidden=64", "--precision=fp32", "--device=cpu", "--peers=false"]


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

    joined: as ranks of one torchrun, of which only the first prints; else independently.
    Raises: RuntimeError with the end of the hosts' logs where one fails.
    """
    command = [sys.executable]
    if joined:
        command += ["-m", "torch.distributed.run", "--nnodes", str(num), "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:29500"]
    cores = sorted(os.sched_getaffinity(0))
    on_core = [{"before": ["taskset", "-c", str(cores[h % len(cores)])]} for h in range(num)]
    own, changes = Path(tempfile.mkdtemp(dir=folder)), dict(enumerate(on_core))
    job = Job(hosts, own, [*command, *program], num_hosts=num, changes=changes)
    if any(job.end(LIMIT_S)):
        raise RuntimeError(f"{' '.join(program)} failed:\n{job.output()[-4000:]}")
    logs = job.logs[:1] if joined else job.logs
    return [json.loads(log.read_text().splitlines()[-1]) for log in logs]


def throughput(
    hosts: Cluster, folder: Path, num: int, *, joined: bool, what: str, repeats: int
) -> dict:
    """profiling/throughput.py on the hosts; of processes that are not joined, rates of each."""
    batch_size = IMAGES * (num if joined else 1)
    program = ["profiling/throughput.py", *MODEL, f"--data.batch_size={batch_size}"]
    program += [f"--what={what}", "--steps=1", "--warmup=1", f"--repeats={repeats}"]
    results = run_on(hosts, folder, num, [*program, "--budget_s=60"], joined=joined)
    rates = [rate for result in results for rate in result["ranks"]["images_per_s"]]
    return results[0] | {"step_s": IMAGES / statistics.median(rates)}


def measure(hosts: Cluster, folder: Path, *, repeats: int) -> dict:
    """All measurements. Units: seconds a step, microseconds a hop."""
    hop_us, steps = {}, []
    for num in HOSTS[1:]:
        ours = [str(Path(__file__).resolve()), "--ping"]
        (seconds,) = run_on(hosts, folder, num, ours, joined=True)
        hop_us[num] = round(1e6 * seconds / (2 * (num - 1)), 1)
        print(f"{num}: {hop_us[num]} us a hop", file=sys.stderr, flush=True)
    counted = throughput(hosts, folder, 2, joined=True, what="step,ranks", repeats=1)
    for mbit_per_s in MBIT_PER_S:
        if mbit_per_s is not None:
            for host in range(len(hosts.names)):
                hosts.throttle(host, mbit_per_s=mbit_per_s)
        for num in HOSTS if mbit_per_s is None else HOSTS[1:]:
            # right before: on a machine that others use the speed of a core varies
            alone, together = (
                throughput(hosts, folder, num, joined=joined, what="step", repeats=repeats)
                for joined in (False, True)
            )
            row = {"ranks": num, "mbit_per_s": mbit_per_s, "compute_s": round(alone["step_s"], 4)}
            row |= {"step_s": round(together["step_s"], 4), "n": together["step"]["ours"]["n"]}
            steps.append(row)
            print(row, file=sys.stderr, flush=True)
    return {
        "images_per_rank": IMAGES,
        "hop_us": hop_us,
        "steps": steps,
        "collectives_per_step": counted["ranks"]["collectives_per_step"],
        "gradient_bytes": counted["ranks"]["gradient_bytes_per_step"],
        "model": counted["config"]["model"],
        "size": counted["config"]["augment"]["size"],
    }


def main() -> None:
    """Read the flags, measure, print one JSON line."""
    parser = argparse.ArgumentParser(description="Measure steps over throttled links.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", default="", help="profiling/results/<this>_<device>_<yyyymm>")
    parser.add_argument(
        "--ping", action="store_true", help="internal: the program that runs on the hosts"
    )
    arguments = parser.parse_args()
    if arguments.ping:
        print_result(ping())
        return
    if (reason := why_not()) is not None:
        refuse(f"no hosts can be made: {reason}", code=1)
    try:
        check_save(arguments.save)
        if arguments.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {arguments.repeats}")
        with Cluster(max(HOSTS)) as hosts, tempfile.TemporaryDirectory() as folder:
            result = measure(hosts, Path(folder), repeats=arguments.repeats)
    except (RuntimeError, ValueError, OSError) as error:
        refuse(str(error), code=1)
    result |= {"n": arguments.repeats, "environment": environment(1, torch.device("cpu"))}
    if arguments.save:
        result["file"] = save_json(arguments.save, result)
    print_result(result, kept=result.get("file"))


if __name__ == "__main__":
    protect_output()
    main()
