"""What a report says in words and tables. A section without anything to say is None, and is left out."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterator
from typing import Any

from loopwright.report.curves import best_of
from loopwright.report.markup import Markup, cut, el, table
from loopwright.report.reading import Recorded
from loopwright.text import format_count, format_time, format_value

__all__ = ["config", "environment", "flat", "header", "metrics", "section", "status_badge", "tiles", "warnings_met"]

_SETTING = 300  # characters of a value that are shown
_ASKED = ("optimizers", "loss")  # settings that are looked for first
_ROWS = 1000


def section(title: str, *body: Any, wide: bool = True, note: str | None = None) -> Markup | None:
    """A titled part of the page; None if nothing is in it."""
    if not any(body):
        return None
    name = title.lower().replace(" ", "-")
    return el(
        "section", el("h2", title), el("p", note, class_="note") if note else None, *body,
        id=name, class_="card" if wide else "card half",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the top


def header(run: Recorded) -> Markup:
    """Name, status, when and how it was started, and what a reader must know first."""
    command = run.fact("command")
    words = [str(word) for word in command] if isinstance(command, list) else []
    facts = [text for text in (_when(run), run.fact("host") and f"on {run.fact('host')}") if text]
    return el(
        "header",
        el("h1", cut(run.name, 120), " ", status_badge(run.status)),
        el("p", cut(" ".join(facts), 200), class_="note") if facts else None,
        el("p", el("code", cut(shlex.join(words), 400)), class_="command") if words else None,
        el("p", el("code", cut(run.folder, 300)), class_="note"),
        list(_told(run)),
    )


def status_badge(status: str) -> Markup:
    """The status in the colour that it has."""
    known = status if status in ("done", "running", "failed", "interrupted", "stopped") else "unknown"
    return el("span", status, class_=f"badge {known}")


def _told(run: Recorded) -> Iterator[Markup]:
    """What has to be said before anything else."""
    if run.status == "running":
        yield _callout("This run is still going on, or was killed: the report shows what it had recorded so far.")
    if run.status == "interrupted":
        yield _callout('This run was interrupted. fit(resume="auto") goes on where its last checkpoint stands.')
    kind, message = run.fact("error", "type"), run.fact("error", "message")
    if kind is not None:
        step = run.fact("progress", "step")
        where = f" after step {step:,}" if isinstance(step, int) else ""
        notes = run.fact("error", "notes")
        text = "\n".join(map(str, [message, *(notes if isinstance(notes, list) else [])]))
        yield el("div", el("strong", f"{cut(kind, 80)}{where}"), el("pre", cut(text, 4000)), class_="callout bad")
    if not any(run.curves.values()):
        yield _callout("Nothing was logged: there are no curves and no metrics to show.")
    for note in run.notes:
        yield _callout(note)


def _callout(text: str) -> Markup:
    return el("div", text, class_="callout", role="note")


def _when(run: Recorded) -> str:
    try:
        began = datetime.datetime.fromisoformat(str(run.fact("started")))
    except ValueError:
        return ""
    restarts = run.fact("restarts")
    more = f", gone on with {len(restarts)} times" if isinstance(restarts, list) and restarts else ""
    return f"started {began:%Y-%m-%d %H:%M:%S}{more}"


def tiles(run: Recorded) -> Markup | None:
    """The few numbers that somebody looks for first."""
    found = [(name, format_value(value), "") for name, value in list(tested(run).items())[:3]]
    for name, curve in list(run.curves.get("valid", {}).items())[:3]:
        value, step = best_of(curve)["last"]
        found.append((name, format_value(value), f"step {step:,}"))
    seconds, steps = _number(run.fact("progress", "seconds")), _number(run.fact("progress", "step"))
    samples, epochs = _number(run.fact("progress", "samples")), _number(run.fact("progress", "epoch"))
    if seconds:
        per_second = f"{format_count(samples / seconds)} samples/s" if samples else ""
        found.append(("time", format_time(min(seconds, 1e12)), per_second))
    if steps:
        found.append(
            ("steps", format_count(steps), f"{format_count(epochs)} epoch{'s' * (epochs != 1)}" if epochs else "")
        )
    weights = run.part("about").get("summary", {})
    count = _number(weights.get("parameters")) if isinstance(weights, dict) else None
    if count:
        found.append(("weights", format_count(count), ""))
    boxes = [
        el("div", el("div", cut(name, 30), class_="k"), el("div", value, class_="v"), el("div", more, class_="k"))
        for name, value, more in found
    ]
    return el("div", boxes, class_="tiles") if boxes else None


def tested(run: Recorded) -> dict[str, float]:
    """What a test after the fit has measured."""
    values = run.part("test").get("metrics")
    found = {name: curve.value[-1] for name, curve in run.curves.get("test", {}).items()}
    return found | {str(k): v for k, v in (values.items() if isinstance(values, dict) else ()) if type(v) is float}


def _number(value: Any) -> float | None:
    """A number of a file that anybody may have written."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e15 else None


# ---------------------------------------------------------------------------------------------------- the tables


