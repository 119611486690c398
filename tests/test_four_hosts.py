"""Four hosts for real: a run on them equals a run of one process; hosts that differ are refused.

`make cluster-test` runs these. Network namespaces stand for the hosts
(profiling/stand_ins/cluster.py).
"""

import json
import math
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launched import (
    BATCH,
    IMAGES,
    LAUNCH,
    TINY,
    TORCHRUN,
    launched,
    losses,
    notes,
    weights,
)
from pipeline.order import SampleOrder
from stand_ins.cluster import ENVIRONMENT, LIMIT_S, ROOT, Cluster, Job

pytestmark = pytest.mark.cluster
SOON = "--rdzv-conf=join_timeout=35"
SIX = ["--max_steps=6"]  # later the rounding of 2 against 8 rows has grown through ReLU's kinks


@pytest.fixture(scope="module")
def four(clusters) -> Cluster:
    return clusters(4)


@pytest.fixture(scope="module")
def alone(tiny_images, tmp_path_factory) -> Path:
    """A run of one process, without torchrun: its run folder."""
    folder = tmp_path_factory.mktemp("alone")
    subprocess.run(
        [sys.executable, "tests/spied_main.py", f"--data.root={tiny_images}",
         f"--out={folder}/run", *TINY, *SIX],
        cwd=ROOT, env=ENVIRONMENT | {"SPY": str(folder)}, check=True, capture_output=True,
        timeout=LIMIT_S,
    )  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def together(four, tiny_images, tmp_path_factory) -> Job:
    """The same run on four hosts by plain torchrun; the last one's /dev/shm holds 1 MB."""
    small = ["unshare", "--mount", "sh", "-c",
             'mount -t tmpfs -o size=1m none /dev/shm && exec "$@"', "sh"]  # fmt: skip
    run = launched(
        four, tmp_path_factory.mktemp("together"), TORCHRUN, f"--data.root={tiny_images}", *SIX,
        nodes=4, changes={3: {"before": small}},
    )  # fmt: skip
    run.succeed()
    return run


def test_losses_and_weights_equal_those_of_one_process(together, alone):
    ours, reference = losses(together.out), losses(alone)
    assert sorted(ours) == sorted(reference) == [1, 2, 3, 4, 5, 6]
    for step, loss in reference.items():
        assert ours[step] == pytest.approx(loss, rel=1e-4, abs=1e-5), step
    expected = weights(alone)
    for name, value in weights(together.out).items():
        if name.startswith("model/") and not name.endswith("num_batches_tracked"):
            # a bias that is still near 0 is added to features of size 1: 0.1 of that at least
            size = expected[name].norm().clamp_min(0.1 * value.numel() ** 0.5)
            error = (value - expected[name]).norm() / size
            assert error < 1e-4, name


def test_all_ranks_end_with_the_same_weights(together):
    digests = {notes(together, rank)[-1]["weights"] for rank in range(4)}
    assert len(digests) == 1


def test_samples_are_disjoint_over_ranks_and_complete(together):
    order = SampleOrder(IMAGES, batch_size=BATCH, seed=0)
    seen = []
    for step in range(6):
        parts = [notes(together, rank)[step]["ids"] for rank in range(4)]
        assert [len(part) for part in parts] == [2, 2, 2, 2]
        assert sum(parts, []) == order.global_batch(step).tolist()
        seen += sum(parts, [])
    assert sorted(seen) == list(range(IMAGES))  # an epoch: every image once


def test_the_learning_rate_follows_the_global_batch(together):
    rows = map(json.loads, (together.out / "metrics.jsonl").read_text().splitlines())
    rates = {row["step"]: row["train/lr"] for row in rows if "train/lr" in row}
    start = 0.05 * BATCH / 256  # not of a host's two images
    assert rates[1] == pytest.approx(start)
    assert rates[4] == pytest.approx(start * (1 + math.cos(math.pi * 3 / 12)) / 2)


def test_only_rank_0_writes_into_the_run_folder(together):
    assert any("metrics.jsonl" in path for path in notes(together, 0)[-1]["written"])
    for rank in (1, 2, 3):
        written = notes(together, rank)[-1]["written"]
        assert [path for path in written if f"stacks-rank-{rank}.txt" not in path] == []


def test_a_small_shm_is_warned_of_with_its_host(together):
    (line,) = together.lines("warning: /dev/shm")
    assert "host node3" in line and "--shm-size" in line


def test_four_ranks_then_two_then_four_keep_the_order_of_samples(four, tiny_images, tmp_path):
    for nodes, last in ((4, 3), (2, 8), (4, 12)):  # 6 steps an epoch: both changes within one
        run = launched(
            four, tmp_path, TORCHRUN, f"--data.root={tiny_images}", f"--max_steps={last}",
            nodes=nodes,
        )  # fmt: skip
        run.succeed()
    order = SampleOrder(IMAGES, batch_size=BATCH, seed=0)
    steps = [[note for note in notes(run, rank) if "ids" in note] for rank in range(4)]
    for step in range(12):
        parts = [note["ids"] for part in steps for note in part if note["step"] == step]
        assert len(parts) == (2 if 3 <= step < 8 else 4)
        assert sum(parts, []) == order.global_batch(step).tolist(), step


