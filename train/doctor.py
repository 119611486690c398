"""Look at this machine before a run: `python train/doctor.py`, or under torchrun for all ranks.

A line for each check, green or with the remedy; exit code 1 if one fails. Start it as the training
will be started, not on the login node: the same torchrun line, container and limits, with
train/doctor.py in place of train/main.py.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import importlib.util
import json
import resource
import socket
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.text import Text
from torch.cuda import nccl

from kernels.choose import HAS_TRITON
from pipeline.streams import protect_output
from train import distributed
from train.distributed import World, gather
from train.distributed.agreement import SHARED_MEMORY
from train.distributed.startup import read_ranks
from train.run.optim import NO_APEX, why_no_apex
from train.run.program import first_line, refuse
from train.run.versions import Finding, dali, driver, driver_cuda, jpeg_decoders, torch_build

FILES_A_RANK = 128
"""NCCL opens sockets to other ranks: 1,024 files ran out at 32 ranks on 4 nodes
(github.com/goodfire-ai/spd, pull request 957), 4,096 sufficed in NVIDIA/nccl issue 127."""
STYLE = {True: ("ok", "green"), False: ("FAIL", "bold red"), None: ("skipped", "dim")}


@dataclass(frozen=True)
class Flags:
    """Those of the program, the same on all hosts."""

    device: str
    seconds: float


def cuda(device: torch.device) -> Finding:
    """A torch that computes on this rank's GPU."""
    version = f"torch {torch.__version__}"
    if driver_cuda() is None:
        return Finding("CUDA", None, f"{version}, no driver")
    if torch.version.cuda is None:
        found = f"{version} is a CPU build beside a driver"
        return Finding("CUDA", False, found, "pip install a CUDA build of torch")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("CUDA", None, f"{version}, CUDA_VISIBLE_DEVICES hides the GPUs")
    try:
        torch.cuda.init()
        if device.type == "cpu":
            return Finding("CUDA", None, f"{version} has GPUs, but --device cpu is given")
        assert (torch.ones(1, device=device) + 1).item() == 2
    except (RuntimeError, AssertionError) as error:
        remedy = (
            "compare nvidia-smi and CUDA_VISIBLE_DEVICES; a GPU that torch was not built for needs "
            "another torch"
        )
        return Finding("CUDA", False, f"{version}: {first_line(error)}", remedy)
    name, nccl_version = torch.cuda.get_device_name(device), ".".join(map(str, nccl.version()))
    found = f"{version}, CUDA {torch.version.cuda}, NCCL {nccl_version}, {name}"
    return Finding("CUDA", True, found)


def dali_memory(device: torch.device) -> Finding:
    """The memory of DALI's pipelines on a GPU beside torch's, with the default --dali flags."""
    if device.type == "cpu":
        return Finding("DALI memory", None, "no CUDA device: nothing is reserved")
    try:
        from pipeline.decode import DecodeOptions, reserve
        from pipeline.loader import num_threads
    except (ImportError, OSError):
        return Finding("DALI memory", None, "see DALI above")
    options, ranks = DecodeOptions(), read_ranks()[3]
    threads = num_threads(options, local_world=ranks, device=device)
    return Finding("DALI memory", True, reserve(options, threads=threads))


def triton(device: torch.device) -> Finding:
    """A Triton that compiles a kernel of ours, and the kernel computes what PyTorch does."""
    if device.type == "cpu":
        return Finding("triton", None, "no CUDA device: PyTorch's operations run")
    if not HAS_TRITON:
        return Finding("triton", False, "not installed", "install the one that torch requires")
    return compiles_and_agrees(device)


