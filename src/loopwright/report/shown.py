"""Single samples of a report: cards of images or texts, or the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopwright.report.markup import Markup, cut, el, table
from loopwright.report.png import is_png
from loopwright.text import format_value

__all__ = ["class_name", "samples_shown"]

_SAMPLES = 200


def class_name(number: Any, names: Sequence[str]) -> str:
    """The name of a class, its number where it has none."""
    return names[number] if type(number) is int and 0 <= number < len(names) else str(number)


def samples_shown(part: dict[str, Any], key: str, names: Sequence[str]) -> Markup | None:
    """The samples that ``lw.Report`` has kept under ``key``; None if there are none."""
    given = part.get(key)
    found = [one for one in (given if isinstance(given, list) else []) if isinstance(one, dict)][:_SAMPLES]
    if not found:
        return None
    if any("image" in one or "text" in one for one in found):
        kind = "cards texts" if "text" in found[0] else "cards"
        return el("div", [_card(one, names) for one in found], class_=kind)
    columns = part["columns"] if isinstance(part.get("columns"), list) else []
    width = max(len(_row(one)) for one in found)
    heads = [cut(columns[i] if i < len(columns) else f"x{i}", 24) for i in range(width)]
    rows = []
    for one in found:
        cells = [el("td", _number(value), class_="n") for value in _row(one)]
        said = [el("td", *one_said, class_=kind) for one_said, kind in _said(one, names)]
        rows.append([*said, *cells, *[""] * (width - len(cells)), one["n"] if type(one.get("n")) is int else ""])
    return table(rows, ["predicted", "target", *heads, "sample"])


def _row(one: dict[str, Any]) -> list[Any]:
    return one["row"] if isinstance(one.get("row"), list) else []


def _card(one: dict[str, Any], names: Sequence[str]) -> Markup:
    image, text, shown = one.get("image"), one.get("text"), None
    if is_png(image):
        shown = el("img", src=f"data:image/png;base64,{image}", alt=f"sample {one.get('n', '')}", loading="lazy")
    elif isinstance(text, str):
        shown = el("blockquote", cut(text, 600))
    (guess, kind), (target, _) = _said(one, names)
    right = kind == "good"
    told = [el("div", *guess, class_=kind) if kind != "n" else el("div", "predicted ", *guess)]
    told += [] if right else [el("div", "true " if kind != "n" else "target ", *target)]
    return el("figure", shown, el("figcaption", told), class_="card-sample")


def _said(one: dict[str, Any], names: Sequence[str]) -> list[tuple[list[Any], str | None]]:
    """What was predicted and what was right, each with the class of its cell."""
    guess, target = one.get("guess"), one.get("target")
    if "p" not in one:
        return [([el("b", _numbers(guess))], "n"), ([el("b", _numbers(target))], "n")]
    kinds = ("good" if guess == target else "warn", None)
    return [
        ([el("b", cut(class_name(said, names), 40)), _share(one, said)], kind)
        for said, kind in zip((guess, target), kinds, strict=True)
    ]


def _share(one: dict[str, Any], number: Any) -> str:
    """The probability that a class was given, if it was noted."""
    pairs = one["top"] if isinstance(one.get("top"), list) else []
    top = {pair[0]: pair[1] for pair in pairs if isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int}
    chance = top.get(number, one.get("p") if number == one.get("target") else None)
    return f" {chance:.1%}" if type(chance) is float and 0.0 <= chance <= 1.0 else ""


def _numbers(value: Any) -> str:
    return ", ".join(map(_number, value[:6])) if isinstance(value, list) else _number(value)


def _number(value: Any) -> str:
    if type(value) is int and abs(value) < 1 << 53:
        return str(value)
    return format_value(value) if type(value) is float else "-"
