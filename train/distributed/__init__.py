"""The processes of a run: which one this is, how they start, agree, stop, and which one failed.

World is this process among them; every collective outside the model is in this folder. Imports
config/, methods/ and network/.
"""

from train.distributed.devices import resolve_device, take_device
from train.distributed.startup import start
from train.distributed.watch import is_lost_connection
from train.distributed.world import (
    StopSignal,
    World,
    failure_of_any,
    from_main,
    gather,
    mean,
    own_buffers,
    stop_at_once,
)

__all__ = [
    "StopSignal",
    "World",
    "failure_of_any",
    "from_main",
    "gather",
    "is_lost_connection",
    "mean",
    "own_buffers",
    "resolve_device",
    "start",
    "stop_at_once",
    "take_device",
]
