"""Heartbeats: which rank a run has lost, and one line that names the rank and its host.

Each rank writes a heartbeat into the store once a second. Rank 0 reads all of them and writes the
failure, on which all ranks exit; the others read rank 0's heartbeat, for the store is on its host.
Not over the process group: a collective with a stopped rank hangs, and NCCL's time-out ends a
process without saying which rank failed. The rank that raised is often not the cause: it may only
have noticed that another exited. One process alone has no Watch, and the step pays nothing for it.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist

INTERVAL_S = 1.0
DEAD_S = 4.0  # after a connection broke, a rank without a heartbeat for this long broke it
GRACE_S = 12.0  # after a connection broke, if every rank still has heartbeats: report only that
LINGER_S = 5.0  # rank 0 keeps the store this long for the others to read the failure
WARN_S = 30.0  # a rank or host that has not joined by then is named
MAX_TIMEOUTS = 10
"""A rank that is alive may take this many timeout_s to join, or to answer."""
FINAL_ERRORS = (ValueError, FloatingPointError)  # a restart would end the same way


@dataclass(frozen=True)
class RankStatus:
    """What rank 0 knows of a rank."""

    rank: int
    silent_s: float  # since its last heartbeat, or since the start if it has not joined
    host: str = ""  # empty: it has not joined
    progress: int = 0
    error: str | None = None  # why it has failed
    is_lost: bool = False  # the error is a broken connection: another rank's failure caused it
    is_final: bool = False  # the error would be the same after a restart
    late_s: float = 0.0  # beyond what its step may take
    stacks: str = ""  # the file of its stacks (Stacks in train/distributed/world.py)

    @property
    def stacks_hint(self) -> str:
        """The end of a line: where its stacks are; empty before training."""
        return f"; its stacks are in {self.stacks} on its host" if self.stacks else ""

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.rank} on host {self.host}" if self.host else f"rank {self.rank}"


@dataclass(frozen=True)
class Failure:
    """Why the run ends; is_reported: rank 0 has printed it."""

    text: str
    is_final: bool = False
    is_reported: bool = False


def diagnose(
    ranks: list[RankStatus], *, timeout_s: float, broken_s: float | None
) -> Failure | None:
    """Which rank failed and how; None while none has. ranks: all, in order.

    broken_s: seconds since the first rank lost a connection, None while none has.
    """
    for rank in ranks:
        if rank.error is not None and not rank.is_lost:
            text = rank.error if rank.rank == 0 else f"{rank.name}: {rank.error}"
            return Failure(text, rank.is_final)
    for rank in ranks:
        if not rank.host and rank.silent_s > MAX_TIMEOUTS * timeout_s:
            text = f"{rank.name} has not joined within {rank.silent_s:.0f} s"
            return Failure(f"{text}: the output on its host says why")
    joined = [rank for rank in ranks if rank.host]
    silent = max(joined, key=lambda rank: rank.silent_s)
    if silent.silent_s > timeout_s:
        return Failure(
            f"{silent.name} has had no heartbeat for {silent.silent_s:.0f} s (--timeout_s): it was "
            f"stopped, or its host or the link to it is down{silent.stacks_hint}"
        )
    late_s = max(rank.late_s for rank in joined)
    if late_s > MAX_TIMEOUTS * timeout_s:  # a main thread that waits for CUDA raises no time-out
        return Failure(stalled(joined, f"{late_s:.0f} s beyond a step's --timeout_s"))
    if broken_s is None:
        return None
    dead = [rank for rank in joined if rank.silent_s > DEAD_S and rank.error is None]
    if dead:  # the first: NCCL or gloo may have ended others because of it
        first = max(dead, key=lambda rank: rank.silent_s)
        return Failure(
            f"{first.name} exited without an error: killed, probably by the OOM killer (dmesg on "
            f"{first.host}), or crashed, as the output there says"
        )
    if broken_s < GRACE_S:
        return None
    why = next(rank.error for rank in joined if rank.error is not None)
    if len({rank.progress for rank in joined}) > 1:
        return Failure(stalled(joined, why))
    return Failure(f"a connection between ranks broke: {why}")


def stalled(joined: list[RankStatus], why: str) -> str:
    """One line for the rank that is behind, or that all wait in the same step."""
    slow = min(joined, key=lambda rank: rank.progress)
    if slow.progress < max(rank.progress for rank in joined):
        return f"{slow.name} is alive but keeps the others waiting: {why}{slow.stacks_hint}"
    latest = max(joined, key=lambda rank: rank.late_s)
    return f"all ranks are alive and wait in one step, {latest.name} too: {why}{latest.stacks_hint}"


class Watch:
    """Owns two threads and their connection to the store, from creation to close."""

    def __init__(
        self, store: dist.TCPStore, *, rank: int, local_rank: int, size: int, timeout_s: float
    ):
        self.rank, self.local_rank, self.timeout_s = rank, local_rank, timeout_s
        self.progress = 0
        """Counted up by the training loop, on all ranks alike."""
        self.on_end: Callable[[str], None] = lambda text: None
        """Called with the reason when this process exits while its main thread waits."""
        self.stacks: Any = None
        """This rank's Stacks, during training."""
        self._heartbeat: dict[str, Any] = {"count": 0, "host": socket.gethostname(), "error": None}
        self._keys = [f"heartbeat/{r}" for r in range(size)]
        self._seen: dict[str, tuple[bytes, float]]
        self._seen = dict.fromkeys(self._keys, (b"", time.monotonic()))
        self._looked = time.monotonic()
        self._broken: float | None = None
        self._warned_missing, self._was_late = False, False
        self._failure: Failure | None = None
        self._is_ending = False
        self._closing, self._is_known = threading.Event(), threading.Event()
        # its own connection: a call that waits blocks all others on the same one
        self._store = store.clone()  # type: ignore[attr-defined] - missing in torch's stub
        self._store.set_timeout(timedelta(seconds=timeout_s))
        if rank == 0:
            self._store.multi_set([*self._keys, "failure"], [""] * (size + 1))
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; then ranks may exit in any order."""
        self._closing.set()
        self._thread.join()

    def reason_for(self, error: Exception) -> BaseException:
        """What to raise in place of `error`, once it is known which rank failed.

        SystemExit, without a message, on a rank whose failure rank 0 has reported.
        """
        if not self._thread.is_alive():
            return error
        if threading.current_thread() is threading.main_thread():
            # torchrun restarts at once and may not cut this short: it kills after 30 s
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        is_lost = is_lost_connection(error)
        self._is_ending = True
        self._heartbeat |= {
            "error": (str(error) or repr(error)).strip().splitlines()[0],
            "is_lost": is_lost,
            "is_final": isinstance(error, FINAL_ERRORS),
        }
        self._is_known.wait(self.timeout_s + GRACE_S + LINGER_S)
        failure = self._failure
        if failure is None:
            return error
        if is_lost:
            is_silent = failure.is_reported or self.local_rank != 0
            return SystemExit(1) if is_silent else ConnectionError(failure.text)
        is_reported = failure.is_reported and isinstance(error, (*FINAL_ERRORS, OSError))
        return SystemExit(1) if is_reported else error

    def _run(self) -> None:
        answers: queue.SimpleQueue[Failure | None] = queue.SimpleQueue()
        exchange = threading.Thread(
            target=self._exchange, args=(answers,), name="watch-store", daemon=True
        )
        exchange.start()
        failure, unanswered_s = None, 0.0
        while failure is None:
            try:
                failure, unanswered_s = answers.get(timeout=INTERVAL_S), 0.0
            except queue.Empty:
                unanswered_s += INTERVAL_S  # not by the clock: this process may have been stopped
                if unanswered_s > self.timeout_s:
                    failure = self._store_failure(None)
            if self._closing.is_set():
                return
        self._failure = failure
        if self.rank == 0:
            self._send(failure)
        is_main_waiting = not self._is_ending  # for a rank that will not answer
        if is_main_waiting:
            if not failure.is_reported and self.local_rank == 0:
                report(f"error: {failure.text}")
            self.on_end(failure.text)
            if (stacks := self.stacks) is not None:
                stacks.dump()
        if failure.is_final:
            end_torchrun()
        if failure.is_reported:
            with contextlib.suppress(dist.DistError):  # rank 0 has waited long enough
                self._store.add("left", 1)
        self._is_known.set()
        if is_main_waiting:
            os._exit(1)

    def _exchange(self, answers: queue.SimpleQueue) -> None:
        """Write a heartbeat and read once a second; a failure, or None, into `answers`.

        In its own thread: the store's time-out covers waiting for a key and not reading its value.
        After a link went down in between, such a call did not return for 900 s.
        """
        failure = None
        while failure is None and not self._closing.is_set():
            try:
                self._heartbeat["count"] += 1
                now: dict[str, Any] = {"progress": self.progress}
                if (stacks := self.stacks) is not None:
                    now |= {"late_s": stacks.late_s, "stacks": str(stacks.path)}
                self._store.set(self._keys[self.rank], json.dumps(self._heartbeat | now))
                failure = self._read_all() if self.rank == 0 else self._read_rank_0()
            except dist.DistError as error:
                failure = self._store_failure(error)
            answers.put(failure)
            if failure is None:
                self._closing.wait(INTERVAL_S)
        answers.put(None)  # so that close() need not wait

    def _silences(self, keys: list[str], heartbeats: list[bytes]) -> list[float]:
        """Seconds since each heartbeat changed, by this process's own clock."""
        now = time.monotonic()
        was_stopped = now - self._looked > 5 * INTERVAL_S  # this process, or the whole machine
        self._looked = now
        for key, heartbeat in zip(keys, heartbeats, strict=True):
            if was_stopped or heartbeat != self._seen[key][0]:
                self._seen[key] = heartbeat, now
        return [now - self._seen[key][1] for key in keys]

    def _read_all(self) -> Failure | None:
        heartbeats = self._store.multi_get(self._keys)
        silences = self._silences(self._keys, heartbeats)
        ranks = []
        for rank, (heartbeat, silent_s) in enumerate(zip(heartbeats, silences, strict=True)):
            known = json.loads(heartbeat) if heartbeat else {}
            known.pop("count", None)
            ranks.append(RankStatus(rank, silent_s, **known))
        now = time.monotonic()
        if self._broken is None and any(rank.is_lost for rank in ranks):
            self._broken = now
        missing = [rank.name for rank in ranks if not rank.host and rank.silent_s > WARN_S]
        if missing and not self._warned_missing:
            self._warned_missing = True
            text = f"{', '.join(missing)} has not joined for {WARN_S:.0f} s"
            report(f"warning: {text}: the output on its host says why")
        joined = [rank for rank in ranks if rank.host]
        is_late = any(rank.late_s > 0 for rank in joined)
        if is_late and not self._was_late:
            why = f"longer than a step's {self.timeout_s:.0f} s (--timeout_s)"
            report(f"warning: {stalled(joined, why)}")
        self._was_late = is_late
        broken_s = None if self._broken is None else now - self._broken
        return diagnose(ranks, timeout_s=self.timeout_s, broken_s=broken_s)

    def _read_rank_0(self) -> Failure | None:
        heartbeat, failure = self._store.multi_get([self._keys[0], "failure"])
        if failure:
            return Failure(**json.loads(failure), is_reported=True)
        (silent_s,) = self._silences(self._keys[:1], [heartbeat])
        if silent_s > (DEAD_S + GRACE_S if self._is_ending else self.timeout_s):
            return self._store_failure(None)
        return None

    def _store_failure(self, error: dist.DistError | None) -> Failure:
        heartbeat = self._seen[self._keys[0]][0]
        host = json.loads(heartbeat)["host"] if heartbeat else os.environ["MASTER_ADDR"]
        why = f"no heartbeat for {self.timeout_s:.0f} s (--timeout_s)"
        if error is not None and "imeout" not in str(error):
            why = "it exited"
        lost = f"host {socket.gethostname()} lost rank 0 on host {host}"
        return Failure(f"{lost}: {why}, or a link between the two is down")

    def _send(self, failure: Failure) -> None:
        """Have the other ranks read the failure, for at most LINGER_S."""
        self._store.set("failure", json.dumps({"text": failure.text, "is_final": failure.is_final}))
        now = time.monotonic()
        alive = sum(now - at < DEAD_S for _, at in self._seen.values())
        while self._store.add("left", 0) < alive - 1 and time.monotonic() < now + LINGER_S:
            time.sleep(0.05)


def report(line: str) -> None:
    """One line on stderr, in one write: print's line break is another, and hosts share logs."""
    print(f"{line}\n", end="", file=sys.stderr, flush=True)


def is_lost_connection(error: Exception) -> bool:
    """Whether an error is a consequence of another rank's exit: gloo's, NCCL's or the store's."""
    is_gloo = isinstance(error, RuntimeError) and "gloo/" in str(error)
    return is_gloo or isinstance(error, dist.DistError)


def may_restart() -> bool:
    """Whether torchrun restarts a process that fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def end_torchrun() -> None:
    """Have torchrun exit instead of restarting what cannot succeed: no exit code means that.

    Only the first process of a host does it, and once: a second signal would interrupt torchrun
    while it ends its processes.
    """
    if may_restart() and os.environ["LOCAL_RANK"] == "0":
        _terminate(os.getppid())


@cache
def _terminate(process: int) -> None:
    os.kill(process, signal.SIGTERM)
