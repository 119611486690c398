"""Ranks that are stopped and links that are down, which no connection reports: named in time.

`make cluster-test` runs these, on two hosts of network namespaces (profiling/stand_ins/cluster.py).
"""

import os
import signal

import pytest

from launched import LAUNCH, same, started, weights

pytestmark = pytest.mark.cluster
QUICK = ["--checkpoint_every=1", "--timeout_s=10"]
SHORT = ["--rdzv-conf=join_timeout=20,read_timeout=10"]


def test_a_stopped_rank_is_named_ended_and_restarted(two, tiny_images, tmp_path, undisturbed):
    run = started(two, tmp_path, tiny_images, *QUICK)
    os.kill(run.ranks(1)[0], signal.SIGSTOP)
    assert run.succeed()["steps"] == 12  # its torchrun kills it 30 s after the others have ended
    (line,) = run.lines()
    assert "rank 1 on host node1 has had no heartbeat for" in line and "--timeout_s" in line
    assert run.left() == [] and same(weights(run.out), undisturbed)


def test_without_restarts_a_stopped_rank_ends_the_others_and_itself_when_it_continues(
    two, tiny_images, tmp_path
):
    run = started(two, tmp_path, tiny_images, *QUICK, launcher=[*LAUNCH, "--max-restarts", "0"])
    (stopped,) = run.ranks(1)
    os.kill(stopped, signal.SIGSTOP)
    assert run.processes[0].wait(600) == 1
    assert "rank 1 on host node1 has had no heartbeat" in run.lines()[0]
    assert run.processes[1].poll() is None and run.ranks(1) == [stopped]  # nobody can end it
    os.kill(stopped, signal.SIGCONT)
    assert run.end() == [1, 1] and run.left() == []


def test_a_link_that_comes_back_costs_a_restarted(two, tiny_images, tmp_path, undisturbed):
    run = started(two, tmp_path, tiny_images, *QUICK)
    two.set_link(1, up=False)
    run.wait_for(lambda: len(run.lines()) == 2, "a line on each side")
    two.set_link(1, up=True)
    first, second = (log.read_text() for log in run.logs)
    assert "error: rank 1 on host node1 has had no heartbeat" in first
    assert "error: host node1 lost rank 0 on host node0" in second
    assert run.succeed()["steps"] == 12
    assert run.left() == [] and same(weights(run.out), undisturbed)


def test_a_link_that_stays_down_ends_both_sides_within_their_time_outs(two, tiny_images, tmp_path):
    run = started(two, tmp_path, tiny_images, *QUICK, launcher=[*LAUNCH, *SHORT])
    two.set_link(1, up=False)
    try:
        assert run.end() == [1, 1]
    finally:
        two.set_link(1, up=True)
    first, second = (log.read_text() for log in run.logs)
    assert "error: rank 1 on host node1 has had no heartbeat" in first
    assert "error: host node0 timed out waiting for hosts that exited" in first
    assert "error: host node1 lost rank 0 on host node0" in second
    assert "error: host node1 lost the rendezvous at node0:29500" in second
    assert run.left() == [] and "Traceback" not in run.output()
