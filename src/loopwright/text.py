"""How values, times and counts read on a screen."""

from __future__ import annotations

import math
from typing import Any

__all__ = [
    "format_bytes", "format_count", "format_spent", "format_time", "format_value", "rule_name", "with_article",
]  # fmt: skip


def format_value(value: float | None) -> str:
    """A logged value in a few characters, the same number of decimals for values of like size; None is ``-``.

    >>> [format_value(v) for v in (0.21345, 12.3456, 3e-4, 1234.5, 5e7, float("nan"), None)]
    ['0.2135', '12.35', '3.00e-04', '1234.5', '5.00e+07', 'nan', '-']
    """
    if value is None:
        return "-"
    value, size = float(value), abs(value)
    if not math.isfinite(value):
        return str(value)
    if size and not 1e-3 <= size < 1e6:
        return f"{value:.2e}"
    return f"{value:.4f}" if size < 10 else f"{value:.2f}" if size < 1000 else f"{value:.1f}"


def format_time(seconds: float) -> str:
    """Hours, minutes and seconds as on a clock; less than 10 seconds with a decimal.

    >>> [format_time(s) for s in (0.31, 7.4, 62, 3723, 90061)]
    ['0.3 s', '7.4 s', '1:02', '1:02:03', '1 d 1:01:01']
    """
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    clock = f"{h}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
    return f"{days} d {clock}" if days else clock


def format_spent(seconds: float) -> str:
    """Like ``format_time``, with less than a second in thousandths of it.

    >>> format_spent(0.0314), format_spent(62)
    ('31 ms', '1:02')
    """
    return f"{1e3 * seconds:.0f} ms" if seconds < 0.95 else format_time(seconds)


def format_bytes(size: float) -> str:
    """A size in memory or on disk, with three digits.

    >>> [format_bytes(n) for n in (999, 1_234_567, 2e13)]
    ['999 B', '1.23 MB', '20 TB']
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.95:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def format_count(number: float) -> str:
    """A whole number with its thousands set apart; a small one keeps a decimal.

    >>> format_count(12345.4), format_count(0.52)
    ('12,345', '0.5')
    """
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def with_article(noun: str) -> str:
    """A noun with its article, as it is spoken in most cases.

    >>> with_article("list"), with_article("int"), with_article("OrderedDict")
    ('a list', 'an int', 'an OrderedDict')
    """
    return f"{'an' if noun[:1].lower() in tuple('aeio') else 'a'} {noun}"


def rule_name(rule: Any) -> int | str:
    """A number as it is, a function or another rule by its name.

    >>> rule_name(5), rule_name(math.floor)
    (5, 'floor')
    """
    return rule if isinstance(rule, int) else str(getattr(rule, "__qualname__", rule))
