"""Where a run lives: its processes, its device, its precision."""

from loopwright.parallel.comm import Ranks, Single
from loopwright.parallel.ddp import DDP
from loopwright.parallel.device import pick_device
from loopwright.parallel.pick import check_strategy, pick_team
from loopwright.parallel.precision import Autocast, Plain, pick_precision
from loopwright.parallel.team import Team, watched

__all__ = [
    "Autocast", "DDP", "Plain", "Ranks", "Single", "Team", "check_strategy", "pick_device", "pick_precision",
    "pick_team", "watched",
]  # fmt: skip
