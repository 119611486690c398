"""Which process this is, on which device, and the few collectives outside the model.

One process without torchrun is a world of one rank and has no process group.
A newcomer's mistake: a collective on one rank only. Every function here is called by all ranks.
"""

import ctypes
import inspect
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.cores import usable_cores
from train.agreement import agree, facts
from train.config import Config
from train.groups import open_groups
from train.network.precision import Precision, set_tf32
from train.verdict import PATIENCE
from train.watch import TELL_S, Watch, may_restart

PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    host_group: Any
    """A gloo group of all ranks, for what the host decides; None in a world of one."""
    watch: Watch | None = None
    """Knows which rank is gone; None in a world of one."""
    sums: Any = None
    """The group of synchronised batch norm: all ranks, a communicator of its own; None for one."""

    @property
    def is_main(self) -> bool:
        """Rank 0 writes files and talks to the user."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks, or None where there is one."""
        return dist.group.WORLD if self.size > 1 else None

    def alone(self) -> "World":
        """This process as a world of one on the same device, which waits for no other rank."""
        return World(0, 1, 0, 1, self.device, None)


@contextmanager
def start(
    device: str, config: Config | None = None, *, mistake: str | None = None
) -> Iterator[World]:
    """Join the other processes that torchrun started, if any; leave them at the end.

    device: as --device. config: of a run, the same on all ranks. mistake: in this process's flags,
    for which all ranks of several are to end.

    Raises: ValueError when --device cuda is asked for where there is none, for a part of torchrun's
    environment, or when processes differ (train/agreement.py); ConnectionError, in place of what a
    broken connection raised, with the rank that is gone; SystemExit where rank 0 has told the user
    already.
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
        mine = facts(config, where.type, fault, mistake)
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


def own_buffers() -> dict[str, Any]:
    """DistributedDataParallel's flag to broadcast no buffers, which torch 2.13 renamed."""
    names = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"
    return {new if new in names else old: False}


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


def take_device(
    device: str, local_rank: int, local_size: int, precision: Precision = "fp32"
) -> torch.device:
    """This process's GPU, or the CPU with its share of the cores, computing in a precision.

    Raises: ValueError where there are no GPUs, or fewer than processes, or for tf32 without one.
    """
    kind = resolve_device(device)
    set_tf32(precision, torch.device(kind))
    if kind == "cpu":
        torch.set_num_threads(max(1, usable_cores() // local_size))
        keep_freed_memory()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"{local_size} processes on this machine but {torch.cuda.device_count()} GPUs: "
            "lower --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    take_high_priority()
    torch.backends.cudnn.benchmark = True  # shapes never change: the search is paid once
    return torch.device("cuda", local_rank)


def take_high_priority() -> None:
    """Put all of this process's work on one stream that the device prefers to DALI's.

    DALI's streams have priority 0, the lowest, and its flag for another has no effect (DALI 2.4,
    Pipeline.default_cuda_stream_priority). One stream from the start, model and DDP included:
    nothing needs to wait for the default stream. NCCL's streams are of the highest priority then,
    or the step would starve the gradients' all-reduce (initNCCLComm of ProcessGroupNCCL.cpp).
    """
    torch.cuda.set_stream(torch.cuda.Stream(priority=-1))
    os.environ["TORCH_NCCL_HIGH_PRIORITY"] = "1"  # read when a communicator is made


def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next step, as PyTorch does on a GPU.

    A step frees its activations and asks for them again; glibc hands large ones back to the kernel,
    which clears each page once more. Nothing is done where the library is not glibc. Figures in
    profiling/LOG.md.
    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda" for --device. Raises: ValueError for cuda where there is none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda, but torch {torch.__version__} finds no CUDA device: "
            "python train/doctor.py says why; or use --device cpu"
        )
    return device


def from_main(world: World, value: Any) -> Any:
    """rank 0's value on every rank (pickled: only between processes of one run)."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.host_group)
    return box[0]


def gather(world: World, value: Any) -> list:
    """The values of all ranks, in order, on every rank."""
    if world.size == 1:
        return [value]
    values: list = [None] * world.size
    dist.all_gather_object(values, value, group=world.host_group)
    return values


def mean(world: World, value: Tensor) -> Tensor:
    """The mean over ranks; `value` is changed in place."""
    if world.size > 1:
        dist.all_reduce(value, group=world.group)
        value /= world.size
    return value


def stop_at_once(world: World) -> None:
    """Outside of training a signal is a KeyboardInterrupt on rank 0, which owns the run folder."""
    for number in STOP_SIGNALS:
        is_ours = world.is_main or number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_ours else signal.SIG_DFL)


class StopSignal:
    """SIGTERM or Ctrl-C on any rank stops all ranks at the same step.

    The ranks' flags are compared without waiting: what was asked for in one step is known to all in
    the next. A second Ctrl-C ends the program at once.
    """

    def __init__(self, world: World):
        self.world = world
        self.received: signal.Signals | None = None
        self._parent = os.getppid()
        self._pending: tuple[Any, Tensor] | None = None
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self.world.is_main:  # not print: a signal may come within one
            text = f"{self.received.name}: stopping and saving; a second Ctrl-C ends it unsaved\n"
            os.write(sys.stderr.fileno(), text.encode())

    def agreed(self) -> bool:
        """Whether to stop after this step; called once a step by every rank."""
        if self.world.size == 1:
            return self.received is not None
        assert self.world.watch is not None
        self.world.watch.progress += 1
        stop = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            stop = flag.item() > 0
        flag = torch.tensor(float(self.received is not None))
        work = dist.all_reduce(flag, group=self.world.host_group, async_op=True)
        self._pending = work, flag
        return stop

    def check_torchrun(self) -> None:
        """Raise ConnectionError on all ranks if it was the death of one's torchrun that stopped us.

        Not as after a signal from outside, with success: the other torchruns are to restart their
        ranks, and so wait for the one that is missing.
        """
        if self.world.size == 1:
            return
        lost = socket.gethostname() if os.getppid() != self._parent else None
        for rank, host in enumerate(gather(self.world, lost)):
            if host is not None:
                raise ConnectionError(
                    f"torchrun was killed on host {host} (rank {rank}); saved at this step. Start "
                    "it there again, with the same command"
                )

    def close(self) -> None:
        """Give the signals back and finish the last exchange."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pending is not None:
            self._pending[0].wait()
