"""How much is trained on in a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loopwright.errors import SettingError
from loopwright.events import Callback
from loopwright.every import Every
from loopwright.flops import Operations
from loopwright.parallel import readers
from loopwright.state import Run, Stage, StepResult
from loopwright.written import warn

__all__ = ["Throughput"]


class Throughput(Callback):
    """Logs samples a second, and if asked for tokens and floating point operations, each ``every``.

    The time is that of the training steps with the wait for their data; validation, checkpoints and the ends of epochs
    are left out. ``train/samples_per_second`` counts what the run counts: ``train/weight_per_second`` where ``fit`` has
    a ``weight`` function. ``tokens(batch)`` gives the tokens of a batch, for ``train/tokens_per_second``.
    ``flops=True`` counts the operations of the first step of each stage (matrix products, convolutions, attention,
    recurrent layers; forward, backward, all phases that are due), for ``train/flops_per_second``; that step takes
    longer and is left out. A warning names operations that cannot be counted. With several ranks all values are those
    of all ranks together. On an accelerator a step ends when it is queued: over a record that makes no difference. Put
    it last in the list: between two steps, what later callbacks do is counted.

    Reads: run.progress, the clock, with ``tokens`` batches. Changes: nothing. Stops: no. Raises SettingError for
    ``flops`` of compiled steps, whose operations nobody sees.

    >>> Throughput(every=10, tokens=lambda batch: batch[0].numel()).every
    10
    """

    def __init__(
        self, every: int | str = "50 steps", *, tokens: Callable[[Any], float] | None = None, flops: bool = False
    ) -> None:
        if tokens is not None and not callable(tokens):
            raise SettingError(f"Throughput(tokens={tokens!r}) cannot be called; pass a function of a batch")
        self.every, self.tokens, self.flops = every, tokens, flops
        self._every = Every(every)
        self._told = False  # what cannot be counted
        self._mode: Operations | None = None  # counts the operations of the open step
        self._forget()

    def _forget(self) -> None:
        self._weight = self._tokens = self._seconds = 0.0
        self._rate: float | None = None  # operations a unit of weight
        self._last = time.perf_counter()

    def on_fit_start(self, run: Run) -> None:
        if self.flops and run.merges:
            raise SettingError(f"Throughput(flops=True) cannot count the operations under {run.merges}; leave one out")
        if self.tokens is None:  # one hook less for each batch
            own = self.on_batch_start
            run.hooks.on_batch_start = tuple(hook for hook in run.hooks.on_batch_start if hook != own)
        self._told = False
        self._forget()
        self._every.begin(run)

    def problems(self, run: Run) -> Iterator[str]:
        for stage in run.stages:
            yield from (f"Throughput: {problem}" for problem in self._every.problems(stage))

    def on_stage_start(self, run: Run, stage: Stage) -> None:
        self._rate = None
        self._every.begin(run)

    def on_epoch_start(self, run: Run) -> None:
        self._last = time.perf_counter()

    def on_step_start(self, run: Run) -> None:
        if self.flops and self._rate is None:
            self._end_count()  # of a step that was dropped
            self._mode = Operations()
            self._mode.__enter__()

    def on_batch_start(self, run: Run, batch: Any) -> None:
        if self.tokens is not None:
            self._tokens += float(self.tokens(batch))

    def on_step_end(self, run: Run, result: StepResult) -> None:
        now = time.perf_counter()
        if self._mode is not None:
            left_out = self._mode.left_out
            self._rate = self._end_count() / result.weight
            if left_out and not self._told:
                self._told = True
                warn(f"flops_per_second of Throughput leaves out what it cannot count: {', '.join(left_out)}")
            self._last, self._tokens = time.perf_counter(), 0.0
            return
        self._seconds, self._last = self._seconds + now - self._last, now
        self._weight += result.weight
        if self._every.due(run.progress):
            self._log(run)

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        self._last = time.perf_counter()

    def on_checkpoint(self, run: Run, path: Any) -> None:
        self._last = time.perf_counter()

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._end_count()

    def _end_count(self) -> float:
        mode, self._mode = self._mode, None
        if mode is None:
            return 0.0
        mode.__exit__(None, None, None)
        return float(mode.total)

    def _log(self, run: Run) -> None:
        seconds, name = self._seconds or 1e-9, "samples" if run.stage and run.stage.counts_samples else "weight"
        rates = {f"{name}_per_second": self._weight / seconds}
        if self.tokens is not None:
            rates["tokens_per_second"] = readers(run).sum(self._tokens) / seconds
        if self._rate is not None:
            rates["flops_per_second"] = run.comm.sum(self._rate) * self._weight / seconds
        self._weight = self._tokens = self._seconds = 0.0
        run.log(rates)
