"""Text for a terminal: aligned tables, sizes and times, and nothing in it that a terminal would obey."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Sequence
from typing import Any

from loopwright.text import format_count, format_value, with_article

__all__ = ["format_any", "format_size", "format_written", "plain", "safe", "table"]

_LONGEST = 200  # characters of a value


def table(rows: Iterable[Sequence[str]], *, right: Iterable[int] = (), indent: int = 0) -> str:
    """Rows as lines whose columns are aligned, those numbered in ``right`` to the right. Columns without text go.

    >>> print(table([("step", "loss", ""), ("8", "0.25", ""), ("1200", "0.5", "")], right=[0]))
    step  loss
       8  0.25
    1200  0.5
    """
    shown = [[safe(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = []
    for row in shown:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def safe(text: str) -> str:
    """``text`` with what is not printable written out: names come from files, and a terminal obeys some of them.

    >>> safe("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def format_size(size: float) -> str:
    """Bytes in the largest unit that leaves a number from 1.

    >>> [format_size(n) for n in (0, 999, 1000, 12_345, 7_000_000_000)]
    ['0 B', '999 B', '1.0 kB', '12.3 kB', '7.0 GB']
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_any(value: Any) -> str:
    """A value of whatever type a file holds, not longer than a few lines; None is ``-``.

    >>> [format_any(v) for v in (1200, 0.25, None, ["a", 1], 10**5000)]
    ['1,200', '0.2500', '-', "['a', 1]", 'a number of 16610 bits']
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return format_count(value) if abs(value) < 1 << 63 else f"a number of {value.bit_length()} bits"
    try:
        text = format_value(value) if value is None or isinstance(value, float) else str(value)
    except ValueError:  # a number with more digits than Python writes is in it
        text = with_article(type(value).__name__)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def format_written(written: Any) -> str:
    """A time that a manifest names, on the clock of this computer; ``-`` if it is none."""
    try:
        return f"{datetime.datetime.fromisoformat(written).astimezone():%Y-%m-%d %H:%M:%S}"
    except (TypeError, ValueError, OverflowError, OSError):
        return "-"


def plain(value: Any) -> Any:
    """Values as JSON has them: numbers that are not finite, and all that JSON does not know, become text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return hex(value)  # Python writes no decimal number of more than some thousand digits
    finite = isinstance(value, float) and math.isfinite(value)
    return value if value is None or finite or isinstance(value, (bool, int, str)) else str(value)
