"""A run on the hosts of a cluster: how it is started, watched, disturbed and ended in the tests."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from limits import abort
from stand_ins.cluster import Cluster

ROOT = Path(__file__).parent.parent
LIMIT_S = 300
"""Much more than anything here takes where the cores are free."""
IMAGES, BATCH = 48, 8
TINY = [
    "--model.arch=resnet18", "--model.stem=cifar", "--model.width=8", "--model.projector_layers=2",
    "--model.projector_dim=16", "--model.projector_hidden=16", "--model.predictor_hidden=8",
    "--augment.size=32", "--eval.size=32", "--eval.resize=32", "--eval.k=5",
    "--eval.every_epochs=9", "--precision=fp32", f"--data.batch_size={BATCH}", "--epochs=2",
    "--log_every=1", "--device=cpu",
]  # fmt: skip
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",  # the hosts share the cores
}
PAUSE_S = 0.3  # between two steps of a slow run: time enough to do harm in one
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
LAUNCH = [sys.executable, "train/launch.py"]


class Launched:
    """One command started on the first hosts of a cluster; each host's output is in a log."""

    def __init__(
        self, hosts: Cluster, folder: Path, launcher: Sequence[str], *flags: str, nodes: int,
        missing: int = 0, endpoint: str = "node0:29500", conf: str = f"join_timeout={LIMIT_S}",
        program: str = "tests/spied_main.py", changes: dict[int, dict] | None = None,
        pause_s: float = 0.0,
    ):  # fmt: skip
        """missing: so many of the nodes are not started.

        changes: for a host, other `flags`, a folder to run in (`cwd`), words `before` the command.
        pause_s: seconds between two steps.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.hosts, self.folder, self.out = hosts, folder, folder / "run"
        self.words = [*launcher, "--nnodes", str(nodes), "--nproc-per-node", "1", "--rdzv-endpoint",
                      endpoint, "--rdzv-conf", conf]  # fmt: skip
        self.flags, self.program, self.changes = flags, program, changes or {}
        self.environment = ENVIRONMENT | {"SPY": str(folder), "SPY_PAUSE_S": str(pause_s)}
        self.logs = [folder / f"{name}.log" for name in hosts.names[: nodes - missing]]
        self.processes = [self.start(host) for host in range(nodes - missing)]

    def start(self, host: int) -> subprocess.Popen:
        """Start the launcher of one host, once more if it has ended."""
        change = self.changes.get(host, {})
        words = [*change.get("before", []), *self.words, self.program]
        return self.hosts.start(
            host, [*words, f"--out={self.out}", *TINY, *self.flags, *change.get("flags", [])],
            log=self.logs[host], cwd=change.get("cwd", ROOT), env=self.environment,
        )  # fmt: skip

    def end(self, limit_s: float = LIMIT_S) -> list[int]:
        """Exit codes, once all launchers have ended."""
        limit = time.monotonic() + limit_s
        try:
            return [p.wait(max(0.1, limit - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            abort(self.left())
            for process in self.processes:
                process.wait(10)
            raise AssertionError(f"still running after {limit_s:.0f} s\n{self.output()}") from None

    def succeed(self) -> dict:
        """The result of a run that ends well: what rank 0 printed as its last line."""
        codes = self.end()
        assert set(codes) == {0}, f"{codes}\n{self.output()}"
        return json.loads(self.logs[0].read_text().splitlines()[-1])

    def output(self) -> str:
        """All hosts' logs."""
        return "\n".join(f"== {log.stem}\n{log.read_text()}" for log in self.logs)

    def lines(self, start: str = "error: ") -> list[str]:
        """The lines of all hosts' logs that begin so."""
        return [line for line in self.output().splitlines() if line.startswith(start)]

    def wait_for(self, is_so, what: str) -> None:
        """Until is_so() is true; fails when it takes too long, or all launchers have ended."""
        limit = time.monotonic() + LIMIT_S
        while not is_so():
            if time.monotonic() > limit:
                abort(self.left())
                raise AssertionError(f"{what}: not within {LIMIT_S} s\n{self.output()}")
            running = [p for p in self.processes if p.poll() is None]
            assert running or is_so(), f"{what}: all have ended\n{self.output()}"
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Until the step was logged, in this attempt or one before."""
        metrics = self.out / "metrics.jsonl"
        self.wait_for(
            lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), f"step {step}"
        )

    def ranks(self, host: int) -> list[int]:
        """Ids of a host's ranks: what runs there but the launcher."""
        return [pid for pid in self.hosts.processes(host) if pid != self.processes[host].pid]

    def notes(self, rank: int) -> list[dict]:
        """What a rank wrote down (tests/spied_main.py)."""
        lines = (self.folder / f"rank-{rank}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def left(self) -> list[int]:
        """Ids of all processes on all hosts."""
        numbers = range(len(self.hosts.names))
        return [pid for host in numbers for pid in self.hosts.processes(host)]


def started(
    hosts: Cluster, folder: Path, images: Path, *flags: str,
    launcher: Sequence[str] = LAUNCH, **options,
) -> Launched:  # fmt: skip
    """A slow run on two hosts, which has done three of its twelve steps."""
    root = f"--data.root={images}"
    run = Launched(hosts, folder, launcher, root, *flags, nodes=2, pause_s=PAUSE_S, **options)
    run.wait_for_step(3)
    return run


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
