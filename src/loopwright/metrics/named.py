"""Metrics by name: what torchmetrics and scikit-learn call them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

from loopwright.errors import SettingError, choose
from loopwright.metrics.function import Function

__all__ = ["by_name"]


def by_name(name: str) -> Any:
    """The metric that ``"torchmetrics:auroc"`` or ``"sklearn:f1_macro"`` names.

    After ``torchmetrics:`` stands a function of ``torchmetrics.functional``, or a class that needs no argument; after
    ``sklearn:`` a scorer (``sklearn.metrics.get_scorer_names()``), or a function of ``sklearn.metrics``. Functions and
    scorers are called on all samples at once, see ``Function``. Raises SettingError for a name that is neither, with
    those that are near, and where the package is missing.

    >>> by_name("sklearn:f1_macro").inputs
    ('preds', 'target')
    """
    package, _, what = name.partition(":")
    if package not in _PACKAGES or not what:
        raise SettingError(
            f"metric {name!r}: expected a name such as 'torchmetrics:auroc' or 'sklearn:f1_macro', or an object such "
            f"as lw.metrics.Accuracy(){_nearest(what or package)}"
        )
    try:
        return _PACKAGES[package](what)
    except ImportError as error:
        extra = {"torchmetrics": "metrics", "sklearn": "sklearn"}[package]
        raise SettingError(
            f"metric {name!r} needs {package}, which cannot be imported ({error}): pip install loopwright[{extra}]"
        ) from error


def _nearest(name: str) -> str:
    """End of the sentence about a name without a package that is known: that which is nearest in one that is there."""
    known: dict[str, str] = {}
    with suppress(ImportError):
        known |= {bare: f"torchmetrics:{bare}" for bare in (key for part in _of_torchmetrics() for key in part)}
    with suppress(ImportError):
        from sklearn import metrics

        known |= {bare: f"sklearn:{bare}" for bare in (*_of_sklearn(), *metrics.get_scorer_names())}
    near = difflib.get_close_matches(name, known, n=1)
    return f". Did you mean {known[near[0]]!r}?" if near else ""


def _torchmetrics(name: str) -> Any:
    functions, classes = _of_torchmetrics()
    if name in functions:
        required = [p.name for p in inspect.signature(functions[name]).parameters.values() if p.default is p.empty]
        if len(required) > 2 + ("task" in required):
            raise SettingError(
                f"metric 'torchmetrics:{name}' needs {', '.join(required[2:])} as well: pass a function, "
                f"functools.partial(torchmetrics.functional.{name}, {required[2]}=...)"
            )
        return Function(functions[name])
    if name not in classes:
        raise SettingError(f"metric 'torchmetrics:{name}' is unknown. {choose(name, [*functions, *classes])}")
    try:
        return classes[name]()
    except TypeError as error:
        raise SettingError(
            f"metric 'torchmetrics:{name}' cannot be made without arguments ({error}): pass the object, "
            f"torchmetrics.{name}(...)"
        ) from None


def _sklearn(name: str) -> Any:
    from sklearn import metrics

    scorers, functions = metrics.get_scorer_names(), _of_sklearn()
    if name in scorers:
        return Function(metrics.get_scorer(name))
    if name not in functions:
        raise SettingError(f"metric 'sklearn:{name}' is unknown. {choose(name, [*scorers, *functions])}")
    return Function(functions[name])


def _of_torchmetrics() -> tuple[dict[str, Any], dict[str, Any]]:
    """Functions and classes."""
    import torchmetrics

    classes = {key: value for key, value in _public(torchmetrics).items() if isinstance(value, type)}
    return _public(torchmetrics.functional), classes


def _of_sklearn() -> dict[str, Any]:
    from sklearn import metrics

    return {key: value for key, value in _public(metrics).items() if _judges(value)}


def _public(module: ModuleType) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__all__ if hasattr(module, name)}


def _judges(thing: Any) -> bool:
    """True for a function of targets and predictions."""
    return inspect.isfunction(thing) and next(iter(inspect.signature(thing).parameters), "") == "y_true"


_PACKAGES: dict[str, Callable[[str], Any]] = {"torchmetrics": _torchmetrics, "sklearn": _sklearn}
