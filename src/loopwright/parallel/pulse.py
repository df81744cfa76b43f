"""One asynchronous message a step: what time it is, and whether somebody wants to stop."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from loopwright.parallel.comm import Ranks
from loopwright.state import SIGNALS, Run

__all__ = ["Pulse"]

_OTHER = len(SIGNALS)  # a reason in words
_EVERY_S, _AT_MOST = 0.1, 16  # seconds and steps from one message to the next, where nobody asks within steps


class Pulse:
    """Lets all ranks see the same clock, and stop at the same step.

    A message tells the seconds of rank 0 and what each rank wants; it is taken when the next one is sent, so that
    nobody waits. One is sent each step where hooks of the user may ask to stop within an epoch: with several ranks
    ``run.request_stop`` takes effect one or two steps later than with one. Where only signals and clocks can, one is
    sent every 0.1 s, or 16 steps if that is less. ``progress.seconds``, on which durations and intervals depend, is
    that of rank 0; between two messages all ranks make the same guess of it.
    """

    def __init__(self, comm: Ranks) -> None:
        self.comm = comm
        self.asked: str | None = None  # by this rank
        self.each_step = True
        self._sent: tuple[int, torch.Tensor, Any] | None = None  # at which beat
        self._beats = self._due = 0
        self._at = 0.0  # clock of this rank at the last beat
        self._taken, self._seconds = 0, 0.0  # beat and clock of rank 0 that all have heard last
        self._rates = deque[float]([0.0], maxlen=2)  # seconds a beat, between messages

    @property
    def _rate(self) -> float:
        """The smaller one: a step in which a checkpoint was written says nothing of the next ones."""
        return min(self._rates)

    def beat(self, run: Run) -> float:
        """Seconds of the run, the same on all ranks. Called once a step by all of them."""
        self._beats += 1
        self._at = time.perf_counter() - run.began
        if self._beats >= self._due:
            before, self._sent = self._sent, self._send(run)
            if before is not None:
                self._take(run, before)
            self._plan()
        return max(run.progress.seconds, self._seconds + self._rate * (self._beats - self._taken))

    def settle(self, run: Run, value: Any = None) -> list[Any]:
        """Stop now if any rank wants to: at the end of an epoch or a validation there is time to wait for all.

        Returns the ``value`` of every rank.
        """
        if self._sent is not None:
            self._take(run, self._sent)
            self._sent = None
        found = self.comm.gather((self.tell(run), value))
        self.hear(run, [told for told, _ in found])
        return [one for _, one in found]

    def tell(self, run: Run) -> tuple[str | None, float, float]:
        """What this rank wants, its clock at the last beat and now, to be gathered."""
        return self.asked, self._at, time.perf_counter() - run.began

    def hear(self, run: Run, found: list[tuple[str | None, float, float]]) -> None:
        """Of all ranks what they ``tell``. What has taken long since the last beat, if anything, was no step."""
        _, at, now = found[0]
        self._note(self._beats, at)
        self._seconds = now
        self._stop(run, [asked for asked, *_ in found])

    def _note(self, beat: int, seconds: float) -> None:
        """At ``beat`` rank 0 had ``seconds``."""
        if beat > self._taken:  # else a later beat is known
            if self._taken:
                self._rates.append(max(0.0, seconds - self._seconds) / (beat - self._taken))
            self._taken, self._seconds = beat, seconds

    def _plan(self) -> None:
        """When the next message is due."""
        steps = 1 if self.each_step or not self._rate else int(_EVERY_S / self._rate)
        self._due = self._beats + max(1, min(steps, _AT_MOST))

    def _send(self, run: Run) -> tuple[int, torch.Tensor, Any]:
        told = torch.zeros(_OTHER + 2, dtype=torch.float64, device="cpu")
        if self.comm.rank == 0:
            told[-1] = self._at
        if self.asked is not None:
            told[SIGNALS.index(self.asked) if self.asked in SIGNALS else _OTHER] = 1.0
        return self._beats, told, dist.all_reduce(told, group=self.comm.group, async_op=True)

    def _take(self, run: Run, sent: tuple[int, torch.Tensor, Any]) -> None:
        beat, told, work = sent
        work.wait()
        *wanted, seconds = told.tolist()
        self._note(beat, seconds)
        if any(wanted) and run.stop_reason is None:
            self._stop(run, self.comm.gather(self.asked))

    def _stop(self, run: Run, asked: list[str | None]) -> None:
        """For a signal, if one has come to any rank, or else for the reason of the first that has one."""
        reasons = [reason for reason in (*SIGNALS, *asked) if reason is not None and reason in asked]
        if reasons and run.stop_reason is None:
            run.stop_reason = reasons[0]
