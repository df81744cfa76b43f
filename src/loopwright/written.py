"""Where in the user's own files something is written, for messages that name the line, and what is written there."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import textwrap
import traceback
import warnings
from functools import cache
from types import CodeType, FrameType
from typing import Any

from loopwright.errors import LoopwrightError, LoopwrightWarning
from loopwright.text import rule_name

__all__ = [
    "blamed",
    "caller",
    "is_derived",
    "is_name",
    "is_ours",
    "parsed",
    "placed",
    "warn",
    "where",
    "written_by_user",
]

_OWN = __name__.partition(".")[0]
_OURS = (_OWN, "contextlib")  # packages whose frames are no place in the code of the user


def where(function: Any) -> str:
    """The file and line at which a function is written, as ``train.py:12``; its name where that is not known.

    >>> where(where).rpartition("/")[2].partition(":")[0]
    'written.py'
    """
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return str(rule_name(function)) if code is None else _line(code.co_filename, code.co_firstlineno)


def is_ours(item: Any) -> bool:
    """True for a class or function of this package, and for what does not say where it comes from."""
    return str(getattr(item, "__module__", _OWN)).partition(".")[0] == _OWN


def is_derived(kind: type, base: type) -> bool:
    """True for a class of this package, or one derived from one that is more than ``base``: it means what that means.

    >>> is_derived(ValueError, Exception), is_derived(LoopwrightError, Exception)
    (False, True)
    """
    return any(one is not base and is_ours(one) for one in kind.__mro__)


def written_by_user(method: Any) -> str | None:
    """Where a method is written; None where it is one of this package."""
    return None if is_ours(method) else where(method)


def parsed(function: Any) -> ast.FunctionDef | None:
    """What is written of a function, parsed; None where that is not to be had."""
    code = getattr(function, "__code__", None)
    return None if code is None else _parsed(code)


@cache  # by what is written: a function may hold models
def _parsed(code: CodeType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if isinstance(tree.body[0], ast.FunctionDef) else None


def is_name(node: ast.AST | None, name: str) -> bool:
    """True where ``name`` itself stands."""
    return isinstance(node, ast.Name) and node.id == name


def caller() -> str | None:
    """The file and line, outside of this package, that has called into it."""
    frame, _ = _outside(*_OURS)
    return None if frame is None else _line(frame.f_code.co_filename, frame.f_lineno)


def warn(text: str) -> None:
    """Issue a LoopwrightWarning that names the line, outside of this package and of torch, that has led to it.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True, action="always") as caught:
    ...     warn("it is cold")
    >>> caught[0].message
    LoopwrightWarning('it is cold')
    """
    frame, level = _outside(*_OURS, "torch")
    # there is no such line at the command line, and in a thread of ours
    warnings.warn(text, LoopwrightWarning, stacklevel=2 if frame is None else level)


def blamed(error: BaseException) -> str | None:
    """The last line outside of this package that ``error`` has come by, or the place that it says itself."""
    found = [
        _line(frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _OURS
    ]
    return getattr(error, "place", None) or (found[-1] if found else None)


class placed:  # noqa: N801 - used as a function, which would cost twice as much: a fit has ten of them
    """Let an error of ours that comes out of this block tell where ``what`` is written, in a note and as ``place``."""

    def __init__(self, what: str, place: str | None) -> None:
        self.what, self.place = what, place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, LoopwrightError) and self.place is not None and error.place is None:
            error.place = self.place
            error.add_note(f"[loopwright] {self.what}: written at {self.place}")


def _outside(*packages: str) -> tuple[FrameType | None, int]:
    """The frame that has called into ``packages``, and how many calls lie between; None where there is none."""
    frame: FrameType | None = sys._getframe()
    level = 0
    while frame is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in packages:
        frame, level = frame.f_back, level + 1
    return frame, level


def _line(file: str, number: int) -> str:
    try:
        here = os.getcwd() + os.sep
    except OSError:  # the folder is gone
        here = ""
    return f"{file.removeprefix(here)}:{number}"
