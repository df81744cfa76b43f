"""Which curves a report draws, in which charts, and thinned to what a screen can show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from loopwright.errors import SettingError, choose
from loopwright.report.log import Curve
from loopwright.report.reading import Recorded

__all__ = ["band", "best_of", "chosen", "compared_charts", "own_charts", "thin"]

_POINTS = 150_000  # of all curves of a page
_LEAST, _MOST = 200, 4000  # of one curve
_CURVES = 400  # of a page
_PARTS = ("valid", "train", "test")  # in the order of their colours


def thin(curve: Curve, limit: int) -> Curve:
    """At most ``limit`` points: the lowest and the highest of each stretch, so that no peak is lost.

    >>> peak = Curve(np.arange(1000), np.where(np.arange(1000) == 421, 9.0, 0.0))
    >>> few = thin(peak, 10)
    >>> len(few) <= 10, float(few.value.max())
    (True, 9.0)
    """
    n, buckets = len(curve), max(1, limit // 2)
    if n <= limit:
        return curve
    size = -(-n // buckets)
    padded = np.full(buckets * size, np.nan)
    padded[:n] = curve.value
    rows = padded.reshape(buckets, size)
    none = ~np.isfinite(rows)
    low = np.where(none, np.inf, rows).argmin(axis=1)
    high = np.where(none, -np.inf, rows).argmax(axis=1)
    begin = np.arange(buckets) * size
    kept = np.unique(np.concatenate([begin + low, begin + high]))
    kept = kept[kept < n]
    return Curve(curve.step[kept], curve.value[kept])


def own_charts(run: Recorded, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """The charts of one run: what is alike (``train/loss``, ``valid/loss``) in the same one, as data for the page."""
    lines = {name: _lines_of(run, name) for name in chosen([run], names)}
    limit = _limit(sum(map(len, lines.values())))
    known = set(lines)
    charts: dict[str, list[dict[str, Any]]] = {}
    for name, found in sorted(lines.items(), key=lambda pair: _part(pair[0])):
        chart = charts.setdefault(_chart_of(name, known), [])
        color = len({line["name"] for line in chart})
        for style, curve in found:
            chart.append({"name": name, "color": color, "style": style, **_points(thin(curve, limit))})
    return [{"title": _title(one, charts[one]), "lines": charts[one]} for one in sorted(charts, key=_rank)]


def _title(title: str, lines: list[dict[str, Any]]) -> str:
    """The whole name, but for train or valid, where a chart has one: ``gradient_norm/0.weight``."""
    names = {line["name"].partition("/")[2] if line["name"].partition("/")[0] in _PARTS else title for line in lines}
    return names.pop() if len(names) == 1 else title


def compared_charts(runs: Sequence[Recorded], groups: Sequence[Sequence[int]], names: Sequence[str] | None) -> Any:
    """A chart for each name, with a line for each run, or a mean with a band for each group of several seeds."""
    wanted = chosen(runs, names)
    limit = _limit(len(wanted) * len(runs))
    charts = []
    for name in sorted(wanted, key=lambda one: (_rank(_chart_of(one, set(wanted))), one.startswith("train/"), one)):
        lines: list[dict[str, Any]] = []
        for color, group in enumerate(groups):
            found = [(i, curve) for i in group if (curve := _main(runs[i], name)) is not None]
            if len(found) > 1:
                lines.append({"group": color, "color": color, "style": "mean", **_band([c for _, c in found], limit)})
            style = "member" if len(found) > 1 else "main"
            lines += [
                {"run": i, "group": color, "color": color, "style": style, **_points(thin(curve, limit))}
                for i, curve in found
            ]
        charts.append({"title": name, "lines": lines})
    return charts


def chosen(runs: Iterable[Recorded], names: Sequence[str] | None) -> list[str]:
    """The names of the curves to draw, in the order in which they were first logged.

    ``names`` are names or patterns (``"grad/*"``); None is all, up to a number that a page can hold. Raises
    SettingError for one that nothing was logged under.
    """
    known: dict[str, None] = {}
    for run in runs:
        for kind in ("train", "step", "valid", "epoch"):
            known |= dict.fromkeys(run.curves.get(kind, {}))
    if names is None:
        return sorted(known, key=lambda name: name.partition("/")[0] not in (*_PARTS, "lr"))[:_CURVES]
    found: dict[str, None] = {}
    for name in names:
        fits = [one for one in known if one == name or fnmatchcase(one, name)]
        if not fits:
            raise SettingError(f"no series {name!r} was logged. {choose(name, known)}")
        found |= dict.fromkeys(fits)
    return list(found)


def best_of(curve: Curve) -> dict[str, Any]:
    """Last, lowest and highest value of a curve with their steps; values that are no numbers are only counted."""
    good = np.isfinite(curve.value)
    told: dict[str, Any] = {"count": len(curve), "bad": int((~good).sum())}
    if len(curve):
        told["last"] = (float(curve.value[-1]), int(curve.step[-1]))
    if good.any():
        low = int(np.where(good, curve.value, np.inf).argmin())
        high = int(np.where(good, curve.value, -np.inf).argmax())
        told["lowest"] = (float(curve.value[low]), int(curve.step[low]))
        told["highest"] = (float(curve.value[high]), int(curve.step[high]))
    return told


def band(curves: Sequence[Curve]) -> tuple[Any, Any, Any, Any]:
    """Steps, mean, least and greatest of curves, over the steps that all of them reach; between points in a line.

    >>> up, down = (Curve(np.array([0, 10]), np.array(v)) for v in ([0.0, 1.0], [1.0, 0.0]))
    >>> [part.tolist() for part in band([up, down])]
    [[0, 10], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0]]
    """
    finite = [(c.step[np.isfinite(c.value)], c.value[np.isfinite(c.value)]) for c in curves]
    finite = [(step, value) for step, value in finite if len(step)]
    empty = np.array([])
    if not finite:
        return empty, empty, empty, empty
    steps = finite[0][0]
    if not all(np.array_equal(steps, step) for step, _ in finite):
        steps = np.unique(np.concatenate([step for step, _ in finite]))
    begin, end = max(step[0] for step, _ in finite), min(step[-1] for step, _ in finite)
    steps = steps[(steps >= begin) & (steps <= end)]
    values = np.stack([np.interp(steps, step, value) for step, value in finite])
    return steps, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def _band(curves: Sequence[Curve], limit: int) -> dict[str, Any]:
    steps, mean, low, high = band(curves)
    kept: list[int] = []
    if len(steps):
        kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), limit // 2)).astype(int)).tolist()
    rows = {"y": mean, "lo": low, "hi": high}
    return {"x": [int(steps[i]) for i in kept], **{k: [_short(v[i]) for i in kept] for k, v in rows.items()}}


def _points(curve: Curve) -> dict[str, Any]:
    return {"x": curve.step.tolist(), "y": [_short(value) for value in curve.value.tolist()]}


def _short(value: float) -> float | None:
    """Six digits, which is more than a screen has; None for what is no number."""
    return float(f"{value:.6g}") if -1e300 < value < 1e300 else None


def _limit(curves: int) -> int:
    return max(_LEAST, min(_MOST, _POINTS // max(1, curves)))


def _lines_of(run: Recorded, name: str) -> list[tuple[str, Curve]]:
    """What is drawn of a name: single values thin, where there are means over whole epochs as well."""
    fine = run.curves.get("step", {}).get(name) or run.curves.get("train", {}).get(name)
    coarse = run.curves.get("valid", {}).get(name) or run.curves.get("epoch", {}).get(name)
    if fine is None or coarse is None:
        one = fine or coarse
        return [] if one is None else [("main", one)]
    if not name.startswith("train/") or len(coarse) < 2:
        return [("main", max(fine, coarse, key=len))]
    return [("raw", fine), ("main", coarse)] if len(fine) > 3 * len(coarse) else [("main", max(fine, coarse, key=len))]


def _main(run: Recorded, name: str) -> Curve | None:
    """The one curve by which runs are compared."""
    lines = _lines_of(run, name)
    return lines[-1][1] if lines else None


def _chart_of(name: str, known: set[str]) -> str:
    """The chart of a name: that of the metric for train, valid and test, else that of what comes before the slash."""
    part, _, rest = name.partition("/")
    if part not in _PARTS or not rest:
        return part
    head, _, last = rest.rpartition("/")
    alone = any(f"{one}/{head}" in known for one in _PARTS)
    return rest if not head else head if alone or last.isdigit() else last


def _part(name: str) -> int:
    part = name.partition("/")[0]
    return _PARTS.index(part) if part in _PARTS else len(_PARTS)


def _rank(title: str) -> tuple[bool, bool, bool]:
    return title != "loss", title == "lr", title not in ("accuracy",)
