"""Three places where progress is shown: a terminal, a notebook, and the lines of a log file."""

from __future__ import annotations

import html
import os
import shutil
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TextIO

from loopwright.notebook import sparkline

__all__ = ["Bar", "Cell", "Display", "Lines", "Notebook", "Terminal", "display_mode", "open_display"]


class Cell(NamedTuple):
    """A text, with the name in front of it on a line (if any) or above it in a table.

    Where there is no room for all, cells of a high rank are left out first.
    """

    name: str
    text: str
    rank: int = 0
    column: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.text}" if self.name else self.text


@dataclass(slots=True)
class Bar:
    """What is going on now: a label, the part that is done (None: unknown), and what to say beside it."""

    label: str
    done: float | None
    cells: list[Cell]


class Display(Protocol):
    """Where progress is shown: ``row`` and ``end`` stay, ``live`` is replaced if it ``erases``."""

    refresh_s: float
    erases: bool

    def live(self, bars: Sequence[Bar], losses: array[float]) -> None: ...
    def row(self, label: str, cells: Sequence[Cell]) -> None: ...
    def end(self, text: str, losses: array[float]) -> None: ...


def display_mode(file: TextIO) -> str:
    """How progress can be shown on ``file``: ``"terminal"``, ``"notebook"`` or ``"lines"``.

    A standard stream inside a Jupyter kernel (also Colab, VS Code, nbclient) is a notebook. A terminal is
    one that can move its cursor; everything else (a file, a pipe, a CI log, ``TERM=dumb``) gets whole lines
    only.

    >>> import io
    >>> display_mode(io.StringIO())
    'lines'
    """
    ipython = sys.modules.get("IPython")
    if ipython is not None and file in (sys.stdout, sys.stderr):
        shell = ipython.get_ipython()
        if getattr(shell, "kernel", None) is not None:
            return "notebook"
    return "terminal" if file.isatty() and os.environ.get("TERM") != "dumb" else "lines"


def open_display(mode: str, file: TextIO, refresh_s: float) -> Display:
    """The display for a mode of ``display_mode``."""
    if mode == "notebook":
        return Notebook(refresh_s)
    return Terminal(file, refresh_s) if mode == "terminal" else Lines(file, max(refresh_s, 30.0))


class Lines:
    """Whole lines, for a file that is read later: nothing is ever written over."""

    erases = False

    def __init__(self, file: TextIO, refresh_s: float) -> None:
        self.file, self.refresh_s = file, refresh_s

    def live(self, bars: Sequence[Bar], losses: array[float]) -> None:
        """A line for the innermost thing that is going on."""
        self.row(bars[-1].label, bars[-1].cells)

    def row(self, label: str, cells: Sequence[Cell]) -> None:
        self._print("  ".join([label, *map(str, cells)]))

    def end(self, text: str, losses: array[float]) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        if text:
            print(text, file=self.file, flush=True)


