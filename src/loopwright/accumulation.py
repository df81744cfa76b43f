"""How much goes into an optimizer step: batches, samples or tokens, always the same or changing with progress."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from loopwright.errors import SettingError
from loopwright.given import not_callable_with
from loopwright.progress import Progress
from loopwright.text import rule_name

__all__ = ["Accumulation", "Amount", "check_unit", "parse_accumulate"]

T = TypeVar("T")
_UNITS = ("batch", "batches", "sample", "samples", "token", "tokens")
_EXPECTED = (
    "a whole number of batches, at least 1, '256 samples', '4096 tokens', a list such as [(0, 1), (1000, 4)] of "
    "(from this step of the stage on, so much), or a function of run.progress that returns one of the first three"
)


class Amount(NamedTuple):
    """So many batches, samples or tokens."""

    n: int
    unit: str

    def take(self, items: Iterator[T], weigh: Callable[[T], float]) -> list[T]:
        """The next of ``items``, up to that which reaches this amount; fewer where they come to an end."""
        taken: list[T] = []
        total = 0.0
        for item in items:
            taken.append(item)
            total += 1 if self.unit == "batches" else weigh(item)
            if total >= self.n:
                break
        return taken


class Accumulation:
    """What is accumulated before a step, as a pure function of progress: nothing of it needs to be saved.

    >>> rule = Accumulation([(0, 1), (100, "256 samples")])
    >>> rule.at(Progress(stage_step=99)), rule.at(Progress(stage_step=100))
    (Amount(n=1, unit='batches'), Amount(n=256, unit='samples'))

    Raises SettingError for a rule that is none.
    """

    def __init__(self, given: Any) -> None:
        self.given = given
        self.parts: list[tuple[int, Amount]] = []
        if isinstance(given, str):
            self.parts = [(0, _amount(given))]
        elif isinstance(given, (list, tuple)):
            self.parts = [_part(one) for one in given]
            starts = [start for start, _ in self.parts]
            if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
                raise SettingError(f"accumulate={given!r}: the steps must rise from 0, as in [(0, 1), (1000, 4)]")
        elif not callable(given):
            raise SettingError(f"accumulate={given!r}: expected {_EXPECTED}")
        elif (why := not_callable_with(given, "progress")) is not None:
            raise SettingError(f"accumulate={rule_name(given)}{why}. Write: def accumulate(progress): ...")

    def at(self, progress: Progress) -> Amount:
        """How much the step after ``progress`` takes. Raises SettingError for what a function may not return."""
        if self.parts:
            return next(amount for start, amount in reversed(self.parts) if progress.stage_step >= start)
        return _amount(self.given(progress))

    @property
    def units(self) -> set[str]:
        """What is counted, as far as is known before it is asked."""
        return {amount.unit for _, amount in self.parts}

    def steps(self, sizes: Iterable[int]) -> int | None:
        """Steps over batches of ``sizes``; None where it depends on progress."""
        if len(self.parts) != 1:
            return None
        left, count = iter(sizes), 0
        while self.parts[0][1].take(left, float):
            count += 1
        return count

    def __str__(self) -> str:
        return str(getattr(self.given, "__qualname__", self.given))


def parse_accumulate(given: Any) -> int | Accumulation:
    """A whole number of batches as it is, anything else as an ``Accumulation``.

    Raises SettingError for what is neither.
    """
    if isinstance(given, Accumulation):
        return given
    made = None if isinstance(given, int) else Accumulation(given)
    if made is None or (isinstance(given, str) and made.units == {"batches"}):
        return _amount(given).n
    return made


def check_unit(unit: str, *, counts_samples: bool, who: str = "accumulate") -> None:
    """Raise SettingError where ``unit`` is not what weighs a batch: the mean of a step is taken over that."""
    if unit == "tokens" and counts_samples:
        raise SettingError(
            f"{who} counts tokens, and nothing says how many a batch has; pass fit(..., weight=lambda batch: ...)"
        )
    if unit == "samples" and not counts_samples:
        raise SettingError(
            "accumulate counts samples, but weight= weighs batches by something else; leave weight= out, or "
            "count that: accumulate='4096 tokens'"
        )


def _amount(given: Any) -> Amount:
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return Amount(given, "batches")
    if isinstance(given, int):
        raise SettingError(f"accumulate={given!r}: expected a whole number of batches, at least 1")
    match = re.fullmatch(r"\s*(\d[\d_]*)\s*([a-z]+)\s*", given) if isinstance(given, str) else None
    if match is None or match[2] not in _UNITS or int(match[1]) < 1:
        raise SettingError(f"accumulate={given!r}: expected {_EXPECTED}")
    return Amount(int(match[1]), "batches" if match[2].startswith("batch") else f"{match[2].rstrip('s')}s")


def _part(given: Any) -> tuple[int, Amount]:
    if not isinstance(given, Sequence) or len(given) != 2 or not isinstance(given[0], int) or given[0] < 0:
        raise SettingError(f"accumulate=[{given!r}]: expected pairs of a step and how much from there on, as (1000, 4)")
    return given[0], _amount(given[1])
