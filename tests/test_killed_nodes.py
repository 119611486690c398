"""Killed ranks and killed torchruns: the run continues to the same weights, or says how it can.

`make cluster-test` runs these, on two hosts of network namespaces (profiling/stand_ins/cluster.py).
"""

import signal

import pytest

from launched import LAUNCH, launched, same, started, weights
from restarts import measure

pytestmark = pytest.mark.cluster


def test_killed_ranks_are_named_and_restarted_to_the_same_bits(clusters, tmp_path):
    found = measure(kills=2, seed=0, folder=tmp_path)  # ten: profiling/results/restarts_*.json
    assert found["restarts"] == found["named"] == 2 and found["same_bits"]


def test_a_killed_torchrun_leaves_no_rank_and_the_run_continues_when_it_is_started_again(
    two, tiny_images, tmp_path, undisturbed
):
    run = started(two, tmp_path, tiny_images)  # no checkpoint before the one for this reason
    run.processes[1].kill()
    run.wait_for(lambda: run.lines(), "line")
    assert "torchrun was killed on host node1 (rank 1); saved at this step" in run.lines()[0]
    run.wait_for(lambda: run.cluster.processes(1) == [], "end of the rank")
    run.processes[1] = run.start(1)
    assert run.succeed()["steps"] == 12
    assert len(run.lines()) == 1 and run.left() == []
    assert same(weights(run.out), undisturbed)


def test_a_killed_torchrun_of_the_endpoint_ends_all_and_the_same_command_continues(
    two, tiny_images, tmp_path, undisturbed
):
    run = started(two, tmp_path, tiny_images)
    run.processes[0].kill()
    assert run.end() == [-signal.SIGKILL, 1]
    first, second = run.lines()
    assert "torchrun was killed on host node0 (rank 0); saved at this step" in first
    assert "host node1 lost the rendezvous at node0:29500" in second
    assert run.left() == []
    again = launched(two, tmp_path, LAUNCH, f"--data.root={tiny_images}", nodes=2)
    assert again.succeed()["steps"] == 12
    assert "at step 0" not in again.output().split("continuing")[1].split("epoch")[0]
    assert same(weights(run.out), undisturbed)


def test_a_host_where_ranks_fail_at_each_restart_is_named_and_ends_all(two, tiny_images, tmp_path):
    broken = tmp_path / "safetensors.py"
    broken.write_text("raise ImportError('libz.so: cannot open shared object file')\n")
    run = launched(
        two, tmp_path, LAUNCH, f"--data.root={tiny_images}", nodes=2,
        changes={1: {"before": ["env", f"PYTHONPATH={tmp_path}"]}},
    )  # fmt: skip
    assert 0 not in run.end(150)
    assert run.left() == []
    first, second = run.lines()
    assert "the ranks of host node1 failed and no restart is left" in first
    assert "rank 1 on host node1 failed" in second and "libz.so" in run.logs[1].read_text()
