"""The ``metrics=`` argument: checked, unwrapped, copied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from loopwright.errors import SettingError
from loopwright.metrics.select import On
from loopwright.text import with_article

__all__ = ["check_metrics", "fresh", "unwrapped"]

INPUTS = ("preds", "target")  # what a metric without ``inputs`` reads


def check_metrics(metrics: Any) -> dict[str, Any]:
    """``metrics`` as a dict, if it can be used: names without "/", each with ``update``, ``compute`` and ``reset``.

    Raises SettingError, saying what to write.

    >>> check_metrics(None)
    {}
    """
    if metrics is None:
        return {}
    if _is_metric(metrics) or not isinstance(metrics, Mapping):
        kind = type(metrics).__name__ if not isinstance(metrics, type) else metrics.__name__
        raise SettingError(f'metrics={kind}: expected a dict with a name for each: metrics={{"accuracy": {kind}(...)}}')
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise SettingError(
                f"metric name {name!r}: expected a text without '/', which joins the parts of logged names"
            )
        if name == "loss":
            raise SettingError("a metric cannot be named 'loss': the mean of what steps return as 'loss' is logged so")
        inner, inputs = unwrapped(metric)
        if isinstance(inner, type):
            raise SettingError(f"metric {name!r} is the class {inner.__name__}: write {inner.__name__}()")
        if not _is_metric(inner):
            raise SettingError(
                f"metric {name!r} is {with_article(type(inner).__name__)}: expected an object with update, compute and "
                "reset, such as those of loopwright.metrics and torchmetrics"
            )
        if not isinstance(inputs, tuple) or not inputs or not all(isinstance(key, str) for key in inputs):
            raise SettingError(
                f"metric {name!r} has inputs={inputs!r}: expected a tuple of names in a step's output. Name them: "
                f'lw.metrics.On({type(inner).__name__}(...), "preds", "target")'
            )
    return dict(metrics)


def fresh(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Deep copies of ``metrics`` that have taken in nothing: each series collects in its own.

    >>> fresh({})
    {}
    """
    copies = {name: copy.deepcopy(metric) for name, metric in metrics.items()}
    for metric in copies.values():
        metric.reset()
    return copies


def _is_metric(thing: Any) -> bool:
    return not isinstance(thing, type) and all(
        callable(getattr(thing, n, None)) for n in ("update", "compute", "reset")
    )


def unwrapped(metric: Any) -> tuple[Any, Any]:
    """The metric itself and the names that it reads."""
    return metric.metric if isinstance(metric, On) else metric, getattr(metric, "inputs", INPUTS)
