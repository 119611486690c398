"""Several hosts on one machine: network namespaces whose links meet in one bridge.

    with Cluster(4) as cluster:
        job = Job(cluster, folder, ["torchrun", "--nnodes", "4", ...])
        cluster.set_link(3, up=False)  # or throttle(3, mbit_per_s=1000)
        job.end()

Hosts node0, node1, ... have their own address and host name, and share CPU, memory and disk. The
bridge is in a namespace too: the machine's own network is not touched. Needs root. 127.0.0.1 is
each host's own loopback: the other hosts reach it as node0.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent.parent
PREFIX = "twinturbo"  # of the namespaces: twinturbo-<pid>-<number of the cluster>-<host>
CLEARING = Path(tempfile.gettempdir(), f"{PREFIX}-clearing.lock")
KILL_S = 10  # a killed process leaves the namespace long before
LIMIT_S = 300
"""Much more than any job takes where the cores are free."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
"""The hosts share the cores: threads that wait must not spin."""


class Cluster:
    """Owns the namespaces from enter to exit, and all processes started in them."""

    _made = 0

    def __init__(self, num_hosts: int):
        """Nothing is made before the with statement. Raises: ValueError for none or above 99."""
        if not 1 <= num_hosts <= 99:
            raise ValueError(f"a cluster has 1 to 99 hosts, got {num_hosts}")
        self.names = [f"node{index}" for index in range(num_hosts)]
        self.addresses = [f"10.77.0.{index + 1}" for index in range(num_hosts)]
        prefix = f"{PREFIX}-{os.getpid()}-{Cluster._made}"
        Cluster._made += 1
        self._switch = f"{prefix}-switch"
        self._spaces = [f"{prefix}-{name}" for name in self.names]
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        """Make the hosts. Raises: RuntimeError where that is not allowed."""
        _clear_leftovers()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Remove them, also after a failure."""
        self.close()

    def _make(self) -> None:
        _ip(f"netns add {self._switch}")
        _ip(f"-n {self._switch} link add bridge type bridge")
        _ip(f"-n {self._switch} link set bridge up")
        hosts = list(zip(self.addresses, self.names, self._spaces, strict=True))
        table = "127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for a, name, _ in hosts)
        for address, name, space in hosts:
            _ip(f"netns add {space}")
            etc = Path("/etc/netns", space)  # `ip netns exec` mounts it over /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(table)
            _ip(f"link add eth0 netns {space} type veth peer name {name} netns {self._switch}")
            _ip(f"-n {self._switch} link set {name} master bridge up")
            _ip(f"-n {space} addr add {address}/24 dev eth0")
            _ip(f"-n {space} link set lo up")
            _ip(f"-n {space} link set eth0 up")

    def start(
        self,
        host: int,
        command: Sequence[str],
        *,
        log: Path,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen:
        """Start a command on a host, its output appended to `log`; the pid is the command's own."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.names[host]]
        words = ["ip", "netns", "exec", self._spaces[host], *named, *command]
        with log.open("ab") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(words, cwd=cwd, env=env, **streams)
        self._started.append(process)
        return process

    def processes(self, host: int) -> list[int]:
        """Ids of all processes that run on a host, children included."""
        return [int(pid) for pid in _ip(f"netns pids {self._spaces[host]}").split()]

    def set_link(self, host: int, *, up: bool) -> None:
        """Connect or disconnect a host; open connections are not notified."""
        _ip(f"-n {self._switch} link set {self.names[host]} {'up' if up else 'down'}")

    def throttle(self, host: int, *, mbit_per_s: float) -> None:
        """Limit what a host sends; what it receives is limited at the senders."""
        queue = f"root tbf rate {mbit_per_s}mbit burst 256kb latency 50ms"
        _ip(f"netns exec {self._spaces[host]} tc qdisc replace dev eth0 {queue}")

    def close(self) -> None:
        """Kill what still runs on the hosts and remove them."""
        for process in self._started:  # by its own id: it may not have reached its host yet
            process.kill()
            process.wait()
        _remove([self._switch, *self._spaces])


