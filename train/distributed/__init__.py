"""The processes of a run: which one this is, how they start, agree, stop, and who is gone.

World is this process among them; every collective outside the model is here. Imports config/,
methods/ and network/.
"""

from train.distributed.devices import resolve_device, take_device
from train.distributed.signals import StopSignal, stop_at_once
from train.distributed.startup import start
from train.distributed.world import World, from_main, gather, mean, own_buffers

__all__ = [
    "StopSignal",
    "World",
    "from_main",
    "gather",
    "mean",
    "own_buffers",
    "resolve_device",
    "start",
    "stop_at_once",
    "take_device",
]
