"""The hosts of a run call each other's names before torchrun's rendezvous, which names nobody.

The host of the endpoint keeps a store there (torchrun's, in the same process, is laid over it) with
its clock; each host compares its own and adds its name. The keeper says who is missing.
A newcomer's mistake: a second launch on the endpoint's host. One process a host starts all ranks.
"""

import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from train.distributed.watch import TELL_S

APART_S = 5.0
"""Clocks may differ so much. torchrun drops a host whose clock is 15 s behind another's in silence:
with 60 s it trained on one of two hosts as rank 0 of 1, and reported success (torch 2.13)."""
ANSWER_S = 10.0  # a store answers at once; another program that has the port, never
POLL_S = 0.5
CONTACT_S = 5.0
ALONE_S = 35.0
"""A host has failed alone when this one has not ended so much later: torchrun waits 30 s for a rank
that will not end."""
AGAIN = "start the same command on all hosts, it goes on from the last checkpoint"


@contextmanager
def roll_call(
    host: str, port: int, *, run: str, lowest: int, most: int, limit_s: float
) -> Iterator[None]:
    """Enter when `lowest` hosts have come; the clock is kept until the exit, for later ones.

    Until then the process also ends if it does not reach the endpoint for limit_s.
    Raises: ValueError with the host and the remedy: a port that is taken, a clock that is apart,
    another number of hosts, hosts that have not come within limit_s, one beyond `most`.
    """
    here, limit = socket.gethostname(), time.monotonic() + limit_s
    is_keeper = is_free_here(host, port)
    if not is_keeper:
        wait_for(host, port, limit)
    server = open_store(host, port, is_keeper)
    store = dist.PrefixStore(f"roll-call/{run}", server)
    # a connection of its own: a call that waits blocks all others on the same one
    own = dist.PrefixStore(f"roll-call/{run}", server.clone())  # type: ignore[attr-defined] - missing in torch's stub
    over = threading.Event()
    keep = partial(keep_clock, own) if is_keeper else partial(keep_contact, host, port, limit_s)
    keeping = threading.Thread(target=keep, args=(over,), name="roll-call", daemon=True)
    if is_keeper:
        keeping.start()
    try:
        try:
            sign_in(store, host, lowest, most)
            # localhost is another host on each
            known = here if host == "localhost" or host.startswith("127.") else host
            answer(store, is_keeper, f"{known}:{port}", lowest, limit)
        except dist.DistError as error:
            raise ValueError(
                f"host {here} lost the rendezvous at {host}:{port} before all hosts had come: see "
                "the output there"
            ) from error
        if not is_keeper:
            keeping.start()
        yield
    except (ChildFailedError, OSError):  # it is over here; a host that was killed is waited for
        with suppress(dist.DistError):  # the keeper has ended too
            store.set("failed", here)
        raise
    finally:
        over.set()
        if is_keeper:
            keeping.join()


def sign_in(store: dist.Store, keeper: str, lowest: int, most: int) -> None:
    """Add this host's name, or have all that wait refused for what this host has otherwise.

    Raises: ValueError on this host alone where the others have begun or have all they need.
    """
    here = socket.gethostname()
    if line := other_number(store, lowest, most) or clock_apart(store, keeper):
        if store.check(["begun"]):
            raise ValueError(line)
        store.set("refused", line)
        return
    if store.check(["failed"]):
        raise ValueError(
            f"the ranks of host {store.get('failed').decode()} failed and no restart is left: all "
            f"hosts end within {ALONE_S:.0f} s, then {AGAIN}"
        )
    number = store.add("number", 1)
    earlier = dict.fromkeys(names_of(store, number - 1))  # each once
    if len(earlier) >= most and here not in earlier:
        store.set(f"host/{number}", "")  # its name would let it in the next time
        # torchrun would keep it waiting without a word and end in a traceback (torch 2.13)
        raise ValueError(
            f"host {here} is one too many, for --nnodes {most} have come: {', '.join(earlier)}. To "
            f"train on more, or on {here} in place of another, end all and start them anew"
        )
    store.set(f"host/{number}", here)
    if number > most and here in earlier:
        print(f"warning: host {here} has come before, it waits for its place: end this launch if "
              "the first one still runs", file=sys.stderr, flush=True)  # fmt: skip


def other_number(store: dist.Store, lowest: int, most: int) -> str | None:
    """One line where the first host that came has another --nnodes.

    With two numbers torchrun was seen to start ranks, end them and wait in silence (torch 2.13).
    """
    here, number = socket.gethostname(), str(most) if lowest == most else f"{lowest}:{most}"
    first, _, there = store.compare_set("nnodes", "", f"{number} {here}").decode().partition(" ")
    if first == number:
        return None
    return (
        f"--nnodes is {number} on host {here} and {first} on host {there}: give all hosts the same"
    )


def clock_apart(store: dist.Store, keeper: str) -> str | None:
    """One line where this host's clock is not the keeper's."""
    ahead = time.time() - float(store.get("clock"))
    if abs(ahead) < APART_S:
        return None
    order = "ahead of" if ahead > 0 else "behind"
    return (
        f"the clock of host {socket.gethostname()} is {abs(ahead):.0f} s {order} that of {keeper}: "
        "synchronise it (chronyc makestep)"
    )


