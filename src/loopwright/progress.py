"""How far a run is, and how long or how often something lasts: progress, durations, intervals."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from loopwright.errors import SettingError, choose

__all__ = ["Duration", "Every", "Progress", "Whole"]


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
    "sample": "samples", "samples": "samples", "s": "seconds", "sec": "seconds",
    "second": "seconds", "seconds": "seconds", "min": "minutes", "minute": "minutes", "minutes": "minutes",
    "h": "hours", "hour": "hours", "hours": "hours", "day": "days", "days": "days",
}  # fmt: skip
_SECONDS = {"minutes": 60.0, "hours": 3600.0, "days": 86400.0}


@dataclass(frozen=True, slots=True)
class Duration:
    """A length of training: a number of steps, epochs, samples or seconds.

    >>> Duration.parse("10 min")
    Duration(value=600.0, unit='seconds')
    >>> Duration.parse(500)
    Duration(value=500.0, unit='steps')
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, text: Duration | int | str, *, unit: str = "steps") -> Duration:
        """Read ``"500 steps"``, ``"2 epochs"``, ``"10 min"``, ``"1e6 samples"`` or a bare number of ``unit``.

        Raises SettingError for an unknown unit, and for a value that is not a positive number.
        """
        if isinstance(text, Duration):
            return text
        match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)\s*([a-z]*)\s*", str(text), re.IGNORECASE)
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
        if not value > 0 or math.isinf(value) or (unit in ("steps", "samples") and value % 1):
            raise SettingError(f"the duration {text!r} must be a positive {'whole ' if value % 1 else ''}number")
        return cls(value * _SECONDS.get(unit, 1.0), "seconds" if unit in _SECONDS else unit)

    def position(self, progress: Progress, batches: int | None = None) -> float:
        """Where ``progress`` stands in this unit; epochs count fractions when ``batches`` an epoch are known."""
        counted: float = progress[_field_of(self.unit)]  # type: ignore[assignment]
        return counted + (progress.batch / batches if batches and self.unit == "epochs" else 0.0)

    @property
    def is_part(self) -> bool:
        """True for a part of an epoch, which only data with a known number of batches has."""
        return self.unit == "epochs" and self.value % 1 != 0

    def __str__(self) -> str:
        return f"{self.value:.15g} {self.unit if self.value != 1 else self.unit[:-1]}"


def _field_of(unit: str) -> int:
    """Which field of a Progress counts ``unit``."""
    return Progress._fields.index({"steps": "step", "epochs": "epoch"}.get(unit, unit))


class Every:
    """An interval: ``due`` is true when a multiple of the duration has been completed since it was asked last.

    Multiples count from the start of the run, so nothing needs saving and a resumed run fires where it would have.

    >>> every = Every("2 steps")
    >>> [every.due(Progress(step=n)) for n in (1, 2, 3, 4, 5)]
    [False, True, False, True, False]
    """

    __slots__ = ("_field", "batches", "duration", "next")

    def __init__(self, duration: Duration | int | str, *, unit: str = "steps") -> None:
        self.duration = Duration.parse(duration, unit=unit)
        self._field = _field_of(self.duration.unit)
        self.start(Progress())

    def start(self, progress: Progress, batches: int | None = None) -> None:
        """Begin, or begin again after a resume, at ``progress``; ``batches`` an epoch allow parts of an epoch."""
        self.batches = batches if self.duration.is_part else None
        self._after(self.duration.position(progress, self.batches))

    def _after(self, position: float) -> None:
        self.next = (math.floor(position / self.duration.value + 1e-9) + 1) * self.duration.value - 1e-9

    def due(self, progress: Progress) -> bool:
        """True once for each multiple reached; one long step that passes several counts once."""
        if self.batches is None and progress[self._field] < self.next:  # type: ignore[operator]
            return False  # nearly always, hence first
        position = self.duration.position(progress, self.batches)
        if position < self.next:
            return False
        self._after(position)
        return True


@dataclass(frozen=True, slots=True)
class Whole:
    """How long a stage is: its ``ends``, of which the first one reached counts, and the steps of an epoch.

    ``per_epoch``: optimizer steps in an epoch, None where the data does not tell; ``accumulate``: batches of a step,
    the mean where that changes.

    >>> whole = Whole((Duration.parse("4 epochs"),), per_epoch=10)
    >>> whole.share(Duration.parse("10 steps")), whole.fraction(Progress(epoch=1, batch=5), Progress())
    (0.25, 0.375)
    """

    ends: tuple[Duration, ...]
    per_epoch: int | None = None
    accumulate: float = 1

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
                    part = (now.epoch - start.epoch) / value
                else:
                    inside = now.batch // self.accumulate
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
        same = [end.value for end in self.ends if end.unit == duration.unit]
        if same:
            return duration.value / min(same)
        if self.per_epoch is not None:
            each = {"steps": 1, "epochs": self.per_epoch}
            steps = [end.value * each[end.unit] for end in self.ends if end.unit in each]
            if steps and duration.unit in each:
                return duration.value * each[duration.unit] / min(steps)
        raise SettingError(
            f"what part '{duration}' is of a stage that lasts {self} is not known before it is over; give a fraction "
            f"such as 0.1, or a duration in {' or '.join(sorted({end.unit for end in self.ends})) or 'its own unit'}"
        )

    @property
    def is_known(self) -> bool:
        """True if every step can be told what part of the stage is done: there is an end, and epochs have a length."""
        return bool(self.ends) and (self.per_epoch is not None or all(end.unit != "epochs" for end in self.ends))

    def __str__(self) -> str:
        return " or ".join(str(end) for end in self.ends) or "until something happens"
