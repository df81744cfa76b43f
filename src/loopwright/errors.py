"""Every error that Loopwright raises by itself, and the exceptions that steer the loop.

Messages say what happened with the values, what was expected, and what to type.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

__all__ = [
    "CheckpointError",
    "DataError",
    "HookError",
    "LoopwrightError",
    "LoopwrightWarning",
    "MetricError",
    "NonFiniteError",
    "PlanError",
    "SettingError",
    "SkipBatch",
    "SkipStep",
    "StepOutputError",
    "StopEpoch",
]

MANY = 40  # names are too many to list

ABSENT: Any = object()
"""The default of an argument that must be given, where an unknown name is to be told before a missing one."""

P = ParamSpec("P")
R = TypeVar("R")


class LoopwrightError(Exception):
    """Base of all errors of this package: ``except lw.LoopwrightError`` catches them and nothing else.

    ``place``: the file and line at which its cause is written, where that is not a line of the traceback.
    """

    place: str | None = None


class LoopwrightWarning(UserWarning):
    """Issued, once for each cause, when something was done that the caller may want to know."""


class SettingError(LoopwrightError, ValueError):
    """Raised when an argument has a value that cannot be used, or that cannot apply in this run."""


class PlanError(SettingError):
    """Raised before step 0 when the run as a whole cannot work; ``problems`` lists every reason found.

    ``places``: for each of them the file and line where it was said, as far as that can be told.
    """

    def __init__(self, problems: Iterable[str], places: Mapping[str, str] | None = None) -> None:
        self.problems, self.places = list(problems), dict(places or {})
        at = {problem: f"\n    at {place}" for problem, place in self.places.items()}
        super().__init__("this run cannot start:\n" + "\n".join(f"  - {p}{at.get(p, '')}" for p in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """To other processes it goes with its problems; an error's own way has its message alone."""
        return type(self), (self.problems, self.places), vars(self)


class StepOutputError(LoopwrightError, TypeError):
    """Raised when a step returns something that the loop cannot use, such as a dict without ``loss``."""


class DataError(LoopwrightError, ValueError):
    """Raised when data cannot be read as batches: empty, exhausted, without a length, not movable."""


class HookError(LoopwrightError, TypeError):
    """Raised when a callback, handler or logger does what it may not: returns a value, or has a wrong signature."""


class MetricError(LoopwrightError, ValueError):
    """Raised when a metric cannot use what a step returned."""


class NonFiniteError(LoopwrightError, FloatingPointError):
    """Raised when a loss or a gradient is NaN or infinite; the parameters have not been touched by that step."""


class CheckpointError(LoopwrightError, RuntimeError):
    """Raised when a checkpoint cannot be written, is damaged, or does not fit this run."""


class SkipBatch(Exception):  # noqa: N818 - steers the loop, is no error
    """Raise it in ``on_batch_start`` or ``map_batch``: this batch is left out of its window."""


class SkipStep(Exception):  # noqa: N818
    """Raise it after ``map_batch`` and before the optimizers move: the window's gradients are dropped in all phases."""


class StopEpoch(Exception):  # noqa: N818
    """Raise it in a hook from ``on_step_start`` to ``on_step_end``: the open window is stepped, then the epoch ends."""


def choose(name: object, known: Iterable[object]) -> str:
    """Sentence that lists the known names and the nearest match, to end an error about an unknown name.

    >>> choose("acuracy", ["loss", "accuracy"])
    "Known: 'accuracy', 'loss'. Did you mean 'accuracy'?"
    """
    names = sorted(str(k) for k in known)
    if len(names) > MANY:
        some = difflib.get_close_matches(str(name), names, n=5)
        told = f"Did you mean {', '.join(map(repr, some))}? " if some else ""
        return f"{told}{len(names)} names are known{'' if some else ', none of them like it'}."
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Known: {', '.join(map(repr, names)) or 'none'}.{hint}"


def name_nearest(kind: type) -> None:
    """Let ``kind(...)`` name the nearest argument for one that it lacks, where no ``@elsewhere`` can stand."""
    setattr(kind, "__init__", elsewhere()(kind.__init__))  # type: ignore[misc]  # noqa: B010


def elsewhere(**ours: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: an unknown argument is a TypeError that tells the nearest, or ours for a name of other libraries.

    What is no name is where that belongs.

    >>> @elsewhere(max_epochs="epochs", lr="SGD(lr=...)")
    ... def train(epochs): ...
    >>> train(max_epochs=3)
    Traceback (most recent call last):
    TypeError: max_epochs=3: that argument is called epochs here
    >>> train(lr=3)
    Traceback (most recent call last):
    TypeError: lr=3: there is no such argument here; write SGD(lr=...)
    >>> train(epoch=3)
    Traceback (most recent call last):
    TypeError: epoch=3: there is no such argument. Known: 'epochs'. Did you mean 'epochs'?
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        code = function.__code__
        if code.co_flags & inspect.CO_VARKEYWORDS:
            return function  # it takes any name
        known = {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]} - {"self"}

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if kwargs.keys() - known:
                _refuse(kwargs, known, ours)
            return function(*args, **kwargs)

        return call

    return decorate


def without_unknown(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of what names the nearest itself, from its ``**unknown``, which no signature shows.

    Neither does it show ``ABSENT``. ``elsewhere`` costs a frame; between ``fit`` and the backward there are as few as
    can be.
    """
    signature = inspect.signature(function)
    named = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    shown = [one.replace(default=one.empty) if one.default is ABSENT else one for one in named]
    setattr(function, "__signature__", signature.replace(parameters=shown))  # noqa: B010
    return function


def refuse_unknown(
    unknown: Mapping[str, object], function: Callable[..., object], ours: Mapping[str, str], **needed: object
) -> None:
    """Raise TypeError for ``unknown`` arguments of ``function``, if there are any, as ``elsewhere`` does.

    And for what is ``needed`` and has not been given.
    """
    if unknown:
        _refuse(unknown, {*inspect.signature(function).parameters} - {"self"}, ours)
    if missing := [name for name, value in needed.items() if value is ABSENT]:
        raise TypeError(f"{' and '.join(missing)} missing; write {function.__name__}({', '.join(needed)}, ...)")


def _refuse(given: Mapping[str, object], known: set[str], ours: Mapping[str, str]) -> None:
    for name in sorted(given.keys() - known):
        if name in ours and not ours[name].isidentifier():
            raise TypeError(f"{name}={_brief(given[name])}: there is no such argument here; write {ours[name]}")
        if name in ours:
            raise TypeError(f"{name}={_brief(given[name])}: that argument is called {ours[name]} here")
        names = [theirs for theirs, called in ours.items() if called.isidentifier()]
        near = difflib.get_close_matches(name, [*sorted(known), *names], n=1)[:1]
        theirs = near[0] if near and near[0] not in known else None
        meant = choose(name, known)
        if theirs is not None:
            meant = f"{choose('', known)} Did you mean {ours[theirs]!r}, called {theirs} elsewhere?"
        raise TypeError(f"{name}={_brief(given[name])}: there is no such argument. {meant}")


def _brief(value: object) -> str:
    """A setting as it is written, data by three dots."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else "..."
