"""Several runs side by side: which they are, in which settings they differ, and which differ by their seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopwright.report.curves import best_of
from loopwright.report.markup import Markup, cut, el, table
from loopwright.report.reading import Recorded
from loopwright.report.sections import flat, section, status_badge
from loopwright.text import format_count, format_time, format_value

__all__ = ["differences", "group_by_seed", "labels", "overview"]

_SEEDS = ("seed", "key", "resumed_from", "progress", "folder")  # settings that may differ within a group
_KEYS = 300


def group_by_seed(runs: Sequence[Recorded]) -> list[list[int]]:
    """Positions of the runs by group: those whose settings are the same but for the seed are together."""
    groups: dict[Any, list[int]] = {}
    for i, run in enumerate(runs):
        settings = {key: value for key, value in flat(run.config).items() if key not in _SEEDS}
        same = tuple(sorted(settings.items())) if settings else i
        groups.setdefault((run.name, same), []).append(i)
    return list(groups.values())


def labels(runs: Sequence[Recorded], groups: Sequence[Sequence[int]]) -> list[str]:
    """A name for each group: that of its runs, with the settings in which the groups differ."""
    found = [flat(runs[group[0]].config) for group in groups]
    keys = [key for key in dict.fromkeys(key for one in found for key in one)
            if key not in (*_SEEDS, "name") and len({one.get(key) for one in found}) > 1]  # fmt: skip
    keys = [key for key in keys if not key.startswith("stages.")] or keys  # most of which only follow from others
    told = []
    for group, settings in zip(groups, found, strict=True):
        parts = [f"{key.rpartition('.')[2]}={settings.get(key, '-')[:30]}" for key in keys[:3]]
        seeds = f"{len(group)} seeds" if len(group) > 1 else "" if parts else runs[group[0]].folder.name
        told.append(" · ".join(part for part in (runs[group[0]].name[:60], " ".join(parts), seeds) if part))
    return [one if told.count(one) == 1 else f"{one} · {runs[group[0]].folder.name}"
            for one, group in zip(told, groups, strict=True)]  # fmt: skip


def overview(runs: Sequence[Recorded], groups: Sequence[Sequence[int]], names: Sequence[str]) -> Markup | None:
    """A row for each run, with the colour that its curves have."""
    shown = [name for name in names if name.startswith(("valid/", "test/"))][:6] or list(names)[:4]
    rows = []
    for color, group in enumerate(groups):
        for i in group:
            run = runs[i]
            seconds, steps, seed = run.fact("progress", "seconds"), run.fact("progress", "step"), run.fact("seed")
            rows.append([
                el("th", el("i", class_=f"key s{color % 8}"), cut(run.name, 40), scope="row"),
                cut(run.folder.name, 30), status_badge(run.status), cut("-" if seed is None else seed, 20),
                el("td", format_count(steps) if type(steps) is int and steps < 1 << 60 else "-", class_="n"),
                el("td", format_time(min(seconds, 1e12)) if type(seconds) in (int, float) else "-", class_="n"),
                *(el("td", _last(run, name), class_="n") for name in shown),
            ])  # fmt: skip
    head = ["run", "folder", "status", "seed", "steps", "time", *(cut(name, 30) for name in shown)]
    return section("Runs", table(rows, head))


def _last(run: Recorded, name: str) -> str:
    for kind in ("test", "valid", "epoch", "train", "step"):
        curve = run.curves.get(kind, {}).get(name)
        if curve is not None:
            return format_value(best_of(curve)["last"][0])
    return "-"


def differences(runs: Sequence[Recorded]) -> Markup | None:
    """Settings and versions that are not the same in all runs."""
    found = [_facts(run) for run in runs]
    keys = [
        key for key in dict.fromkeys(key for one in found for key in one) if len({one.get(key) for one in found}) > 1
    ]
    head = ["", *(cut(f"{run.name} {run.folder.name[-6:]}", 30) for run in runs)]
    rows = [
        [el("th", cut(key, 60), scope="row"), *(cut(one.get(key, "-"), 60) for one in found)] for key in keys[:_KEYS]
    ]
    more = f"and {len(keys) - _KEYS:,} more" if len(keys) > _KEYS else None
    same = el("p", "All settings are the same.", class_="note") if not rows else None
    return section("Differences", table(rows, head) if rows else None, more, same)


def _facts(run: Recorded) -> dict[str, str]:
    settings = flat(run.config) or {"seed": str(run.fact("seed"))}
    settings.pop("key", None)
    versions = run.fact("versions")
    if isinstance(versions, dict):
        settings |= {f"version of {name}": str(version) for name, version in versions.items()}
    commit, diff = run.fact("git", "commit"), run.fact("git", "diff")
    settings |= {"git commit": str(commit)[:12]} if commit else {}
    return settings | ({"uncommitted changes": f"{len(diff):,} characters"} if isinstance(diff, str) and diff else {})
