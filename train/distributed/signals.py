"""What a signal does: during training all ranks stop at the same step and save."""

import os
import signal
import socket
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.distributed.world import World, gather

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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
