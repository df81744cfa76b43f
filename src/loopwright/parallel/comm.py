"""The other processes of a run: with one process, there are none."""

from __future__ import annotations

__all__ = ["Single"]


class Single:
    """A run of one process.

    >>> Single().sum(3.0)
    3.0
    """

    rank = 0
    world_size = 1

    def sum(self, value: float) -> float:
        return value

    def any(self, flag: bool) -> bool:
        return flag
