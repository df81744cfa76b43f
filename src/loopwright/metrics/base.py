"""A small base for metrics: say what is added up, and how the totals become a value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from loopwright.errors import CheckpointError, MetricError, SettingError, choose
from loopwright.metrics.algebra import Algebra

__all__ = ["Metric", "wide"]


class Metric(Algebra):
    """A value over many batches, computed from totals; subclasses give ``state``, ``update`` and ``compute``.

    ``state`` names the totals and how they grow: ``"sum"``, ``"max"``, ``"min"``, or ``"cat"`` (all values are kept,
    joined along dimension 0). ``update`` calls ``self.add(name=value)`` with numbers or tensors of any shape;
    ``compute`` reads ``self.total(name)``. ``inputs`` are the names in a step's output that ``update`` receives, in
    order. ``keys`` tells ``trainer.plan`` what ``compute`` gives: () for a number, the names in a dict, None where that
    is unknown. Totals live on the device of what is added (sums in float64 or int64), are never read from it before
    ``compute``, and hold no graph. Resetting, merging, saving and arithmetic (see ``Derived``) need nothing more.

    >>> class Bias(Metric):
    ...     state = {"error": "sum", "count": "sum"}
    ...     def update(self, preds, target):
    ...         self.add(error=(preds - target).sum(), count=target.numel())
    ...     def compute(self):
    ...         return self.total("error") / self.total("count")
    >>> bias = Bias()
    >>> bias.update(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0]))
    >>> float(bias.compute())
    1.5
    """

    state: ClassVar[Mapping[str, str]] = {}
    inputs: tuple[str, ...] = ("preds", "target")
    keys: Any = None
    _totals: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Empty totals, so that an own ``__init__`` need not call this class's."""
        for name, reduction in cls.state.items():
            if reduction not in _JOINS:
                raise SettingError(
                    f"{cls.__name__}.state[{name!r}] = {reduction!r} is no reduction. {choose(reduction, _JOINS)}"
                )
        self = super().__new__(cls)
        self._totals = {}
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in one batch."""
        raise NotImplementedError(f"{type(self).__name__} needs update({', '.join(self.inputs)})")

    def compute(self) -> Any:
        """The value of all that was taken in since the last reset: a number, a 1-D tensor, or a dict of such."""
        raise NotImplementedError(f"{type(self).__name__} needs compute()")

    def fold(self) -> None:
        """Add what ``update`` may have put off; called before totals are read."""

    def reset(self) -> None:
        """Forget all that was taken in."""
        self._totals = {}

    def add(self, **values: Any) -> None:
        """Join numbers or tensors to the totals of these names. Raises MetricError for a name that is no state."""
        totals, state = self._totals, self.state
        for name, value in values.items():
            if name not in state:
                raise MetricError(f"{type(self).__name__} has no state {name!r}. {choose(name, state)}")
            if isinstance(value, Tensor):
                value = value.detach() if value.requires_grad else value
            elif not isinstance(value, (int, float)):
                raise MetricError(
                    f"{type(self).__name__}.add({name}=...) takes a number or a tensor, got {type(value).__name__}"
                )
            totals[name] = _JOINS[state[name]](totals.get(name), value)

    def total(self, name: str) -> Tensor:
        """The total of ``name``, on its device. With nothing added: 0, -inf for max, inf for min, no rows for cat."""
        self.fold()
        if name not in self.state:
            raise MetricError(f"{type(self).__name__} has no state {name!r}. {choose(name, self.state)}")
        value = self._totals.get(name)
        if value is None:
            value = {"sum": 0, "max": -math.inf, "min": math.inf, "cat": []}[self.state[name]]
        if isinstance(value, list):
            return torch.cat(value) if value else torch.empty(0)
        return value if isinstance(value, Tensor) else _tensor(value)

    def merge(self, other: Metric) -> None:
        """Add what ``other`` has taken in, as if it had been given here; ``other`` stays as it is.

        Raises MetricError if it is another kind of metric or has other settings.
        """
        if type(other) is not type(self) or other._settings() != self._settings():
            raise MetricError(
                f"cannot merge {_named(other, self)} into {_named(self, other)}: both must be of one class with the "
                "same settings"
            )
        self.fold()
        other.fold()
        for name, value in other._totals.items():
            for part in value if isinstance(value, list) else [value]:
                self._totals[name] = _JOINS[self.state[name]](self._totals.get(name), part)

    def state_dict(self) -> dict[str, Any]:
        """The totals by name, as numbers and tensors of their own."""
        self.fold()
        totals = {k: torch.cat(v) if isinstance(v, list) else v for k, v in self._totals.items()}
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in totals.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave. Raises CheckpointError for a state of another metric."""
        unknown = sorted(set(state) - set(self.state))
        if unknown:
            raise CheckpointError(
                f"the saved metric has the state {unknown[0]!r}, which {type(self).__name__} does not have. "
                f"{choose(unknown[0], self.state)}"
            )
        self.reset()
        for name, value in state.items():
            value = value.clone() if isinstance(value, Tensor) else value
            self._totals[name] = [value] if self.state[name] == "cat" else value

    def _ratio(self, total: str, count: str) -> float:
        """One total over another, read from the device; nan, with a warning, where nothing was counted."""
        counted = float(self.total(count))
        return float(self.total(total)) / counted if counted else self._nothing()

    def _settings(self) -> dict[str, Any]:
        plain = (bool, int, float, str, tuple, type(None))
        return {k: v for k, v in vars(self).items() if k[0] != "_" and isinstance(v, plain)}


