"""The hosts of a run register by name before torchrun's rendezvous, which names no missing host.

The host of the endpoint, the keeper, has a store with its clock (torchrun's store, in the same
process, shares the port); each host compares its own clock, adds its name and writes a heartbeat
until all have come. The keeper counts the hosts that are present and names them. One launcher a
host starts all ranks: a second one on the keeper's host would fail.
"""

import errno
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import takewhile

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from train.distributed.watch import WARN_S, report
from train.distributed.world import stop_signals

CLOCK_S = 5.0
"""Clocks may differ by this much. torchrun silently drops a host whose clock differs by 15 s: with
60 s it trained on one of two hosts as rank 0 of 1, and reported success (torch 2.13)."""
ANSWER_S = 10.0  # a store answers at once; another program on the port, never
POLL_S = 0.5
SILENT_S = 10.0  # without a heartbeat for so long a host has left
CONTACT_S = 5.0
FAILED_S = 35.0
"""A failed host failed alone if this one still runs so much later: torchrun waits 30 s for a rank
to exit."""
LEFT = "left"  # in place of a heartbeat
AGAIN = "start the same command on all hosts to continue from the last checkpoint"
OTHER_PORT = "give all hosts another port with --rdzv-endpoint"


@contextmanager
def registered(
    host: str, port: int, *, run: str, min_hosts: int, max_hosts: int, limit_s: float
) -> Iterator[None]:
    """Enter when min_hosts have registered; the clock is kept until the exit, for later ones.

    A signal before that is a KeyboardInterrupt and withdraws this host. Until the exit the process
    also exits if it does not reach the endpoint for limit_s.
    Raises: ValueError with the host and the remedy: a port in use, a clock that differs, another
    number of hosts, hosts that have not registered within limit_s, a host beyond max_hosts.
    """
    name, limit = socket.gethostname(), time.monotonic() + limit_s
    is_keeper = is_free_port(host, port)
    if not is_keeper:
        wait_for_port(host, port, limit)
    server = open_store(host, port, is_keeper)
    store = dist.PrefixStore(f"hosts/{run}", server)
    # its own connection: a call that waits blocks all others on the same one
    clone = dist.PrefixStore(f"hosts/{run}", server.clone())  # type: ignore[attr-defined] - missing in torch's stub
    keep = partial(keep_clock, clone) if is_keeper else partial(keep_contact, host, port, limit_s)
    over = threading.Event()
    thread = threading.Thread(target=keep, args=(over,), name="hosts", daemon=True)
    if is_keeper:
        thread.start()
    try:
        before = {n: signal.signal(n, signal.default_int_handler) for n in stop_signals()}
        entry = f"{name}/{uuid.uuid4().hex}"
        try:
            register(store, entry, host, min_hosts, max_hosts)
            # localhost is another host on each
            known = name if host == "localhost" or host.startswith("127.") else host
            wait_for_quorum(store, entry, f"{known}:{port}", min_hosts, limit, is_keeper=is_keeper)
        except dist.DistError as error:
            raise ValueError(lost_endpoint(host, port, error)) from error
        except KeyboardInterrupt:
            with suppress(dist.DistError):
                store.set(f"heartbeat/{entry}", LEFT)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if not is_keeper:
            thread.start()
        yield
    except (ChildFailedError, OSError):  # failed for good; a host that was killed may come back
        with suppress(dist.DistError):  # the keeper has exited too
            store.set("failed", name)
        raise
    finally:
        over.set()
        if is_keeper:
            thread.join()


