"""What a schedule is, and the places inside of one: fractions of the whole, or durations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from loopwright.errors import SettingError
from loopwright.progress import Duration, Ends

__all__ = [
    "Schedule", "Share", "check_number", "check_numbers", "check_values", "fractions", "narrowed", "place", "places",
    "share_of",
]  # fmt: skip

Share = Callable[[Duration], float]  # what part of the whole a duration is


class Schedule:
    """A value for each fraction of a stage: ``schedule(0.0)`` at its first step, ``schedule(1.0)`` at its end.

    Made by ``cosine(1e-3, 0.0)`` and the other names of this module. Raises SettingError outside of 0..1, and where a
    part of it is said in steps or epochs, whose fraction only a run knows.

    >>> from loopwright.schedules import linear
    >>> linear(1.0, 0.0)(0.25)
    0.75
    """

    __slots__ = ()

    def __call__(self, fraction: float) -> float:
        if not 0 <= fraction <= 1:
            raise SettingError(f"a schedule goes from 0 to 1, the part of a stage that is done; got {fraction!r}")
        return self.at(fraction)

    def at(self, fraction: float) -> float:
        """The value at ``fraction``, which is not checked."""
        raise NotImplementedError

    def within(self, share: Share) -> Schedule:
        """The same with fractions in place of durations; ``share`` says what part of the whole one is."""
        return self

    def plain(self) -> dict[str, Any]:
        """Names and numbers that ``from_plain`` reads back.

        >>> from loopwright.schedules import cosine
        >>> cosine(0.1, 0.0).plain()
        {'kind': 'cosine', 'start': 0.1, 'end': 0.0}
        """
        own: Any = self
        return {"kind": type(self).__name__, **{f.name: _plain(getattr(self, f.name)) for f in fields(own)}}

    def plot(self, ax: Any = None) -> Any:
        """Draw it with matplotlib, on ``ax`` if given; the axes are returned."""
        from loopwright.schedules.picture import plot

        return plot(self, ax)


def check_number(name: str, value: Any) -> None:
    """Raise SettingError unless ``value`` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SettingError(f"{name}={value!r}: expected a finite number")


def check_numbers(schedule: Any) -> None:
    """Raise SettingError unless every field of ``schedule`` is a finite number."""
    for field in fields(schedule):
        check_number(field.name, getattr(schedule, field.name))


def check_values(
    at: Callable[[float], Any], name: str, low: float = -math.inf, high: float = math.inf, *, below: bool = False
) -> None:
    """Raise SettingError unless ``at`` gives finite numbers from ``low`` to ``high`` (below it with ``below``).

    It is called at 32 places, from the start to shortly before the end.

    >>> check_values(lambda fraction: 1 - 2 * fraction, "lr", 0.0)
    Traceback (most recent call last):
    loopwright.errors.SettingError: the schedule of 'lr' gives -0.0625 when 0.53125 of the stage is done; expected ...
    """
    for fraction in (k / 32 for k in range(32)):
        try:
            value = float(at(fraction))
        except Exception as error:
            raise SettingError(
                f"the schedule of {name!r} fails when {fraction:g} of the stage is done: {error!r}. It is called with "
                "numbers from 0 to 1 and gives a number"
            ) from error
        if not (math.isfinite(value) and low <= value <= high and not (below and value == high)):
            wanted = "a finite number" if low == -math.inf else f"{low:g} or more"
            if high < math.inf:
                wanted = f"a number from {low:g} to {'below ' if below else ''}{high:g}"
            raise SettingError(
                f"the schedule of {name!r} gives {value:g} when {fraction:g} of the stage is done; expected {wanted}"
            )


def places(places: Sequence[Any], name: str) -> tuple[Any, ...]:
    """Fractions in order, or durations, of which several may be joined by "|" (the first) and "&" (the last)."""
    made: list[Any] = [_place(place) for place in places]
    known = [place for place in made if not isinstance(place, (Duration, Ends))]
    for place in known:
        check_number(name, place)
    if any(not 0 <= place <= 1 for place in known) or any(b < a for a, b in pairwise(known)):
        raise SettingError(
            f"{name}={list(places)!r}: expected fractions from 0 to 1 that do not fall, or durations such as "
            "'500 steps'"
        )
    return tuple(made)


def place(given: Any, name: str) -> Any:
    """One place, told by its own ``name`` where it is none."""
    made = _place(given)
    if not isinstance(made, (Duration, Ends)):
        check_number(name, made)
        if not 0 <= made <= 1:
            raise SettingError(f"{name}={given!r}: expected a fraction from 0 to 1, or a duration such as '500 steps'")
    return made


def _place(given: Any) -> Any:
    if isinstance(given, str):
        ends = Ends.parse(given)
        given = ends if ends.alone is None else ends.alone
    return given.value / 100 if isinstance(given, Duration) and given.unit == "percent" else given


def fractions(places: Sequence[Any]) -> list[float]:
    """The places, all of which must be fractions by now."""
    for place in places:
        if isinstance(place, (Duration, Ends)):
            raise SettingError(
                f"how much '{place}' is of the whole is known in a run only; give a fraction, or say how long the "
                "whole is: schedule.within(lambda duration: duration.value / 10_000)"
            )
    return list(places)


def share_of(place: Any, share: Share) -> float:
    """A place as a fraction. Raises SettingError for a duration that is longer than the whole."""
    if not isinstance(place, (Duration, Ends)):
        return float(place)
    part = share(place) if isinstance(place, Duration) else place.share(share)
    if part > 1:
        raise SettingError(f"'{place}' is longer than the whole in which it lies; make it shorter, or give a fraction")
    return part


def narrowed(share: Share, width: float) -> Share:
    """``share`` of a part that is ``width`` of the whole."""
    return lambda duration: share(duration) / width if width else math.inf


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.plain()
    if isinstance(value, (Duration, Ends)):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return value if not callable(value) else getattr(value, "__qualname__", repr(value))
