"""Records as rows of one table, of one run or of many: for a spreadsheet, or ``pandas.read_csv``."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from loopwright.errors import SettingError, elsewhere
from loopwright.folder import put
from loopwright.loggers.tracking import run_label
from loopwright.state import Progress, Run

__all__ = ["CSVLogger"]

_FIRST = ["kind", "step", "epoch", "samples", "seconds"]


class CSVLogger:
    """Writes one row a record to ``metrics.csv`` in the run's folder, or to ``path``, which many runs may share.

    The columns are ``kind, step, epoch, samples, seconds`` and the names in the order in which they came.
    When a new name appears, the file is written anew with one column more, and takes the place of the old
    one in one go. A value that a record does not have is an empty cell; NaN is ``nan``, infinities are
    ``inf`` and ``-inf``.

    A ``path`` may be that of many runs, one after the other: its first column is ``run``, the end of the folder of
    the run, ``digits/20261121-101500-1a2b3c``. Runs that go on side by side need a file each.

    A resumed run drops those of its rows that its checkpoint did not know. A Trainer without a folder refuses one
    without a ``path``. Of several processes only rank 0 writes.

    >>> import loopwright as lw
    >>> for name in ("wide", "narrow"):
    ...     trainer = lw.Trainer(epochs=1, name=name, loggers=[CSVLogger("all.csv")], progress=False)
    ...     run = trainer.run(lambda run, batch: run.log({"width": 0.5}), [1])
    >>> import pandas
    >>> pandas.read_csv("all.csv")["run"].str.partition("/")[0].unique().tolist()
    ['wide', 'narrow']

    Raises SettingError if ``path`` is a file that is no such table.
    """

    @elsewhere()
    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = path
        self._target = None if path is None else Path(path)
        self._file: TextIO | None = None
        self._label = ""  # of the run in a file of many
        self._columns: list[str] = []
        self._rows = 0  # of this run
        self._keep: int | None = None

    def start(self, run: Run) -> None:
        """Open the table for ``run``; after ``load_state_dict``, cut it to what the checkpoint knew."""
        self.close(run.status)
        path = self.path if self.path is not None else run.folder and run.folder / "metrics.csv"
        self._target = Path(path) if path and run.comm.rank == 0 else None
        self._label = run_label(run, self._label) if self.path is not None else ""
        self._columns, self._rows = [], 0
        if self._target is not None:
            self._file = self._open(self._target, self._keep)
        self._keep = None

    def log(self, progress: Progress, values: Mapping[str, float], kind: str) -> None:
        """Write one row."""
        if self._target is None:
            return
        try:
            self._log(self._target, progress, values, kind)
        except OSError:  # what it wrote of a row goes when the table is opened anew
            file, self._file = self._file, None
            with suppress(OSError):
                if file is not None:
                    file.close()
            raise

    def _log(self, target: Path, progress: Progress, values: Mapping[str, float], kind: str) -> None:
        outside = self._file is None  # of a run, such as the values of a test afterwards
        file = self._file = self._file or self._open(target, None)
        new = [name for name in values if name not in self._columns]
        if new:
            file.close()
            self._rewrite(target, [*self._columns, *new], _read(target, self._first)[1])
            file = self._file = target.open("a", newline="", encoding="utf-8")
        seconds = round(progress.seconds, 6)
        first = [kind, progress.step, progress.epoch, progress.samples, seconds]
        if self.path is not None:
            first.insert(0, self._label)
        _write(file, [[*first, *(values.get(name, "") for name in self._columns[len(first) :])]])
        file.flush()
        self._rows += 1
        self._file = file
        if outside:
            self.close("closed")

    def _open(self, path: Path, keep: int | None) -> TextIO:
        """The table at ``path`` ready to append to, with whole rows only and at most ``keep`` of this run."""
        path.parent.mkdir(parents=True, exist_ok=True)
        columns, rows = _read(path, self._first) if path.exists() else (self._first, [])
        own = [i for i, row in enumerate(rows) if self.path is None or row[:1] == [self._label]]
        gone = set(own[len(own) if keep is None else keep :])
        self._rows = len(own) - len(gone)
        self._rewrite(path, columns, [row for i, row in enumerate(rows) if i not in gone])
        return path.open("a", newline="", encoding="utf-8")

    @property
    def _first(self) -> list[str]:
        return _FIRST if self.path is None else ["run", *_FIRST]

    def _rewrite(self, path: Path, columns: list[str], rows: list[list[str]]) -> None:
        """Write all anew beside the old file, then replace it."""
        self._columns = list(columns)

        def write(part: Path) -> None:
            with part.open("w", newline="", encoding="utf-8") as file:
                _write(file, [columns, *(row + [""] * (len(columns) - len(row)) for row in rows)])

        put(path, write)

    def close(self, status: str) -> None:
        """Close the file; a later ``log`` still appends to it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        """How many rows the run has in the table, and what they are marked with in one of many runs."""
        return {"rows": self._rows, "run": self._label}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``start`` drop the rows after those that ``state`` knew."""
        self._keep, self._label = int(state["rows"]), str(state.get("run", ""))


def _write(file: TextIO, rows: Iterable[list[Any]]) -> None:
    csv.writer(file, lineterminator="\n").writerows(rows)


def _read(path: Path, first: list[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table; a last row that was not written to its end is left out."""
    text = path.read_text(encoding="utf-8")
    rows = list(csv.reader(StringIO(text[: text.rfind("\n") + 1], newline="")))
    if not rows:
        return first, []
    if rows[0][: len(first)] != first:
        raise SettingError(
            f"CSVLogger cannot add to {path}: its first line is {','.join(rows[0])[:80]!r}, expected "
            f"'{','.join(first)},...'. Give another path, or move that file away"
        )
    return rows[0], rows[1:]
