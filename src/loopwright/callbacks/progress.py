"""Shows how far a run is, how fast it goes and how long it will take, wherever it runs."""

from __future__ import annotations

import math
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from loopwright.callbacks.displays import Bar, Cell, Display, display_mode, open_display
from loopwright.callbacks.estimate import part_done, planned, time_left
from loopwright.errors import SettingError, choose
from loopwright.events import Callback
from loopwright.recorded import at, rule
from loopwright.state import Run, StepResult
from loopwright.text import format_count, format_time, format_value

__all__ = ["ProgressBar"]

_MODES = ("auto", "terminal", "notebook", "lines")
_BURST, _A_SECOND = 50, 10  # rows that may come at once, and those that may follow each second


class ProgressBar(Callback):
    """Shows epochs, batches, samples a second, the last logged values, and the time left for the whole run.

    In a terminal a bar is drawn below the output at most each ``refresh_s`` seconds, with a line an epoch
    that stays; in a notebook, a table of the epochs, the curve of the loss and a progress line; in a file,
    a pipe or a CI log, one plain line an epoch and at most one every 30 seconds in between. ``mode`` says
    which, ``"auto"`` looks at ``file`` (``sys.stderr`` by default). ``metrics`` names the values to show;
    by default those of the training and the validation. Epochs that take no time are thinned to 10 lines a
    second; the last one is always there.

    It never reads the device: the values are those of the last record (``Trainer(log_every=...)``). Of
    several processes only rank 0 shows anything. ``LOOPWRIGHT_PROGRESS=0`` and ``TQDM_DISABLE=1`` in the
    environment switch it off, ``NO_COLOR=1`` the colours.

    Reads: run.progress, run.metrics, run.history. Changes: nothing. Stops: no.

    >>> ProgressBar(mode="lines", metrics=["train/loss", "valid/accuracy"]).refresh_s
    0.1

    Raises SettingError for an unknown mode and for more than 10 refreshes a second.
    """

    def __init__(
        self,
        refresh_s: float = 0.1,
        *,
        file: TextIO | None = None,
        metrics: Sequence[str] | None = None,
        mode: str = "auto",
    ) -> None:
        if not refresh_s >= 0.1:
            raise SettingError(f"refresh_s={refresh_s!r}: expected 0.1 seconds or more")
        if mode not in _MODES:
            raise SettingError(f"mode={mode!r} is unknown. {choose(mode, _MODES)}")
        if isinstance(metrics, str):
            raise SettingError(f"metrics={metrics!r}: expected a list of logged names, such as [{metrics!r}]")
        self.refresh_s, self.file, self.metrics, self.mode = refresh_s, file, metrics, mode
        self.display: Display | None = None
        self.fitting = False
        self.began = self.opened = self.zero = self.idle_s = 0.0
        self.held: Callable[[], tuple[str, list[Cell]]] | None = None  # a row that came too soon
        self.planned = -1  # the stage for which it was counted how many epochs and steps there are to be
        self.next = math.inf  # seconds of the run: the one number that a step without a refresh compares

    # training

    def on_fit_start(self, run: Run) -> None:
        self._open(run)
        self.fitting, self.rows, self.shown, self.held, self.planned = True, 0, -1, None, -1
        if self.display is not None and run.progress.step:
            self.display.row(f"{'goes on' if run.resumed_from is None else 'resumed'} after {_so_far(run)}", [])
        self._begin_epoch(run)

    def on_epoch_start(self, run: Run) -> None:
        self._begin_epoch(run)
        if run.progress.seconds >= self.next:
            self._refresh(run)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        if run.progress.seconds < self.next:
            return
        self._refresh(run)

    def on_epoch_end(self, run: Run) -> None:
        if self.display is None:
            return
        # put into words when it is shown, which not every row is
        label, record, took, rate = (
            self._label(run),
            run.history[-1],
            self._now() - self.began,
            self._rate(run, rank=99),
        )
        self.held = lambda: (label, [*self._record(run, record), *rate, Cell("", format_time(took), 2, "time")])
        if self.rows < _BURST + _A_SECOND * (self._now() - self.opened):
            self._show_held()
        # erased by the row; if another follows soon, the bar would only flicker
        slow = self._now() - self.began > 1.0 and self.display.erases
        self.next = self._now() + (0.0 if slow else self.display.refresh_s)
        self.epoch = run.progress.epoch + 1

    def on_fit_end(self, run: Run) -> None:
        self._show_held()
        if self.display is not None and run.progress.batch and run.progress.step != self.shown:
            self._show_step(run, {})  # it ended within an epoch, which has no record
        reason = run.stop_reason or ""
        what = "interrupted" if run.interrupted else "stopped" if reason else "finished"
        self._close(run, f"{what} after {_so_far(run)}{f': {reason}' if what == 'stopped' else ''}{self._waited(run)}")

    def _waited(self, run: Run) -> str:
        """How much of the time went by waiting for data, where it is worth a word."""
        took = run.progress.seconds - self.opened
        share = run.waited / took if took > 1 else 0.0
        more = "; more workers or a faster transform would help" if share > 0.3 else ""
        return f"\n{share:.0%} of the time was spent waiting for data{more}" if share > 0.1 else ""

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._show_held()
        asked = isinstance(error, KeyboardInterrupt | SystemExit)
        after = f" after {_so_far(run)}" if run.stages else ""
        self._close(run, f"{'interrupted' if asked else f'failed ({type(error).__name__})'}{after}")

    # reading: validation, test, prediction

    def on_validation_start(self, run: Run) -> None:
        valid = run.stage.valid if self.fitting and run.stage else None
        counts = [source.batches for source in valid.values()] if isinstance(valid, Mapping) else [None]
        known = [n for n in counts if n is not None]
        self._begin_reading(run, "validation", sum(known) if len(known) == len(counts) else None)

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        self.validated = True
        # the validation at the end of an epoch is in the row of that epoch
        self._end_reading(run, values, show=not self.fitting or run.progress.epoch < self.epoch)

    def on_test_start(self, run: Run) -> None:
        self._begin_reading(run, "test", None)

    def on_test_end(self, run: Run, values: Mapping[str, float]) -> None:
        self._end_reading(run, values, show=True)

    def on_predict_start(self, run: Run) -> None:
        self._begin_reading(run, "prediction", None)

    def on_predict_end(self, run: Run) -> None:
        self._end_reading(run, {}, show=False)

    def on_eval_batch_end(self, run: Run, output: Any, batch: Any) -> None:
        self.read += 1
        if time.perf_counter() - self.zero < self.next:
            return
        self._refresh_reading(run)

    def on_predict_batch_end(self, run: Run, output: Any, batch: Any) -> None:
        self.on_eval_batch_end(run, output, batch)

    def _begin_reading(self, run: Run, what: str, batches: int | None) -> None:
        if not self.fitting:
            self._open(run)
            self._begin_epoch(run)
        self.reading, self.read, self.read_batches, self.read_began = what, 0, batches, self._now()

    def _refresh_reading(self, run: Run) -> None:
        if self.display is None:
            return
        n, total = self.read, self.read_batches
        count = f"{n:,}/{total:,}" if total else f"{n:,} batches"
        bar = Bar(self.reading, n / total if total else None, [Cell("", count)])
        self.next = self._now() + self.display.refresh_s
        bars = [bar]
        if self.fitting and (run.progress.batch or run.progress.epoch >= self.epoch):  # an epoch is open
            bar.label = bar.label.rjust(len(self._label(run)))
            bars = [self._training(run), bar]
        self.display.live(bars, _losses(run))

    def _end_reading(self, run: Run, values: Mapping[str, float], *, show: bool) -> None:
        seconds = self._now() - self.read_began
        self.idle_s += seconds
        if self.display is not None and show:
            if self.fitting:
                self._show_step(run, values, Cell("", format_time(seconds), 2, "time"))
            else:
                self.display.row(self.reading, self._cells(values, values))
            self.next = self._now() + (0.0 if self.display.erases else self.display.refresh_s)
        if not self.fitting:
            self._close(run, "")

    # what is shown

    def _open(self, run: Run) -> None:
        file = self.file or sys.stderr
        self.display, self.next = None, math.inf
        self.zero = time.perf_counter() - run.progress.seconds
        self.opened = run.progress.seconds
        if run.comm.rank == 0 and file is not None and not _switched_off():
            mode = display_mode(file) if self.mode == "auto" else self.mode
            self.display = open_display(mode, file, self.refresh_s)
            self.next = self.opened + (0.0 if self.display.erases else self.display.refresh_s)

    def _close(self, run: Run, text: str) -> None:
        if self.display is not None:
            self.display.end(text, _losses(run))
        self.display, self.fitting, self.held, self.next = None, False, None, math.inf

    def _now(self) -> float:
        """Seconds of the run, also between steps."""
        return time.perf_counter() - self.zero

    def _begin_epoch(self, run: Run) -> None:
        p = run.progress
        self.epoch, self.batch, self.samples = p.epoch + 1, p.batch, p.samples
        self.began, self.idle_s, self.validated = self._now(), 0.0, False
        if self.planned != run.progress.stage:
            self.planned = run.progress.stage
            self.epochs, self.steps = planned(run, "epoch"), planned(run, "step")

    def _refresh(self, run: Run) -> None:
        if self.display is not None:
            self.next = run.progress.seconds + self.display.refresh_s
            self.display.live([self._training(run)], _losses(run))

    def _label(self, run: Run, more: str = "") -> str:
        n, total = min(self.epoch, self.epochs or self.epoch), self.epochs
        parts = [f"epoch {n:>{len(str(total))}}/{total}" if total else f"epoch {n}"]
        if len(run.stages) > 1 and run.stage is not None:
            parts.insert(0, run.stage.name.ljust(max(len(stage.name) for stage in run.stages)))
        return "  ".join(parts + [more] * bool(more))

    def _training(self, run: Run) -> Bar:
        """The epoch that is open, or is being validated."""
        p, stage = run.progress, run.stage
        total = stage.source.batches if stage is not None else None
        self.batch = p.batch if p.epoch < self.epoch else total or self.batch
        cells = [Cell("", f"{self.batch:,}/{total:,}" if total else f"{self.batch:,} batches", 1)]
        if self.steps:
            cells.append(Cell("", self._step(run), 3))
        cells += self._cells(run.metrics, [name for name in run.metrics if self._is_live(run, name)])
        cells += self._rate(run, rank=9)
        left = time_left(run)
        if left is not None:
            cells.append(Cell("", f"{format_time(left)} left", 2))
        return Bar(self._label(run), self.batch / total if total else part_done(run), cells)

    def _is_live(self, run: Run, name: str) -> bool:
        said = rule(run.recorded, name)
        if said is not None and "bar" not in said:
            return False
        if name.startswith("valid/"):
            return self.validated
        return said is not None or _is_train_loss(name)

    def _step(self, run: Run) -> str:
        return f"step {run.progress.step:,}" + (f"/{self.steps:,}" if self.steps else "")

    def _rate(self, run: Run, *, rank: int) -> list[Cell]:
        """Samples a second of training in this epoch; nothing where a step does not say its samples."""
        samples, seconds = run.progress.samples - self.samples, self._now() - self.began - self.idle_s
        if not samples or seconds <= 0:
            return []
        return [Cell("", f"{format_count(samples / seconds)} samples/s", rank, "speed")]

    def _cells(self, values: Mapping[str, Any], names: Iterable[str]) -> list[Cell]:
        """The chosen values, or else those of ``names``; the first loss and the validation matter most."""
        cells: list[Cell] = []
        for name in self.metrics or names:
            rank = 20 if name.startswith("train/") and cells else min(len(cells), 8)
            cells.append(Cell(name, _value(values.get(name)), rank))
        return cells

    def _record(self, run: Run, record: Mapping[str, Any]) -> list[Cell]:
        names = at(run.recorded, record, "bar") if run.recorded else record
        return self._cells(record, [name for name in names if name.startswith(("train/", "valid/"))])

    def _show_step(self, run: Run, values: Mapping[str, float], *more: Cell) -> None:
        """A line within an epoch: the last logged losses and a validation."""
        losses = {name: value for name, value in run.metrics.items() if _is_train_loss(name)}
        known = at(run.recorded, {**losses, **values}, "bar")
        self.shown = run.progress.step
        if self.display is not None:
            self.display.row(self._label(run, self._step(run)), [*self._cells(known, known), *more])

    def _show_held(self) -> None:
        if self.display is not None and self.held is not None:
            self.display.row(*self.held())
            self.rows, self.held = self.rows + 1, None


def _is_train_loss(name: str) -> bool:
    return name.startswith("train/") and name.endswith("loss")


def _value(value: float | None) -> str:
    return format_value(value).rjust(6)


def _losses(run: Run) -> array[float]:
    """The loss of each step up to the last record."""
    return next(iter(run.history.losses.values()), array("f"))


def _so_far(run: Run) -> str:
    p = run.progress
    counts: Iterable[tuple[int, str]] = ((p.epoch, "epoch"), (p.step, "step"))
    where = f" ({run.folder})" if run.folder is not None else ""
    return ", ".join([*(f"{n:,} {unit}{'s' * (n != 1)}" for n, unit in counts), format_time(p.seconds)]) + where


def _switched_off() -> bool:
    no = ("", "0", "false", "no", "off")
    on, off = os.environ.get("LOOPWRIGHT_PROGRESS"), os.environ.get("TQDM_DISABLE", "")
    return (on is not None and on.lower() in no) or off.lower() not in no
