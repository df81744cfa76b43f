"""A metric fed from other names of a step's output, and what else than an object may stand for a metric."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from loopwright.errors import SettingError, choose
from loopwright.metrics.algebra import inputs_of, is_metric, leaves
from loopwright.metrics.around import Around
from loopwright.metrics.base import Metric
from loopwright.metrics.function import Function
from loopwright.metrics.named import by_name

__all__ = ["On", "as_metric", "renamed"]


class On(Around):
    """``metric``, fed from the ``names`` of a step's output, in their order.

    It is any object with ``update``, ``compute`` and ``reset``, and stays as it is; or a name or a function, as in
    ``metrics=``. Raises SettingError without a name.

    >>> from loopwright.metrics import Accuracy
    >>> On(Accuracy(), "logits", "y").inputs
    ('logits', 'y')
    """

    def __init__(self, metric: Any, *names: str) -> None:
        if not names or not all(isinstance(name, str) for name in names):
            raise SettingError(
                f"On({type(metric).__name__}, ...) needs the names of what to pass to its update, such as "
                f'On(metric, "preds", "target"); got {", ".join(map(repr, names)) or "none"}'
            )
        inner = metric.metric if isinstance(metric, On) else metric
        self.metric = as_metric(inner, *names)
        self.inputs = names

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in one batch."""
        self.metric.update(*args, **kwargs)


def as_metric(thing: Any, *names: str) -> Any:
    """The metric that ``thing`` stands for: a name ``"torchmetrics:..."`` or ``"sklearn:..."``, a function, itself.

    ``names``: what a function is given of the output of a step.

    >>> as_metric(lambda preds, target: float((preds - target).max())).inputs
    ('preds', 'target')
    """
    if isinstance(thing, str):
        made = by_name(thing)
        return Function(made.function, *names) if isinstance(made, Function) else made
    if callable(thing) and not isinstance(thing, type) and not is_metric(thing):
        return Function(thing, *names)
    return thing


def renamed(metrics: Mapping[str, Any], *, prefix: str = "", suffix: str = "", **inputs: str) -> dict[str, Any]:
    """Copies of ``metrics`` under names with ``prefix`` and ``suffix``, fed from other names: one set for each head.

    ``preds="logits"`` lets those that read ``preds`` read ``logits``. What they share they go on sharing. Raises
    SettingError for an input that none of them reads.

    >>> from loopwright.metrics import Accuracy
    >>> heads = renamed({"accuracy": Accuracy()}, suffix="_a", preds="logits_a", target="y_a")
    >>> list(heads), heads["accuracy_a"].inputs
    (['accuracy_a'], ('logits_a', 'y_a'))
    """
    made = {name: as_metric(metric) for name, metric in metrics.items()}
    parts = {id(leaf): leaf for metric in made.values() for leaf in leaves(metric)}
    known = {key for leaf in parts.values() for key in inputs_of(leaf)}
    for key in inputs:
        if key not in known:
            raise SettingError(f"renamed(..., {key}=...): none of the metrics reads {key!r}. {choose(key, known)}")
    copies = {number: _reading(copy.deepcopy(leaf), inputs) for number, leaf in parts.items()}
    return {f"{prefix}{name}{suffix}": copy.deepcopy(metric, copies) for name, metric in made.items()}


def _reading(metric: Any, names: Mapping[str, str]) -> Any:
    """``metric``, which is told to read others for these names, or put into ``On`` where that is not for us to say."""
    old = tuple(inputs_of(metric))
    new = tuple(names.get(key, key) for key in old)
    if new == old:
        return metric
    if isinstance(metric, (Metric, On)):
        metric.inputs = new
        return metric
    return On(metric, *new)