def register(store: dist.Store, entry: str, keeper: str, min_hosts: int, max_hosts: int) -> None:
    """Add this host, or have all waiting hosts exit for what differs on this one.

    entry: name of the host / a text that no other launcher has.
    Raises: ValueError on this host alone where the others have started or have all they need.
    """
    name = host_of(entry)
    if line := different_nnodes(store, min_hosts, max_hosts) or different_clock(store, keeper):
        if store.check(["started"]):
            raise ValueError(line)
        store.set("refused", line)
        return
    if store.check(["failed"]):
        failed = f"the ranks of host {store.get('failed').decode()} failed and no restart is left"
        raise ValueError(f"{failed}: all hosts exit within {FAILED_S:.0f} s, then {AGAIN}")
    store.set(f"heartbeat/{entry}", "0")
    store.append("entries", f"{entry}\n")  # type: ignore[attr-defined] - missing in torch's stub
    earlier = list(takewhile(lambda other: other != entry, present(store)))
    names = list(dict.fromkeys(map(host_of, earlier)))
    if len(names) >= max_hosts and name not in names:
        store.set(f"heartbeat/{entry}", LEFT)
        # torchrun would keep it waiting silently and exit with a traceback (torch 2.13)
        raise ValueError(
            f"host {name} has no place among the hosts of this run, {', '.join(names)} (--nnodes "
            f"{max_hosts}). To train on others, stop the command on all hosts and start it on those"
        )
    for other in earlier:
        if host_of(other) == name:  # if it still waits, it is this one's turn
            store.set(f"heartbeat/{other}", LEFT)
    if name in names and store.check(["started"]):
        again = f"host {name} has registered before, it waits for its place"
        report(f"warning: {again}: stop this launch if the first one still runs")


def different_nnodes(store: dist.Store, min_hosts: int, max_hosts: int) -> str | None:
    """One line where the first registered host has another --nnodes.

    With two numbers torchrun started ranks, ended them and waited silently (torch 2.13).
    """
    name = socket.gethostname()
    number = str(max_hosts) if min_hosts == max_hosts else f"{min_hosts}:{max_hosts}"
    first, _, other = store.compare_set("nnodes", "", f"{number} {name}").decode().partition(" ")
    if first == number:
        return None
    differs = f"--nnodes is {number} on host {name} and {first} on host {other}"
    return f"{differs}: give all hosts the same"


def different_clock(store: dist.Store, keeper: str) -> str | None:
    """One line where this host's clock differs from the keeper's."""
    ahead = time.time() - float(store.get("clock"))
    if abs(ahead) < CLOCK_S:
        return None
    order = "ahead of" if ahead > 0 else "behind"
    clock = f"the clock of host {socket.gethostname()} is {abs(ahead):.0f} s {order}"
    return f"{clock} that of {keeper}: synchronise it (chronyc makestep)"


def present(store: dist.Store) -> dict[str, bytes]:
    """Entries of the hosts that have not left, in order, with their last heartbeats."""
    entries = store.get("entries").decode().split() if store.check(["entries"]) else []
    beats = store.multi_get([f"heartbeat/{entry}" for entry in entries])
    known = zip(entries, beats, strict=True)
    return {entry: beat for entry, beat in known if beat.decode() != LEFT}


def host_of(entry: str) -> str:
    """The host's name."""
    return entry.rpartition("/")[0]


def drop_silent(store: dist.Store, seen: dict[str, tuple[bytes, float]]) -> list[str]:
    """Names of the hosts that are present; those without a new heartbeat for SILENT_S have left.

    seen: the last heartbeat of each entry and when it was new, by this process's clock.
    """
    now = time.monotonic()
    # this process, and the store in it, may have been stopped
    was_stopped = bool(seen) and now - max(at for _, at in seen.values()) > SILENT_S / 2
    for entry, beat in present(store).items():
        if was_stopped or seen.get(entry, (b"", now))[0] != beat:
            seen[entry] = beat, now
        elif now - seen[entry][1] > SILENT_S:
            store.compare_set(f"heartbeat/{entry}", beat.decode(), LEFT)
    return list(dict.fromkeys(map(host_of, present(store))))


def wait_for_quorum(
    store: dist.Store, entry: str, endpoint: str, min_hosts: int, limit: float, *, is_keeper: bool
) -> None:
    """Return when min_hosts are present.

    Raises: ValueError, the same on all hosts, or on one that was started twice.
    """
    began, beat, fewest = time.monotonic(), 0, min_hosts
    seen: dict[str, tuple[bytes, float]] = {}
    while True:
        if store.check(["refused"]):
            if is_keeper:
                time.sleep(2 * POLL_S)  # the others still read it
            raise ValueError(store.get("refused").decode())
        if store.check(["started"]):
            return
        beat += 1
        if store.compare_set(f"heartbeat/{entry}", str(beat - 1), str(beat)).decode() == LEFT:
            raise ValueError(
                f"host {host_of(entry)} was started a second time, or was suspended for "
                f"{SILENT_S:.0f} s: this launch of it ends"
            )
        if is_keeper:
            names = drop_silent(store, seen)
            if len(names) >= min_hosts:
                store.set("started", "yes")
                return
            line = (
                f"{len(names)} of {min_hosts} hosts have registered: {', '.join(names)}. Start the "
                f"same command on all, each with --rdzv-endpoint {endpoint}, and open that port in "
                "the firewall"
            )
            if time.monotonic() > limit:
                store.set("refused", line)
            elif time.monotonic() - began > WARN_S:
                if len(names) < fewest:  # at first, and when one has left
                    report(f"warning: {line}; waiting")
                fewest = len(names)
        time.sleep(POLL_S)


