"""Which batches and samples a metric sees, and when its value is told: windows, filters, groups."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopwright.errors import MetricError, SettingError
from loopwright.events import describe
from loopwright.metrics.algebra import inputs_of
from loopwright.metrics.around import Around
from loopwright.metrics.memory import remember, restore
from loopwright.metrics.select import On, as_metric

__all__ = ["Grouped", "Running", "Where", "Window", "tells_each_record"]


class Running(Around):
    """``metric`` over the epoch so far, in each record of the training as well as in that of the epoch.

    Other metrics are in the record of the epoch alone. Each record computes the value once, which reads the device.

    >>> from loopwright.metrics import Mean
    >>> Running(Mean("loss")).inputs
    ('loss',)
    """

    def __init__(self, metric: Any) -> None:
        self.metric = as_metric(metric)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names that the metric reads."""
        return tuple(inputs_of(self.metric))

    def update(self, *args: Any) -> None:
        """Take in one batch."""
        self.metric.update(*args)


class Window(Running):
    """``metric`` over the last ``batches`` batches of the epoch, in each record of the training; 1 is the last batch.

    Each batch is taken in by a copy of the metric; computing merges them, so that the metric needs ``merge``, as ours
    have. Over several ranks it is refused: the parts of a batch could not be told apart.

    >>> from loopwright.metrics import Mean
    >>> last = Window(Mean("loss"), 2)
    >>> for loss in (5.0, 1.0, 2.0):
    ...     last.update(loss)
    >>> last.compute()
    1.5
    """

    def __init__(self, metric: Any, batches: int) -> None:
        super().__init__(metric)
        if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
            raise SettingError(f"Window(metric, {batches!r}): expected a whole number of batches from 1, such as 50")
        if not callable(getattr(self.metric, "merge", None)):
            raise SettingError(
                f"Window({type(self.metric).__name__}, ...) needs a metric with merge(other), such as those of "
                "lw.metrics; for torchmetrics take torchmetrics.wrappers.Running"
            )
        self.batches = batches
        self._parts: list[Any] = []

    def update(self, *args: Any) -> None:
        """Take in one batch, and forget the one before the window."""
        part = self._parts.pop(0) if len(self._parts) == self.batches else copy.deepcopy(self.metric)
        part.reset()
        part.update(*args)
        self._parts.append(part)

    def compute(self) -> Any:
        """The value over the window."""
        whole = copy.deepcopy(self.metric)
        whole.reset()
        for part in self._parts:
            whole.merge(part)
        return whole.compute()

    def reset(self) -> None:
        """Begin an empty window."""
        self._parts = []

    def merge(self, other: Any) -> None:
        """Append the batches of ``other``."""
        self._parts = [*self._parts, *copy.deepcopy(other._parts)][-self.batches :]

    def state_dict(self) -> dict[str, Any]:
        """What each batch of the window gave."""
        return {"parts": [remember(part) for part in self._parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        self._parts = [_loaded(self.metric, one) for one in state["parts"]]


class Where(Running):
    """``metric`` over the samples for which ``predicate`` is true.

    The names of the predicate's parameters say what it is given of a step's output (or of a batch that is a dict). It
    returns a bool for each sample, shape [N], or one for the whole batch. Choosing samples reads the device.

    >>> from loopwright.metrics import MAE
    >>> large = Where(MAE(), lambda target: target > 1)
    >>> large.update(torch.tensor([1.0, 5.0]), torch.tensor([0.0, 2.0]))
    >>> large.compute(), large.inputs
    (3.0, ('preds', 'target'))
    """

    def __init__(self, metric: Any, predicate: Callable[..., Any]) -> None:
        super().__init__(metric)
        try:
            self._asks = tuple(inspect.signature(predicate).parameters)
        except (TypeError, ValueError):
            self._asks = ()
        if not self._asks:
            raise SettingError(
                f"Where(metric, {predicate!r}): expected a function whose parameters name what it reads, such as "
                "lambda target: target > 0"
            )
        self.predicate = predicate

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names that the metric reads, then those that only the predicate does."""
        return tuple(dict.fromkeys((*inputs_of(self.metric), *self._asks)))

    def update(self, *args: Any) -> None:
        """Take in those samples of one batch for which the predicate is true."""
        given = dict(zip(self.inputs, args, strict=True))
        keep = self.predicate(*(given[name] for name in self._asks))
        values = args[: len(inputs_of(self.metric))]
        if not isinstance(keep, Tensor) or keep.ndim == 0:
            if bool(keep):
                self.metric.update(*values)
            return
        if keep.dtype != torch.bool or keep.ndim != 1:
            raise MetricError(
                f"the predicate of Where({type(self.metric).__name__}, ...) returned {describe(keep)}; expected a bool "
                "for each sample, shape [N], or one for the batch"
            )
        if bool(keep.any()):
            self.metric.update(*(_rows(value, keep) for value in values))


class Grouped(Running):
    """``metric`` for each group of samples: a dict, recorded as ``name/group``.

    ``by`` names the groups in a step's output (or in a batch that is a dict): integers or strings, one a sample, or one
    for the batch. Reads the device at each batch, to see which groups there are. Groups that had no sample since the
    last reset are not in the dict.

    >>> from loopwright.metrics import MAE
    >>> error = Grouped(MAE(), by="site")
    >>> error.update(torch.tensor([1.0, 5.0, 3.0]), torch.zeros(3), ["a", "b", "a"])
    >>> error.compute()
    {'a': 2.0, 'b': 5.0}
    """

    def __init__(self, metric: Any, by: str) -> None:
        super().__init__(metric)
        if not isinstance(by, str):
            raise SettingError(f'Grouped(metric, by={by!r}): expected the name of the groups, such as by="site"')
        self.by = by
        self._groups: dict[Any, Any] = {}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names that the metric reads, then that of the groups."""
        return tuple(dict.fromkeys((*inputs_of(self.metric), self.by)))

    def update(self, *args: Any) -> None:
        """Take in one batch, each sample in its group."""
        groups = args[self.inputs.index(self.by)]
        values = args[: len(inputs_of(self.metric))]
        groups = groups.tolist() if hasattr(groups, "tolist") else groups
        if not isinstance(groups, (list, tuple)):
            self._of(groups).update(*values)
            return
        rows: dict[Any, list[int]] = {}
        for i, group in enumerate(groups):
            rows.setdefault(group, []).append(i)
        for group, index in rows.items():
            self._of(group).update(*(_rows(value, index, len(groups)) for value in values))

    def _of(self, group: Any) -> Any:
        if not isinstance(group, (int, str)):
            raise MetricError(f"the group {group!r} of {self.by!r}: expected integers or strings, one a sample")
        if group not in self._groups:
            self._groups[group] = copy.deepcopy(self.metric)
            self._groups[group].reset()
        return self._groups[group]

    def compute(self) -> dict[str, Any]:
        """The metric's value of each group."""
        return {str(group): metric.compute() for group, metric in sorted(self._groups.items(), key=_order)}

    def reset(self) -> None:
        """Forget all groups."""
        self._groups = {}

    def merge(self, other: Any) -> None:
        """Add what ``other`` has taken in, group by group."""
        for group, metric in other._groups.items():
            self._of(group).merge(metric)

    def state_dict(self) -> dict[str, Any]:
        """What each group has taken in."""
        return {"groups": list(self._groups), "parts": [remember(metric) for metric in self._groups.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        parts = (_loaded(self.metric, one) for one in state["parts"])
        self._groups = dict(zip(state["groups"], parts, strict=True))


def tells_each_record(metric: Any) -> bool:
    """True for a metric whose value is told in each record of the training, and not of the epoch alone."""
    return type(metric.metric if isinstance(metric, On) else metric) in (Running, Window)


def _loaded(metric: Any, state: Mapping[str, Any] | None) -> Any:
    made = copy.deepcopy(metric)
    made.reset()
    if state is not None:
        restore(made, state)
    return made


def _order(item: tuple[Any, Any]) -> tuple[bool, Any]:
    return isinstance(item[0], str), item[0]


def _rows(value: Any, chosen: Any, count: int | None = None) -> Any:
    """The chosen rows of what has one for each sample; anything else as it is."""
    count = len(chosen) if count is None else count
    if isinstance(value, Tensor) and value.ndim:
        if len(value) != count:
            raise MetricError(f"a metric is given {describe(value)}, and there are groups or bools for {count} samples")
        return value[torch.as_tensor(chosen, device=value.device)]
    if isinstance(value, (list, tuple)):
        index = chosen.nonzero().flatten().tolist() if isinstance(chosen, Tensor) else chosen
        return type(value)(value[i] for i in index)
    return value
