"""What a model said in an evaluation: how it confused classes or missed numbers, and on which samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopwright.report.markup import Markup, cut, el, table
from loopwright.report.reading import Recorded
from loopwright.report.residuals import residuals
from loopwright.report.sections import section
from loopwright.report.shown import class_name, samples_shown

__all__ = ["predictions"]

_GRID = 30  # classes of which a whole table is shown
_PAIRS = 20


def predictions(run: Recorded) -> list[Markup | None]:
    """The sections of the test and of the last validation, which is folded where there was a test."""
    test, valid = _of(run, "test", "Test"), _of(run, "valid", "Validation")
    if any(test) and any(valid):
        return [*test, el("details", el("summary", "The same of the last validation"), valid, class_="more")]
    return [*test, *valid]


def _of(run: Recorded, name: str, title: str) -> list[Markup | None]:
    part = run.part(name)
    step, count, classes = part.get("step"), part.get("samples"), part.get("classes")
    when = f", at step {step:,}" if type(step) is int else ""
    note = f"{count:,} samples{when}" if type(count) is int else None
    names = [str(one) for one in classes] if isinstance(classes, list) else []
    return [
        section(f"{title}: confusions", *_confusions(part, names), note=note),
        section(f"{title}: residuals", *residuals(part), note=note),
        section(f"{title}: worst predictions", samples_shown(part, "worst", names)),
        section(f"{title}: best predictions", samples_shown(part, "best", names)),
    ]


# --------------------------------------------------------------------------------------------------- confusions


def _confusions(part: dict[str, Any], names: Sequence[str]) -> list[Markup | None]:
    counts = _square(part.get("counts"))
    if not counts or not any(map(sum, counts)):
        return []
    grid = _grid(counts, names) if len(counts) <= _GRID else None
    return [el("div", grid, _classes(counts, names), class_="pair"), _pairs(counts, names) if grid is None else None]


def _square(counts: Any) -> list[list[int]]:
    """A square of whole numbers; empty if it is none."""
    if not isinstance(counts, list) or not all(isinstance(row, list) and len(row) == len(counts) for row in counts):
        return []
    whole = all(type(cell) is int and 0 <= cell < 1 << 60 for row in counts for cell in row)
    return counts if whole else []


def _grid(counts: list[list[int]], names: Sequence[str]) -> Markup:
    size = len(counts)
    head = [el("th", cut(class_name(j, names), 14), scope="col") for j in range(size)]
    rows = [el("tr", el("th", "true \\ predicted", class_="corner"), head)]
    for i, row in enumerate(counts):
        total = max(1, sum(row))
        true = class_name(i, names)
        cells = [_shade(n, n / total, right=i == j, title=f"{true} taken for {class_name(j, names)}: {n:,}")
                 for j, n in enumerate(row)]  # fmt: skip
        rows.append(el("tr", el("th", cut(class_name(i, names), 18), scope="row"), cells))
    return el("div", el("table", rows, class_="grid"), class_="scroll", tabindex="0")


def _shade(count: int, share: float, *, right: bool, title: str) -> Markup:
    kind = "right" if right else "wrong"
    if not count:
        return el("td", "·", class_="none")
    strong = share if right else min(1.0, 0.15 + share)
    return el(
        "td", f"{count:,}", class_=f"{kind}{' hot' if strong > 0.5 else ''}", style=f"--p:{strong:.3f}", title=title
    )


def _classes(counts: list[list[int]], names: Sequence[str]) -> Markup:
    """Precision, recall and F1 of each class; ``-`` where there is nothing to divide by."""
    rows = []
    for i, row in enumerate(counts[:200]):
        hit, true, said = row[i], sum(row), sum(one[i] for one in counts)
        parts = [
            hit / said if said else None,
            hit / true if true else None,
            2 * hit / (said + true) if said + true else None,
        ]
        cells = [el("td", "-" if part is None else f"{part:.1%}", class_="n") for part in parts]
        rows.append([el("th", cut(class_name(i, names), 30), scope="row"), *cells, el("td", f"{true:,}", class_="n")])
    hits, total = sum(row[i] for i, row in enumerate(counts)), sum(map(sum, counts))
    last = el("p", f"{hits:,} of {total:,} right ({hits / total:.2%})", class_="note")
    return el("div", table(rows, ["class", "precision", "recall", "F1", "samples"]), last)


def _pairs(counts: list[list[int]], names: Sequence[str]) -> Markup | None:
    """The confusions that happened most, where a whole table would be too large."""
    wrong = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
    rows = [
        [cut(class_name(i, names), 40), cut(class_name(j, names), 40), n]
        for n, i, j in sorted(wrong, reverse=True)[:_PAIRS]
    ]
    return table(rows, ["true", "taken for", "samples"]) if rows else None
