"""Write the pages of docs/api: every public name, how it is called, and its docstring.

Usage: ``python tools/api.py docs/api tests/api.txt``, as ``make api`` does: the second holds the surface alone, a line
for each name and signature, so that no change to it goes unseen.
"""

from __future__ import annotations

import enum
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import loopwright as lw

HEAD = "Written by `make api` from the docstrings; do not edit."


def doc(thing: object) -> str:
    """Docstring written for ``thing`` itself: neither inherited nor made by ``dataclass``."""
    text = thing.__doc__ or ""
    made = inspect.isclass(thing) and text.startswith(f"{thing.__name__}(")
    return "" if made else text.strip()


def public(module: ModuleType, prefix: str = "") -> Iterator[tuple[str, object]]:
    """``(dotted name, object)`` of all that ``__all__`` of the package and of its public modules names."""
    for name in module.__all__:
        thing = getattr(module, name)
        yield prefix + name, thing
        if isinstance(thing, ModuleType) and hasattr(thing, "__all__"):
            yield from public(thing, f"{prefix}{name}.")


def surface(module: ModuleType) -> Iterator[str]:
    """One line for each public name, and an indented one for each public member of a class."""
    for name, thing in public(module):
        if isinstance(thing, ModuleType):
            yield f"{name}: module"
        elif inspect.isclass(thing) and issubclass(thing, enum.Enum):
            yield f"{name}: " + ", ".join(thing.__members__)
        elif inspect.isclass(thing):
            yield f"class {name}{signature(thing)}"
            yield from (f"    {line}" for line in members(thing))
        elif callable(thing):
            yield f"{name}{signature(thing)}"
        else:
            yield f"{name}: {type(thing).__name__}"


def members(owner: type) -> Iterator[str]:
    """Public attributes that ``owner`` has from this package, inherited too, less those its call names."""
    fields = {*getattr(owner, "__dataclass_fields__", ()), *getattr(owner, "_fields", ())}
    names = {name for cls in ours(owner) for name in vars(cls) if not name.startswith("_")}
    for name in sorted(names - fields):
        thing = inspect.getattr_static(owner, name)
        if isinstance(thing, property):
            yield f"{name}: property"
        elif isinstance(thing, (staticmethod, classmethod)):
            yield f"{name}{signature(thing.__func__)}: {type(thing).__name__}"
        elif inspect.isfunction(thing):
            yield f"{name}{signature(thing)}"
        elif not inspect.ismemberdescriptor(thing):
            yield f"{name}: {type(thing).__name__}"


def ours(owner: Any) -> list[type]:
    """The classes of this package that ``owner`` consists of."""
    return [cls for cls in inspect.getmro(owner) if cls.__module__.split(".")[0] == lw.__name__]


class Written:
    """An annotation that prints as it was written, in every version of Python."""

    def __init__(self, annotation: object) -> None:
        text = getattr(annotation, "__forward_arg__", annotation)  # NamedTuple makes ForwardRef of a string
        self.text = text if isinstance(text, str) else inspect.formatannotation(annotation)

    def __repr__(self) -> str:
        return self.text


def signature(thing: Any) -> str:
    """How it is called, as written, without the addresses that ``repr`` puts into defaults.

    ``(...)`` stands for a signature that is Python's own: that of an exception without an ``__init__``.
    """
    is_error = isinstance(thing, type) and issubclass(thing, BaseException)
    if is_error and not any("__init__" in vars(cls) for cls in ours(thing)):
        return "(...)"
    call = inspect.signature(thing)
    parameters = [
        one if one.annotation is one.empty else one.replace(annotation=Written(one.annotation))
        for one in call.parameters.values()
    ]
    result = call.return_annotation
    result = result if result in (call.empty, None) else Written(result)
    return re.sub(r" at 0x[0-9a-f]+", "", str(call.replace(parameters=parameters, return_annotation=result)))


# ----------------------------------------------------------------------------------------------------- the pages

# in the order of the index: title, first sentence, and what belongs there; the first that takes a name has it
PAGES: dict[str, tuple[str, str, Callable[[str, Any], bool]]] = {
    "errors": (
        "Errors and signals",
        "What is raised by us, and what a hook may raise to steer the loop.",
        lambda name, thing: inspect.isclass(thing) and issubclass(thing, BaseException),
    ),
    "callbacks": (
        "Callbacks",
        "What can be given as `lw.Trainer(callbacks=[...])` or `lw.Stage(..., callbacks=[...])`.",
        lambda name, thing: inspect.isclass(thing) and issubclass(thing, lw.Callback),
    ),
    "metrics": (
        "Metrics",
        "What `metrics={...}` of a task may hold, besides any torchmetrics metric and scikit-learn scorer.",
        lambda name, thing: name.startswith("metrics"),
    ),
    "loggers": (
        "Loggers",
        "What can be given as `lw.Trainer(loggers=[...])`, and what works on their records.",
        lambda name, thing: name.startswith("loggers") or thing.__module__.startswith("loopwright.loggers"),
    ),
    "data": (
        "Data",
        "Loaders, samplers, splits, and what makes a source of any data.",
        lambda name, thing: name.startswith("data") or thing.__module__.startswith("loopwright.data"),
    ),
    "optim": (
        "Optimizers, schedules and losses",
        "What moves the weights, and by how much.",
        lambda name, thing: (
            name.startswith(("optim", "schedules", "losses")) or thing.__module__.startswith("loopwright.optim")
        ),
    ),
    "training": ("Training", "The trainer, the task, what they make of them, and all else.", lambda name, thing: True),
}


