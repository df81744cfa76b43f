"""Records as a table on the console, one row an epoch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TextIO

from loopwright.errors import elsewhere
from loopwright.monitor import better, improved
from loopwright.state import Progress, Run
from loopwright.text import format_value

__all__ = ["TableLogger"]

_BEST, _PLAIN, _CLEAR = "\x1b[1;32m", "\x1b[0m", "\x1b[J"


class TableLogger:
    """Prints one aligned row an epoch, with the best value of each column so far in bold green.

    The columns are ``epoch``, the logged names, ``seconds``. When a new name comes, the header is printed
    again with one column more; a value that an epoch does not have is ``-``. Losses and errors are best
    when small, accuracies and scores when large; a name that does not tell is never marked. Colour is for
    terminals only, and not where ``NO_COLOR`` is set. ``file`` is ``sys.stdout`` by default. Of several
    processes only rank 0 prints. It goes with ``Trainer(progress=False)``: the progress display has a line
    an epoch of its own.

    >>> table = TableLogger()
    >>> table.log(Progress(epoch=1, seconds=0.5), {"train/loss": 0.71, "valid/accuracy": 0.5}, "epoch")
     epoch  train/loss  valid/accuracy  seconds
         1      0.7100          0.5000      0.5
    """

    @elsewhere()
    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self._columns: list[str] = []
        self._best: dict[str, float] = {}
        self._silent = False

    def start(self, run: Run) -> None:
        """Begin a table; the best values of a run that goes on are those of its history."""
        self._columns, self._best, self._silent = [], {}, run.comm.rank != 0
        for record in run.history:
            self._mark({name: value for name, value in record.items() if "/" in name})

    def log(self, progress: Progress, values: Mapping[str, float], kind: str) -> None:
        """Print the row of an epoch; other kinds of records are left out."""
        if kind != "epoch" or self._silent:
            return
        file = self.file or sys.stdout
        tty = file.isatty() and os.environ.get("TERM") != "dumb"
        lines = []
        new = [name for name in values if name not in self._columns]
        if new:
            self._columns += new
            lines.append(self._line("epoch", self._columns, "seconds"))
        cells = [format_value(values.get(name)).rjust(_width(name)) for name in self._columns]
        best = self._mark(values)
        if tty and not os.environ.get("NO_COLOR"):
            cells = [_BEST + c + _PLAIN if n in best else c for n, c in zip(self._columns, cells, strict=True)]
        lines.append(self._line(str(progress.epoch), cells, f"{progress.seconds:.1f}"))
        # a progress bar may stand below the cursor
        file.write((_CLEAR if tty else "") + "".join(line + "\n" for line in lines))
        file.flush()

    def _mark(self, values: Mapping[str, float]) -> set[str]:
        """Take over the best values so far; the names of those that are it now."""
        found = set()
        for name, value in values.items():
            way = better(name)
            if way is not None and improved(value, self._best.get(name), way):
                self._best[name] = value
                found.add(name)
        return found

    def _line(self, epoch: str, cells: list[str], seconds: str) -> str:
        padded = [cell.rjust(_width(name)) for name, cell in zip(self._columns, cells, strict=True)]
        return "  ".join([f"{epoch:>6}", *padded, f"{seconds:>7}"])


def _width(name: str) -> int:
    return max(len(name), 8)