def compiles_and_agrees(device: torch.device) -> Finding:
    """Run the normalising kernel and PyTorch's operations on `device`, and compare."""
    import triton as installed

    from kernels.normalize import normalize_views
    from train.config.schema import IMAGENET_MEAN, IMAGENET_STD

    images = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8, device=device).view(2, 8, 8, 3)
    values = (images, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
    try:
        ours, plain = (normalize_views(*values, kernels=name) for name in ("triton", "plain"))
        torch.testing.assert_close(ours, plain)
    except Exception as error:  # compiler, linker, loader and file system each have their own
        found = f"{installed.__version__}: {first_line(error)}"
        remedy = "install a C compiler (gcc), and set TRITON_CACHE_DIR to a writable folder"
        return Finding("triton", False, found, remedy)
    return Finding("triton", True, f"{installed.__version__} compiled and ran a kernel")


def apex() -> Finding:
    """Which apex: NVIDIA's, none, or PyPI's package of that name."""
    reason = why_no_apex()
    if reason == NO_APEX:
        return Finding("apex", True, "not installed, and not needed: torch's fused SGD runs")
    if reason is not None:
        return Finding("apex", False, reason, "pip uninstall apex")
    if importlib.util.find_spec("amp_C") is None:
        remedy = "build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or uninstall it"
        return Finding("apex", False, "NVIDIA's, built without its CUDA extensions", remedy)
    return Finding("apex", True, "NVIDIA's, for --optim.implementation apex")


def shared_memory(device: torch.device, folder: str = "/dev/shm") -> Finding:
    """Room in /dev/shm for NCCL, which passes data between a machine's ranks through it."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    found = f"{free >> 20} MiB free in {folder}"
    if device.type == "cpu":
        return Finding("shared memory", True, f"{found}, none needed without NCCL")
    if free >= SHARED_MEMORY:
        return Finding("shared memory", True, found)
    remedy = (
        "docker run --shm-size 8g; Kubernetes: an emptyDir of medium Memory; else remove what "
        f"other programs left in {folder}"
    )
    return Finding("shared memory", False, f"{found}, NCCL needs {SHARED_MEMORY >> 20}", remedy)


def open_files(ranks: int) -> Finding:
    """A limit of open files that the sockets between `ranks` do not reach."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(1024, FILES_A_RANK * ranks)
    if limit >= needed:
        return Finding("open files", True, f"limit {limit}")
    remedy = f"ulimit -n {min(65536, most)} before the start"
    if most < needed:
        remedy = f"raise the hard limit of {most}, in /etc/security/limits.conf or LimitNOFILE="
    remedy += "; docker run --ulimit nofile=65536"
    return Finding("open files", False, f"limit {limit}, {ranks} ranks need {needed}", remedy)


def examine(device: torch.device, ranks: int) -> list[Finding]:
    """The checks that one rank makes without the others."""
    fit = [driver(), torch_build(), cuda(device), dali(), dali_memory(device)]
    rest = [jpeg_decoders(device), triton(device), apex(), shared_memory(device), open_files(ranks)]
    return fit + rest


def report(checks: list[list[Finding]], hosts: list[str]) -> list[dict]:
    """Print a line for each check, one for each result where hosts differ; all as dicts.

    checks: of each rank, in the same order. hosts: of each rank.
    """
    console, rows = Console(stderr=True, soft_wrap=True, highlight=False), []
    for of_ranks in zip(*checks, strict=True):
        for finding in dict.fromkeys(of_ranks):
            where = {host for host, other in zip(hosts, of_ranks, strict=True) if other == finding}
            word, style = STYLE[finding.ok]
            line = Text.assemble((f"{word:8}", style), f"{finding.name:14}")
            if where != set(hosts):
                line.append(f"{', '.join(sorted(where))}: ")
            line.append(finding.found)
            if finding.remedy:
                line.append(f" -> {finding.remedy}", "yellow")
            console.print(line)
            rows.append(finding._asdict() | {"hosts": sorted(where)})
    return rows


def main() -> None:
    """Run the checks on every rank and the two measurements over all of them; rank 0 prints."""
    parser = argparse.ArgumentParser(description="Check a machine, or under torchrun a cluster.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds", type=float, default=5.0, help="of all-reduce and decoding")
    arguments = Flags(**vars(parser.parse_args()))
    if not 0 < arguments.seconds <= 600:
        refuse(f"--seconds must be above 0 and at most 600, got {arguments.seconds}")
    try:
        with distributed.start(arguments.device, options=arguments) as world:
            ok = check_ranks(world, arguments.seconds)
    except (ValueError, RuntimeError, ConnectionError) as error:
        # ranks do not reach each other: each reports its own
        own = [*examine(torch.device("cpu"), 1), Finding("ranks", False, first_line(error))]
        print(json.dumps({"ok": False, "checks": report([own], [socket.gethostname()])}))
        ok = False
    sys.exit(not ok)


def check_ranks(world: World, seconds: float) -> bool:
    """Examine, measure, print; whether every check of every rank passed or does not apply."""
    checks = gather(world, examine(world.device, world.size))
    hosts, rates = gather(world, socket.gethostname()), []
    if any(finding.ok is False for found in checks for finding in found if finding.name == "DALI"):
        judged = [Finding("decode", None, "not measured: see DALI above")]
    else:
        from train.distributed import rank_rates  # imports DALI

        rates = rank_rates.measure(world, seconds)
        judged = [Finding(*result) for result in rank_rates.judge(rates, hosts)]
    checks = [[*found, *judged] for found in checks]
    ok = all(finding.ok is not False for found in checks for finding in found)
    if world.is_main:
        rows = report(checks, hosts)
        ranks = [{"host": host, **rate} for host, rate in zip(hosts, rates, strict=False)]
        print(json.dumps({"ok": ok, "checks": rows, "ranks": ranks}))
    return ok


if __name__ == "__main__":
    protect_output()
    main()
