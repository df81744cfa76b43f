"""Public names that are called otherwise than before, and what their modules give under the old ones.

An entry stays for ever: `loopwright upgrade` rewrites old code by it, long after the name itself has gone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import loopwright
from loopwright.written import warn

__all__ = ["RENAMED", "Renamed", "old_name"]


@dataclass(frozen=True, slots=True)
class Renamed:
    """What a name is called now, since which version, and the version in which the old name goes."""

    to: str
    since: str
    goes: str


# in the same module before and after, as one writes them after `lw.`
RENAMED = {
    "optim.is_ours": Renamed("optim.is_schedule", since="0.1.0", goes="0.3.0"),
}

_HOW = "`loopwright upgrade .` shows what to change in your code, and changes it with --write"


def old_name(module: str, name: str) -> Any:
    """What ``module`` calls otherwise now, with a warning; AttributeError for all else, and once the old name goes.

    >>> old_name("loopwright.optim", "Adam")
    Traceback (most recent call last):
    AttributeError: module 'loopwright.optim' has no attribute 'Adam'
    """
    old = f"{module}.{name}".partition(".")[2]
    if old not in RENAMED:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    now = RENAMED[old]
    if _parts(loopwright.__version__) >= _parts(now.goes):
        raise AttributeError(f"lw.{old} went in {now.goes}; it is called lw.{now.to}. {_HOW}")
    warn(f"lw.{old} is called lw.{now.to} since {now.since}, and the old name goes in {now.goes}. {_HOW}")
    return getattr(sys.modules[module], now.to.rpartition(".")[2])


def _parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))