def names_of(store: dist.Store, number: int) -> list[str]:
    """The first hosts that came, one that came again twice, without those that were too many."""
    names = (store.get(f"host/{n}").decode() for n in range(1, number + 1))
    return [name for name in names if name]


def is_free_here(host: str, port: int) -> bool:
    """Whether the address is this host's and the port free.

    Raises: ValueError where another program has the port, or this user may not have it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror:  # wait_for tells: names of hosts that start may come later
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:  # another host's
                    continue
                raise ValueError(
                    f"port {port} of host {socket.gethostname()} cannot be had ({error.strerror}): "
                    "end what holds it, or give all hosts another port with --rdzv-endpoint"
                ) from error
            return True
    return False


def wait_for(host: str, port: int, limit: float) -> None:
    """Return when the port answers. Raises: ValueError when it does not in time."""
    began, has_told, here = time.monotonic(), False, socket.gethostname()
    while True:
        try:
            socket.create_connection((host, port), timeout=ANSWER_S).close()
            return
        except OSError as error:
            line = (
                f"host {here} finds nobody at {host}:{port} ({error.strerror or error}): start the "
                "command there too, correct --rdzv-endpoint, or open the port in the firewall"
            )
        if time.monotonic() > limit:
            raise ValueError(line)
        if time.monotonic() - began > TELL_S and not has_told:
            has_told = True
            print(f"warning: {line}; waiting", file=sys.stderr, flush=True)
        time.sleep(POLL_S)


def open_store(host: str, port: int, is_keeper: bool) -> dist.TCPStore:
    """The store at the endpoint. Raises: ValueError when what answers there is none."""
    made: list[dist.TCPStore] = []

    def make() -> None:
        try:
            store = dist.TCPStore(
                host, port, is_master=is_keeper, timeout=timedelta(seconds=ANSWER_S),
                wait_for_workers=False, multi_tenant=True,
            )  # fmt: skip
        except dist.DistError:
            return
        made.append(store)

    # it has no time-out of its own once something answers
    thread = threading.Thread(target=make, name="open-store", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if not made:
        raise ValueError(
            f"what answers host {socket.gethostname()} at {host}:{port} is not a rendezvous: give "
            "all hosts another port with --rdzv-endpoint"
        )
    made[0].set_timeout(timedelta(seconds=60))
    return made[0]


def keep_clock(store: dist.Store, over: threading.Event) -> None:
    """Show this host's time to the others until it is over, or a host has failed alone.

    Then this process ends, and all others with it: torchrun has closed the rendezvous, also where
    --nnodes allows fewer hosts, and would have them wait for that host's ranks without a word.
    """
    since = None
    while not over.is_set():
        store.set("clock", str(time.time()))
        if store.check(["failed"]):
            since = since or time.monotonic()
            if time.monotonic() - since > ALONE_S:
                failed = store.get("failed").decode()
                line = (
                    f"the ranks of host {failed} failed and no restart is left, its output says why"
                )
                print(f"error: {line}: {AGAIN}", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return
        over.wait(POLL_S)


def keep_contact(host: str, port: int, limit_s: float, over: threading.Event) -> None:
    """End this process, and with it its ranks, when the endpoint is out of reach for limit_s.

    torchrun's own calls to the store have no time-out: after a link went down they were seen to
    hang until TCP gives up, which takes a quarter of an hour.
    """
    last = time.monotonic()
    while not over.wait(CONTACT_S):
        try:
            socket.create_connection((host, port), timeout=ANSWER_S).close()
            last = time.monotonic()
        except OSError as error:
            if time.monotonic() - last > limit_s:
                print(f"error: {out_of_reach(host, port, error)}", file=sys.stderr, flush=True)
                os._exit(1)


def out_of_reach(host: str, port: int, error: Exception) -> str:
    """One line for an endpoint that was there and is not any more."""
    return (
        f"host {socket.gethostname()} has no rendezvous at {host}:{port} any more, it ended or the "
        f"link is down ({type(error).__name__}): {AGAIN}"
    )


def answer(store: dist.Store, is_keeper: bool, endpoint: str, lowest: int, limit: float) -> None:
    """Return when enough hosts have come. Raises: ValueError, on all hosts with the same words."""
    began, has_told = time.monotonic(), False
    while True:
        number = store.add("number", 0)
        if store.check(["refused"]):
            if is_keeper:
                time.sleep(2 * POLL_S)  # the others still read it here
            raise ValueError(store.get("refused").decode())
        if number >= lowest:
            store.set("begun", "yes")
            return
        if is_keeper:
            names = ", ".join(names_of(store, number))
            line = (
                f"{number} of {lowest} hosts have come: {names}. Start the same command on all, "
                f"each with --rdzv-endpoint {endpoint}, and let the firewall pass that port"
            )
            if time.monotonic() > limit:
                store.set("refused", line)
            elif time.monotonic() - began > TELL_S and not has_told:
                has_told = True
                print(f"warning: {line}; waiting", file=sys.stderr, flush=True)
        time.sleep(POLL_S)
