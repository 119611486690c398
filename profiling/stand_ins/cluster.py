"""Several hosts on one machine: network namespaces whose links meet in one bridge.

    with Cluster(4) as cluster:
        process = cluster.start(0, ["torchrun", "--nnodes", "4", ...], log=folder / "node0.log")
        cluster.set_link(3, up=False)  # or throttle(3, mbit_per_s=1000)

Hosts node0, node1, ... have an address and a host name of their own and share CPU, memory and disk.
The bridge lies in a namespace too: nothing of the machine's own network is touched. Needs root.
A newcomer's mistake: 127.0.0.1. A host's loopback is its own; the others find it as node0.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from filelock import FileLock

PREFIX = "twinturbo"  # of the namespaces: twinturbo-<pid>-<number of the cluster>-<host>
CLEARING = Path(tempfile.gettempdir(), f"{PREFIX}-clearing.lock")
GONE_S = 10  # a killed process leaves the namespace long before


class Cluster:
    """Owns the namespaces from enter to exit, and whatever was started in them."""

    _made = 0

    def __init__(self, num_hosts: int):
        """Nothing is made before the with statement. Raises: ValueError for none or above 99."""
        if not 1 <= num_hosts <= 99:
            raise ValueError(f"a cluster here has 1 to 99 hosts, got {num_hosts}")
        self.names = [f"node{index}" for index in range(num_hosts)]
        self.addresses = [f"10.77.0.{index + 1}" for index in range(num_hosts)]
        self._own = f"{PREFIX}-{os.getpid()}-{Cluster._made}"
        Cluster._made += 1
        self._switch = f"{self._own}-switch"
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
        """Take them down, also after a failure."""
        self.close()

    def _make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        hosts = zip(self.addresses, self.names, strict=True)
        table = "127.0.0.1 localhost\n" + "".join(f"{a} {name}\n" for a, name in hosts)
        for index, name in enumerate(self.names):
            space = self._space(index)
            _ip("netns", "add", space)
            etc = Path("/etc/netns", space)  # `ip netns exec` lays it over /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(table)
            _ip("link", "add", "eth0", "netns", space, "type", "veth",
                "peer", "name", name, "netns", self._switch)  # fmt: skip
            _ip("-n", self._switch, "link", "set", name, "master", "bridge", "up")
            _ip("-n", space, "addr", "add", f"{self.addresses[index]}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _space(self, host: int) -> str:
        return f"{self._own}-{self.names[host]}"

    def start(
        self, host: int, command: Sequence[str], *, log: Path, cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen:  # fmt: skip
        """Start a command on a host, its output appended to `log`; the pid is the command's own."""
        as_host = ["ip", "netns", "exec", self._space(host), "unshare", "--uts", "sh", "-c",
                   'hostname "$0" && exec "$@"', self.names[host]]  # fmt: skip
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*as_host, *command], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, cwd=cwd, env=env,
            )  # fmt: skip
        self._started.append(process)
        return process

    def processes(self, host: int) -> list[int]:
        """Ids of all processes that run on a host, the children of what was started included."""
        listed = _ip("netns", "pids", self._space(host))
        return [int(pid) for pid in listed.split()]

    def set_link(self, host: int, *, up: bool) -> None:
        """Plug or unplug a host's cable; open connections are not told."""
        _ip("-n", self._switch, "link", "set", self.names[host], "up" if up else "down")

    def throttle(self, host: int, *, mbit_per_s: float) -> None:
        """Limit what a host sends; what it receives is limited where it is sent."""
        rate = ["rate", f"{mbit_per_s}mbit", "burst", "256kb", "latency", "50ms"]
        _ip("netns", "exec", self._space(host), "tc", "qdisc", "replace", "dev", "eth0", "root",
            "tbf", *rate)  # fmt: skip

    def close(self) -> None:
        """Kill what still runs on the hosts and take them down."""
        for process in self._started:  # by its own id: it may not have reached its host yet
            process.kill()
            process.wait()
        _remove([self._switch, *map(self._space, range(len(self.names)))])


def why_not() -> str | None:
    """Why no cluster can be made here; None where one can."""
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed (packages iproute2 and util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Cluster(1) as cluster:
            code = cluster.start(0, ["true"], log=Path(os.devnull)).wait()
    except RuntimeError as error:
        return str(error)
    return None if code == 0 else "a host name of its own is not allowed (unshare --uts)"


def _clear_leftovers() -> None:
    """Remove namespaces of programs that were killed; one process at a time, for all see them."""
    with FileLock(CLEARING):
        spaces = re.findall(rf"^({PREFIX}-(\d+)-\S+)", _ip("netns", "list"), re.MULTILINE)
        _remove(space for space, pid in spaces if not Path("/proc", pid).exists())


def _remove(spaces: Iterable[str]) -> None:
    there = {line.split()[0] for line in _ip("netns", "list").splitlines()}
    for space in there.intersection(spaces):
        limit = time.monotonic() + GONE_S
        while pids := _ip("netns", "pids", space).split():
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if time.monotonic() > limit:
                raise RuntimeError(f"{space}: processes {pids} do not end after kill -9")
            time.sleep(0.02)
        _ip("netns", "del", space)
        shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)  # the switch has none


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