def api_pages(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Name and text of each page, the index first."""
    found: dict[str, dict[str, Any]] = {page: {} for page in PAGES}
    seen: set[int] = set()
    begin = ["Trainer", "Task", "Supervised", "Run", "Callback", "Loader"]
    places = {name: place for place, name in enumerate(begin)}
    for name, thing in sorted(public(module), key=lambda pair: (pair[0].count("."), places.get(pair[0], len(places)))):
        if not isinstance(thing, ModuleType) and callable(thing) and id(thing) not in seen:
            seen.add(id(thing))
            found[next(page for page, (_, _, takes) in PAGES.items() if takes(name, thing))][name] = thing
    order = ["training", *(page for page in PAGES if page != "training")]
    index = [f"# API\n\nEvery public name of `import loopwright as lw`. {HEAD}\n"]
    for page in order:
        index += [f"## [{PAGES[page][0]}]({page}.md)\n", f"{PAGES[page][1]}\n", "| name | what it is |\n|---|---|"]
        rows = ((name, f"{page}.md#{anchor(name)}", first(thing)) for name, thing in found[page].items())
        index += [*(f"| [`lw.{name}`]({link}) | {what} |" for name, link, what in rows), ""]
    yield "README.md", "\n".join(index).rstrip() + "\n"
    for page in order:
        title, what, _ = PAGES[page]
        parts = [f"# {title}\n\n{what} {HEAD}\n", *(entry(name, thing) for name, thing in found[page].items())]
        yield f"{page}.md", "\n".join(parts).rstrip() + "\n"


def anchor(name: str) -> str:
    """Where a page shows ``name``, as the headings of Markdown are linked to."""
    return re.sub(r"[^a-z0-9_-]", "", f"lw.{name}".lower())


def first(thing: object) -> str:
    """The first sentence of a docstring, in a table."""
    text = " ".join(doc(thing).split("\n\n")[0].split())
    return re.split(r"(?<=[.!])\s(?=[A-Z`])|: ``", text)[0].rstrip(":").replace("``", "`").replace("|", "\\|")


def entry(name: str, thing: Any) -> str:
    """One name: heading, call, docstring, and the methods that are its own."""
    call = signature(thing)
    if inspect.isclass(thing):
        call = call.removesuffix(" -> None")
    lines = [f"## `lw.{name}`\n", f"```text\n{folded(name.rpartition('.')[2] + call)}\n```\n", markdown(doc(thing)), ""]
    methods = [
        f"- `{method}{signature(one).replace('(self, ', '(').replace('(self)', '()')}`: {first(one)}"
        for method, one in sorted(vars(thing).items() if inspect.isclass(thing) else ())
        if inspect.isfunction(one) and not method.startswith("_") and one.__doc__ and is_own(thing, method)
    ]
    return "\n".join([*lines, *methods, *([""] if methods else [])])


def is_own(owner: type, method: str) -> bool:
    """False for the hooks of a callback, which the page tells once."""
    return owner is lw.Callback or not hasattr(lw.Callback, method)


def folded(call: str) -> str:
    """A long signature with one parameter a line."""
    if len(call) <= 100 or "(" not in call:
        return call
    name, _, rest = call.partition("(")
    depth, parts, part = 0, list[str](), ""
    inside, _, result = rest.rpartition(")")
    for letter in inside:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts, part = [*parts, part.strip()], ""
        else:
            part += letter
    lines = "".join(f"    {one},\n" for one in [*parts, part.strip()])
    return f"{name}(\n{lines}){result}"


def markdown(text: str) -> str:
    """A docstring of ours: code in double backquotes, examples and literal blocks fenced."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith(">>> "):
            found.append(f"```pycon\n{paragraph}\n```")
        elif found and found[-1].endswith("::") and paragraph.startswith("    "):
            found[-1] = found[-1][:-1]
            found.append(f"```text\n{inspect.cleandoc(paragraph)}\n```")
        else:
            found.append(paragraph.replace("``", "`"))
    return "\n\n".join(found)


if __name__ == "__main__":
    folder, recorded = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in api_pages(lw):
        (folder / file).write_text(text, encoding="utf-8")
    recorded.write_text("".join(f"{line}\n" for line in surface(lw)), encoding="utf-8")
    print(f"{folder} and {recorded} are those of the package")
