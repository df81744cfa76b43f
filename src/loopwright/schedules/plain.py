"""Schedules read back from plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loopwright.errors import SettingError, choose
from loopwright.schedules.base import Schedule
from loopwright.schedules.compose import concat, cyclical, repeat, restarts, scaled, warmup
from loopwright.schedules.shapes import constant, cosine, exponential, linear, piecewise, polynomial

__all__ = ["from_plain"]


def from_plain(data: Mapping[str, Any]) -> Schedule:
    """The schedule that ``plain`` has written down. Raises SettingError for an unknown kind, and for other fields.

    >>> from_plain({"kind": "warmup", "schedule": {"kind": "cosine", "start": 0.1, "end": 0}, "over": "500 steps"})
    concat(parts=(linear(start=0.0, end=0.1), cosine(start=0.1, end=0)), bounds=(Duration(value=500.0, unit='steps'),))
    """
    rest = {name: _read(value) for name, value in data.items() if name != "kind"}
    kind = _KINDS.get(data.get("kind", ""))
    if kind is None:
        raise SettingError(f"{dict(data)!r} names no kind of schedule. {choose(data.get('kind'), _KINDS)}")
    try:
        return kind(**rest)
    except TypeError as error:
        raise SettingError(f"{data['kind']} does not take these fields: {error}") from None


_SHAPES = (constant, linear, cosine, polynomial, exponential, piecewise, concat, repeat, scaled)
_KINDS: dict[str, Callable[..., Schedule]] = {
    **{kind.__name__: kind for kind in _SHAPES}, "warmup": warmup, "cyclical": cyclical, "restarts": restarts,
}  # fmt: skip


def _read(value: Any) -> Any:
    if isinstance(value, Mapping):
        return from_plain(value)
    return [_read(one) for one in value] if isinstance(value, (list, tuple)) else value