def metrics(run: Recorded) -> Markup | None:
    """Last, lowest and highest value of each name, each with its step."""
    seen: dict[str, Any] = {}
    for kind in ("valid", "epoch", "train", "step"):
        for name, curve in run.curves.get(kind, {}).items():
            if name not in seen:
                seen[name] = best_of(curve)
    seen |= {name: {"count": 1, "bad": 0, "last": (value, None)} for name, value in tested(run).items()}
    rows = [
        [el("th", cut(name, 60), scope="row"), *(_at(told.get(key)) for key in ("last", "lowest", "highest")),
         told["count"], el("td", told["bad"], class_="n warn") if told["bad"] else ""]
        for name, told in list(seen.items())[:_ROWS]
    ]  # fmt: skip
    left = len(seen) - _ROWS
    head = ["series", "last", "lowest", "highest", "values", "not finite"]
    if not any(told["bad"] for told in seen.values()):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return section("Metrics", table(rows, head), f"and {left:,} more" if left > 0 else None) if rows else None


def _at(found: Any) -> Markup:
    if found is None:
        return el("td", "-", class_="n")
    value, step = found
    where = el("span", "" if step is None else f"step {step:,}", class_="step")
    return el("td", format_value(value), " ", where, class_="n")


def warnings_met(run: Recorded) -> Markup | None:
    """Warnings, reasons why a resume would not be exact, and files that were left out of the archive."""
    met = run.parts.get("warnings")
    rows = []
    for one in (met if isinstance(met, list) else [])[:200]:
        if isinstance(one, dict):
            times = one.get("times")
            text = el("span", cut(one.get("text", ""), 600))
            rows.append([el("td", one.get("kind", ""), class_="nowrap"), text, times if type(times) is int else ""])
    return section("Warnings", table(rows, ["kind", "what", "times"])) if rows else None


def config(run: Recorded) -> Markup | None:
    """Every setting, nested ones by their path."""
    if isinstance(run.config, str):
        return section("Settings", el("pre", cut(run.config, 20_000)), wide=False)
    first = {name: run.config[name] for name in _ASKED if name in run.config} if isinstance(run.config, dict) else {}
    settings = flat(first) | flat(run.config)
    rows = [[el("th", cut(key, 60), scope="row"), cut(value, _SETTING)] for key, value in settings.items()]
    return section("Settings", table(rows[:_ROWS], class_="pairs"), wide=False) if rows else None


def flat(settings: Any, path: str = "") -> dict[str, str]:
    """Nested settings as one level: ``optimizers.main.lr``; short lists as one value.

    >>> flat({"seed": 0, "stages": {"fit": {"until": ["2 epochs"]}}})
    {'seed': '0', 'stages.fit.until': '2 epochs'}
    """
    found: dict[str, str] = {}
    if isinstance(settings, dict):
        for key, value in settings.items():
            found |= flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(settings, list) and any(isinstance(one, (dict, list)) for one in settings):
        for i, value in enumerate(settings):
            found |= flat(value, f"{path}.{i}")
    elif path:
        found[path] = ", ".join(map(_plain, settings)) if isinstance(settings, list) else _plain(settings)
    return found


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.12g}"  # 0.0004 and not 0.00039999999999999996
    try:
        return str(value)
    except ValueError:  # a number with more digits than Python writes
        return "a huge number"


def environment(run: Recorded) -> Markup | None:
    """Versions, git, the data, the seed, and whether the run can be resumed exactly."""
    rows = [[el("th", name, scope="row"), value] for name, value in _environment(run) if value]
    diff = run.fact("git", "diff")
    folded = [
        _folded("uncommitted changes", diff if isinstance(diff, str) else None, 200_000),
        _folded("installed packages", run.packages, 100_000),
    ]
    return section("Environment", table(rows, class_="pairs"), *folded, wide=False) if rows or any(folded) else None


def _environment(run: Recorded) -> Iterator[tuple[str, Any]]:
    versions = run.fact("versions")
    for name, version in versions.items() if isinstance(versions, dict) else ():
        yield str(name)[:40], cut(version, 80)
    commit = run.fact("git", "commit")
    if isinstance(commit, str):
        dirty = ", with uncommitted changes" if run.fact("git", "dirty") else ""
        yield "git commit", Markup(f"{el('code', commit[:12])}{dirty}")
    seed = run.fact("seed")
    yield "seed", "none was set" if seed is None else cut(seed, 30)
    exact = run.fact("exact")
    if isinstance(exact, list) and exact:
        yield "exact resume", Markup(f"no: {el('ul', [el('li', cut(one, 600)) for one in exact[:20]])}")
    elif exact is True:
        yield "exact resume", "yes"
    for name, value in flat(run.fact("data")).items():
        yield f"data {name}"[:60], cut(value, 120)
    for name in ("device", "threads"):
        yield name, cut(run.part("about").get(name) or "", 80)
    source = run.fact("source", "left_out")
    if isinstance(source, list) and source:
        yield "not archived", cut(", ".join(map(str, source)), _SETTING)


def _folded(title: str, text: str | None, longest: int) -> Markup | None:
    if not text:
        return None
    more = f"\n… ({len(text) - longest:,} more characters)" if len(text) > longest else ""
    return el("details", el("summary", title), el("pre", text[:longest] + more))
