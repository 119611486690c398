"""What two ranks find, run by tests/test_two_ranks.py as a script: rank 0 prints a JSON list."""

import json
import os
import signal
import sys
import types
from typing import Any

if not __package__:  # run as a script, like those of profiling/
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sys.path.insert(1, os.path.join(sys.path[0], "profiling"))

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from measure.turns import take_turns
from train.distributed import StopSignal, World, failure_of_any, gather
from train.run.optim import GuardedStep
from train.run.state import TrainState, warn_of_differing_ranks

CPU = torch.device("cpu")
STEPS, SIGNALLED = 12, 4


def stopped_at(world: World) -> int:
    """The step after which this rank stops; rank 1 alone gets SIGTERM, in the SIGNALLED-th."""
    stop = StopSignal(world)
    step = 0
    while step < STEPS:
        if (step, world.rank) == (SIGNALLED, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        if stop.agreed():
            break
        step += 1
    stop.close()
    return step


def turns(world: World) -> dict:
    """Summaries of variants, of which one fails on rank 1 alone."""

    def fails() -> float:
        if world.rank == 1:
            raise ValueError("no such peer")
        return 1.0

    variants = {"fails": fails, "ours": lambda: 1.0 + world.rank}
    found = take_turns(variants, images=10, n=2, world=world)
    return {name: timing.summary() for name, timing in found.items()}


def failed(world: World) -> list[str | None]:
    """What each rank learns of a failure of rank 1, for which rank 0 waits in a collective."""
    found, one = None, torch.ones(1)
    if world.rank == 1:
        try:
            failure_of_any(world, "step", "out of memory")
        except RuntimeError as error:
            found = str(error)
    dist.all_reduce(one)
    if world.rank == 0:
        found = failure_of_any(world, "step", None)
    return gather(world, found)


def steps(world: World) -> dict:
    """What training with DDP has found on this rank. The group outlives the DDP.

    DDP's reducer would end it holding the GIL, for which the group's threads wait (torch 2.13).
    """
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    guard = GuardedStep(optimizer, torch.amp.GradScaler("cpu", enabled=False), CPU)
    weights = [model.weight.tolist()]
    for step in range(3):
        bad = (step, world.rank) == (1, 1)
        x = torch.full((4, 3), float("nan") if bad else 1.0 + world.rank)
        guard(ddp(x).square().sum())
        weights.append(model.weight.tolist())
    warnings: list[list[str]] = []
    state = TrainState(model, ddp, optimizer, guard)  # type: ignore[arg-type] - of any module
    for changed in (None, 1):
        if world.rank == changed:
            with torch.no_grad():
                model.bias[1] = torch.nextafter(model.bias[1], torch.tensor(9.0))
        warnings.append([])
        warn_of_differing_ranks(state, world, warnings[-1].append)
    return {"weights": weights, "skipped": guard.check(3), "warnings": warnings}


def on_rank(rank: int, port: int) -> None:
    """Rank 0 prints what both have found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    watch: Any = types.SimpleNamespace(progress=0, timeout_s=0.5)
    store = dist.distributed_c10d._get_default_store()
    world = World(rank, 2, rank, 2, CPU, dist.group.WORLD, watch, store=store)
    found = steps(world) | {"turns": turns(world), "failed": failed(world)}
    everywhere = gather(world, found | {"signalled": SIGNALLED, "stopped_at": stopped_at(world)})
    if rank == 0:
        print(json.dumps(everywhere))
    dist.destroy_process_group()


if __name__ == "__main__":
    is_rank_1 = os.fork() == 0
    on_rank(int(is_rank_1), int(sys.argv[1]))
    if is_rank_1:
        os._exit(0)
    sys.exit(os.wait()[1])
