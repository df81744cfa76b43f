"""Whether a function of scikit-learn or torchmetrics applies at all, tried on data like that of a first batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from loopwright.errors import MetricError
from loopwright.events import describe

__all__ = ["check_applies"]

_MOST = 16  # classes, labels or columns that are tried: what fails for many fails for these
_USUAL = ("_macro", "_ovr")  # ends of the names that are suggested first

Call = Callable[[Any, Tensor, Tensor], Any]


def check_applies(function: Any, call: Call, preds: Tensor, target: Tensor, *, as_scorer: Call) -> None:
    """Raise MetricError, with what to write instead, if ``call(function, ...)`` fails on the best of such predictions.

    A batch may lack a class, and what fails on it may do well on all samples: tried are predictions of the kind that
    ``preds`` are, and right, of targets that have every class. Functions of the user's own are not tried.
    ``as_scorer`` is how scorers are called, among which another is looked for.
    """
    like = _like(preds, target) if _module(function) in ("sklearn", "torchmetrics") else None
    error = None if like is None else _failure(call, function, *like)
    if like is None or error is None:
        return
    fits = [f"'sklearn:{name}'" for name in _relatives(function) if _failure(as_scorer, _scorer(name), *like) is None]
    name = getattr(getattr(function, "_score_func", function), "__name__", type(function).__name__)
    instead = f"write {' or '.join(fits[:3])}" if fits else "pass a function that takes such predictions"
    said = str(error).strip().rstrip(".")
    raise MetricError(
        f"{name} cannot be computed of preds {describe(preds)} and target {describe(target)}: {said}. For these, "
        f"{instead}"
    ) from error


def _failure(call: Call, function: Any, preds: Tensor, target: Tensor) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(function, preds, target)
        except Exception as error:
            return error
    return None


def _like(preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
    """Right predictions of a few samples of every class; None where it does not follow what would be right."""
    if not preds.ndim or not len(preds):
        return None
    if target.is_floating_point():
        shape = (8, *(min(size, _MOST) for size in target.shape[1:]))
        values = torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape)
        return (values + 0.5, values) if preds.shape == target.shape else None
    if preds.ndim == target.ndim + 1 and preds.shape[1] == 1:
        preds = preds.squeeze(1)
    if preds.ndim == target.ndim + 1:
        classes = torch.arange(min(preds.shape[1], _MOST)).repeat(2)
        return 6.0 * torch.nn.functional.one_hot(classes, int(classes.max()) + 1) - 3.0, classes
    if preds.shape != target.shape:
        return None
    highest = int(target.max()) if preds.is_floating_point() else max(int(preds.max()), int(target.max()))
    if highest > 1:
        classes = torch.arange(min(highest + 1, _MOST)).repeat(2)
        return (classes, classes) if not preds.is_floating_point() and preds.ndim == 1 else None
    columns = () if target.ndim == 1 else (min(target.shape[1], _MOST),)
    labels = torch.arange(8).reshape(8, *[1] * len(columns)).add(torch.arange(*columns) if columns else 0) % 2
    return (6.0 * labels - 3.0 if preds.is_floating_point() else labels), labels


def _module(function: Any) -> str:
    inner = getattr(function, "func", function)  # of a functools.partial
    return str(getattr(inner, "__module__", None) or type(inner).__module__).partition(".")[0]


def _relatives(function: Any) -> Iterator[str]:
    """Scorers whose names begin with that of ``function``: what else there is of f1."""
    if _module(function) != "sklearn":
        return
    from sklearn.metrics import get_scorer_names

    inner = getattr(function, "_score_func", getattr(function, "func", function))
    stem = str(getattr(inner, "__name__", "")).removesuffix("_score") + "_"
    found = [name for name in get_scorer_names() if name.startswith(stem)]
    yield from sorted(found, key=lambda name: not name.endswith(_USUAL))


def _scorer(name: str) -> Any:
    from sklearn.metrics import get_scorer

    return get_scorer(name)
