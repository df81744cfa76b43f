"""HTML as values: what is no ``Markup`` is escaped wherever it is put, so that nobody has to remember to."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable
from typing import Any

__all__ = ["Markup", "cut", "digest", "el", "embedded", "standard", "table"]

_VOID = {"img", "meta", "br"}
_LONGEST = 2000  # characters of a text that is shown when it is pointed at


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def el(tag: str, *children: Any, **attributes: Any) -> Markup:
    """An element. Children: text and numbers, which are escaped, elements, lists of those; None is left out.

    ``class_`` is the attribute class, ``data_x`` is data-x; None and False leave an attribute out.

    >>> el("td", "a < b", class_="name", title='"')
    '<td class="name" title="&quot;">a &lt; b</td>'
    """
    told = "".join(
        f" {name.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(_printable(str(value)))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{tag}{told}>" if tag in _VOID else f"<{tag}{told}>{_joined(children)}</{tag}>")


def _joined(children: Iterable[Any]) -> str:
    parts = []
    for child in children:
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, (list, tuple)):
            parts.append(_joined(child))
        elif child is not None:
            parts.append(html.escape(_printable(str(child))))
    return "".join(parts)


def _printable(text: str) -> str:
    """``text`` with what no screen shows written out: a name can turn the direction of what follows it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def cut(text: Any, length: int = 80) -> Markup:
    """A text of any length in at most ``length`` characters; pointed at, more of it is shown.

    >>> cut("abcdef", 4)
    '<span title="abcdef">abc…</span>'
    """
    text = str(text)
    if len(text) <= length:
        return Markup(_joined([text]))
    return el("span", f"{text[: length - 1]}…", title=text[:_LONGEST])


def table(rows: Iterable[Iterable[Any]], head: Iterable[Any] = (), *, class_: str = "") -> Markup:
    """A table that scrolls inside of its own box. A cell may be a whole ``th`` or ``td`` of its own."""
    cells, names = [[_cell(cell) for cell in row] for row in rows], list(head)
    right = [cell.startswith('<td class="n"') for cell in cells[0]] if cells else []
    heads = [el("th", name, scope="col", class_="n" if i < len(right) and right[i] else None)
             for i, name in enumerate(names)]  # fmt: skip
    top = el("thead", el("tr", heads)) if heads else None
    body = el("tbody", [el("tr", row) for row in cells])
    return el("div", el("table", top, body, class_=class_ or None), class_="scroll", tabindex="0")


def _cell(cell: Any) -> Markup:
    if isinstance(cell, Markup) and cell.startswith(("<td", "<th")):
        return cell
    number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
    return el("td", cell, class_="n" if number else None)


def embedded(value: Any) -> Markup:
    """Plain data as JSON that can stand in a script element: nothing in it can end the element.

    >>> embedded(["</script>", float("nan")])
    '["\\\\u003c/script\\\\u003e",null]'
    """
    text = json.dumps(standard(value), separators=(",", ":"), allow_nan=False)  # ASCII
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def standard(value: Any) -> Any:
    """Plain data as standard JSON has it: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): standard(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [standard(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value  # NaN and infinities


def digest(script: str) -> str:
    """What a content security policy allows a script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
