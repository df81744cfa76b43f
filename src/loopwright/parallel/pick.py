"""Which ranks a run has, and on which device this one computes."""

from __future__ import annotations

from typing import Any

import torch

from loopwright.errors import SettingError, choose
from loopwright.parallel.comm import Ranks
from loopwright.parallel.ddp import DDP
from loopwright.parallel.device import pick_device
from loopwright.parallel.fsdp import FSDP
from loopwright.parallel.join import join, local_device
from loopwright.parallel.team import Team
from loopwright.parallel.world import check_world, find_world
from loopwright.state import Strategy

__all__ = ["check_strategy", "pick_team"]

_STRATEGIES: dict[str, Any] = {"auto": DDP, "ddp": DDP, "fsdp": FSDP, "single": None}


def check_strategy(strategy: str | Strategy) -> None:
    """Raise SettingError unless ``strategy`` is a name, or an object with ``begin_stage``."""
    if isinstance(strategy, str):
        if strategy not in _STRATEGIES:
            raise SettingError(f"strategy={strategy!r} is unknown. {choose(strategy, _STRATEGIES)}")
    elif isinstance(strategy, type) or not callable(getattr(strategy, "begin_stage", None)):
        raise SettingError(
            f"strategy={strategy!r}: expected 'auto', 'ddp', 'fsdp', 'single' or an object such as "
            "lw.DDP(find_unused=True)"
        )


def pick_team(
    device: str | torch.device, *, devices: int | str, nodes: int | str, strategy: str | Strategy
) -> tuple[torch.device, Team | None]:
    """The device of this process, and its team: None where it trains alone. Joins the process group once.

    Raises SettingError where ``devices`` or ``nodes`` are not what was started.

    >>> pick_team("cpu", devices="auto", nodes="auto", strategy="auto")
    (device(type='cpu'), None)
    """
    world = find_world()
    check_world(world, devices, nodes)
    if strategy == "single" or world.world_size == 1:
        return pick_device(device), None
    picked = pick_device(device)
    join(world, picked.type)
    if picked.type != "cpu":
        own = local_device(world, picked.type)
        if picked.index not in (None, own.index) and device != "auto":
            raise SettingError(
                f"device={str(device)!r} is one for all {world.local_world_size} processes of this machine; write "
                f"device={picked.type!r}, and each takes its own"
            )
        picked = own
    made: Any = _STRATEGIES[strategy]() if isinstance(strategy, str) else strategy
    return picked, Team(Ranks(), made, picked)
