"""Checks of arguments that several constructors share, so that the same mistake is told in the same words."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from loopwright.errors import SettingError

__all__ = ["check_flag", "check_list", "check_seed", "check_text", "is_number", "named", "not_callable_with"]


def check_flag(name: str, value: Any) -> None:
    """Raise SettingError unless ``value`` is True or False: "no" would be taken for True.

    >>> check_flag("deterministic", "no")
    Traceback (most recent call last):
    loopwright.errors.SettingError: deterministic='no': expected True or False
    """
    if not isinstance(value, bool):
        raise SettingError(f"{name}={value!r}: expected True or False")


def check_text(name: str, value: Any, such_as: str, *, where: str = "") -> None:
    """Raise SettingError unless ``value`` is a text with something in it."""
    if not isinstance(value, str) or not value.strip():
        raise SettingError(f"{where}{name}={value!r}: expected a text, such as {name}={such_as!r}")


def check_seed(value: Any, otherwise: str) -> None:
    """Raise SettingError unless ``value`` is a whole number from 0, or None, which does what ``otherwise`` says."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise SettingError(f"seed={value!r}: expected a whole number from 0, or None {otherwise}")
    if value is not None and value >= 2**64:
        raise SettingError(f"seed={value!r}: torch takes seeds below 2**64, such as seed={value % 2**64}")


def check_list(name: str, value: Any, such_as: str, *, where: str = "") -> None:
    """Raise SettingError unless ``value`` is a list or tuple; one object alone is told how to be put into one.

    >>> check_list("loggers", 3, "'csv'")
    Traceback (most recent call last):
    loopwright.errors.SettingError: loggers=3: expected a list of them, such as loggers=['csv']
    """
    if isinstance(value, (list, tuple)):
        return
    kind = value if isinstance(value, type) else type(value)
    told, such_as = (
        (repr(value), such_as) if kind.__module__ == "builtins" else (kind.__name__, f"{kind.__name__}(...)")
    )
    raise SettingError(f"{where}{name}={told}: expected a list of them, such as {name}=[{such_as}]")


class named:  # noqa: N801 - used as a function, which would cost twice as much, as of written.placed
    """Let a SettingError about ``value`` say which argument it was given as.

    >>> with named("log_every", None):
    ...     raise SettingError("None is not a duration")
    Traceback (most recent call last):
    loopwright.errors.SettingError: log_every=None is not a duration
    """

    def __init__(self, name: str, value: Any, *, where: str = "") -> None:
        self.name, self.value, self.where = name, value, where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SettingError):
            text, shown = str(error), repr(self.value)
            told = text if text.startswith(shown) else f"{shown}: {text}"
            raise SettingError(f"{self.where}{self.name}={told}") from None


def is_number(value: Any) -> bool:
    """True for a real number that is no bool and not NaN, NumPy's too.

    >>> is_number(0.5), is_number(True), is_number("1"), is_number(float("nan"))
    (True, False, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def not_callable_with(function: Callable[..., Any], *names: str) -> str | None:
    """Why ``function`` cannot be called with so many positional arguments; None where it can, or does not tell.

    What a decorator has made of one that takes others is called as it is.

    >>> not_callable_with(lambda batch: None, "run", "batch")
    '(batch) cannot be called with (run, batch): too many positional arguments'
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without one
        return None
    try:
        signature.bind(*names)
    except TypeError as error:
        try:
            inspect.signature(function, follow_wrapped=False).bind(*names)
        except TypeError:
            return f"{signature} cannot be called with ({', '.join(names)}): {error}"
    return None
