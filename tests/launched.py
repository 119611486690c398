"""A training on the hosts of a cluster, and what the tests compare of it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from stand_ins.cluster import ENVIRONMENT, LIMIT_S, Cluster, Job

IMAGES, BATCH = 48, 8
TINY = ["--model.arch=resnet18", "--model.stem=cifar", "--model.width=8", "--device=cpu"]
TINY += ["--model.projector_layers=2", "--model.projector_dim=16", "--model.projector_hidden=16"]
TINY += ["--model.predictor_hidden=8", "--augment.size=32", "--eval.size=32", "--eval.resize=32"]
TINY += ["--eval.k=5", "--eval.every_epochs=9", "--precision=fp32", f"--data.batch_size={BATCH}"]
TINY += ["--epochs=2", "--log_every=1"]
PAUSE_S = 0.3  # between two steps of a slow run: time for a fault within one
MEET = ["--nproc-per-node=1", "--rdzv-endpoint=node0:29500", f"--rdzv-conf=join_timeout={LIMIT_S}"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", *MEET]
LAUNCH = [sys.executable, "train/launch.py", *MEET]


def launched(
    hosts: Cluster,
    folder: Path,
    launcher: Sequence[str],
    *flags: str,
    nodes: int,
    missing: int = 0,
    program: str = "tests/spied_main.py",
    changes: dict[int, dict] | None = None,
) -> Job:
    """A job in folder/run. missing: this many of the nodes are not started; changes: as Job's."""
    command = [*launcher, "--nnodes", str(nodes), program, f"--out={folder}/run", *TINY, *flags]
    environment = ENVIRONMENT | {"SPY": str(folder)}
    return Job(hosts, folder, command, num_hosts=nodes - missing, changes=changes, env=environment)


def started(
    hosts: Cluster, folder: Path, images: Path, *flags: str, launcher: Sequence[str] = LAUNCH
) -> Job:
    """A slow run on two hosts, which has done three of its twelve steps."""
    slow, root = ["env", f"SPY_PAUSE_S={PAUSE_S}", *launcher], f"--data.root={images}"
    job = launched(hosts, folder, slow, root, *flags, nodes=2)
    metrics = job.out / "metrics.jsonl"
    job.wait_for(lambda: metrics.exists() and '"step": 3,' in metrics.read_text(), "step 3")
    return job


def notes(job: Job, rank: int) -> list[dict]:
    """What a rank noted (tests/spied_main.py)."""
    lines = (job.folder / f"rank-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(out: Path) -> dict:
    """The newest checkpoint's weights, statistics and momentum."""
    newest = max((out / "checkpoints").glob("step-*"))
    return {
        f"{name}/{key}": value
        for name in ("model", "optimizer")
        for key, value in load_file(newest / f"{name}.safetensors").items()
    }


def same(a: dict, b: dict) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all((a[key] == b[key]).all() for key in a)


def losses(out: Path) -> dict[int, float]:
    """The loss of each logged step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
