"""Where a run lives: its processes, its device, its precision."""

from loopwright.parallel.comm import Ranks, Single
from loopwright.parallel.ddp import DDP
from loopwright.parallel.device import pick_device
from loopwright.parallel.join import join, local_device
from loopwright.parallel.pick import check_strategy, pick_team
from loopwright.parallel.precision import Autocast, Plain, Scaled, pick_precision
from loopwright.parallel.team import Team, watched
from loopwright.parallel.world import World, check_world, find_world

__all__ = [
    "DDP",
    "Autocast",
    "Plain",
    "Ranks",
    "Scaled",
    "Single",
    "Team",
    "World",
    "check_strategy",
    "check_world",
    "find_world",
    "join",
    "local_device",
    "pick_device",
    "pick_precision",
    "pick_team",
    "watched",
]
