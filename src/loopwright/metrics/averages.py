"""Mean, sum, smallest and largest of values that a step returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from loopwright.errors import MetricError, SettingError
from loopwright.events import describe
from loopwright.metrics.base import Metric, wide

__all__ = ["Max", "Mean", "Min", "Sum"]


class Mean(Metric):
    """Mean of ``value`` of a step's output; a float, nan if nothing was seen.

    Each element counts once, so a vector with one value a sample gives the mean over samples, and a scalar counts each
    batch alike. ``weight=`` names the weights in the output: numbers or tensors of the same shape, or one number for
    all elements of a batch. Sums are float64. Raises MetricError for a weight of another shape. Scalars that a step
    returns are averaged over samples without any metric.

    >>> mean = Mean("loss_of_each")
    >>> mean.update(torch.tensor([1.0, 2.0, 3.0]))
    >>> mean.update(torch.tensor([6.0]))
    >>> mean.compute()
    3.0
    """

    state: ClassVar[Mapping[str, str]] = {"total": "sum", "weight": "sum"}
    keys = ()

    def __init__(self, value: str = "value", *, weight: str | None = None) -> None:
        self.inputs = (_checked(type(self), value),) if weight is None else (_checked(type(self), value), weight)

    def update(self, value: Tensor | float, weight: Tensor | float | None = None) -> None:
        """Take in the values of one batch, with their weights."""
        if weight is None:
            if isinstance(value, Tensor) and value.ndim:
                self.add(total=_sum_of(value), weight=value.numel())
            else:
                self.add(total=_real(value), weight=1)
            return
        value, size = _floats(value)
        weight, weights = _floats(weight)
        if weight.ndim and weight.shape != value.shape:
            raise MetricError(
                f"value {describe(value)} and weight {describe(weight)} do not fit: expected one shape for both, or "
                "one number as the weight of the batch"
            )
        self.add(total=(value * weight).sum(), weight=weight.sum() * (size // max(weights, 1)))

    def compute(self) -> float:
        """The mean."""
        return self._ratio("total", "weight")


class Sum(Metric):
    """Sum of ``value`` of a step's output over all elements of all batches, in float64; a float, 0.0 of nothing.

    >>> tokens = Sum("tokens")
    >>> tokens.update(torch.tensor([3, 4]))
    >>> tokens.compute()
    7.0
    """

    state: ClassVar[Mapping[str, str]] = {"total": "sum"}
    keys = ()

    def __init__(self, value: str = "value") -> None:
        self.inputs = (_checked(type(self), value),)

    def update(self, value: Tensor | float) -> None:
        """Take in the values of one batch."""
        self.add(total=_sum_of(value) if isinstance(value, Tensor) else _real(value))

    def compute(self) -> float:
        """The sum."""
        return float(self.total("total"))


class Max(Metric):
    """Largest ``value`` of a step's output over all elements of all batches; a float, nan if nothing was seen.

    NaN stays: one that was seen is the value.

    >>> largest = Max("value")
    >>> largest.update(torch.tensor([3.0, 4.0]))
    >>> largest.compute()
    4.0
    """

    state: ClassVar[Mapping[str, str]] = {"most": "max"}
    keys = ()

    def __init__(self, value: str = "value") -> None:
        self.inputs = (_checked(type(self), value),)

    def update(self, value: Tensor | float) -> None:
        """Take in the values of one batch."""
        if not isinstance(value, Tensor):
            self.add(most=_real(value))
        elif value.numel():
            self.add(most=_real(value).detach().amax())

    def compute(self) -> float:
        """The largest."""
        return float(self.total("most")) if self._totals else self._nothing()


class Min(Metric):
    """Smallest ``value`` of a step's output over all elements of all batches; otherwise as ``Max``.

    >>> smallest = Min("value")
    >>> smallest.update(torch.tensor([3.0, 4.0]))
    >>> smallest.compute()
    3.0
    """

    state: ClassVar[Mapping[str, str]] = {"least": "min"}
    keys = ()

    def __init__(self, value: str = "value") -> None:
        self.inputs = (_checked(type(self), value),)

    def update(self, value: Tensor | float) -> None:
        """Take in the values of one batch."""
        if not isinstance(value, Tensor):
            self.add(least=_real(value))
        elif value.numel():
            self.add(least=_real(value).detach().amin())

    def compute(self) -> float:
        """The smallest."""
        return float(self.total("least")) if self._totals else self._nothing()


def _checked(kind: type, value: Any) -> str:
    if not isinstance(value, str):
        raise SettingError(f"{kind.__name__}({value!r}): expected the name of a value in a step's output")
    return value


def _real(value: Any) -> Any:
    if isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex()):
        raise MetricError(f"value {describe(value)}: a record holds real numbers. Write value.abs(), or value.real")
    return value


def _sum_of(value: Tensor) -> Tensor:
    return _real(value).sum(dtype=wide(value.device))  # type: ignore[no-any-return]


def _floats(value: Tensor | float) -> tuple[Tensor, int]:
    _real(value)
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64), 1
    return value.detach().to(wide(value.device)), value.numel()
