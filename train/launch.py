"""torchrun for several hosts: the settings that restarts need, and one line for what goes wrong.

    python train/launch.py --nnodes 4 --nproc-per-node gpu --rdzv-endpoint HOST:29500 \\
        train/main.py --config ... --out ...

Takes torchrun's flags and PET_* variables, the same on all hosts, and runs torchrun's code. Before
that the hosts register by name (train/distributed/registration.py), for torchrun waits silently for
a missing host. What fails, what happens then (make cluster-test; a rank that hangs:
tests/test_watch.py), and within what time (J: --rdzv-conf join_timeout, 600 s; T: train/main.py's
--timeout_s, 60 s):

    a rank                       rank 0 names it and its host; all restart from the    30 s
                                 last checkpoint
    a rank is stopped            the same; with --max-restarts 0 the others exit, its  T + 35 s
                                 own torchrun waits until it continues
    a rank hangs but is alive    after T a warning names it and the file of its        10 T + 35 s
                                 stacks; then the same
    a link, for less than T      nothing
    a link or a host             both sides name whom they lost, wait for it and       T + J
                                 restart, or exit
    the ranks of one host, at    the host is named, all exit                           35 s
    each restart
    a torchrun                   all ranks save at the same step; the other hosts      J
                                 wait until it is started again
    the torchrun at HOST         all ranks save and all hosts exit: start the same     30 s
                                 command on all hosts
    a host, before the start     the registered hosts are named after 30 s             J
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# read when torch is imported; without it each lost connection prints 20 lines of stack frames

import argparse
import signal
import socket

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import (
    determine_local_world_size,
    get_args_parser,
    parse_min_max_nnodes,
    run,
)

from pipeline.streams import protect_output
from train.config.parser import explain
from train.distributed.registration import AGAIN, lost_endpoint, registered
from train.run.program import refuse

SETTINGS = {
    "PET_MAX_RESTARTS": "3",
    # SIGUSR1 is SLURM's warning: torchrun would die of it and leave its ranks running
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    # or a restart reads the keys of the previous attempt
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "PYTHONFAULTHANDLER": "1",  # a rank that dies of SIGSEGV prints its stacks
}


def main() -> None:
    """Run torchrun's code. Exits with 0, with 1 after one line, or with 128 + a signal's number."""
    for name, value in SETTINGS.items():
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: torchrun would handle it
            value = value.replace(",SIGHUP", "")
        os.environ.setdefault(name, value)
    parser, host = get_args_parser(), socket.gethostname()
    parser.allow_abbrev = False  # torchrun takes a program's --n 3 for an abbreviation of its flag
    known = [action.option_strings[0][2:] for action in parser._actions if action.option_strings]
    parser.error = lambda message: refuse(explain(message, known), code=1)
    arguments = parser.parse_args()
    try:
        check(arguments)
        launch(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = "failed: its own line, or rank 0's, says why"
        if failure.exitcode < 0:
            how = f"was killed by {signal.Signals(-failure.exitcode).name}, and no restart is left"
        refuse(f"rank {rank} on host {host} {how}", code=1)
    except RendezvousTimeoutError:
        waited = f"host {host} timed out waiting for hosts that exited (--rdzv-conf join_timeout)"
        refuse(f"{waited}: {AGAIN}", code=1)
    except RendezvousError as error:
        refuse(lost_endpoint(*endpoint(arguments), error), code=1)
    except SignalException as error:  # the ranks have saved, see status.json
        raise SystemExit(128 + error.sigval) from None
    except (ValueError, OSError) as error:  # OSError: of --log-dir
        refuse(f"host {host}: {error}" if isinstance(error, OSError) else str(error), code=1)
    except KeyboardInterrupt:  # before torchrun handles the signal
        refuse(f"host {host} stopped before all hosts had registered", code=130)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what torchrun reports by a traceback, or after all hosts have joined."""
    host = socket.gethostname()
    try:
        min_hosts, max_hosts = parse_min_max_nnodes(arguments.nnodes)
    except (ValueError, RuntimeError):
        min_hosts = max_hosts = 0
    if not 1 <= min_hosts <= max_hosts:
        raise ValueError(f"--nnodes {arguments.nnodes}: give a number of hosts, or MIN:MAX")
    try:
        ranks, why = determine_local_world_size(arguments.nproc_per_node), "at least one is needed"
    except ValueError as error:
        ranks, why = 0, f"{error} On GPUs python train/doctor.py says why"
    if ranks < 1:
        raise ValueError(
            f"--nproc-per-node {arguments.nproc_per_node} on host {host}: {why}; give a number of "
            "processes, or gpu where there are GPUs"
        )
    is_file = not (arguments.module or arguments.no_python)
    if is_file and not os.path.isfile(arguments.training_script):
        missing = f"{arguments.training_script} is not on host {host}"
        raise ValueError(f"{missing}: start in the repository's folder")


def launch(arguments: argparse.Namespace) -> None:
    """Start this host's ranks; of several hosts, once they have registered."""
    min_hosts, max_hosts = parse_min_max_nnodes(arguments.nnodes)
    if max_hosts == 1 and not arguments.rdzv_endpoint:
        run(arguments)
        return
    if not arguments.rdzv_endpoint:
        raise ValueError("--nnodes above 1 needs --rdzv-endpoint HOST:PORT, the same on all hosts")
    arguments.rdzv_backend = "c10d"
    conf = dict(part.split("=", 1) for part in arguments.rdzv_conf.split(",") if "=" in part)
    try:
        limit_s = float(conf.get("join_timeout", 600))
    except ValueError:
        raise ValueError(f"--rdzv-conf {arguments.rdzv_conf}: join_timeout is seconds") from None
    numbers = {"min_hosts": min_hosts, "max_hosts": max_hosts, "limit_s": limit_s}
    with registered(*endpoint(arguments), run=arguments.rdzv_id, **numbers):
        run(arguments)


def endpoint(arguments: argparse.Namespace) -> tuple[str, int]:
    """Host and port of the rendezvous."""
    return parse_rendezvous_endpoint(arguments.rdzv_endpoint, default_port=29400)


if __name__ == "__main__":
    protect_output()
    main()
