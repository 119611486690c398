"""The collectives of a compiled step have one order on all ranks; the step is cut at buckets.

NCCL hangs where two ranks launch in another order. BYOL, MoCo and SwAV have subgraphs that do not
depend on each other, whose order the compiler chooses. It is the graph's: Inductor makes each
collective depend on the one before (torch/_inductor/comms.py, decide_global_ordering_of_comms), and
what reorders by measured times is off. Seeds of str hashes, the one thing that differs between two
ranks' compilers, are different here.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
METHODS = ("byol", "moco", "swav")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict]]:
    """What each of two ranks has compiled and sent, by method."""
    folder = tmp_path_factory.mktemp("order")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = []
    for rank in range(2):
        with (folder / f"{rank}").open("w") as out, (folder / f"{rank}.err").open("w") as errors:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "tests/rank_of_order.py", str(rank), str(port)], cwd=ROOT,
                    stdout=out, stderr=errors, env=environment | {"PYTHONHASHSEED": str(rank + 1)},
                )
            )  # fmt: skip
    try:
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], [(folder / f"{r}.err").read_text()[-2000:] for r in range(2)]
    lines = [[json.loads(x) for x in (folder / f"{r}").read_text().splitlines()] for r in range(2)]
    return [{line["method"]: line for line in of_rank} for of_rank in lines]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_generate_and_send_the_same_collectives_in_the_same_order(ranks, method):
    first, second = (found[method] for found in ranks)
    assert first["graphs"] == second["graphs"]  # Inductor's code, with the names of its buffers
    assert first["sent"] == second["sent"]
    calls = [call for graph in first["graphs"] for call in graph["calls"]]
    sums = [one for one in first["sent"] if one[2][0] != "0"]  # not DDP's group
    steps = 2 if method == "byol" else 1
    assert steps * len(calls) == len(sums) >= 4  # all that was generated was sent


@pytest.mark.slow
@pytest.mark.dist
def test_the_compiled_step_is_cut_where_gradients_can_be_sent_early(ranks):
    graphs = ranks[0]["byol"]["graphs"]
    is_backward = [graph["is_backward"] for graph in graphs]
    assert is_backward == [False] * 3 + [True] * 3  # two buckets and the rest
    sent = [group for what, _, (group, _) in ranks[0]["byol"]["sent"] if "all_reduce" in what]
    forward, backward = (
        sum(len(g["calls"]) for g in graphs if g["is_backward"] is kind) for kind in (False, True)
    )
    first = sent[: forward + backward + 1]
    assert first[-1] == "0" and first.count("0") == 1  # the first step has one bucket
    second = sent[len(first) + forward :]
    # a bucket of gradients goes before batch norm's last sums, not after the pass
    assert second.index("0") < len(second) - 1 - second[::-1].index(first[0])


def test_nothing_reorders_collectives_by_measured_times():
    from torch._inductor import config

    assert not config.reorder_for_compute_comm_overlap
    assert not config.aten_distributed_optimizations.enable_overlap_scheduling
    assert torch._dynamo.config.optimize_ddp is True  # the default, chosen: profiling/LOG.md
