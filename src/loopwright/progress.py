"""How far a run is, and how long something lasts: progress, durations, the ends of a stage."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from loopwright.errors import SettingError, choose

__all__ = ["Duration", "Ends", "Progress", "Whole", "alternatives", "field_of", "is_counted"]


class Progress(NamedTuple):
    """Completed units of a run: an immutable value that only ``loop.py`` replaces.

    ``stage``, ``epoch``, ``step``, ``samples`` and ``seconds`` count over the whole run (seconds over restarts),
    ``batch`` within the open epoch, ``stage_step`` within the open stage, ``phase_steps`` for each phase by name.
    A named tuple, since one is made at every step and a frozen dataclass costs more than twice as much.

    >>> Progress(epoch=2, batch=3).epoch
    2
    """

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    stage_step: int = 0
    samples: int = 0
    phase_steps: dict[str, int] = {}  # noqa: RUF012 - replaced, never changed
    seconds: float = 0.0


_UNITS = {
    "step": "steps", "steps": "steps", "epoch": "epochs", "epochs": "epochs",
    "sample": "samples", "samples": "samples", "token": "tokens", "tokens": "tokens", "batch": "batches",
    "batches": "batches", "%": "percent", "percent": "percent", "s": "seconds", "sec": "seconds",
    "second": "seconds", "seconds": "seconds", "min": "minutes", "minute": "minutes", "minutes": "minutes",
    "h": "hours", "hour": "hours", "hours": "hours", "day": "days", "days": "days",
}  # fmt: skip
_WHOLE = ("steps", "samples", "tokens", "batches")
_COUNTED = {"steps": "step", "epochs": "epoch", "samples": "samples", "tokens": "samples", "seconds": "seconds"}
_SECONDS = {"minutes": 60.0, "hours": 3600.0, "days": 86400.0}


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of training: a number of steps, epochs, samples, tokens, batches or seconds, or a part of a stage.

    Tokens are what ``fit(weight=)`` gives.

    >>> Duration.parse("10 min")
    Duration(value=600.0, unit='seconds')
    >>> Duration.parse(500)
    Duration(value=500.0, unit='steps')
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, text: Duration | int | str, *, unit: str = "steps") -> Duration:
        """Read "500 steps", "2 epochs", "10 min", "1e6 samples", "10%" or a bare number of ``unit``.

        Raises SettingError for an unknown unit, and for a value that is not a positive number.
        """
        if isinstance(text, Duration):
            return text
        return (_read if isinstance(text, (str, int, float)) else _read.__wrapped__)(text, unit)

    def position(self, progress: Progress, batches: int | None = None) -> float:
        """Where ``progress`` stands in this unit; epochs count fractions when ``batches`` an epoch are known."""
        counted: float = progress[field_of(self)]  # type: ignore[assignment]
        return counted + (progress.batch / batches if batches and self.unit == "epochs" else 0.0)

    @property
    def is_part(self) -> bool:
        """True for a part of an epoch, which only data with a known number of batches has."""
        return self.unit == "epochs" and self.value % 1 != 0

    def __str__(self) -> str:
        if self.unit == "percent":
            return f"{self.value:.15g}%"
        singular = "batch" if self.unit == "batches" else self.unit[:-1]
        return f"{self.value:.15g} {self.unit if self.value != 1 else singular}"


@lru_cache(maxsize=256, typed=True)  # every fit reads the same few
def _read(text: int | str, unit: str) -> Duration:
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*([a-z]*|%)\s*", str(text), re.IGNORECASE)
    try:
        if match is None or isinstance(text, bool):
            raise ValueError
        value, name = float(match[1]), match[2].lower() or unit
    except ValueError:
        raise SettingError(
            f"{text!r} is not a duration; write a number and a unit, such as '500 steps', '2 epochs', "
            "'10 min' or '1e6 samples'"
        ) from None
    if name not in _UNITS:
        raise SettingError(f"unknown unit {name!r} in the duration {text!r}. {choose(name, _UNITS)}")
    unit = _UNITS[name]
    if not value > 0 or math.isinf(value) or (unit in _WHOLE and value % 1):
        raise SettingError(f"the duration {text!r} must be a positive {'whole ' if value % 1 else ''}number")
    if unit == "percent" and value > 100:
        raise SettingError(f"the duration {text!r} is more than all; write at most 100%")
    return Duration(value * _SECONDS.get(unit, 1.0), "seconds" if unit in _SECONDS else unit)


def field_of(duration: Duration) -> int:
    """Which field of a Progress counts the unit of ``duration``."""
    return Progress._fields.index(_COUNTED[duration.unit])


def is_counted(duration: Duration) -> bool:
    """True for what progress alone tells, without the length of a stage or of its epochs."""
    return duration.unit in _COUNTED and not duration.is_part


@dataclass(frozen=True, slots=True)
class Ends:
    """Several durations as one: "10 epochs | 2 h" lasts until the first is over, "2 epochs & 500 steps" until both are.

    ``parts``: the first of them that is over counts; each is over with the last of its own.

    >>> str(Ends.parse("500 steps & 2 epochs | 1 h"))
    '500 steps & 2 epochs | 3600 seconds'
    """

    parts: tuple[tuple[Duration, ...], ...]

    @classmethod
    def parse(cls, text: Ends | Duration | int | str, *, unit: str = "steps") -> Ends:
        """Read durations joined by "|" and "&", which binds closer. Raises SettingError as ``Duration.parse`` does."""
        if isinstance(text, Ends):
            return text
        if not isinstance(text, str):
            return cls(((Duration.parse(text, unit=unit),),))
        return cls(tuple(tuple(Duration.parse(d, unit=unit) for d in part) for part in alternatives(text)))

    @property
    def alone(self) -> Duration | None:
        """The duration, if it is one."""
        return self.parts[0][0] if len(self.parts) == len(self.parts[0]) == 1 else None

    def share(self, of: Callable[[Duration], float]) -> float:
        """What part of a whole it is, by what part each of its durations is."""
        return min(max(of(duration) for duration in part) for part in self.parts)

    def __str__(self) -> str:
        return " | ".join(" & ".join(map(str, part)) for part in self.parts)


def alternatives(text: str) -> list[list[str]]:
    """What stands between "|", and in each what stands between "&", which binds closer. SettingError for brackets.

    >>> alternatives("500 steps & 2 epochs | 1 h")
    [['500 steps ', ' 2 epochs '], [' 1 h']]
    """
    if "(" in text or ")" in text:
        raise SettingError(f"{text!r}: write it without brackets; '&' binds closer than '|': 'a & c | b & c'")
    return [part.split("&") for part in text.split("|")]


@dataclass(frozen=True, slots=True)
class Whole:
    """How long a stage is: its ``ends``, of which the first one reached counts, and the steps of an epoch.

    ``per_epoch``: optimizer steps in an epoch, None where the data does not tell; ``batches`` in an epoch: those of a
    step where None, and alone where windows of so many tokens are not known by number.

    >>> whole = Whole((Duration.parse("4 epochs"),), per_epoch=10)
    >>> whole.share(Duration.parse("10 steps")), whole.fraction(Progress(epoch=1, batch=5), Progress())
    (0.25, 0.375)
    """

    ends: tuple[Duration, ...]
    per_epoch: int | None = None
    batches: int | None = None

    def fraction(self, now: Progress, start: Progress) -> float:
        """What part of the stage is done, from 0 to 1: completed steps (samples, seconds) by their number in all.

        Epochs of unknown length count when they are over.
        """
        done, each = 0.0, self.per_epoch
        for end in self.ends:
            unit, value = end.unit, end.value
            if unit == "steps":
                part = (now.step - start.step) / value
            elif unit == "epochs":
                if value % 1 and each is not None:  # ends after so many steps
                    part = (now.step - start.step) / max(1, round(value * each))
                elif each is None:
                    inside = 0 if self.batches is None else min(1.0, now.batch / self.batches)
                    part = (now.epoch - start.epoch + inside) / value
                else:
                    inside = now.batch * each // self.batches if self.batches else now.batch
                    part = ((now.epoch - start.epoch) * each + (inside if inside < each else each)) / (value * each)
            elif unit == "samples":
                part = (now.samples - start.samples) / value
            else:
                part = (now.seconds - start.seconds) / value
            if part > done:
                done = part
        return done if done < 1.0 else 1.0

    def share(self, duration: Duration) -> float:
        """What part of the stage ``duration`` is. Raises SettingError where it cannot be known before it is over."""
        if duration.unit == "percent":
            return duration.value / 100
        unit = "samples" if duration.unit == "tokens" else duration.unit
        same = [end.value for end in self.ends if end.unit == unit]
        if same:
            return duration.value / min(same)
        if self.per_epoch is not None:
            a_batch = self.per_epoch / self.batches if self.batches else 1
            each = {"steps": 1, "epochs": self.per_epoch, "batches": a_batch}
            steps = [end.value * each[end.unit] for end in self.ends if end.unit in each]
            if steps and unit in each:
                return duration.value * each[unit] / min(steps)
        elif self.batches is not None and unit == "batches" and [end.unit for end in self.ends] == ["epochs"]:
            return duration.value / (self.ends[0].value * self.batches)
        raise SettingError(
            f"what part '{duration}' is of a stage that lasts {self} is not known before it is over; give a fraction "
            f"such as 0.1, or a duration in {' or '.join(sorted({end.unit for end in self.ends})) or 'its own unit'}"
        )

    @property
    def is_known(self) -> bool:
        """True if every step can be told what part of the stage is done: there is an end, and epochs have a length."""
        known = self.per_epoch is not None or self.batches is not None
        return bool(self.ends) and (known or all(end.unit != "epochs" for end in self.ends))

    def __str__(self) -> str:
        return " or ".join(str(end) for end in self.ends) or "until something happens"
