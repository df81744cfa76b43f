"""A schedule as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopwright.schedules.compose import scaled
from loopwright.schedules.shapes import as_schedule

__all__ = ["plot"]


def plot(schedule: Any, ax: Any = None, *, points: int = 1001) -> Any:
    """Draw a schedule, or a dict of them (each on axes of its own), with matplotlib; returns the axes.

    Needs matplotlib: ``pip install "loopwright[plot]"``. Nothing is shown or written.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('schedule.plot() needs matplotlib: pip install "loopwright[plot]"') from error
    drawn = {name: as_schedule(one) for name, one in schedule.items()} if isinstance(schedule, Mapping) else None
    if drawn is not None:
        if ax is None:
            size = (5.0 * len(drawn), 3.2)
            _, ax = pyplot.subplots(1, len(drawn), figsize=size, layout="constrained", squeeze=False)
            ax = list(ax[0])
        for one, (name, part) in zip(ax, drawn.items(), strict=True):
            plot(part, one, points=points)
            one.set_ylabel(f"{name}, times its own" if isinstance(part, scaled) else name)
        return ax
    if ax is None:
        _, ax = pyplot.subplots(figsize=(5.0, 3.2), layout="constrained")
    at = [i / (points - 1) for i in range(points)]
    ax.plot(at, [schedule(fraction) for fraction in at], linewidth=1.8)
    ax.set_xlim(0, 1)
    ax.set_xlabel("part of the stage that is done")
    ax.set_ylabel("value")
    ax.grid(visible=True, alpha=0.3)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax
