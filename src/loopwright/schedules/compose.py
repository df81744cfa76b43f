"""Schedules made of others: one after the other, over and over, times what a group came with."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loopwright.errors import SettingError
from loopwright.progress import Duration
from loopwright.schedules.base import Schedule, Share, check_number, fractions, narrowed, place, places, share_of
from loopwright.schedules.shapes import as_schedule, cosine, linear

__all__ = ["concat", "cyclical", "one_cycle", "repeat", "restarts", "scaled", "warmup"]


@dataclass(frozen=True, slots=True)
class concat(Schedule):  # noqa: N801
    """One schedule after the other, each squeezed into its part; ``bounds`` says where each but the first begins.

    A place is a fraction, or a duration from the start. By default all parts are as long. A number stands for a
    constant. Where one ends and the next begins, the next holds.

    >>> rise_and_fall = concat([linear(0.0, 1.0), cosine(1.0, 0.0)], bounds=[0.25])
    >>> rise_and_fall(0.125), rise_and_fall(0.25), rise_and_fall(1.0)
    (0.5, 1.0, 0.0)
    """

    parts: Sequence[Schedule | float]
    bounds: Sequence[float | str | Duration] | None = None

    def __post_init__(self) -> None:
        parts = tuple(inner(part) for part in self.parts)
        if not parts:
            raise SettingError("concat([]) has nothing to put one after the other")
        bounds = [i / len(parts) for i in range(1, len(parts))] if self.bounds is None else self.bounds
        if len(bounds) + 1 != len(parts):
            raise SettingError(f"{len(parts)} parts have {len(parts) - 1} bounds between them; got bounds={bounds!r}")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "bounds", places(bounds, "bounds"))

    def at(self, fraction: float) -> float:
        parts: Any = self.parts
        bounds: Any = self.bounds
        if not fraction and bounds and bounds[0] != 0:  # also where a bound is a duration
            return parts[0].at(0.0)  # type: ignore[no-any-return]
        try:
            i = bisect_right(bounds, fraction)
            low, high = bounds[i - 1] if i else 0.0, bounds[i] if i < len(bounds) else 1.0
            part = (fraction - low) / (high - low) if high > low else 0.0
        except TypeError:
            fractions(bounds)  # tells which of them is none
            raise
        return parts[i].at(part)  # type: ignore[no-any-return]

    def within(self, share: Share) -> Schedule:
        bounds = [share_of(place, share) for place in self.bounds or ()]
        edges = [0.0, *bounds, 1.0]
        inner: list[Schedule | float] = []
        for part, low, high in zip(self.parts, edges, edges[1:], strict=False):
            inner.append(as_schedule(part).within(narrowed(share, high - low)))
        return concat(inner, bounds)


@dataclass(frozen=True, slots=True)
class repeat(Schedule):  # noqa: N801
    """``part`` over and over, ``times`` times, each ``stretch`` times as long as the one before.

    Each begins anew where the last has ended; the end of the last is the end.

    >>> repeat(linear(1.0, 0.0), 2)(0.75)
    0.5
    """

    part: Schedule
    times: int
    stretch: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", inner(self.part))
        _check_count("times", self.times)
        check_number("stretch", self.stretch)
        if self.stretch <= 0:
            raise SettingError(f"stretch={self.stretch!r}: expected a positive number")

    def at(self, fraction: float) -> float:
        if fraction == 1:
            return self.part.at(1.0)
        q = self.stretch
        if q == 1:
            passed = fraction * self.times
        else:  # the lengths are a geometric series, of which this is the place as a number of parts
            passed = math.log1p(fraction * (q**self.times - 1)) / math.log(q)
        i = min(int(passed + 1e-9), self.times - 1)  # k / total, times as many, may fall just short of a whole number
        if q != 1:
            begun = (q**i - 1) / (q**self.times - 1)
            passed = i + (fraction - begun) * (q**self.times - 1) / (q - 1) / q**i
        return self.part.at(min(max(passed - i, 0.0), 1.0))

    def within(self, share: Share) -> Schedule:
        lengths = [self.stretch**i for i in range(self.times)]
        parts = [self.part.within(narrowed(share, length / sum(lengths))) for length in lengths]
        if all(part == self.part for part in parts):
            return self
        return concat(parts, [sum(lengths[:i]) / sum(lengths) for i in range(1, self.times)])


@dataclass(frozen=True, slots=True)
class scaled(Schedule):  # noqa: N801
    """``part`` times the value that each group of the optimizer had when it was made: for discriminative rates.

    It goes around a whole schedule, not into another. By itself it gives the factor.

    >>> scaled(cosine(1.0, 0.0))(0.5)
    0.5
    """

    part: Schedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", inner(self.part))

    def at(self, fraction: float) -> float:
        return self.part.at(fraction)

    def within(self, share: Share) -> Schedule:
        return scaled(self.part.within(share))


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SettingError(f"{name}={value!r}: expected a whole number, from 1")


def inner(part: Any) -> Schedule:
    if isinstance(part, scaled):
        raise SettingError(f"{part!r} is inside of another schedule; put scaled(...) around the whole one")
    return as_schedule(part)


def warmup(schedule: Schedule | float, over: float | str | Duration, *, start: float = 0.0) -> Schedule:
    """A straight line from ``start`` to where ``schedule`` begins, and then all of it, in what is left.

    ``over`` is a fraction, or a duration such as ``"500 steps"`` or ``"1 epoch"``.
    Source: Goyal et al. 2017 (arXiv:1706.02677), section 2.2.

    >>> warmup(cosine(1.0, 0.0), 0.1)(0.05)
    0.5
    """
    if isinstance(schedule, scaled):
        return scaled(warmup(schedule.part, over, start=start))
    then = as_schedule(schedule)
    check_number("start", start)
    return concat([linear(start, then.at(0.0)), then], [place(over, "over")])


def cyclical(low: float, high: float, *, cycles: int, rise: float = 0.5) -> Schedule:
    """Up and down between ``low`` and ``high``, ``cycles`` times; ``rise`` is the part of a cycle that goes up.

    Source: Smith 2017 (arXiv:1506.01186), the triangular policy.

    >>> cyclical(0.0, 1.0, cycles=2)(0.25)
    1.0
    """
    check_number("low", low)
    check_number("high", high)
    _check_count("cycles", cycles)
    return repeat(concat([linear(low, high), linear(high, low)], [place(rise, "rise")]), cycles)


def restarts(high: float, low: float = 0.0, *, cycles: int, stretch: float = 1.0) -> Schedule:
    """Half a cosine from ``high`` to ``low``, ``cycles`` times, each ``stretch`` times as long as the one before.

    Source: Loshchilov & Hutter 2017 (arXiv:1608.03983), SGDR; ``stretch`` is its T_mult.

    >>> restarts(1.0, cycles=2)(0.5)
    1.0
    """
    check_number("high", high)
    check_number("low", low)
    _check_count("cycles", cycles)
    return repeat(cosine(high, low), cycles, stretch)


def one_cycle(
    peak: float | None = None,
    *,
    rise: float = 0.25,
    div: float = 25.0,
    div_final: float = 1e5,
    momentum: Sequence[float] | None = (0.95, 0.85, 0.95),
) -> dict[str, Schedule]:
    """One cycle of the learning rate, and one of the momentum against it: what ``schedule=`` takes.

    The rate goes from ``peak / div`` to ``peak`` in the first ``rise`` of the stage, then to ``peak / div_final``, by
    half cosines; the momentum (the first beta, for optimizers of Adam's kind) through the three values, unless
    ``momentum`` is None. Without a ``peak``, that of each group is its own learning rate.
    Source: Smith & Topin 2018 (arXiv:1708.07120), with the shape and the defaults of fastai's ``fit_one_cycle``.

    >>> sorted(one_cycle(0.01))
    ['lr', 'momentum']
    >>> one_cycle(0.01)["lr"](0.25)
    0.01
    """
    top = 1.0 if peak is None else peak
    check_number("peak", top)
    for name, number in (("div", div), ("div_final", div_final)):
        check_number(name, number)
        if number <= 0:
            raise SettingError(f"{name}={number!r}: expected a positive number, by which the peak is divided")
    up_to = [place(rise, "rise")]
    lr: Schedule = concat([cosine(top / div, top), cosine(top, top / div_final)], up_to)
    made: dict[str, Schedule] = {"lr": scaled(lr) if peak is None else lr}
    if momentum is not None:
        if not isinstance(momentum, (tuple, list)) or len(momentum) != 3:
            raise SettingError(
                f"momentum={momentum!r}: expected three numbers, at the start, at the peak and at the end, such as "
                "(0.95, 0.85, 0.95), or None"
            )
        for one in momentum:
            check_number("momentum", one)
        first, middle, last = momentum
        made["momentum"] = concat([cosine(first, middle), cosine(middle, last)], up_to)
    return made
