"""Which rank failed when a run of several ends, and how all ranks are notified of it."""

import os
import signal
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from train.distributed import watch
from train.distributed.watch import DEAD_S, GRACE_S, MAX_TIMEOUTS, RankStatus, Watch, diagnose

BROKEN = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"


def statuses(*changed: RankStatus) -> list[RankStatus]:
    """Four ranks of four hosts, all well but for those given."""
    well = {
        rank: RankStatus(rank, silent_s=0.5, host=f"node{rank}", progress=7) for rank in range(4)
    }
    return list((well | {status.rank: status for status in changed}).values())


def failure(*changed: RankStatus, broken_s: float | None = None) -> str:
    failed = diagnose(statuses(*changed), timeout_s=60, broken_s=broken_s)
    return "" if failed is None else failed.text


def test_ranks_that_are_well_are_left_alone():
    assert failure() == ""
    assert failure(RankStatus(2, silent_s=59, host="node2")) == ""
    assert failure(RankStatus(2, silent_s=59)) == ""


def test_a_silent_rank_is_named_with_its_host():
    text = failure(RankStatus(2, silent_s=61, host="node2"))
    assert "rank 2 on host node2" in text and "no heartbeat for 61 s" in text


def test_a_rank_that_never_joined_is_named_after_ten_times_as_long():
    assert "rank 3 has not joined" in failure(RankStatus(3, silent_s=60 * MAX_TIMEOUTS + 1))


def test_of_a_broken_connection_the_rank_without_a_heartbeat_is_named_not_those_that_noticed():
    noticed = [RankStatus(r, 0.5, f"node{r}", 7, error=BROKEN, is_lost=True) for r in (0, 1, 3)]
    dead = RankStatus(2, silent_s=DEAD_S + 0.1, host="node2", progress=7)
    assert "rank 2 on host node2 exited without an error" in failure(*noticed, dead, broken_s=5)
    assert failure(*noticed, broken_s=GRACE_S - 1) == ""  # its heartbeats have not been missed yet
    assert BROKEN in failure(*noticed, broken_s=GRACE_S + 1)


def test_a_rank_that_is_alive_and_falls_behind_is_named_when_the_others_time_out():
    late = "[/pytorch/third_party/gloo/gloo/x.cc:1] Timed out waiting 600000ms for recv"
    waiting = [RankStatus(r, 0.5, f"node{r}", 8, error=late, is_lost=True) for r in (0, 2, 3)]
    assert "rank 1 on host node1 is alive but keeps the others waiting" in failure(
        *waiting, RankStatus(1, 0.5, "node1", 7), broken_s=GRACE_S + 1
    )


def test_a_ranks_own_error_comes_before_what_others_noticed():
    noticed = [RankStatus(r, 0.5, f"node{r}", 7, error=BROKEN, is_lost=True) for r in (0, 1)]
    own = RankStatus(3, 9.0, "node3", 7, error="out of GPU memory", is_lost=False)
    assert failure(*noticed, own, broken_s=20) == "rank 3 on host node3: out of GPU memory"