class Job:
    """One command started on the first hosts of a cluster; each host's output is in a log."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        command: Sequence[str],
        *,
        num_hosts: int,
        changes: dict[int, dict] | None = None,
        env: dict[str, str] = ENVIRONMENT,
    ):
        """changes: for a host, more `flags`, words `before` the command, a folder (`cwd`)."""
        folder.mkdir(parents=True, exist_ok=True)
        self.cluster, self.folder, self.out = cluster, folder, folder / "run"
        self.command, self.changes, self.env = command, changes or {}, env
        self.logs = [folder / f"{name}.log" for name in cluster.names[:num_hosts]]
        self.processes = [self.start(host) for host in range(num_hosts)]

    def start(self, host: int) -> subprocess.Popen:
        """Start the command on one host, again if it has ended."""
        change = self.changes.get(host, {})
        words = [*change.get("before", []), *self.command, *change.get("flags", [])]
        cwd = change.get("cwd", ROOT)
        return self.cluster.start(host, words, log=self.logs[host], cwd=cwd, env=self.env)

    def end(self, limit_s: float = LIMIT_S) -> list[int]:
        """Exit codes, once the command has ended on all hosts. Raises: RuntimeError if it hangs."""
        limit = time.monotonic() + limit_s
        try:
            return [p.wait(max(0.1, limit - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            self._abort(f"still running after {limit_s:.0f} s")

    def succeed(self) -> dict:
        """The last line of host 0, as JSON. Raises: RuntimeError if a host failed."""
        if any(codes := self.end()):
            raise RuntimeError(f"exit codes {codes}\n{self.output()}")
        return json.loads(self.logs[0].read_text().splitlines()[-1])

    def output(self) -> str:
        """All hosts' logs."""
        return "\n".join(f"== {log.stem}\n{log.read_text()}" for log in self.logs)

    def lines(self, start: str = "error: ") -> list[str]:
        """The lines of all hosts' logs that begin so."""
        return [line for line in self.output().splitlines() if line.startswith(start)]

    def wait_for(self, is_so: Callable[[], object], what: str) -> None:
        """Until is_so(). Raises: RuntimeError after LIMIT_S, or when the command has ended."""
        limit = time.monotonic() + LIMIT_S
        while not is_so():
            if time.monotonic() > limit:
                self._abort(f"{what}: not within {LIMIT_S} s")
            if all(p.poll() is not None for p in self.processes) and not is_so():
                raise RuntimeError(f"{what}: all have ended\n{self.output()}")
            time.sleep(0.02)

    def ranks(self, host: int) -> list[int]:
        """Ids of a host's ranks: its processes but the launcher."""
        return [pid for pid in self.cluster.processes(host) if pid != self.processes[host].pid]

    def left(self) -> list[int]:
        """Ids of all processes on all hosts."""
        numbers = range(len(self.cluster.names))
        return [pid for host in numbers for pid in self.cluster.processes(host)]

    def _abort(self, why: str) -> NoReturn:
        """End all by SIGABRT, on which Python prints the stacks of all threads."""
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)
        for process in self.processes:
            process.wait(KILL_S)
        raise RuntimeError(f"{why}\n{self.output()}")


def why_not() -> str | None:
    """Why no cluster can be made on this machine; None where one can."""
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (packages iproute2 and util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Cluster(1) as cluster:
            code = cluster.start(0, ["true"], log=Path(os.devnull)).wait()
    except RuntimeError as error:
        return str(error)
    return None if code == 0 else "a separate host name is not allowed (unshare --uts)"


def _clear_leftovers() -> None:
    """Remove namespaces of killed programs; one process at a time, for all list the same."""
    with FileLock(CLEARING):
        spaces = re.findall(rf"^({PREFIX}-(\d+)-\S+)", _ip("netns list"), re.MULTILINE)
        _remove(space for space, pid in spaces if not Path("/proc", pid).exists())


def _remove(spaces: Iterable[str]) -> None:
    listed = {line.split()[0] for line in _ip("netns list").splitlines()}
    for space in listed.intersection(spaces):
        limit = time.monotonic() + KILL_S
        while pids := _ip(f"netns pids {space}").split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            if time.monotonic() > limit:
                raise RuntimeError(f"{space}: processes {pids} do not end after kill -9")
            time.sleep(0.02)
        _ip(f"netns del {space}")
        shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)  # the switch has none


def _ip(words: str) -> str:
    done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {words}: {done.stderr.strip()}")
    return done.stdout
