"""The ``metrics=`` argument: checked, copied, what its entries share, and which keys they give."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from loopwright import monitor
from loopwright.errors import SettingError
from loopwright.metrics.algebra import Derived, inputs_of, is_metric, leaves
from loopwright.metrics.around import Around
from loopwright.metrics.base import Metric
from loopwright.metrics.modes import Grouped
from loopwright.metrics.select import On, as_metric
from loopwright.text import with_article

__all__ = ["check_metrics", "fresh", "keys_of", "parts_of", "unwrapped", "within"]


def check_metrics(metrics: Any) -> dict[str, Any]:
    """``metrics`` as a dict of objects, if it can be used: names without "/", each with update, compute and reset.

    Names such as ``"torchmetrics:auroc"`` and functions become the metrics that they stand for. Raises SettingError,
    saying what to write.

    >>> check_metrics(None)
    {}
    """
    if metrics is None:
        return {}
    if is_metric(metrics) or not isinstance(metrics, Mapping):
        one = metrics[0] if isinstance(metrics, (list, tuple)) and metrics else metrics
        kind = one.__name__ if isinstance(one, type) else type(one).__name__
        given = kind if one is metrics else f"[{kind}, ...]"
        way = f'metrics={{"accuracy": {kind}(...)}}'
        raise SettingError(f"metrics={given}: expected a dict with a name for each: {way}")
    return {name: _checked(name, metric) for name, metric in metrics.items()}


def _checked(name: Any, metric: Any) -> Any:
    if not isinstance(name, str) or not name or "/" in name:
        raise SettingError(f"metric name {name!r}: expected a text without '/', which joins the parts of logged names")
    if name == "loss":
        raise SettingError("a metric cannot be named 'loss': the mean of what steps return as 'loss' is logged so")
    if isinstance(metric, str) and ":neg_" in metric and monitor.better(name) == "min":
        raise SettingError(
            f"metric {name!r} is {metric.partition(':')[2]}, of which more is better, and its name says that less is: "
            f"name it 'neg_{name}'"
        )
    metric = as_metric(metric)
    inner, inputs = unwrapped(metric)
    if isinstance(inner, type):
        raise SettingError(f"metric {name!r} is the class {inner.__name__}: write {inner.__name__}()")
    if not is_metric(inner):
        raise SettingError(
            f"metric {name!r} is {with_article(type(inner).__name__)}: expected an object with update, compute and "
            "reset, such as those of loopwright.metrics and torchmetrics, or a function of predictions and targets"
        )
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(key, str) for key in inputs):
        raise SettingError(
            f"metric {name!r} has inputs={inputs!r}: expected a tuple of names in a step's output. Name them: "
            f'lw.metrics.On({type(inner).__name__}(...), "preds", "target")'
        )
    return metric


def fresh(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Deep copies of ``metrics`` that have taken in nothing: each series collects in its own.

    A part that several of them are computed of is one part of their copies too; so are built-in ones that read the
    same and have the same settings.

    >>> fresh({})
    {}
    """
    copies: dict[int, Any] = {}
    known: dict[Any, Any] = {}
    for metric in metrics.values():
        for leaf in leaves(metric):
            key = _sameness(leaf)
            if key not in known:
                known[key] = copy.deepcopy(leaf)
                known[key].reset()
            copies[id(leaf)] = known[key]
    return {name: copy.deepcopy(metric, copies) for name, metric in metrics.items()}


def parts_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What ``metrics`` are fed through, each once: a metric by its name, parts of one as ``name/0``, ``name/1``, ..."""
    parts: dict[str, Any] = {}
    seen: set[int] = set()
    for name, metric in metrics.items():
        for i, leaf in enumerate(leaves(metric)):
            if id(leaf) not in seen:
                seen.add(id(leaf))
                parts[f"{name}/{i}" if isinstance(metric, Derived) else name] = leaf
    return parts


def _sameness(leaf: Any) -> Any:
    """Equal for metrics that would take in the same: one object, or built-in ones with the same plain settings."""
    ours = isinstance(leaf, Metric) and type(leaf).__module__.startswith("loopwright.")
    settings = leaf._settings() if ours else {}
    if not ours or settings.keys() != {name for name in vars(leaf) if name[0] != "_"}:
        return id(leaf)
    return type(leaf), tuple(leaf.inputs), repr(sorted(settings.items()))


def unwrapped(metric: Any) -> tuple[Any, Any]:
    """The metric itself and the names that it reads."""
    return metric.metric if isinstance(metric, On) else metric, inputs_of(metric)


def within(metric: Any) -> Iterator[Any]:
    """The metrics that do the work inside of ``metric``: in On and in modes, as parts of arithmetic, itself."""
    for leaf in leaves(metric):
        if isinstance(leaf, Around):
            yield from within(leaf.metric)
        else:
            yield leaf


def keys_of(name: str, metric: Any) -> list[str] | None:
    """The names under which ``metric`` is logged, as far as they can be known; None where only computing tells.

    >>> from loopwright.metrics import Accuracy, Precision
    >>> keys_of("accuracy", Accuracy()), keys_of("p", Precision(["cat", "dog"], average=None))
    (['accuracy'], ['p/cat', 'p/dog'])
    """
    while isinstance(metric, Around) and not isinstance(metric, Grouped):
        metric = metric.metric
    if (
        not isinstance(metric, (Metric, Derived))
        or not isinstance(metric.keys, tuple)
        or _computes_otherwise(type(metric))
    ):
        return None
    keys = metric.keys
    return [f"{name}/{key}" for key in keys] or [name]


def _computes_otherwise(kind: type) -> bool:
    """True for a class whose value is not the one that the ``keys`` it has inherited are of."""
    said = next(i for i, cls in enumerate(kind.__mro__) if "keys" in vars(cls))
    return any(name in vars(cls) for cls in kind.__mro__[:said] for name in ("compute", "combine"))
