"""Whose fault it is that a run of several ranks ends, from what rank 0 knows of each of them.

train/distributed/watch.py collects the signs once a second, and ends the processes.
A newcomer's mistake: blaming the rank that raised. It may only have noticed that another is gone.
"""

from dataclasses import dataclass

DEAD_S = 4.0  # after a connection broke: who has had no beat for so long broke it
GRACE_S = 12.0  # after a connection broke: if all beat on, say no more than that
PATIENCE = 10  # a rank that lives has so many times timeout_s to come, or to answer


@dataclass(frozen=True)
class Sign:
    """What rank 0 knows of a rank."""

    rank: int
    silent_s: float
    """Seconds since its last beat, or since the start if it has not come."""
    host: str = ""
    """Empty: it has not come."""
    progress: int = 0
    words: str | None = None
    """Why it has failed."""
    is_lost: bool = False
    """The words are of a broken connection: another rank's failure."""
    is_final: bool = False
    """A mistake that no restart mends."""
    late_s: float = 0.0
    """Seconds beyond what its step may take."""
    stacks: str = ""
    """The file in which it writes down where it stands when it is late
    (train/distributed/stacks.py)."""

    @property
    def where(self) -> str:
        """The end of a line: which file has more; empty before training."""
        return f"; where it stands is in {self.stacks} there" if self.stacks else ""

    @property
    def name(self) -> str:
        """For people."""
        return f"rank {self.rank} on host {self.host}" if self.host else f"rank {self.rank}"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends; is_spoken: rank 0 has told the user."""

    text: str
    is_final: bool = False
    is_spoken: bool = False


def judge(signs: list[Sign], *, timeout_s: float, broken_s: float | None) -> Verdict | None:
    """Whose fault it is, or None while there is nothing to say. signs: of all ranks, in order.

    broken_s: seconds since the first rank lost a connection, None while none has.
    """
    for sign in signs:
        if sign.words is not None and not sign.is_lost:
            text = sign.words if sign.rank == 0 else f"{sign.name}: {sign.words}"
            return Verdict(text, sign.is_final)
    came = [sign for sign in signs if sign.host]
    for sign in signs:
        if not sign.host and sign.silent_s > PATIENCE * timeout_s:
            return Verdict(f"{sign.name} has not come within {sign.silent_s:.0f} s: the output "
                           "on its host says why")  # fmt: skip
    quiet = max(came, key=lambda sign: sign.silent_s)
    if quiet.silent_s > timeout_s:
        return Verdict(
            f"{quiet.name} has given no sign of life for {quiet.silent_s:.0f} s (--timeout_s): it "
            f"was stopped, or its host or the link to it is down{quiet.where}"
        )
    late_s = max(sign.late_s for sign in came)
    if late_s > PATIENCE * timeout_s:  # main threads that wait for CUDA hear of no time-out
        return Verdict(stalled(came, f"{late_s:.0f} s beyond a step's --timeout_s"))
    if broken_s is None:
        return None
    gone = [sign for sign in came if sign.silent_s > DEAD_S and sign.words is None]
    if gone:  # the first: NCCL or gloo may have ended others for its sake
        first = max(gone, key=lambda sign: sign.silent_s)
        return Verdict(
            f"{first.name} ended without a word: killed, if not by hand then for want of memory "
            f"(dmesg on {first.host})"
        )
    if broken_s < GRACE_S:
        return None
    why = next(sign.words for sign in came if sign.words is not None)
    if len({sign.progress for sign in came}) > 1:
        return Verdict(stalled(came, why))
    return Verdict(f"a connection between ranks broke: {why}")


def stalled(came: list[Sign], why: str) -> str:
    """Who is behind the others, or that all stand in one step; and which file has more."""
    slow = min(came, key=lambda sign: sign.progress)
    if slow.progress < max(sign.progress for sign in came):
        return f"{slow.name} lives but keeps the others waiting: {why}{slow.where}"
    latest = max(came, key=lambda sign: sign.late_s)
    return f"all ranks live and wait in one step, {latest.name} too: {why}{latest.where}"
