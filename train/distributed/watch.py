"""Which rank a run has lost: signs of life, and one line that names the rank and its host.

Each rank writes a beat into the store once a second. Rank 0 reads them all and gives the verdict,
which ends the others in silence; they read rank 0's, where the store is. Not over the process
group: a collective with a stopped rank hangs, and NCCL's time-out ends a process without saying
whose fault it was. A rank that is stopped, killed or cut off has no beat; one that failed says so
in its last ones; one that hangs beats on and falls behind.
A newcomer's mistake: looking for a cost in the step. This is a thread of its own that touches
nothing of the training, and one process alone has none.
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
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from train.distributed.verdict import DEAD_S, GRACE_S, Sign, Verdict, judge, stalled

INTERVAL_S = 1.0
LINGER_S = 5.0  # rank 0 keeps the store for the others to read the verdict
TELL_S = 30.0  # who has not come by then is named
MISTAKES = (ValueError, FloatingPointError)  # starting again would end the same way


class Watch:
    """Owns two threads and their connection to the store, from creation to close."""

    def __init__(
        self, store: dist.TCPStore, *, rank: int, local_rank: int, size: int, timeout_s: float
    ):
        self.rank, self.local_rank, self.timeout_s = rank, local_rank, timeout_s
        self.progress = 0
        """Counted up by the training loop, on all ranks alike."""
        self.on_end: Callable[[str], None] = lambda text: None
        """Told why when the process ends while its main thread waits for another rank."""
        self.stacks: Any = None
        """Where this rank stands (train/distributed/stacks.py): in training."""
        self._beat = {"count": 0, "host": socket.gethostname(), "words": None}
        self._keys = [f"beat/{r}" for r in range(size)]
        self._seen: dict[str, tuple[bytes, float]]
        self._seen = dict.fromkeys(self._keys, (b"", time.monotonic()))
        self._looked = time.monotonic()
        self._broken: float | None = None
        self._has_told, self._has_warned = False, False
        self._verdict: Verdict | None = None
        self._is_ending = False
        self._closing, self._judged = threading.Event(), threading.Event()
        # a connection of its own: a call that waits blocks all others on the same one
        self._store = store.clone()  # type: ignore[attr-defined] - missing in torch's stub
        self._store.set_timeout(timedelta(seconds=timeout_s))
        if rank == 0:
            self._store.multi_set([*self._keys, "verdict"], [""] * (size + 1))
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; then ranks may leave in any order."""
        self._closing.set()
        self._thread.join()

    def last_words(self, error: Exception) -> BaseException:
        """What to raise in place of `error`, once it is known whose fault it was.

        A rank for which rank 0 has spoken leaves in silence, by SystemExit.
        """
        if not self._thread.is_alive():
            return error
        if threading.current_thread() is threading.main_thread():
            # torchrun restarts at once and may not cut this short: it kills after 30 s
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        is_lost = is_lost_connection(error)
        words = (str(error) or repr(error)).strip().splitlines()[0]
        self._is_ending = True
        self._beat |= {
            "words": words, "is_lost": is_lost, "is_final": isinstance(error, MISTAKES)
        }  # fmt: skip
        self._judged.wait(self.timeout_s + GRACE_S + LINGER_S)
        verdict = self._verdict
        if verdict is None:
            return error
        if is_lost:
            is_quiet = verdict.is_spoken or self.local_rank != 0
            return SystemExit(1) if is_quiet else ConnectionError(verdict.text)
        is_said = verdict.is_spoken and isinstance(error, (*MISTAKES, OSError))
        return SystemExit(1) if is_said else error

    def _run(self) -> None:
        answers: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()
        threading.Thread(
            target=self._talk, args=(answers,), name="watch-store", daemon=True
        ).start()
        verdict, unanswered_s = None, 0.0
        while verdict is None:
            try:
                verdict, unanswered_s = answers.get(timeout=INTERVAL_S), 0.0
            except queue.Empty:
                unanswered_s += INTERVAL_S  # not by the clock: this process may have been stopped
                if unanswered_s > self.timeout_s:
                    verdict = self._without_store(None)
            if self._closing.is_set():
                return
        self._verdict = verdict
        if self.rank == 0:
            self._tell_others(verdict)
        is_main_waiting = not self._is_ending  # for a rank that will not answer
        if is_main_waiting:
            if not verdict.is_spoken and self.local_rank == 0:
                # one write: print's line break is another, and hosts may share a log
                print(f"error: {verdict.text}\n", end="", file=sys.stderr, flush=True)
            self.on_end(verdict.text)
            if (stacks := self.stacks) is not None:
                stacks.dump()
        if verdict.is_final:
            end_torchrun()
        if verdict.is_spoken:
            with contextlib.suppress(dist.DistError):  # rank 0 has waited long enough
                self._store.add("left", 1)
        self._judged.set()
        if is_main_waiting:
            os._exit(1)

    def _talk(self, answers: queue.SimpleQueue) -> None:
        """Beat and look once a second, what is found into `answers`.

        In a thread of its own, for the store's time-out covers waiting for a key and not reading
        its value: after a link went down in between, such a call did not return for 900 s.
        """
        verdict = None
        while verdict is None and not self._closing.is_set():
            try:
                self._beat["count"] += 1
                now: dict[str, Any] = {"progress": self.progress}
                if (stacks := self.stacks) is not None:
                    now |= {"late_s": stacks.late_s, "stacks": str(stacks.path)}
                own = json.dumps(self._beat | now)
                self._store.set(self._keys[self.rank], own)
                verdict = self._look() if self.rank == 0 else self._listen()
            except dist.DistError as error:
                verdict = self._without_store(error)
            answers.put(verdict)
            if verdict is None:
                self._closing.wait(INTERVAL_S)
        answers.put(None)  # so that close() need not wait

    def _silences(self, keys: list[str], beats: list[bytes]) -> list[float]:
        """Seconds since each beat changed, by this process's own clock."""
        now = time.monotonic()
        was_stopped = now - self._looked > 5 * INTERVAL_S  # all of it, or the whole machine
        self._looked = now
        for key, beat in zip(keys, beats, strict=True):
            if was_stopped or beat != self._seen[key][0]:
                self._seen[key] = beat, now
        return [now - self._seen[key][1] for key in keys]

    def _look(self) -> Verdict | None:
        beats = self._store.multi_get(self._keys)
        silences = self._silences(self._keys, beats)
        signs = []
        for rank, (beat, silent_s) in enumerate(zip(beats, silences, strict=True)):
            known = json.loads(beat) if beat else {}
            known.pop("count", None)
            signs.append(Sign(rank, silent_s, **known))
        now = time.monotonic()
        if self._broken is None and any(sign.is_lost for sign in signs):
            self._broken = now
        late = [sign.name for sign in signs if not sign.host and sign.silent_s > TELL_S]
        if late and not self._has_told:
            self._has_told = True
            print(f"warning: {', '.join(late)} has not come for {TELL_S:.0f} s: the output on its "
                  "host says why", file=sys.stderr, flush=True)  # fmt: skip
        came = [sign for sign in signs if sign.host]
        is_late = any(sign.late_s > 0 for sign in came)
        if is_late and not self._has_warned:
            why = f"longer than a step's {self.timeout_s:.0f} s (--timeout_s)"
            print(f"warning: {stalled(came, why)}\n", end="", file=sys.stderr, flush=True)
        self._has_warned = is_late
        broken_s = None if self._broken is None else now - self._broken
        return judge(signs, timeout_s=self.timeout_s, broken_s=broken_s)

    def _listen(self) -> Verdict | None:
        beat, text = self._store.multi_get([self._keys[0], "verdict"])
        if text:
            return Verdict(**json.loads(text), is_spoken=True)
        (silent_s,) = self._silences(self._keys[:1], [beat])
        if silent_s > (DEAD_S + GRACE_S if self._is_ending else self.timeout_s):
            return self._without_store(None)
        return None

    def _without_store(self, error: dist.DistError | None) -> Verdict:
        beat = self._seen[self._keys[0]][0]
        host = json.loads(beat)["host"] if beat else os.environ["MASTER_ADDR"]
        why = f"no sign of life for {self.timeout_s:.0f} s (--timeout_s)"
        if error is not None and "imeout" not in str(error):
            why = "it ended"
        return Verdict(f"host {socket.gethostname()} lost rank 0 on host {host}: {why}, or a link "
                       "between the two is down")  # fmt: skip

    def _tell_others(self, verdict: Verdict) -> None:
        words = {"text": verdict.text, "is_final": verdict.is_final}
        self._store.set("verdict", json.dumps(words))
        now = time.monotonic()
        living = sum(now - at < DEAD_S for _, at in self._seen.values())
        while self._store.add("left", 0) < living - 1 and time.monotonic() < now + LINGER_S:
            time.sleep(0.05)


def is_lost_connection(error: Exception) -> bool:
    """Whether an error is a consequence of another rank's end: gloo's, NCCL's or the store's."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/" in str(error)
    )


def may_restart() -> bool:
    """Whether torchrun was told to restart a process that fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def end_torchrun() -> None:
    """Have torchrun end instead of restarting what cannot succeed; it knows no exit code for that.

    Once a host: its first process does it.
    """
    if may_restart() and os.environ["LOCAL_RANK"] == "0":
        os.kill(os.getppid(), signal.SIGTERM)
