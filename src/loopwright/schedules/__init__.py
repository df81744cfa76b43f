"""Values that change while training goes on: each a pure function of the part of a stage that is done, from 0 to 1.

They are plain values: comparable, printed as they are written, readable back (``plain``, ``from_plain``). Nothing of
them is in a checkpoint, since where training stands says where they stand.
"""

from loopwright.schedules.base import Schedule
from loopwright.schedules.compose import concat, cyclical, one_cycle, repeat, restarts, scaled, warmup
from loopwright.schedules.picture import plot
from loopwright.schedules.plain import from_plain
from loopwright.schedules.shapes import (
    as_schedule,
    constant,
    cosine,
    curve,
    exponential,
    linear,
    piecewise,
    polynomial,
)

__all__ = [
    "Schedule", "as_schedule", "concat", "constant", "cosine", "curve", "cyclical", "exponential", "from_plain",
    "linear", "one_cycle", "piecewise", "plot", "polynomial", "repeat", "restarts", "scaled", "warmup",
]  # fmt: skip
