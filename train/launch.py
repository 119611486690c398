"""torchrun for several hosts: the settings that restarts need, and one line for what goes wrong.

    python train/launch.py --nnodes 4 --nproc-per-node gpu --rdzv-endpoint HOST:29500 \\
        train/main.py --config ... --out ...

Takes torchrun's flags and PET_* variables, and runs torchrun's code. Before that the hosts call
their names (train/distributed/roll_call.py), for torchrun waits for a missing host without a word.
What dies, what happens then (make cluster-test; a rank that hangs: tests/test_watch.py), and within
what time (J: --rdzv-conf join_timeout, 600 s; T: train/main.py's --timeout_s, 60 s):

    a rank                       rank 0 names it and its host; all restart from the    30 s
                                 last checkpoint
    a rank is stopped            the same; with --max-restarts 0 the others end, its   T + 35 s
                                 own torchrun waits until it goes on
    a rank hangs but lives       after T a warning names it and the file of its        10 T + 35 s
                                 stacks (train/distributed/stacks.py); then the same
    a link, for less than T      nothing
    a link or a host             both sides say whom they lost, wait for it to come    T + J
                                 again and restart, or end
    the ranks of one host, at    the host is named, all end                         35 s
    each restart
    a torchrun                   all ranks save at the same step; the other hosts      J
                                 wait until it is started again
    the torchrun at HOST         all ranks save and everything ends: start the same    30 s
                                 line on all hosts
    a host, before the start     the others' names are told after 30 s                 J

A newcomer's mistake: another --rdzv-endpoint on each host. All of them name the same one.
"""

import os
import sys

if not __package__:  # run as a script: the repo root, not this folder, heads sys.path
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# at its import torch reads it; without, 20 lines of stack frames for each lost connection

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

from train.config.parser import explain
from train.distributed.roll_call import AGAIN, out_of_reach, roll_call
from train.run.program import refuse

SETTINGS = {
    "PET_MAX_RESTARTS": "3",
    # SIGUSR1 is SLURM's warning: torchrun would die of it and leave its ranks behind
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a restart reads the attempt before's keys
    "PYTHONFAULTHANDLER": "1",  # a rank that dies of SIGSEGV shows where
}


def main() -> None:
    """Run torchrun's code. Exits with 0, with 1 after one line, or with 128 + a signal's number."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    parser, here = get_args_parser(), socket.gethostname()
    parser.allow_abbrev = False  # torchrun takes a program's --n 3 for an abbreviation of its own
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
        refuse(f"rank {rank} on host {here} {how}", code=1)
    except RendezvousTimeoutError:
        refuse(f"host {here} waited in vain for hosts that ended (--rdzv-conf join_timeout): "
               f"{AGAIN}", code=1)  # fmt: skip
    except RendezvousError as error:
        refuse(out_of_reach(*endpoint(arguments), error), code=1)
    except SignalException as error:  # the ranks have saved, status.json says so
        raise SystemExit(128 + error.sigval) from None
    except (ValueError, OSError) as error:  # OSError: of --log-dir
        refuse(f"host {here}: {error}" if isinstance(error, OSError) else str(error), code=1)
    except KeyboardInterrupt:  # before torchrun takes the signal
        refuse(f"host {here} stopped before all hosts had come", code=130)


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what torchrun tells by a traceback, or after all hosts have come."""
    try:
        lowest, most = parse_min_max_nnodes(arguments.nnodes)
    except (ValueError, RuntimeError):
        lowest = most = 0
    if not 1 <= lowest <= most:
        raise ValueError(f"--nnodes {arguments.nnodes}: give a number of hosts, or LEAST:MOST")
    try:
        ranks, why = determine_local_world_size(arguments.nproc_per_node), "one is the least"
    except ValueError as error:
        ranks, why = 0, f"{error} On GPUs python train/doctor.py says why"
    if ranks < 1:
        raise ValueError(
            f"--nproc-per-node {arguments.nproc_per_node} on host {socket.gethostname()}: {why}; "
            "give a number of processes, or gpu where there are GPUs"
        )
    is_file = not (arguments.module or arguments.no_python)
    if is_file and not os.path.isfile(arguments.training_script):
        raise ValueError(
            f"{arguments.training_script} is not on host {socket.gethostname()}: start in the "
            "repository's folder"
        )


def launch(arguments: argparse.Namespace) -> None:
    """Start this host's ranks, on several hosts after the roll call."""
    lowest, most = parse_min_max_nnodes(arguments.nnodes)
    if most == 1 and not arguments.rdzv_endpoint:
        run(arguments)
        return
    if not arguments.rdzv_endpoint:
        raise ValueError("--nnodes above 1 needs --rdzv-endpoint HOST:PORT, one of the hosts")
    arguments.rdzv_backend = "c10d"
    host, port = endpoint(arguments)
    conf = dict(part.split("=", 1) for part in arguments.rdzv_conf.split(",") if "=" in part)
    try:
        limit_s = float(conf.get("join_timeout", 600))
    except ValueError:
        raise ValueError(f"--rdzv-conf {arguments.rdzv_conf}: join_timeout is seconds") from None
    with roll_call(host, port, run=arguments.rdzv_id, lowest=lowest, most=most, limit_s=limit_s):
        run(arguments)


def endpoint(arguments: argparse.Namespace) -> tuple[str, int]:
    """Host and port of the rendezvous."""
    return parse_rendezvous_endpoint(arguments.rdzv_endpoint, default_port=29400)


if __name__ == "__main__":
    main()
