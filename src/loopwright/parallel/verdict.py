"""What ended a run of several ranks, judged from what each of them has told and what the kernel says of it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from loopwright.errors import LoopwrightError
from loopwright.parallel.calls import Call, clash
from loopwright.parallel.standing import Process

__all__ = ["IN_ORDER", "FailedElsewhereError", "Report", "Seen", "Verdict", "awaited", "ended", "judge", "unreachable"]


class Report(NamedTuple):
    """What a rank tells of itself, every beat."""

    beat: int
    step: int
    place: str
    waits: str  # the call in which it waits for others, or ""
    path: int
    still: float  # seconds for which its training thread has not run
    error: str | None = None
    trace: str = ""
    lost: bool = False  # the error came of another's end: gloo's "Connection closed by peer" and the like
    left: bool = False  # its training is over; nothing is expected of it any more
    heard: bool = False  # it knows how the run has ended, and needs the store no more
    stack: Sequence[str] = ()  # the lines in which it stands, the last one called at the end
    calls: Sequence[Call] = ()  # its last collectives, once it stands still in one or has failed

    @property
    def done(self) -> bool:
        """Its training is over, and in order."""
        return self.left and self.error is None

    def pack(self) -> str:
        return json.dumps(self)

    @classmethod
    def unpack(cls, text: str) -> Report:
        """
        >>> mine = Report(1, 120, "train.py:41 in main", "", 0, 0.0)
        >>> Report.unpack(mine.pack()) == mine
        True
        """
        report = cls(*json.loads(text))
        return report._replace(stack=tuple(report.stack), calls=tuple(Call(*call) for call in report.calls))


@dataclass
class Seen:
    """A rank as another one sees it.

    ``silent``: seconds since its last beat, less those in which the one that looks did not run; ``age``: all seconds
    since that report came; ``lost``: since its lost connection.
    """

    process: Process
    report: Report | None = None
    silent: float = 0.0
    came: float = field(default_factory=time.monotonic)  # when the report came, by the clock of the one that looks
    age: float = 0.0
    lost: float = 0.0
    state: str = "runs"  # its process, as state_of tells


class FailedElsewhereError(LoopwrightError):
    """This rank has done its part, and another one has not."""


class Verdict(NamedTuple):
    """What ended the run: ``text`` is one line, ``more`` what rank 0 prints below it. ``rank`` None: no single one.

    No text: nothing was wrong.
    """

    rank: int | None
    text: str
    more: str = ""
    silent: Process | None = None  # what does not end by itself if it is stopped

    def pack(self) -> str:
        return json.dumps(self)

    @classmethod
    def unpack(cls, text: str) -> Verdict:
        verdict = cls(*json.loads(text))
        return verdict._replace(silent=Process(*verdict.silent) if verdict.silent is not None else None)


IN_ORDER = Verdict(None, "")  # all ranks have left


def judge(seen: Mapping[int, Seen], *, patience: float, beat: float) -> Verdict | None:
    """What rank 0 makes of all ranks; None while nothing is wrong.

    A cause goes before what followed from it: an error of a rank's own, then a rank that is gone or silent, then calls
    that do not match, then an error that looks as if another rank had caused it (after some beats in which the cause
    could have shown itself), then a deadlock.
    """
    return (
        _failed(seen)
        or ended(seen, patience=patience)
        or _mismatched(seen)
        or _lost(seen, 4 * beat)
        or _locked(seen, patience, 4 * beat)
    )


def ended(seen: Mapping[int, Seen], *, patience: float) -> Verdict | None:
    """A rank that is gone without a word, or silent for ``patience`` seconds.

    One that is silent but runs, as far as the kernel of this machine knows, is alive: something in it holds Python's
    lock, such as one long call of a C library.
    """
    for rank, one in seen.items():
        report = one.report
        if report is not None and (report.left or report.error is not None):
            continue
        if one.state == "gone":
            text = f"rank {rank} ended without a word, killed or crashed{_last(one)}"
            return Verdict(rank, text, _stood(seen, rank))
        if one.silent >= patience and one.state != "runs":
            why = {"stopped": ": its process was stopped by a signal", "traced": ": a debugger holds its process"}
            text = f"{_silent(rank, one)}{why.get(one.state, '')}{_last(one, age=False)}"
            return Verdict(rank, text, _stood(seen, rank), silent=one.process)
    return None


def unreachable(zero: Seen, reason: str) -> Verdict | None:
    """What another rank makes of it when the store, which lives in rank 0, does not answer; None if rank 0 has left."""
    if zero.report is not None and zero.report.error is not None:
        return _failed({0: zero}) or _lost({0: zero}, 0.0)
    if zero.report is not None and zero.report.left:
        return None
    how = "ended without a word, killed or crashed" if zero.state == "gone" else f"cannot be reached ({reason})"
    return Verdict(0, f"rank 0 {how}{_last(zero)}", _stood({0: zero}, 0))


def _failed(seen: Mapping[int, Seen]) -> Verdict | None:
    for rank, one in seen.items():
        report = one.report
        if report is not None and report.error is not None and not report.lost:
            return Verdict(rank, _failure(rank, report), report.trace)
    return None


def _mismatched(seen: Mapping[int, Seen]) -> Verdict | None:
    """Ranks whose collectives do not match: one of them waits for ever, or was torn down by what it was sent.

    The rank is named that does what no other one does, if there is one.
    """
    found = clash({rank: one.report.calls for rank, one in seen.items() if one.report is not None and one.report.calls})
    if found is None:
        return None
    where, made = found
    by_call: dict[str, list[int]] = {}
    for rank, call in made.items():
        by_call.setdefault(call, []).append(rank)
    told = "; ".join(f"{_ranks(ranks)}: {call}" for call, ranks in sorted(by_call.items(), key=lambda one: one[1]))
    alone = [ranks[0] for ranks in by_call.values() if len(ranks) == 1]
    culprit = alone[0] if len(alone) == 1 and len(made) > 2 else None
    steps = Counter(seen[rank].report.step for rank in made)  # type: ignore[union-attr]
    text = f"collectives do not match at step {min(steps)}: {where}: {told}"
    shown = [culprit] if culprit is not None else [ranks[0] for ranks in by_call.values()]
    return Verdict(culprit, text, "\n".join([*(_stood(seen, rank) for rank in shown[:4]), _ADVICE]))


def _lost(seen: Mapping[int, Seen], wait: float) -> Verdict | None:
    """A rank that lost its connection, when no cause has shown itself: those that are quiet are named as well."""
    for rank, one in seen.items():
        report = one.report
        if report is None or report.error is None or one.lost < wait:
            continue
        quiet = {
            r: other for r, other in seen.items()
            if r != rank and other.silent >= wait > 0 and not (other.report and other.report.left)
        }  # fmt: skip
        for r, other in quiet.items():
            text = f"{_silent(r, other)}{_last(other, age=False)}; {_failure(rank, report)}"
            return Verdict(r, text, report.trace)
        return Verdict(rank, _failure(rank, report), report.trace)
    return None


def _locked(seen: Mapping[int, Seen], patience: float, fresh: float) -> Verdict | None:
    """All that have not left wait for others, none has moved for ``patience``, and not all stand in one place.

    All in one place is no deadlock of ours: a network that hangs, or is slow. The time-out of torch is for that. One
    that has left makes no more calls: for it a part of the patience is enough.
    """
    if any(one.report is not None and one.report.left for one in seen.values()):
        patience = fresh
    waiting: dict[tuple[int, int, str], list[int]] = {}
    left: list[int] = []
    for rank, one in seen.items():
        report = one.report
        if report is not None and report.left:
            left.append(rank)
        elif report is None or not report.waits or report.still < patience or one.silent >= fresh:
            return None
        else:
            waiting.setdefault((report.step, report.path, report.waits), []).append(rank)
    if len(waiting) + bool(left) < 2:
        return None
    lines = []
    for ranks in [*waiting.values(), *([left] if left else [])]:
        report = seen[ranks[0]].report
        assert report is not None
        where = "has left training" if report.left else f"waits in {report.waits}, {report.place}"
        lines.append(f"  {_ranks(ranks)}: step {report.step}, {where}")
    told = "; ".join(line.strip() for line in lines)
    if len(lines) > 4:  # one line must stay one
        told = f"{'; '.join(line.strip() for line in lines[:4])}; ..."
    return Verdict(None, f"deadlock: no rank has moved for {patience:.0f} s. {told}", "\n".join([*lines, _ADVICE]))


def awaited(seen: Mapping[int, Seen]) -> str:
    """Whose training is not over, and where the first of them stands; "" if that of all is."""
    there = {rank: one.report for rank, one in seen.items() if one.report is None or not one.report.left}
    if not there:
        return ""
    first = next(iter(there.values()))
    where = "" if first is None else f" (step {first.step}, {first.place})"
    return f"{_ranks(list(there))}{where}"


_ADVICE = (
    "A collective (all_reduce, barrier, the backward of a model over ranks, a value that is reduced) must be called by "
    "all ranks in the same order, with as many numbers; look for an `if rank == 0:` around one of these lines, and "
    "for a SkipStep of one rank alone"
)


def _stood(seen: Mapping[int, Seen], rank: int) -> str:
    """The lines in which a rank was when it last reported, as Python prints those of an error."""
    report = seen[rank].report
    if report is None or not report.stack:
        return ""
    stood = f"rank {rank} stood in, when it last reported (most recent call last):"
    return "\n".join([stood, *(f"  {line}" for line in report.stack)])


def _failure(rank: int, report: Report) -> str:
    return f"rank {rank} failed at step {report.step}, {report.place}: {report.error}"


def _silent(rank: int, one: Seen) -> str:
    return f"rank {rank} has not been heard of for {one.silent:.0f} s"


def _last(one: Seen, *, age: bool = True) -> str:
    """What is known of a rank that tells nothing any more: its last report, which may be of a step before its end."""
    process, report = f"process {one.process.pid} on {one.process.name}", one.report
    if report is None:
        return f" ({process})"
    waits = f", waiting in {report.waits}" if report.waits else ""
    when = f", which came {one.age:.1f} s ago" if age else ""
    return f" (its last report{when}: at step {report.step}, {report.place}{waits}; {process})"


def _ranks(ranks: list[int]) -> str:
    """
    >>> _ranks([1]), _ranks([0, 2, 3, 4])
    ('rank 1', 'ranks 0, 2-4')
    """
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    shown = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"