def wide(device: torch.device) -> torch.dtype:
    """The widest float that sums can have on this kind of device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _named(metric: Metric, other: Metric) -> str:
    """The metric with those settings that ``other`` has otherwise."""
    mine, its = (m._settings() if isinstance(m, Metric) else {} for m in (metric, other))
    differ = ", ".join(f"{k}={v!r}" for k, v in mine.items() if k in its and its[k] != v)
    return f"{type(metric).__name__}({differ})"


_WIDE = (torch.float64, torch.int64, torch.complex64, torch.complex128)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _sum(old: Any, new: Any) -> Any:
    if isinstance(new, Tensor):
        if new.is_cpu and new.ndim == 0 and not new.is_complex():
            new = new.item()  # no device to wait for, and Python adds the same float64 ten times as fast
        elif new.dtype not in _WIDE:
            new = new.to(wide(new.device) if new.is_floating_point() else torch.int64)
    # with 0 it makes a tensor of our own, which nobody can change
    return new + 0 if old is None else _beside(old, new) + new


def _max(old: Any, new: Any) -> Any:
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return new.clone() if old is None else torch.maximum(*_pair(old, new))
    return old if old is not None and (new <= old or old != old) else new  # nan stays, as in torch.maximum


def _min(old: Any, new: Any) -> Any:
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return new.clone() if old is None else torch.minimum(*_pair(old, new))
    return old if old is not None and (new >= old or old != old) else new


def _cat(old: Any, new: Any) -> list[Tensor]:
    rows: list[Tensor] = [] if old is None else old
    rows.append(torch.atleast_1d(_tensor(new)).clone())  # a loop may write the next batch into the same memory
    return rows


def _pair(old: Any, new: Any) -> tuple[Tensor, Tensor]:
    return _tensor(_beside(old, new)), _tensor(new)


def _beside(old: Any, new: Any) -> Any:
    """``old`` on the device of ``new``: after loading, totals wait on the CPU for the first batch."""
    if isinstance(old, Tensor) and isinstance(new, Tensor) and old.device != new.device:
        return old.to(new.device)
    return old


_JOINS: Mapping[str, Callable[[Any, Any], Any]] = {"sum": _sum, "max": _max, "min": _min, "cat": _cat}
