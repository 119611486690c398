"""Before ranks start: a port that is taken, hosts that are missing, clocks that differ."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from train import launch
from train.distributed import registration
from train.distributed.registration import (
    is_free_port,
    keep_contact,
    open_store,
    register,
    registered,
    wait_for_port,
    wait_for_quorum,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture
def store(port, monkeypatch) -> dist.TCPStore:
    monkeypatch.setattr(registration, "POLL_S", 0.01)
    return dist.TCPStore(
        "localhost", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )


def test_a_port_of_this_host_is_free_taken_or_another_hosts(port):
    assert is_free_port("localhost", port)
    with socket.socket() as other:
        other.bind(("localhost", port))
        other.listen()
        with pytest.raises(
            ValueError, match=rf"port {port} of host .* cannot be opened .*--rdzv-end"
        ):
            is_free_port("localhost", port)
    assert not is_free_port("192.0.2.1", port)  # an address for documentation: nobody's
    assert not is_free_port("no-such-host.invalid", port)


def test_an_endpoint_where_nothing_answers_is_named_early_and_given_up_in_time(
    port, monkeypatch, capsys
):
    monkeypatch.setattr(registration, "WARN_S", 0.1)
    monkeypatch.setattr(registration, "POLL_S", 0.05)
    line = rf"cannot reach localhost:{port} \(Connection refused\): .*--rdzv-endpoint"
    with pytest.raises(ValueError, match=line):
        wait_for_port("localhost", port, time.monotonic() + 0.5)
    assert capsys.readouterr().err.count("warning: host") == 1


def test_another_program_at_the_endpoint_is_no_rendezvous(monkeypatch):
    monkeypatch.setattr(registration, "ANSWER_S", 0.3)
    with socket.socket() as other:
        other.bind(("localhost", 0))
        other.listen()
        with pytest.raises(ValueError, match="is not a rendezvous.*--rdzv-endpoint"):
            open_store("localhost", other.getsockname()[1], False)
    for thread in threading.enumerate():  # alive at Python's end, it would abort the process
        if thread.name == "open-store":
            thread.join(20)
            assert not thread.is_alive()


def test_hosts_that_are_missing_are_counted_and_those_that_registered_named(
    store, monkeypatch, capsys
):
    monkeypatch.setattr(registration, "WARN_S", 0.1)
    store.set("clock", str(time.time()))
    (entry,) = register_all(store, monkeypatch, "node0", min_hosts=4, max_hosts=4)
    with pytest.raises(ValueError, match="1 of 4 hosts have registered: node0. Start"):
        wait(store, entry, is_keeper=True, min_hosts=4, seconds=0.5)
    assert "warning: 1 of 4 hosts have registered" in capsys.readouterr().err
    with pytest.raises(ValueError, match="1 of 4 hosts"):  # the other hosts say the same
        wait(store, is_keeper=False, min_hosts=4, seconds=60)


def wait(
    store, entry: str = "", *, is_keeper: bool, min_hosts: int = 2, seconds: float = 5
) -> None:
    limit = time.monotonic() + seconds
    wait_for_quorum(store, entry, "node0:29500", min_hosts, limit, is_keeper=is_keeper)


def register_all(
    store, monkeypatch, *names: str, min_hosts: int = 2, max_hosts: int = 2
) -> list[str]:
    """Register hosts; their entries."""
    entries = [f"{name}/{uuid.uuid4().hex}" for name in names]
    for entry, name in zip(entries, names, strict=True):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        register(store, entry, names[0], min_hosts, max_hosts)
    return entries


@pytest.mark.parametrize(("shift", "order"), [(60, "behind"), (-60, "ahead of")])
def test_a_clock_that_differs_is_refused_on_all_hosts(store, monkeypatch, shift, order):
    store.set("clock", str(time.time() + shift))
    register_all(store, monkeypatch, "node0")
    for is_keeper in (True, False):
        with pytest.raises(ValueError, match=f"clock of host node0 is 60 s {order} .*synchronise"):
            wait(store, is_keeper=is_keeper)


def test_a_clock_that_is_near_is_not_refused(store, monkeypatch):
    store.set("clock", str(time.time() + 2))
    first, second = register_all(store, monkeypatch, "node0", "node1")
    wait(store, first, is_keeper=True)
    wait(store, second, is_keeper=False)


@pytest.mark.parametrize(("min_hosts", "max_hosts", "first"), [(4, 4, "4"), (3, 4, "3:4")])
def test_another_number_of_hosts_is_refused_on_all_hosts(
    store, monkeypatch, min_hosts, max_hosts, first
):
    store.set("clock", str(time.time()))
    register_all(store, monkeypatch, "node0", "node1", min_hosts=min_hosts, max_hosts=max_hosts)
    register_all(store, monkeypatch, "node2", min_hosts=2, max_hosts=2)
    line = f"--nnodes is 2 on host node2 and {first} on host node0: give all hosts the same"
    for is_keeper in (True, False):
        with pytest.raises(ValueError, match=line):
            wait(store, is_keeper=is_keeper, min_hosts=min_hosts)


def test_a_host_that_comes_to_a_complete_run_is_refused_alone_unless_it_registered_before(
    store, monkeypatch, capsys
):
    store.set("clock", str(time.time()))
    first, second = register_all(store, monkeypatch, "node0", "node1")
    for begun in (False, True):
        for _ in range(2):  # its own name among the registered does not let it in
            with pytest.raises(
                ValueError, match=r"node2 has no place .* run, node0, node1 \(--nnodes 2\).* stop"
            ):
                register_all(store, monkeypatch, "node2")
        if not begun:
            wait(store, first, is_keeper=True)
    assert capsys.readouterr().err == ""
    register_all(store, monkeypatch, "node0")
    assert capsys.readouterr().err.startswith("warning: host node0 has registered before, it waits")
    with pytest.raises(ValueError, match="--nnodes is 3 on host node1"):
        register_all(store, monkeypatch, "node1", min_hosts=3, max_hosts=3)
    wait(store, second, is_keeper=False)


def test_a_host_that_was_started_twice_takes_no_others_place(store, monkeypatch):
    store.set("clock", str(time.time()))
    names = ("node0", "node1", "node1", "node2")
    first, older, newer, _ = register_all(store, monkeypatch, *names, min_hosts=4, max_hosts=4)
    with pytest.raises(ValueError, match="host node1 was started a second time"):
        wait(store, older, is_keeper=False)
    with pytest.raises(ValueError, match="3 of 4 hosts have registered: node0, node1, node2. "):
        wait(store, first, is_keeper=True, min_hosts=4, seconds=0)
    store.delete_key("refused")
    register_all(store, monkeypatch, "node3", min_hosts=4, max_hosts=4)
    with pytest.raises(ValueError, match="node4 has no place"):
        register_all(store, monkeypatch, "node4", min_hosts=4, max_hosts=4)
    wait(store, first, is_keeper=True, min_hosts=4)
    wait(store, newer, is_keeper=False, min_hosts=4)


def test_a_host_that_leaves_before_all_have_come_is_missing_and_its_place_is_free(
    port, store, monkeypatch, capsys
):
    """By a signal, which withdraws it at once, and by kill -9."""
    monkeypatch.setattr(registration, "is_free_port", lambda host, port: False)
    monkeypatch.setattr(registration, "SILENT_S", 0.4)
    monkeypatch.setattr(registration, "WARN_S", 0.0)
    seen = dist.PrefixStore("hosts/x", store)
    seen.set("clock", str(time.time()))
    first, _ = register_all(seen, monkeypatch, "node0", "killed", min_hosts=3, max_hosts=3)
    monkeypatch.setattr(socket, "gethostname", lambda: "stopped")
    stop = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    stop.start()
    call = partial(registered, "localhost", port, run="x", min_hosts=3, max_hosts=3, limit_s=9)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), call():
        pass
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(ValueError, match="1 of 3 hosts have registered: node0. Start"):
        wait(seen, first, is_keeper=True, min_hosts=3, seconds=1)
    warned = [line.split(".")[0] for line in capsys.readouterr().err.splitlines()]
    assert warned == [f"warning: {n} of 3 hosts have registered: {names}"
                      for n, names in ((2, "node0, killed"), (1, "node0"))]  # fmt: skip
    seen.delete_key("refused")
    late = register_all(seen, monkeypatch, "node1", "node2", min_hosts=3, max_hosts=3)
    waiting = [
        threading.Thread(target=wait, args=(seen, e), kwargs={"is_keeper": False, "min_hosts": 3})
        for e in late
    ]
    for thread in waiting:
        thread.start()
    wait(seen, first, is_keeper=True, min_hosts=3)
    for thread in waiting:
        thread.join(20)


def test_localhost_is_reported_to_the_others_as_this_hosts_name(port, monkeypatch):
    monkeypatch.setattr(registration, "POLL_S", 0.01)
    line = f"1 of 2 hosts .*--rdzv-endpoint {socket.gethostname()}:{port}, "
    with (
        pytest.raises(ValueError, match=line),
        registered("localhost", port, run="x", min_hosts=2, max_hosts=2, limit_s=0.1),
    ):
        pass


def test_the_keepers_clock_is_kept_for_hosts_that_come_later(port, monkeypatch):
    monkeypatch.setattr(registration, "POLL_S", 0.01)
    with registered("localhost", port, run="x", min_hosts=1, max_hosts=1, limit_s=5):
        late = dist.PrefixStore("hosts/x", open_store("localhost", port, False))
        before = float(late.get("clock"))
        time.sleep(0.2)
        assert time.time() - 0.2 < float(late.get("clock")) > before
        assert any(thread.name == "hosts" for thread in threading.enumerate())
    assert not any(thread.name == "hosts" for thread in threading.enumerate())


def test_a_host_that_failed_alone_ends_all(store, monkeypatch, capsys):
    killed, over = [], threading.Event()
    monkeypatch.setattr(registration, "FAILED_S", 0.3)
    monkeypatch.setattr(registration.os, "kill", lambda *words: killed.append(words))
    keeping = threading.Thread(target=registration.keep_clock, args=(store, over))
    keeping.start()
    time.sleep(0.5)
    store.set("failed", "node1")
    time.sleep(0.15)
    assert killed == []  # all may be failing
    keeping.join(5)
    over.set()
    keeping.join()
    assert killed == [(os.getpid(), signal.SIGTERM)]
    assert "ranks of host node1 failed and no restart is left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [ChildFailedError("x", {0: ProcessFailure(0, 1, 1, "none")}), FileNotFoundError("--log-dir")],
)
def test_a_host_reports_that_it_failed_for_good_and_then_no_host_registers(
    port, monkeypatch, error
):
    monkeypatch.setattr(registration, "POLL_S", 0.01)
    server = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    seen = dist.PrefixStore("hosts/x", server)
    seen.set("clock", str(time.time()))
    seen.set("started", "yes")  # by the keeper
    monkeypatch.setattr(registration, "is_free_port", lambda host, port: False)
    call = partial(registered, "localhost", port, run="x", min_hosts=1, max_hosts=1, limit_s=5)
    with pytest.raises(KeyboardInterrupt), call():
        raise KeyboardInterrupt
    assert not seen.check(["failed"])
    with pytest.raises(type(error)), call():
        raise error
    assert seen.get("failed").decode() == socket.gethostname()
    with pytest.raises(ValueError, match=r"ranks of host .* failed .*start the same"), call():
        pass


def test_a_host_that_cannot_reach_the_endpoint_any_more_ends_in_time(port, monkeypatch, capfd):
    codes, over = [], threading.Event()
    monkeypatch.setattr(registration, "CONTACT_S", 0.05)
    monkeypatch.setattr(registration.os, "_exit", lambda code: (codes.append(code), over.set()))
    with socket.socket() as server:
        server.bind(("localhost", port))
        server.listen()
        contact = threading.Thread(target=keep_contact, args=("localhost", port, 0.3, over))
        contact.start()
        time.sleep(0.6)
        assert codes == []
    contact.join(20)
    assert codes == [1]
    assert f"lost the rendezvous at localhost:{port}, it exited" in capfd.readouterr().err


@pytest.mark.parametrize("nohup", [False, True])
def test_the_launcher_starts_ranks_with_the_settings_that_restarts_need(port, tmp_path, nohup):
    show = tmp_path / "show.py"
    names = ("TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE",
             "TORCHELASTIC_SIGNALS_TO_HANDLE", "WORLD_SIZE")  # fmt: skip
    show.write_text(f"import os\nprint([os.environ[name] for name in {names}])")
    done = subprocess.run(
        [*["nohup"] * nohup, sys.executable, "train/launch.py", "--nnodes", "1:2",
         "--rdzv-conf", "last_call_timeout=1", "--rdzv-endpoint", f"localhost:{port}", str(show)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    signals = "SIGTERM,SIGINT,SIGQUIT,SIGUSR1" if nohup else "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    assert done.stdout.strip() == f"['3', 'False', '{signals}', '1']"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--nproc-per-nod=8"], "--nproc-per-nod is unknown: perhaps you meant --nproc-per-node"),
        (["--rdzv_endpont", "h:1"], "--rdzv_endpont is unknown: perhaps you meant --rdzv-endpoint"),
        (["--nnodes", "x"], "--nnodes x: give a number of hosts"),
        (["--nnodes", "0"], "--nnodes 0: give a number of hosts"),
        (["--nnodes", "4:2"], "--nnodes 4:2: give"),
        (["--nproc-per-node", "0"], "--nproc-per-node 0 on host HOST: at least one is needed"),
        (["--nproc-per-node", "gpu"], "--nproc-per-node gpu on host HOST: Cuda is not available"),
        (["--nproc-per-node", "many"], "--nproc-per-node many on host HOST: Unsupported"),
        (["--nnodes", "2", "--rdzv-endpoint", "h:1", "--rdzv-conf", "join_timeout=soon"],
         "--rdzv-conf join_timeout=soon: join_timeout is seconds"),
    ],
)  # fmt: skip
def test_a_mistaken_launch_line_is_refused_before_the_hosts_register(
    flags, line, monkeypatch, capsys
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, value in launch.SETTINGS.items():
        monkeypatch.setenv(name, value)  # put back after the test
    monkeypatch.setattr(sys, "argv", ["launch.py", *flags, str(ROOT / "train/main.py")])
    monkeypatch.setattr(launch, "registered", None)
    monkeypatch.setattr(launch, "run", None)
    with pytest.raises(SystemExit) as ended:
        launch.main()
    printed = capsys.readouterr().err
    assert ended.value.code == 1
    assert printed.count("\n") == 1
    assert line.replace("HOST", socket.gethostname()) in printed


def test_a_program_that_is_missing_is_named_with_its_host(monkeypatch, capsys):
    for name, value in launch.SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["launch.py", "--nproc-per-node", "1", "train/nowhere.py"])
    monkeypatch.setattr(launch, "run", None)
    with pytest.raises(SystemExit, match="1"):
        launch.main()
    assert f"nowhere.py is not on host {socket.gethostname()}" in capsys.readouterr().err
