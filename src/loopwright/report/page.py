"""The page: one file that needs no network, made of a style, a script, and what the run folders tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from loopwright import __version__
from loopwright.errors import SettingError
from loopwright.folder import put
from loopwright.report.comparing import differences, group_by_seed, labels, overview
from loopwright.report.curves import chosen, compared_charts, own_charts
from loopwright.report.effort import checkpoints, layers, time_and_memory
from loopwright.report.markup import Markup, cut, digest, el, embedded
from loopwright.report.predicted import predictions
from loopwright.report.reading import Recorded, find_run, read_run
from loopwright.report.sections import config, environment, header, metrics, section, tiles, warnings_met

__all__ = ["write"]

_RUNS = 50  # that are compared on one page


def write(
    runs: str | Path | Sequence[str | Path], path: str | Path | None = None, *, series: Sequence[str] | None = None
) -> Path:
    """Write the report of a run, or of several side by side, as one HTML file, and return its path.

    ``runs`` are run folders, or ``runs/<name>`` for the newest run of that name. ``path`` is by default ``report.html``
    in the folder of a single run, and ``comparison.html`` in the working directory for several. ``series`` are names or
    patterns (``"grad/*"``) of the curves to draw; None is all, up to 400. Curves are thinned so that no peak is lost.
    Runs whose settings differ by their seed alone are drawn as a mean with a band from the least to the greatest.

    What is torn or missing is left out and said. Raises SettingError for what is no run and for unknown series.

    >>> import loopwright as lw, torch
    >>> from torch import nn
    >>> trainer = lw.Trainer(epochs=1, progress=False)
    >>> net = nn.Linear(2, 2)
    >>> task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    >>> run = trainer.fit(task, [(torch.eye(2), torch.tensor([0, 1]))])
    >>> write(run.folder).name
    'report.html'
    """
    given = [runs] if isinstance(runs, (str, Path)) else list(runs)
    if not given:
        raise SettingError("a report needs a run; give its folder, such as runs/digits")
    if len(given) > _RUNS:
        raise SettingError(f"{len(given)} runs are too many for one page, which has room for {_RUNS}")
    if isinstance(series, str):
        raise SettingError(f"series={series!r}: expected a list of names or patterns, such as [{series!r}]")
    folders = list(dict.fromkeys(find_run(one) for one in given))
    recorded = [read_run(folder) for folder in folders]
    target = Path(path) if path is not None else _default(folders)
    page = _single(recorded[0], series) if len(recorded) == 1 else _several(recorded, series)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        put(target, lambda part: part.write_text(page, encoding="utf-8", errors="backslashreplace"))
    except OSError as error:
        raise SettingError(f"the report cannot be written to {target}: {error.strerror or error}") from error
    return target


def _default(folders: Sequence[Path]) -> Path:
    return folders[0] / "report.html" if len(folders) == 1 else Path("comparison.html")


def _single(run: Recorded, series: Sequence[str] | None) -> str:
    charts = own_charts(run, series)
    best = _best_step(run)
    data = {"charts": charts, "marks": [{"x": best, "label": "best checkpoint"}] if best is not None else []}
    body = [
        header(run), _part(tiles, run), _curves(charts), _part(predictions, run), _part(metrics, run),
        el("div", _part(time_and_memory, run), _part(checkpoints, run), class_="columns"), _part(layers, run),
        _part(warnings_met, run), el("div", _part(config, run), _part(environment, run), class_="columns"),
    ]  # fmt: skip
    return _page(f"{run.name[:100]} ({run.status})", body, data)


def _part(make: Callable[[Recorded], Any], run: Recorded) -> Any:
    """A part of the page; what it needs may have been written by anybody, and must not cost the rest of the page."""
    try:
        return make(run)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        told = f"A part of this run could not be shown ({make.__name__}): {type(error).__name__}: {error}"
        return el("div", cut(told, 300), class_="callout")


def _several(runs: Sequence[Recorded], series: Sequence[str] | None) -> str:
    groups = group_by_seed(runs)
    names = labels(runs, groups)
    charts = compared_charts(runs, groups, series)
    data = {"charts": charts, "marks": [], "groups": names, "runs": [f"{r.name[:60]} {r.folder.name}" for r in runs]}
    title = f"{len(runs)} runs compared"
    told = [el("div", cut(f"{run.folder}: {note}", 600), class_="callout") for run in runs for note in run.notes]
    band = any(len(group) > 1 for group in groups)
    note = "Lines with a band are the mean over seeds; the band goes from the least to the greatest." if band else None
    return _page(title, [
        el("header", el("h1", title), told), overview(runs, groups, chosen(runs, None)), _curves(charts, note),
        differences(runs),
    ], data)  # fmt: skip


def _curves(charts: Sequence[Any], note: str | None = None) -> Markup | None:
    if not charts:
        return None
    told = el("p", "Over optimizer steps. Drag across a curve to zoom in, double-click to see all again; a name in a "
              "legend hides its curve.", class_="note screen")  # fmt: skip
    off = el("noscript", el("p", "The curves need JavaScript, which this browser does not run.", class_="callout"))
    return section("Curves", told, off, el("div", id="charts", class_="charts"), note=note)


def _best_step(run: Recorded) -> int | None:
    """The step of the best checkpoint, where one was monitored."""
    from loopwright.checkpoint import index

    best = index(run.folder / "checkpoints")["best"] if (run.folder / "checkpoints").is_dir() else None
    digits = best.name.rpartition("-")[2] if best is not None else ""
    return int(digits) if digits.isdecimal() and len(digits) < 16 else None


@cache
def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _page(title: str, body: Sequence[Any], data: Any) -> str:
    script = _asset("page.js")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{digest(script)}'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="generator", content=f"loopwright {__version__}"),
        el("title", title),
        el("style", Markup(_asset("page.css"))),
    )
    main = el(
        "body", el("main", *body), el("footer", f"written by loopwright {__version__}"),
        el("div", id="tip", role="status"),
        el("script", embedded(data), type="application/json", id="data"), el("script", Markup(script)),
    )  # fmt: skip
    return f"<!doctype html>\n{el('html', head, main, lang='en')}\n"
