"""What a notebook shows of our objects: tables and small curves, as HTML without scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from loopwright.text import format_count, format_value

__all__ = ["sparkline", "table_html"]


def table_html(head: Sequence[str], rows: Iterable[Sequence[Any]], *, limit: int = 200) -> str:
    """A table; numbers stand to the right, of more than ``limit`` rows the last ones are shown.

    >>> table_html(["name"], [["a < b"]])
    '<table><tr><th>name</th></tr><tr><td style="text-align:left">a &lt; b</td></tr></table>'
    """
    rows = list(rows)
    hidden = len(rows) - limit
    parts = ["<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>"]
    if hidden > 0:
        parts.append(f'<tr><td colspan="{len(head)}">{hidden:,} earlier lines</td></tr>')
        rows = rows[-limit:]
    parts += ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
    return f"<table>{''.join(parts)}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f'<td style="text-align:right">{format_value(value)}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td style="text-align:right">{format_count(value)}</td>'
    return f'<td style="text-align:left">{"" if value is None else html.escape(str(value))}</td>'


def sparkline(values: Sequence[float], *, width: int = 320, height: int = 48) -> str:
    """An SVG curve of ``values``, thinned to at most one point every 2 pixels; empty for fewer than 2.

    >>> sparkline([3.0, 1.0, 2.0]).count(",")
    3
    """
    stride = max(1, -(-len(values) // (width // 2)))
    means = np.array(values[: len(values) // stride * stride], dtype=np.float64).reshape(-1, stride).mean(axis=1)
    drawn = [(i, v) for i, v in enumerate(means.tolist()) if math.isfinite(v)]
    if len(drawn) < 2:
        return ""
    low, high = min(v for _, v in drawn), max(v for _, v in drawn)
    x, y = width / max(len(means) - 1, 1), (height - 4) / ((high - low) or 1.0)
    points = " ".join(f"{i * x:.1f},{height - 2 - (v - low) * y:.1f}" for i, v in drawn)
    return (
        f'<svg width="{width}" height="{height}" style="display:block;margin:0.3em 0" role="img">'
        f"<title>loss of each step from {drawn[0][1]:.4g} to {drawn[-1][1]:.4g}</title>"
        f'<polyline points="{points}" fill="none" stroke="#4c9a52" stroke-width="1.5"/></svg>'
    )
