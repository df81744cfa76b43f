"""One asynchronous message a step: what time it is, and whether somebody wants to stop."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from loopwright.parallel.comm import Ranks
from loopwright.parallel.watch import Watch
from loopwright.state import SIGNALS, Run

__all__ = ["Pulse"]

_OTHER = len(SIGNALS)  # a reason in words


class Pulse:
    """Lets all ranks see the same clock, and stop at the same step.

    Each step sends the seconds of rank 0 and what each rank wants, and takes what was sent a step before: nobody
    waits. So with several ranks ``run.request_stop`` and signals take effect a step later than with one, and
    ``progress.seconds``, on which durations and intervals depend, is that of rank 0.
    """

    def __init__(self, comm: Ranks) -> None:
        self.comm = comm
        self.asked: str | None = None  # by this rank
        self.watch: Watch | None = None  # which is told where training stands
        self._sent: tuple[torch.Tensor, Any] | None = None

    def beat(self, run: Run) -> float:
        """Seconds of the run, the same on all ranks. Called once a step by all of them."""
        if self.watch is not None:
            self.watch.step = run.progress.step
        before, self._sent = self._sent, self._send(run)
        return run.progress.seconds if before is None else self._take(run, before)

    def settle(self, run: Run) -> None:
        """Stop now if any rank wants to; at the end of an epoch or a validation there is time to wait for all."""
        if self._sent is not None:
            self._take(run, self._sent)
        self._sent = None
        self._take(run, self._send(run))

    def _send(self, run: Run) -> tuple[torch.Tensor, Any]:
        told = torch.zeros(_OTHER + 2, dtype=torch.float64, device="cpu")
        if self.comm.rank == 0:
            told[-1] = time.perf_counter() - run.began
        if self.asked is not None:
            told[SIGNALS.index(self.asked) if self.asked in SIGNALS else _OTHER] = 1.0
        return told, dist.all_reduce(told, group=self.comm.group, async_op=True)

    def _take(self, run: Run, sent: tuple[torch.Tensor, Any]) -> float:
        told, work = sent
        work.wait()
        *wanted, seconds = told.tolist()
        if any(wanted) and run.stop_reason is None:
            words = next((words for words in self.comm.gather(self.asked) if words is not None), None)
            run.stop_reason = next((name for name, n in zip(SIGNALS, wanted, strict=False) if n), words)
        return float(seconds)
