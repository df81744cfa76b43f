"""When something is done again: intervals, in one language for records, validations, checkpoints and events."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from loopwright.accumulation import check_unit
from loopwright.errors import SettingError, choose
from loopwright.progress import Duration, Progress, alternatives, field_of, is_counted

if TYPE_CHECKING:
    from loopwright.state import Run, Stage

__all__ = ["Every"]

_WORDS = ("every", "at", "after", "before")
_MOMENTS = ("every", "at")  # the others hold for a while, and say no moment


class Every:
    """When something is done: ``due`` is true once at each of its moments, however often it is asked there.

    ``"500 steps"``, or ``"every 500 steps"``: when a multiple has been completed since it was asked last.
    ``"at 20 epochs"``: once, when so much has been completed. ``"a | b"``: at either. ``"a & b"``: at the moments of
    both, or at those of a that lie ``"after 2 epochs"`` (at least so much is completed) or ``"before 5 epochs"`` (less
    is). ``&`` binds closer than ``|``. Units count from the start of the run, batches and percents (``"10%"``) from
    that of the open stage, whose length 100% are. All follows from progress, so nothing needs saving, and a resumed
    run goes on where it would have.

    >>> every = Every("2 steps & after 3 steps | at 1 step")
    >>> [step for step in range(1, 9) if every.due(Progress(step=step))]
    [1, 4, 6, 8]

    ``inside``: epochs count by their batches, where their number is known, also if whole. ``bounds`` allows "after" and
    "before" alone, for what has moments of its own. Raises SettingError for what is not of this language.
    """

    __slots__ = ("_batches", "_field", "_fraction", "_groups", "_since", "inside", "next")

    def __init__(
        self, when: Every | Duration | int | str, *, unit: str = "steps", inside: bool = False, bounds: bool = False
    ) -> None:
        when = str(when) if isinstance(when, Every) else when
        read = _read if isinstance(when, (str, int, float, Duration)) else _read.__wrapped__
        said, within = read(when, unit, bounds)
        self._groups = [[_Term(word, duration) for word, duration in group] for group in said]
        # of moments inside of an epoch, validation is asked at steps alone: there epochs are over with their last batch
        self.inside = inside or within
        self.start(Progress())

    def begin(self, run: Run, at: Progress | None = None) -> None:
        """Begin, or begin again after a resume or in another stage, where ``run`` stands, or ``at`` a place before."""
        stage, at = run.stage, run.progress if at is None else at
        if stage is None:
            self.start(at)
        else:
            self.start(at, stage.source.batches, partial(stage.whole.fraction, start=run.stage_start), run.stage_start)

    def start(
        self,
        progress: Progress,
        batches: int | None = None,
        fraction: Callable[[Progress], float] | None = None,
        since: Progress = Progress(),  # noqa: B008 - a value
    ) -> None:
        """Begin at ``progress``, in a stage begun at ``since`` with ``batches`` an epoch and its ``fraction`` done."""
        self._batches, self._fraction, self._since = batches, fraction, since
        for group in self._groups:
            for term in group:
                term.pass_by(self._position(term.duration, progress))
        first = self._groups[0][0]
        alone = len(self._groups) == len(self._groups[0]) == 1 and first.word == "every"
        plain = alone and not self._is_of_stage(first.duration)
        self._field = field_of(first.duration) if plain else 0
        self.next = first.next if plain else -math.inf

    def due(self, progress: Progress) -> bool:
        """True once for each moment; one long step in which several lie counts once."""
        if progress[self._field] < self.next:  # type: ignore[operator]
            return False  # nearly always, hence first
        if self.next != -math.inf:  # one interval alone
            only = self._groups[0][0]
            only.pass_by(progress[self._field])  # type: ignore[arg-type]
            self.next = only.next
            return True
        fires = False
        for group in self._groups:  # all are asked each time: each keeps its place only if it sees every moment
            holds = [term.holds(self._position(term.duration, progress)) for term in group]
            fires |= all(holds)
        return fires

    def _position(self, duration: Duration, now: Progress) -> float:
        if duration.unit == "percent":
            return 100 * self._fraction(now) if self._fraction is not None else 0.0
        if duration.unit == "batches":
            return (now.epoch - self._since.epoch) * (self._batches or 0) + now.batch
        return duration.position(now, self._batches if self.inside or duration.is_part else None)

    @property
    def of_stage(self) -> bool:
        """True if it goes by the length of the open stage or of its epochs, and has to begin again in the next one."""
        return any(self._is_of_stage(term.duration) for group in self._groups for term in group)

    def _is_of_stage(self, duration: Duration) -> bool:
        return not is_counted(duration) or (self.inside and duration.unit == "epochs")

    def times(self, done: Mapping[str, float]) -> float:
        """About how often it is due, while so much of each unit is ``done``.

        >>> Every("10 steps & after 50 steps | at 20%").times({"steps": 200, "percent": 100})
        16.0
        """
        found = 0.0
        for group in self._groups:
            moments = [term.times(done) for term in group if term.is_moment]
            found += min(moments, default=0.0) * math.prod(term.share(done) for term in group if not term.is_moment)
        return found

    def missed(self, done: Mapping[str, float], *, moments: Collection[str]) -> Duration | None:
        """What lies beyond all that will be ``done`` of its unit, if nothing of it comes before that; else None.

        ``moments``: the words that are looked at. A unit that is not in ``done`` may have no end.

        >>> Every("at 99 epochs").missed({"epochs": 2}, moments=("at",))
        Duration(value=99.0, unit='epochs')
        """
        late = [[t.duration for t in group if t.word in moments and t.is_after(done)] for group in self._groups]
        return late[0][0] if all(late) else None

    def problems(self, stage: Stage, *, at_steps: bool = False) -> Iterator[str]:
        """Why it cannot be known in ``stage``, each with the fix; ``at_steps`` where it is asked at steps alone."""
        for term in (term for group in self._groups for term in group):
            duration = term.duration
            mixed = at_steps and self.inside and term.is_moment and duration.unit == "epochs"
            if stage.source.batches is None and (mixed or duration.is_part or duration.unit == "batches"):
                yield f"'{duration}' needs data with a known number of batches; count steps instead"
            elif duration.unit == "percent" and not stage.whole.is_known:
                yield f"'{duration}' of a stage that lasts {stage.whole} is not known before it is over; count steps"
            elif duration.unit == "tokens":
                try:
                    check_unit("tokens", counts_samples=stage.counts_samples, who=f"'{duration}'")
                except SettingError as error:
                    yield str(error)

    def __str__(self) -> str:
        return " | ".join(" & ".join(map(str, group)) for group in self._groups)


class _Term:
    """One word and its duration, and where it comes next."""

    __slots__ = ("duration", "next", "word")

    def __init__(self, word: str, duration: Duration) -> None:
        self.word, self.duration, self.next = word, duration, 0.0

    @property
    def is_moment(self) -> bool:
        return self.word in _MOMENTS

    @property
    def is_inside(self) -> bool:
        """True if it may come inside of an epoch."""
        return self.duration.unit != "epochs" or self.duration.is_part

    def pass_by(self, position: float) -> None:
        """What lies at ``position`` or before is over."""
        value = self.duration.value
        if self.word == "every":
            self.next = (math.floor(position / value + 1e-9) + 1) * value - 1e-9
        elif self.word == "at" and position >= value - 1e-9:
            self.next = math.inf
        else:
            self.next = value - 1e-9

    def holds(self, position: float) -> bool:
        if self.word == "before":
            return position < self.next
        if position < self.next:
            return False
        if self.word != "after":
            self.pass_by(position)
        return True

    def times(self, done: Mapping[str, float]) -> float:
        """How often it comes while so much is done; once, or not at all, for a single moment."""
        parts = done.get(self.duration.unit, 0.0) / self.duration.value
        return parts // 1 if self.word == "every" and math.isfinite(parts) else float(parts >= 1)

    def is_after(self, done: Mapping[str, float]) -> bool:
        """True if it lies beyond what is done."""
        return self.duration.value > done.get(self.duration.unit, math.inf)

    def share(self, done: Mapping[str, float]) -> float:
        """Of what is done, the part in which it holds."""
        part = min(1.0, self.duration.value / max(done.get(self.duration.unit, 0.0), 1e-9))
        return part if self.word == "before" else 1 - part

    def __str__(self) -> str:
        return str(self.duration) if self.word == "every" else f"{self.word} {self.duration}"


@lru_cache(maxsize=256, typed=True)  # every fit reads the same few
def _read(
    when: Duration | int | str, unit: str, bounds: bool
) -> tuple[tuple[tuple[tuple[str, Duration], ...], ...], bool]:
    """The words and durations of ``when``, and whether a moment of it may come inside of an epoch."""
    said = alternatives(when) if isinstance(when, str) else [[when]]
    groups = [[_Term(*_worded(one, unit)) for one in group] for group in said]
    for group in groups:
        _check(group, when, bounds)
    inside = any(term.is_inside for group in groups for term in group if term.is_moment)
    return tuple(tuple((term.word, term.duration) for term in group) for group in groups), inside


def _worded(text: Duration | int | str, unit: str) -> tuple[str, Duration]:
    """The word of one part, "every" where there is none, and its duration."""
    word, _, rest = text.strip().partition(" ") if isinstance(text, str) else ("", "", "")
    known = word.lower() in _WORDS
    if rest and word.isalpha() and not known:
        numbered = any(letter.isdigit() for letter in rest)
        first = "" if numbered else f": a number comes first, as in '5 {rest.split()[-1]}', or a word before that"
        raise SettingError(f"{text!r} begins with an unknown word{first}. {choose(word, _WORDS)}")
    return word.lower() if known else "every", Duration.parse(rest if known else text, unit=unit)


def _check(group: list[_Term], when: object, bounds: bool) -> None:
    moments = [term for term in group if term.is_moment]
    if not moments and not bounds:
        raise SettingError(
            f"{when!r}: {' & '.join(map(str, group))!r} says for how long, but not when; add moments, such as "
            f"'every 100 steps & {group[0]}', or mean a single one: 'at {group[0].duration}'"
        )
    if len(moments) > 1 and any(term.duration.unit == "seconds" for term in moments):
        raise SettingError(
            f"{when!r}: a time and another moment hardly ever fall on the same step; join moments by '|', and by '&' "
            "what holds for a while: 'after ...', 'before ...'"
        )