@pytest.fixture
def ranks(monkeypatch):
    """Three ranks' watches in one process, with a faster clock; what ended, by rank."""
    monkeypatch.setattr(watch, "INTERVAL_S", 0.02)
    for name, seconds in (("DEAD_S", 0.3), ("GRACE_S", 1.0), ("LINGER_S", 1.0)):
        monkeypatch.setattr(watch, name, seconds)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    before = signal.getsignal(signal.SIGTERM)
    store = dist.TCPStore(
        "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )
    made = [Watch(store, rank=r, local_rank=0, size=3, timeout_s=1.0) for r in range(3)]
    yield made
    for each in made:
        each.close()
    signal.signal(signal.SIGTERM, before)


def ended(monkeypatch) -> list[int]:
    """Exit codes instead of exits."""
    codes: list[int] = []
    monkeypatch.setattr(watch.os, "_exit", codes.append)
    return codes


def until(condition, limit_s: float = 20) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_stopped_rank_ends_the_waiting_ones_with_one_line(ranks, monkeypatch, capfd):
    codes = ended(monkeypatch)
    heard = []
    ranks[0].on_end = heard.append
    time.sleep(0.1)
    ranks[2].close()  # as a process that was stopped: no heartbeat any more
    until(lambda: len(codes) == 2)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "rank 2 on host" in errors[0] and codes == [1, 1]
    assert heard == [errors[0].removeprefix("error: ")]


def test_a_stopped_rank_0_is_named_on_each_of_the_other_hosts(ranks, monkeypatch, capfd):
    codes = ended(monkeypatch)
    time.sleep(0.1)
    ranks[0].close()
    until(lambda: len(codes) == 2)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 2 and all("lost rank 0" in line for line in errors)


def test_a_late_rank_is_reported_once_with_its_file(ranks, capfd):
    for rank, watched in enumerate(ranks):
        watched.progress = 8 - (rank == 1)
        watched.stacks = types.SimpleNamespace(late_s=0.0, path=f"run/stacks-rank-{rank}.txt")
    for late_s in (0.0, 0.5):
        for watched in ranks:
            watched.stacks.late_s = late_s
        counts = [watched._heartbeat["count"] for watched in ranks]
        for watched, count in zip(ranks, counts, strict=True):
            until(lambda watched=watched, count=count: watched._heartbeat["count"] > count + 5)
    printed = capfd.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("warning")]
    assert "rank 1 on host" in line and "keeps the others waiting" in line
    assert line.endswith("its stacks are in run/stacks-rank-1.txt on its host")


class HangingStore:
    """As a store whose answer was on a link when it went down."""

    def __init__(self):
        self.gives_up = threading.Event()

    def set(self, *_):
        self.gives_up.wait()
        raise dist.DistNetworkError


def test_a_store_that_never_answers_is_a_lost_rank_0(ranks, monkeypatch, capfd):
    codes = ended(monkeypatch)
    ranks[1]._store = store = HangingStore()
    said = []

    def has_spoken() -> bool:
        said.append(capfd.readouterr().err)
        return "lost rank 0" in "".join(said)

    until(has_spoken)  # rank 0, which misses rank 1, may end before it
    until(lambda: 1 in codes)
    store.gives_up.set()


def test_a_lost_connection_is_answered_with_the_dead_ranks_name(ranks, monkeypatch):
    codes = ended(monkeypatch)
    time.sleep(0.1)
    ranks[2].close()
    reason = ranks[0].reason_for(RuntimeError(BROKEN))
    assert isinstance(reason, ConnectionError) and "rank 2 on host" in str(reason)
    until(lambda: codes == [1])  # rank 1, whose main thread still waits


def test_a_mistake_that_all_ranks_make_is_reported_by_rank_0_alone(ranks):
    mistake = ValueError("--data.batch_size is no multiple of 3")
    with ThreadPoolExecutor(3) as pool:
        reasons = list(pool.map(lambda each: each.reason_for(mistake), ranks))
    assert reasons[0] is mistake
    assert [type(reason) for reason in reasons[1:]] == [SystemExit, SystemExit]


def test_a_bug_on_one_rank_keeps_its_traceback_and_rank_0_names_the_rank(ranks, monkeypatch, capfd):
    codes = ended(monkeypatch)
    bug = KeyError("x")
    assert ranks[1].reason_for(bug) is bug
    until(lambda: len(codes) == 2)
    assert f"error: rank 1 on host {os.uname().nodename}: 'x'" in capfd.readouterr().err


def test_torchrun_is_ended_once_and_only_where_a_restart_could_not_succeed(monkeypatch):
    sent = []
    watch._terminate.cache_clear()
    monkeypatch.setattr(watch.os, "kill", lambda pid, number: sent.append((pid, number)))
    for restarts, local_rank in (("0", "0"), ("3", "1"), ("3", "0"), ("3", "0")):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        watch.end_torchrun()
    assert sent == [(os.getppid(), signal.SIGTERM)]
    watch._terminate.cache_clear()
