"""What two ranks do alike: skip a step bad on one, stop at the signal of one, compare weights."""

import json
import os

import pytest

from forked import forked
from test_sync_norm import free_port

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    """Of each rank: weights before and after each step, steps skipped, warnings, last step."""
    done = forked(["tests/two_ranks.py", str(free_port())])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_weight_on_any(ranks):
    start, first, second, third = ranks[0]["weights"]
    assert start != first == second != third
    assert ranks[1]["weights"] == ranks[0]["weights"]
    assert [rank["skipped"] for rank in ranks] == [1, 1]


def test_a_rank_whose_weights_differ_in_one_bit_is_named(ranks):
    equal, (line,) = ranks[0]["warnings"]
    assert equal == [] and ranks[1]["warnings"] == [equal, [line]]
    assert line.startswith(f"the weights of rank 1 on host {os.uname().nodename} are not")


def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks):
    assert [rank["stopped_at"] for rank in ranks] == [rank["signalled"] + 1 for rank in ranks]
