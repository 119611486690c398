"""Joins the processes of a run, and leaves them at the end."""

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from train.config import Config
from train.distributed.agreement import agree, process_facts
from train.distributed.devices import take_device
from train.distributed.groups import open_groups
from train.distributed.verdict import PATIENCE
from train.distributed.watch import TELL_S, Watch, may_restart
from train.distributed.world import World
from train.network.model import Precision

PR_SET_PDEATHSIG = 1


@contextmanager
def start(
    device: str, config: Config | None = None, *, mistake: str | None = None
) -> Iterator[World]:
    """Join the other processes that torchrun started, if any; leave them at the end.

    device: as --device. config: of a run, the same on all ranks. mistake: in this process's flags,
    for which all ranks of several are to end.

    Raises: ValueError when --device cuda is asked for where there is none, for a part of torchrun's
    environment, or when processes differ (train/distributed/agreement.py); ConnectionError, in
    place of what a broken connection raised, with the rank that is gone; SystemExit where rank 0
    has told the user already.
    """
    rank, size, local_rank, local_size = read_ranks()
    precision: Precision = "fp32" if config is None else config.precision
    if "WORLD_SIZE" in os.environ:
        follow_launcher()
    if size == 1:
        where = take_device(device, local_rank, local_size, precision)
        yield World(rank, size, local_rank, local_size, where, None)
        return
    timeout_s = Config.timeout_s if config is None else config.timeout_s
    patience = timedelta(seconds=PATIENCE * timeout_s)
    store = open_store(rank, size, patience)
    watch = Watch(store, rank=rank, local_rank=local_rank, size=size, timeout_s=timeout_s)
    try:
        where, fault = torch.device("cpu"), None
        try:
            check_restarts()
            where = take_device(device, local_rank, local_size, precision)
        except ValueError as error:
            fault = str(error)
        mine = process_facts(config, where.type, fault, mistake)
        if warning := agree(store, mine, rank=rank, size=size):
            print(f"warning: {warning}", file=sys.stderr)
        sums, host_group = open_groups(
            dist.PrefixStore("groups", store), rank=rank, size=size, device=where,
            timeout_s=timeout_s, out="" if config is None else config.out,
        )  # fmt: skip
        yield World(rank, size, local_rank, local_size, where, host_group, watch, sums)
        watch.close()
        dist.barrier(group=host_group)  # rank 0 keeps the store until no watch needs it
        dist.destroy_process_group()  # not after an error: it could wait for a rank that is gone
    except Exception as error:
        reason = watch.last_words(error)
        if reason is error:
            raise
        raise reason from error


def read_ranks() -> tuple[int, int, int, int]:
    """rank, size, local rank and local size as torchrun gives them; 0, 1, 0, 1 without it.

    Raises: ValueError where only a part of them is set, or they contradict each other.
    """
    values = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    set_here = {name: os.environ[name] for name in values if name in os.environ}
    remedy = "start with torchrun or train/launch.py, or unset them"
    try:
        values |= {name: int(value) for name, value in set_here.items()}
    except ValueError:
        raise ValueError(f"{set_here} in the environment are no whole numbers: {remedy}") from None
    rank, size, local_rank, local_size = values.values()
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ValueError(f"{set_here} in the environment do not go together: {remedy}")
    needed = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if size > 1 and (missing := [name for name in needed if name not in os.environ]):
        raise ValueError(f"WORLD_SIZE is {size}, but {', '.join(missing)} are not set: {remedy}")
    if size > 1 and not ((port := os.environ["MASTER_PORT"]).isdecimal() and int(port) < 1 << 16):
        raise ValueError(f"MASTER_PORT is {os.environ['MASTER_PORT']!r}, no port: {remedy}")
    return rank, size, local_rank, local_size


def open_store(rank: int, size: int, timeout: timedelta) -> dist.TCPStore:
    """The store that rank 0 keeps, at the address that torchrun chose.

    Raises: ConnectionError when rank 0 is not there in time.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    here = f"rank {rank} on host {socket.gethostname()}"
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank == 0 and not is_torchruns
    waiting = threading.Timer(
        TELL_S, print, kwargs={"file": sys.stderr, "flush": True},
        args=(f"warning: {here} finds no rank 0 at {address}:{port}: start it there, or correct "
              "MASTER_ADDR and MASTER_PORT; waiting",),
    )  # fmt: skip
    waiting.start()
    try:
        return dist.TCPStore(
            address, port, size, is_master=is_master, timeout=timeout, wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except dist.DistError as error:
        if is_master:
            raise ConnectionError(
                f"{here} cannot have port {port}: end what holds it, or take another with "
                "torchrun's --master-port"
            ) from error
        raise ConnectionError(
            f"{here} cannot reach rank 0 at {address}:{port}: "
            "it did not start (the output on its host says why), or a firewall is between the two"
        ) from error
    finally:
        waiting.cancel()


def check_restarts() -> None:
    """Raise ValueError where torchrun would restart and could not succeed."""
    if may_restart() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # seen with torch 2.13: 1 of 8, 2 of 5, 2 of 5, 1 of 6 restarts worked (pytorch #135712)
        raise ValueError(
            "--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment, "
            "else a restart reads the keys of the attempt before and fails; train/launch.py sets it"
        )


def follow_launcher() -> None:
    """Have SIGTERM sent here when torchrun or a study is killed: or its GPU would stay held."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # killed in between
        raise SystemExit(1)
