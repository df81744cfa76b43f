"""Where a run lives: its processes, its device, its precision."""

from loopwright.parallel.comm import Ranks, Single
from loopwright.parallel.ddp import DDP
from loopwright.parallel.device import check_device, pick_device
from loopwright.parallel.fsdp import FSDP
from loopwright.parallel.join import join, local_device
from loopwright.parallel.norms import norms_in, syncs_norms
from loopwright.parallel.pick import check_strategy, pick_team
from loopwright.parallel.precision import Autocast, Plain, Scaled, pick_precision
from loopwright.parallel.shards import is_shard, like, local, region, shard_of, whole
from loopwright.parallel.team import Spare, Team, readers, watched
from loopwright.parallel.world import World, check_counts, check_world, find_world

__all__ = [
    "DDP",
    "FSDP",
    "Autocast",
    "Plain",
    "Ranks",
    "Scaled",
    "Single",
    "Spare",
    "Team",
    "World",
    "check_counts",
    "check_device",
    "check_strategy",
    "check_world",
    "find_world",
    "is_shard",
    "join",
    "like",
    "local",
    "local_device",
    "norms_in",
    "pick_device",
    "pick_precision",
    "pick_team",
    "readers",
    "region",
    "shard_of",
    "syncs_norms",
    "watched",
    "whole",
]