class Terminal:
    """Bars below the cursor, which stays where it was: what is printed meanwhile lands above them.

    They are erased before anything that stays is written, and drawn anew with the next refresh.
    """

    erases = True

    def __init__(self, file: TextIO, refresh_s: float) -> None:
        self.file, self.refresh_s = file, refresh_s
        self.color = not os.environ.get("NO_COLOR")
        try:
            "━╸─".encode(file.encoding or "ascii")
            self.glyphs = ("━", "╸", "─")
        except UnicodeEncodeError:
            self.glyphs = ("#", ">", "-")

    def live(self, bars: Sequence[Bar], losses: array[float]) -> None:
        width = self._width()
        lines = [self._line(bar, width) for bar in bars]
        n = len(lines)
        # make room by moving down, which scrolls at the bottom but keeps the column; then save and draw
        room = "\x1bD" * n + f"\x1b[{n}A"
        self.file.write("\x1b[J" + room + "\x1b7" + "".join("\r\n" + line for line in lines) + "\x1b8")
        self.file.flush()

    def row(self, label: str, cells: Sequence[Cell]) -> None:
        self._print(self._line(Bar(label, None, list(cells)), self._width()))

    def end(self, text: str, losses: array[float]) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        self.file.write("\x1b[J" + (text + "\n" if text else ""))
        self.file.flush()

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[22m" if self.color and text else text

    def _width(self) -> int:
        if "COLUMNS" not in os.environ:
            try:
                return os.get_terminal_size(self.file.fileno()).columns or 80
            except (OSError, ValueError):
                pass
        return shutil.get_terminal_size().columns

    def _line(self, bar: Bar, width: int) -> str:
        """``bar`` in less than ``width`` columns: cells of a high rank are left out, then the bar itself."""
        room, cells, least = width - 1 - len(bar.label), list(bar.cells), 0 if bar.done is None else 14
        while cells and _length(cells) + least > room:
            cells.remove(max(cells, key=lambda cell: cell.rank))
        room -= _length(cells)
        drawn = "" if bar.done is None or room < least else "  " + self._bar(bar.done, min(30, room - 2))
        texts = [f"  {self._dim(cell.name)} {cell.text}" if cell.name else f"  {cell.text}" for cell in cells]
        return bar.label[: width - 1] + drawn + "".join(texts)

    def _bar(self, done: float, width: int) -> str:
        full, tip, empty = self.glyphs
        filled = min(max(done, 0.0), 1.0) * width
        head = full * int(filled) + (tip if filled % 1 >= 0.5 else "")
        tail = empty * (width - len(head))
        return f"\x1b[32m{head}\x1b[39m{self._dim(tail)}" if self.color else head + tail


def _length(cells: Sequence[Cell]) -> int:
    return sum(len(str(cell)) + 2 for cell in cells)


class Notebook:
    """A table of the epochs, the curve of the loss and a progress line, in one output updated in place."""

    erases = True
    rows_while_running, rows_at_end = 10, 500

    def __init__(self, refresh_s: float) -> None:
        self.refresh_s = refresh_s
        self.rows: list[dict[str, str]] = []
        self.names: list[str] = []
        self.handle: Any = None
        self.curve, self.points = "", 0

    def live(self, bars: Sequence[Bar], losses: array[float]) -> None:
        self._show(self.rows_while_running, losses, "".join(f"<div>{_bar_html(bar)}</div>" for bar in bars))

    def row(self, label: str, cells: Sequence[Cell]) -> None:
        self.rows.append({"": label, **{cell.name or cell.column: cell.text.strip() for cell in cells}})
        self.names = sorted(dict.fromkeys([*self.names, *self.rows[-1]]), key=_place)

    def end(self, text: str, losses: array[float]) -> None:
        self._show(self.rows_at_end, losses, f"<div>{html.escape(text)}</div>")

    def _show(self, rows: int, losses: array[float], below: str) -> None:
        from IPython.display import HTML, display

        if len(losses) != self.points:
            self.curve, self.points = sparkline(losses), len(losses)
        body = self._table(rows) + self.curve + below
        page = HTML(
            f'<div style="font-family:monospace;font-variant-numeric:tabular-nums;white-space:pre">{body}</div>'
        )
        if self.handle is None:
            self.handle = display(page, display_id=True)
        else:
            self.handle.update(page)

    def _table(self, limit: int) -> str:
        if not self.rows:
            return ""
        names = self.names
        cell = '<td style="padding:0 0.7em;text-align:right">'
        hidden = len(self.rows) - limit
        rows = [f'<td colspan="{len(names)}">{hidden} earlier lines</td>'] if hidden > 0 else []
        rows += ["".join(cell + html.escape(row.get(n, "")) + "</td>" for n in names) for row in self.rows[-limit:]]
        head = "".join(f"{cell}<b>{html.escape(name)}</b></td>" for name in names)
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in [head, *rows])}</table>"


def _place(name: str) -> tuple[int, str]:
    """The label first, then what was logged, then speed and time."""
    kinds = ("", "train", "valid", "test")
    kind = name.partition("/")[0]
    if kind in kinds:
        return kinds.index(kind), ""  # in the order in which they came
    return len(kinds) + (kind == name), name


def _bar_html(bar: Bar) -> str:
    style = "width:12em;height:0.8em;margin:0 1em;accent-color:#4c9a52"
    drawn = "  " if bar.done is None else f'<progress style="{style}" value="{bar.done:.4f}" max="1"></progress>'
    return html.escape(bar.label) + drawn + html.escape("  ".join(map(str, bar.cells)))
