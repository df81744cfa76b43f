"""How far predicted numbers lie from their targets: one against the other, and how often by how much."""

from __future__ import annotations

import math
from typing import Any

from loopwright.report.markup import Markup, el, table
from loopwright.text import format_value

__all__ = ["residuals"]

_SIZE, _LEFT, _REST = 420, 58, 14  # of a drawing and its margins, in its own units
_BASE, _INNER = _SIZE - _LEFT, _SIZE - _LEFT - _REST


def residuals(part: dict[str, Any]) -> list[Markup | None]:
    """Two drawings and a few figures; empty for fewer than two points."""
    given = part.get("points")
    points = [(float(p[0]), float(p[1])) for p in (given if isinstance(given, list) else []) if _is_point(p)][:5000]
    if len(points) < 2:
        return []
    misses = sorted(guess - target for target, guess in points)
    told = {
        "mean of residuals": sum(misses) / len(misses),
        "root mean square": math.sqrt(sum(miss * miss for miss in misses) / len(misses)),
        "median": misses[len(misses) // 2],
    }
    shown = {name: format_value(value) for name, value in told.items()}
    low, high = (format_value(misses[i]) for i in (len(misses) // 20, -1 - len(misses) // 20))
    shown["90% of them lie from"] = f"{low} to {high}"
    figures = table([el("th", name, scope="row"), el("td", text, class_="n")] for name, text in shown.items())
    return [el("div", _scatter(points), _histogram(misses), figures, class_="pair even")]


def _is_point(point: Any) -> bool:
    fits = isinstance(point, list) and len(point) == 2
    return fits and all(type(one) in (int, float) and -1e150 < one < 1e150 for one in point)


class _Scale:
    """Numbers from ``low`` to ``high`` as places in a drawing."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high, self.span = low, high, (high - low) or 1.0

    def x(self, value: float) -> str:
        return f"{_LEFT + _INNER * (value - self.low) / self.span:.1f}"

    def y(self, value: float) -> str:
        return f"{_BASE - _INNER * (value - self.low) / self.span:.1f}"


def _scatter(points: list[tuple[float, float]]) -> Markup:
    """Predictions over targets; on the line they are equal."""
    scale = _Scale(min(map(min, points)), max(map(max, points)))
    low, high, middle = scale.low, scale.high, (scale.low + scale.high) / 2
    dots = [el("circle", cx=scale.x(target), cy=scale.y(guess), r="2.6", class_="dot") for target, guess in points]
    line = el("line", x1=scale.x(low), y1=scale.y(low), x2=scale.x(high), y2=scale.y(high), class_="ideal")
    up = [el("text", format_value(v), x=_LEFT - 6, y=scale.y(v), text_anchor="end") for v in (low, middle, high)]
    return _figure("predicted (up) over target", [*_axis(scale, middle), *up, line, *dots])


def _histogram(misses: list[float]) -> Markup:
    """How many residuals lie in each of some equal parts of their range."""
    scale = _Scale(misses[0], misses[-1])
    bins = min(40, max(5, int(math.sqrt(len(misses)))))
    counts = [0] * bins
    for miss in misses:
        counts[min(bins - 1, int(bins * (miss - scale.low) / scale.span))] += 1
    width, bars = _INNER / bins, []
    for i, count in enumerate(counts):
        height = _INNER * count / max(counts)
        bars.append(el("rect", x=f"{_LEFT + i * width:.1f}", y=f"{_BASE - height:.1f}", width=f"{width - 1:.1f}",
                       height=f"{height:.1f}", class_="bin"))  # fmt: skip
    if not scale.low < 0.0 < scale.high:
        return _figure("residuals: predicted minus target", [*_axis(scale, (scale.low + scale.high) / 2), *bars])
    zero = el("line", x1=scale.x(0.0), x2=scale.x(0.0), y1=_REST, y2=_BASE, class_="ideal")
    return _figure("residuals: predicted minus target", [*_axis(scale, 0.0), *bars, zero])


def _axis(scale: _Scale, middle: float) -> list[Markup]:
    ends = ((scale.low, "start"), (middle, "middle"), (scale.high, "end"))
    line = el("line", x1=_LEFT, y1=_BASE, x2=_SIZE - _REST, y2=_BASE, class_="axis")
    return [line, *(el("text", format_value(v), x=scale.x(v), y=_BASE + 20, text_anchor=to) for v, to in ends)]


def _figure(title: str, shapes: list[Markup]) -> Markup:
    box = f"0 0 {_SIZE} {_SIZE - 26}"
    return el("figure", el("figcaption", title), el("svg", shapes, viewBox=box, role="img", aria_label=title),
              class_="drawing")  # fmt: skip
