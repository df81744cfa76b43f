"""What a run took and left: time, memory, layers, checkpoints."""

from __future__ import annotations

import math
from typing import Any

from loopwright.checkpoint import decode, index, list_checkpoints
from loopwright.checkpoint.manifest import peek
from loopwright.errors import CheckpointError
from loopwright.report.markup import Markup, cut, el, table
from loopwright.report.reading import Recorded
from loopwright.report.sections import section
from loopwright.text import format_bytes, format_count, format_spent, format_value

__all__ = ["checkpoints", "layers", "time_and_memory"]

_LAYERS, _CHECKPOINTS = 400, 200
_NAMES = {
    "data": "waiting for data", "clip and check": "clip and check", "rest": "the loop itself",
}  # fmt: skip


def time_and_memory(run: Recorded) -> Markup | None:
    """A bar of what the time was spent on, with a table of the same, and the peaks of memory."""
    parts = _profiled(run) or _measured(run)
    total = sum(seconds for _, seconds in parts)
    bar = rows = None
    if total > 0:
        bar = el("div", [
            el("i", class_=f"s{i % 8}", style=f"width:{100 * seconds / total:.2f}%", title=f"{name}: {seconds:.3g} s")
            for i, (name, seconds) in enumerate(parts)
        ], class_="bar", role="img", aria_label=", ".join(f"{n} {s / total:.0%}" for n, s in parts[:8]))  # fmt: skip
        rows = table(
            [el("th", el("i", class_=f"key s{i % 8}"), cut(name, 60), scope="row"),
             el("td", format_spent(seconds), class_="n"), el("td", f"{seconds / total:.1%}", class_="n")]
            for i, (name, seconds) in enumerate(parts)
        )  # fmt: skip
    peaks = [(name, size) for name, key in (("of this process", "memory"), ("of the device's tensors", "device_memory"))
             if (size := _positive(run.part("about").get(key)))]  # fmt: skip
    memory = [el("p", f"Peak memory {name}: {format_bytes(size)}") for name, size in peaks]
    return section("Time and memory", bar, rows, *memory, wide=False)


def _profiled(run: Recorded) -> list[tuple[str, float]]:
    """As ``lw.Profiler`` has measured, the longest first."""
    lines = run.profile.get("lines")
    found: list[tuple[str, float]] = []
    for name, line in lines.items() if isinstance(lines, dict) else ():
        seconds = _positive(line.get("seconds")) if isinstance(line, dict) else 0.0
        if seconds:
            found.append((_NAMES.get(str(name), str(name)), seconds))
    found.sort(key=lambda pair: -pair[1])
    rest = sum(seconds for _, seconds in found[11:])
    return [*found[:11], ("everything else", rest)] if rest else found


def _measured(run: Recorded) -> list[tuple[str, float]]:
    """As far as it is known without a profile."""
    total, waited = _positive(run.fact("progress", "seconds")), _positive(run.fact("progress", "waited"))
    spent = run.part("about").get("seconds")
    spent = spent if isinstance(spent, dict) else {}
    known = {"waiting for data": waited, **{name: _positive(spent.get(name)) for name in ("validation", "checkpoints")}}
    if not total or not any(known.values()):
        return []
    known = {"training steps": max(0.0, total - sum(known.values())), **known}
    return [(name, seconds) for name, seconds in known.items() if seconds]


def _positive(value: Any) -> float:
    fits = type(value) in (int, float) and math.isfinite(value) and 0 < value < 1e15
    return float(value) if fits else 0.0


def layers(run: Recorded) -> Markup | None:
    """The layers as ``lw.Report`` has found them."""
    summary = run.part("about").get("summary")
    if not isinstance(summary, dict) or not isinstance(summary.get("rows"), list):
        return None
    rows = [[str(cell) for cell in row] for row in summary["rows"] if isinstance(row, list) and len(row) == 5]
    shown = [_layer(row) for row in rows[:_LAYERS]]
    if rows and all(row[1] == row[2] == row[4] == "" for row in rows):  # no forward was possible
        head, shown = ["layer", "parameters"], [[row[0], row[3]] for row in shown]
    else:
        head = ["layer", "input", "output", "parameters", "FLOPs"]
    totals = [el("p", cut(line, 200), class_="note") for line in (summary.get("totals") or []) if isinstance(line, str)]
    more = f"and {len(rows) - _LAYERS:,} more layers" if len(rows) > _LAYERS else None
    return section("Model", table(shown, head, class_="layers"), more, totals) if rows else None


def _layer(row: list[str]) -> list[Any]:
    name = row[0].lstrip(" ")
    depth = min(12, (len(row[0]) - len(name)) // 2)
    first = el("th", cut(name, 60), scope="row", style=f"padding-left:{0.6 + 1.1 * depth:.1f}em")
    return [first, cut(row[1], 40), cut(row[2], 40), *(el("td", cut(cell, 40), class_="n") for cell in row[3:])]


def checkpoints(run: Recorded) -> Markup | None:
    """Step, size and monitored value of each; which is the best and which the last."""
    found = list_checkpoints(run.folder / "checkpoints")
    if not found:
        return None
    marked = index(run.folder / "checkpoints")
    rows = []
    for path in found[-_CHECKPOINTS:]:
        info = _about(path)
        notes = [mark for mark in ("best", "last") if marked.get(mark) == path]
        monitor, value, step = info.get("monitor"), info.get("value"), info.get("step")
        shown = f"{monitor} {format_value(value)}" if isinstance(monitor, str) and type(value) is float else ""
        rows.append([
            el("th", cut(path.name, 60), scope="row"), [el("span", mark, class_="badge") for mark in notes],
            el("td", format_count(step) if type(step) is int and step < 1 << 60 else "-", class_="n"),
            el("td", format_bytes(_size(path)), class_="n"), cut(shown, 60),
        ])  # fmt: skip
    return section("Checkpoints", table(rows, ["checkpoint", "", "step", "size", "monitored"]), wide=False)


def _about(path: Any) -> dict[str, Any]:
    """What a manifest says, unverified."""
    try:
        info = decode(peek(path).get("info"), {})
    except CheckpointError:
        return {}
    return info if isinstance(info, dict) else {}


def _size(path: Any) -> int:
    try:
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    except OSError:
        return 0