def test_the_harness_measures_four_hosts(four, tmp_path):
    run = launched(
        four, tmp_path, LAUNCH, "--what=[step,ranks]", "--peers=false", "--repeats=1",
        program="profiling/throughput.py", nodes=4,
    )  # fmt: skip
    result = run.succeed()
    ranks = result["ranks"]
    assert result["environment"]["world"] == 4 and len(ranks["images_per_s"]) == 4
    assert ranks["total_images_per_s"] == pytest.approx(sum(ranks["images_per_s"]))
    assert ranks["scaling_efficiency"] > 0 and ranks["collectives_per_step"]


def other_code(folder: Path) -> dict:
    """A host whose checkout has one more line in one file."""
    names = ("kernels", "pipeline", "profiling", "tests", "train")
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results"))
    with (folder / "train" / "loop.py").open("a") as file:
        file.write("# a change that was not copied to all hosts\n")
    return {"cwd": folder}


def other_images(folder: Path, images: Path) -> dict:
    """A host with a disk of its own, on which one image is missing."""
    shutil.copytree(images, folder)
    (folder / "china" / "00.jpg").unlink()
    mount = f'mount --bind {folder} {images} && exec "$@"'
    return {"before": ["unshare", "--mount", "sh", "-c", mount, "sh"]}


@pytest.mark.parametrize("what", ["code", "flag", "typo", "images"])
def test_a_host_that_differs_is_named_in_one_line_and_not_restarted(
    four, tiny_images, tmp_path, what
):
    change, parts = {
        "code": (lambda: other_code(tmp_path / "code"), ("train/loop.py is", "same revision")),
        "flag": (lambda: {"flags": ["--optim.lr=0.1"]}, ("--optim.lr is 0.1", "same flags")),
        "typo": (lambda: {"flags": ["--epoch=3"]}, ("--epoch is unknown", "meant --epochs")),
        "images": (
            lambda: other_images(tmp_path / "images", tiny_images),
            ("other images", "china/00.jpg is missing there", "copy them again"),
        ),
    }[what]
    run = launched(
        four, tmp_path, LAUNCH, f"--data.root={tiny_images}", nodes=2, changes={1: change()}
    )
    assert 0 not in run.end()
    (line,) = run.lines()
    assert "host node1" in line
    for part in parts:
        assert part in line
    assert run.left() == [] and "Traceback" not in run.output()


def missing(hosts: Cluster, folder: Path) -> Job:
    return launched(hosts, folder, [*LAUNCH, SOON], nodes=4, missing=1)


def taken(hosts: Cluster, folder: Path) -> Job:
    server = hosts.start(0, [sys.executable, "-m", "http.server", "29500"], log=folder / "http")
    while b"Serving" not in (folder / "http").read_bytes():
        assert server.poll() is None
        time.sleep(0.1)
    return launched(hosts, folder, LAUNCH, nodes=2)


def address(hosts: Cluster, folder: Path) -> Job:
    launcher = [*LAUNCH, "--rdzv-endpoint=10.77.0.99:29500", SOON]
    return launched(hosts, folder, launcher, nodes=2)


def clock(hosts: Cluster, folder: Path) -> Job:
    late = folder / "late.py"
    late.write_text(
        "import runpy, sys, time\nnow = time.time\ntime.time = lambda: now() - 60\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    before = ["sh", "-c", f'python=$1; shift; exec "$python" {late} "$@"', "sh"]
    return launched(hosts, folder, LAUNCH, nodes=2, changes={1: {"before": before}})


CASES = {
    missing: [("3 of 4 hosts have registered: ", "--rdzv-endpoint node0:29500")] * 3,
    taken: [
        ("port 29500 of host node0", "another port with --rdzv-endpoint"),
        ("host node1", "node0:29500 is not a rendezvous", "--rdzv-endpoint"),
    ],
    address: [(f"host node{n} cannot reach 10.77.0.99:29500", "--rdzv-endpoint") for n in (0, 1)],
    clock: [("the clock of host node1 is 60 s behind", "synchronise")] * 2,
}


@pytest.fixture(scope="module")
def refusals(clusters, tmp_path_factory) -> dict:
    """The job of each case: they mostly wait, all at the same time."""

    def refused(case) -> Job:
        run = case(clusters(4), tmp_path_factory.mktemp(case.__name__))
        assert set(run.end()) == {1}
        return run

    with ThreadPoolExecutor(len(CASES)) as pool:
        return dict(zip(CASES, pool.map(refused, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_hosts_that_do_not_meet_report_why_once_each(refusals, case):
    run = refusals[case]
    lines = run.lines()
    assert len(lines) == len(CASES[case]), run.output()
    for line, parts in zip(lines, CASES[case], strict=True):
        for part in parts:
            assert part in line
    assert run.left() == [] or case is taken  # the other program continues
    assert "Traceback" not in run.output()


@pytest.mark.parametrize("case", [missing, address], ids=lambda case: case.__name__)
def test_where_waiting_may_help_the_line_comes_first_as_a_warning(refusals, case):
    warnings = refusals[case].lines("warning: ")
    errors = refusals[case].lines()
    assert {line.split(": ", 1)[1].removesuffix("; waiting") for line in warnings} == {
        line.split(": ", 1)[1] for line in errors
    }
