"""The shapes that schedules are made of."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loopwright.errors import SettingError
from loopwright.progress import Duration
from loopwright.schedules.base import (
    Schedule,
    Share,
    check_number,
    check_numbers,
    fractions,
    places,
    share_of,
)

__all__ = ["as_schedule", "constant", "cosine", "curve", "exponential", "linear", "piecewise", "polynomial"]


@dataclass(frozen=True, slots=True)
class constant(Schedule):  # noqa: N801 - these classes read as verbs: cosine(1e-3, 0.0)
    """``value`` all along.

    >>> constant(0.1)(0.7)
    0.1
    """

    value: float

    def __post_init__(self) -> None:
        check_numbers(self)

    def at(self, fraction: float) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class linear(Schedule):  # noqa: N801
    """A straight line from ``start`` to ``end``."""

    start: float
    end: float

    def __post_init__(self) -> None:
        check_numbers(self)

    def at(self, fraction: float) -> float:
        return self.start * (1 - fraction) + self.end * fraction


@dataclass(frozen=True, slots=True)
class cosine(Schedule):  # noqa: N801
    """Half a cosine from ``start`` to ``end``, flat at both.

    Source: Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5.

    >>> cosine(1.0, 0.0)(0.5)
    0.5
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        check_numbers(self)

    def at(self, fraction: float) -> float:
        share = (1 + math.cos(math.pi * fraction)) / 2
        return self.start * share + self.end * (1 - share)


@dataclass(frozen=True, slots=True)
class polynomial(Schedule):  # noqa: N801
    """From ``start`` to ``end`` as ``(1 - fraction) ** power`` falls.

    >>> polynomial(1.0, 0.0, power=2)(0.5)
    0.25
    """

    start: float
    end: float
    power: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.power <= 0:
            raise SettingError(f"power={self.power!r}: expected a positive number")

    def at(self, fraction: float) -> float:
        share: float = (1 - fraction) ** self.power
        return self.start * share + self.end * (1 - share)


@dataclass(frozen=True, slots=True)
class exponential(Schedule):  # noqa: N801
    """From ``start`` to ``end`` by the same factor in equal parts; both are positive, or both negative.

    >>> exponential(1e-4, 1.0)(0.5)
    0.01
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.start * self.end <= 0:
            raise SettingError(f"{self!r}: no factor leads from one to the other; expected two numbers of one sign")

    def at(self, fraction: float) -> float:
        return self.end if fraction == 1 else self.start * (self.end / self.start) ** fraction


@dataclass(frozen=True, slots=True)
class piecewise(Schedule):  # noqa: N801
    """Straight lines through ``points``, pairs ``(place, value)``; before the first and after the last it is level.

    A place is a fraction, or a duration from the start, such as ``"2 epochs"``.

    >>> piecewise([(0, 0.0), (0.5, 1.0), (1, 0.0)])(0.25)
    0.5
    """

    points: Sequence[tuple[float | str | Duration, float]]

    def __post_init__(self) -> None:
        points = self.points.items() if isinstance(self.points, Mapping) else self.points
        if not points or not all(isinstance(point, (tuple, list)) and len(point) == 2 for point in points):
            raise SettingError(f"points={self.points!r}: expected pairs such as [(0, 0.1), (0.3, 1.0), (1, 0.0)]")
        at = places([place for place, _ in points], "points")
        for _, value in points:
            check_number("points", value)
        object.__setattr__(self, "points", tuple(zip(at, (value for _, value in points), strict=True)))

    def at(self, fraction: float) -> float:
        known = fractions([place for place, _ in self.points])
        i = bisect_right(known, fraction)
        if i in (0, len(known)):
            return self.points[max(i - 1, 0)][1]
        (_, low), (_, high) = self.points[i - 1 : i + 1]
        part = (fraction - known[i - 1]) / (known[i] - known[i - 1])
        return low * (1 - part) + high * part

    def within(self, share: Share) -> Schedule:
        return piecewise([(share_of(place, share), value) for place, value in self.points])


@dataclass(frozen=True, slots=True)
class curve(Schedule):  # noqa: N801
    """Any ``function`` of the fraction; it cannot be read back from plain data.

    >>> curve(lambda fraction: 0.1 * (1 - fraction))(1.0)
    0.0
    """

    function: Callable[[float], float]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise SettingError(f"curve({self.function!r}): expected a function of the fraction")

    def at(self, fraction: float) -> float:
        return float(self.function(fraction))

    def __repr__(self) -> str:
        return f"curve({getattr(self.function, '__qualname__', repr(self.function))})"


def as_schedule(value: Any) -> Schedule:
    """``value`` itself, a constant for a number, a curve for a function. Raises SettingError for anything else.

    >>> as_schedule(0.1)
    constant(value=0.1)
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, type):
        raise SettingError(f"{value.__name__} is a kind of schedule; make one, such as {value.__name__}(...)")
    if callable(value):
        return curve(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return constant(float(value))
    raise SettingError(f"{value!r} is no schedule; write a number, or one such as lw.schedules.cosine(1e-3, 0.0)")