def is_free_port(host: str, port: int) -> bool:
    """Whether the address is this host's and the port free.

    Raises: ValueError where another program has the port, or this user may not open it.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:  # wait_for_port reports it: the name of a host may be known later
        return False
    for family, _, _, _, address in addresses:
        try:
            socket.create_server(address, family=family).close()
            return True
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # that: another host's
                raise ValueError(
                    f"port {port} of host {socket.gethostname()} cannot be opened "
                    f"({os.strerror(error.errno or 0)}): stop the program that uses it, or "
                    f"{OTHER_PORT}"
                ) from error
    return False


def wait_for_port(host: str, port: int, limit: float) -> None:
    """Return when the port answers. Raises: ValueError when it does not in time."""
    began, has_warned = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=ANSWER_S).close()
            return
        except OSError as error:
            name, why = socket.gethostname(), error.strerror or error
        line = (
            f"host {name} cannot reach {host}:{port} ({why}): start the command there too, correct "
            "--rdzv-endpoint, or open the port in the firewall"
        )
        if time.monotonic() > limit:
            raise ValueError(line)
        if time.monotonic() - began > WARN_S and not has_warned:
            has_warned = True
            report(f"warning: {line}; waiting")
        time.sleep(POLL_S)


def open_store(host: str, port: int, is_keeper: bool) -> dist.TCPStore:
    """The store at the endpoint. Raises: ValueError when another program answers."""
    opened: list[dist.TCPStore] = []

    def connect() -> None:
        timeout = timedelta(seconds=ANSWER_S)
        options = {"wait_for_workers": False, "multi_tenant": True}
        with suppress(dist.DistError):
            opened.append(dist.TCPStore(host, port, None, is_keeper, timeout, **options))

    # a thread: TCPStore waits without limit once something answers
    thread = threading.Thread(target=connect, name="open-store", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not opened:
        name = f"what answers host {socket.gethostname()} at {host}:{port}"
        raise ValueError(f"{name} is not a rendezvous: {OTHER_PORT}")
    opened[0].set_timeout(timedelta(seconds=60))
    return opened[0]


def keep_clock(store: dist.Store, over: threading.Event) -> None:
    """Write this host's time for the others until `over`, or until a host has failed alone.

    Then this process exits, and all others with it: torchrun has closed the rendezvous, even where
    --nnodes allows fewer hosts, and would have them wait silently for that host's ranks.
    """
    failed_at = None
    while not over.is_set():
        store.set("clock", str(time.time()))
        if store.check(["failed"]):
            failed_at = failed_at or time.monotonic()
            if time.monotonic() - failed_at > FAILED_S:
                host = store.get("failed").decode()
                failed = f"the ranks of host {host} failed and no restart is left, see its output"
                report(f"error: {failed}: {AGAIN}")
                os.kill(os.getpid(), signal.SIGTERM)
                return
        over.wait(POLL_S)


def keep_contact(host: str, port: int, limit_s: float, over: threading.Event) -> None:
    """End this process, and with it its ranks, when the endpoint is unreachable for limit_s.

    torchrun's own calls to the store have no time-out: after a link went down they hung until TCP
    gave up, which takes a quarter of an hour.
    """
    last = time.monotonic()
    while not over.wait(CONTACT_S):
        try:
            socket.create_connection((host, port), timeout=ANSWER_S).close()
            last = time.monotonic()
        except OSError as error:
            if time.monotonic() - last > limit_s:
                report(f"error: {lost_endpoint(host, port, error)}")
                os._exit(1)


def lost_endpoint(host: str, port: int, error: Exception) -> str:
    """One line for an endpoint that cannot be reached any more."""
    lost = f"host {socket.gethostname()} lost the rendezvous at {host}:{port}"
    why = f"it exited, see its output, or the link is down ({type(error).__name__})"
    return f"{lost}, {why}: {AGAIN}"
