"""Where a run lives: its processes, its device, its precision."""

from loopwright.parallel.comm import Single
from loopwright.parallel.device import pick_device
from loopwright.parallel.join import join, local_device
from loopwright.parallel.precision import Autocast, Plain, pick_precision
from loopwright.parallel.world import World, check_world, find_world

__all__ = [
    "Autocast",
    "Plain",
    "Single",
    "World",
    "check_world",
    "find_world",
    "join",
    "local_device",
    "pick_device",
    "pick_precision",
]
