"""Means: of values that a step returns, of absolute and of squared errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from loopwright.errors import MetricError, SettingError
from loopwright.events import describe
from loopwright.metrics.base import Metric, wide
from loopwright.metrics.functional import difference

__all__ = ["MAE", "MSE", "Mean"]


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

    def __init__(self, value: str = "value", *, weight: str | None = None) -> None:
        if not isinstance(value, str):
            raise SettingError(f"Mean({value!r}): expected the name of a value in a step's output")
        self.inputs = (value,) if weight is None else (value, weight)

    def update(self, value: Tensor | float, weight: Tensor | float | None = None) -> None:
        """Take in the values of one batch, with their weights."""
        if weight is None and (not isinstance(value, Tensor) or value.ndim == 0):
            self.add(total=value, weight=1)
            return
        value, size = _floats(value)
        if weight is None:
            self.add(total=value.sum(), weight=size)
            return
        weight, weights = _floats(weight)
        if weight.ndim and weight.shape != value.shape:
            raise MetricError(
                f"value {describe(value)} and weight {describe(weight)} do not fit: expected one shape for both, or "
                "one number as the weight of the batch"
            )
        self.add(total=(value * weight).sum(), weight=weight.sum() * (size // max(weights, 1)))

    def compute(self) -> float:
        """The mean."""
        return _ratio(self.total("total"), self.total("weight"))


class MAE(Metric):
    """Mean of ``|preds - target|`` over all elements of all batches; a float, nan if nothing was seen.

    Both have one shape, of any dtype that holds real numbers. Batches are added in float64
    (float32 where the device has no more).
    Raises MetricError for shapes that differ.

    >>> mae = MAE()
    >>> mae.update(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0]))
    >>> mae.compute()
    1.5
    """

    state: ClassVar[Mapping[str, str]] = {"total": "sum", "count": "sum"}

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        error = difference(preds.detach(), target).abs()
        self.add(total=error.sum(), count=error.numel())

    def compute(self) -> float:
        """The mean absolute error."""
        return _ratio(self.total("total"), self.total("count"))


class MSE(Metric):
    """Mean of ``(preds - target)²`` over all elements of all batches; otherwise as ``MAE``.

    >>> mse = MSE()
    >>> mse.update(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0]))
    >>> mse.compute()
    2.5
    """

    state: ClassVar[Mapping[str, str]] = {"total": "sum", "count": "sum"}

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        error = difference(preds.detach(), target).square()
        self.add(total=error.sum(), count=error.numel())

    def compute(self) -> float:
        """The mean squared error."""
        return _ratio(self.total("total"), self.total("count"))


def _floats(value: Tensor | float) -> tuple[Tensor, int]:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64), 1
    return value.detach().to(wide(value.device)), value.numel()


def _ratio(total: Tensor, count: Tensor) -> float:
    return float(total) / float(count) if float(count) else math.nan
