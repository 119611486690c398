"""The hosts that stand_ins/cluster.py makes: names, links, and that nothing of them is left."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from stand_ins.cluster import CLEARING, Cluster, _clear_leftovers

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("clusters")]
SEND = "import socket; socket.create_connection(('node1', 5000)).sendall(bytes(4 << 20))"
RECEIVE = (
    "import socket, time; s = socket.create_server(('', 5000)); c = s.accept()[0]; t = time.time();"
    "n = sum(iter(lambda: len(c.recv(1 << 16)), 0)); print(n, time.time() - t, flush=True)"
)


def spaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    own = {line.split()[0] for line in listed.stdout.splitlines()}
    return {name for name in own if name.startswith(f"twinturbo-{os.getpid()}-")}


def output(hosts: Cluster, host: int, code: str, log: Path, *, wait: bool = True) -> str:
    process = hosts.start(host, [sys.executable, "-c", code], log=log)
    if wait:
        assert process.wait(60) == 0, log.read_text()
    return log.read_text()


def test_hosts_have_names_of_their_own_and_find_one_another(clusters, tmp_path):
    hosts = clusters(2)
    code = "import socket; print(socket.getfqdn(), socket.gethostbyname('node1'))"
    assert output(hosts, 0, code, tmp_path / "log") == f"node0 {hosts.addresses[1]}\n"
    assert os.uname().nodename != "node0"  # this machine's own name is as it was


def test_two_clusters_do_not_meet(clusters, tmp_path):
    server = clusters(2), clusters(2)
    output(server[0], 1, RECEIVE, tmp_path / "server", wait=False)
    other = server[1].start(0, [sys.executable, "-c", SEND], log=tmp_path / "other")
    assert other.wait(60) != 0 and "refused" in (tmp_path / "other").read_text()


def test_a_throttled_link_carries_no_more_and_an_unplugged_one_nothing(clusters, tmp_path):
    hosts = clusters(2)
    hosts.throttle(0, mbit_per_s=16)
    receiver = hosts.start(1, [sys.executable, "-c", RECEIVE], log=tmp_path / "receiver")
    retry = f"import time\nwhile True:\n  try: {SEND}; break\n  except OSError: time.sleep(.1)"
    output(hosts, 0, retry, tmp_path / "sender")
    assert receiver.wait(60) == 0
    num_bytes, seconds = (tmp_path / "receiver").read_text().split()
    assert int(num_bytes) == 4 << 20 and float(seconds) > 0.9 * (4 << 20) * 8 / 16e6
    hosts.set_link(1, up=False)
    with pytest.raises(AssertionError, match="timed out|No route"):
        code = "import socket; socket.create_connection(('node1', 5000), timeout=1)"
        output(hosts, 0, code, tmp_path / "unplugged")


def test_nothing_is_left_after_a_failure_not_even_a_stopped_process(tmp_path):
    before = spaces()
    with pytest.raises(KeyError), Cluster(2) as hosts:
        process = hosts.start(0, ["sleep", "600"], log=tmp_path / "log")
        while process.pid not in hosts.processes(0):
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        assert len(spaces() - before) == 3
        raise KeyError
    assert process.poll() == -signal.SIGKILL and spaces() == before
    assert {path.name for path in Path("/etc/netns").glob(f"twinturbo-{os.getpid()}-*")} <= before


def test_what_a_killed_program_left_is_removed_by_the_next(tmp_path):
    code = f"""
import os, sys
sys.path.append({str(Path(__file__).parent.parent / "profiling")!r})
from pathlib import Path
from stand_ins.cluster import Cluster
hosts = Cluster(1).__enter__()
hosts.start(0, ["sleep", "600"], log=Path({str(tmp_path / "log")!r}))
os.kill(os.getpid(), 9)"""
    killed = subprocess.Popen([sys.executable, "-c", code])
    assert killed.wait(60) == -signal.SIGKILL

    def left() -> str:
        return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout

    assert f"twinturbo-{killed.pid}-" in left()
    _clear_leftovers()
    assert f"twinturbo-{killed.pid}-" not in left()


def test_two_programs_do_not_clear_at_the_same_time():
    """The second would find namespaces in the list that the first has removed, and fail."""
    second = threading.Thread(target=_clear_leftovers)
    with FileLock(CLEARING):
        second.start()
        second.join(0.5)
        assert second.is_alive()
    second.join(20)
    assert not second.is_alive()
