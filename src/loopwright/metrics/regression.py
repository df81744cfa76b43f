"""How far predictions are from numbers: absolute and squared errors, and the share of variance that is explained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from loopwright.errors import MetricError, SettingError
from loopwright.events import describe
from loopwright.metrics.algebra import Derived
from loopwright.metrics.base import Metric, wide
from loopwright.metrics.shapes import check_real, check_tensors, difference
from loopwright.written import warn

__all__ = ["MAE", "MSE", "R2", "RMSE"]


class MAE(Metric):
    """Mean of ``|preds - target|`` over all elements of all batches; a float, nan if nothing was seen.

    Both have one shape, of any dtype that holds real numbers. Batches are added in float64
    (float32 where the device has no more).
    ``preds`` and ``target`` name what is read of a step's output. Raises MetricError for shapes that differ.

    >>> mae = MAE()
    >>> mae.update(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0]))
    >>> mae.compute()
    1.5
    """

    state: ClassVar[Mapping[str, str]] = {"total": "sum", "count": "sum"}
    keys = ()

    def __init__(self, *, preds: str = "preds", target: str = "target") -> None:
        self.inputs = (preds, target)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        check_tensors(preds, target)
        error = difference(preds.detach(), target).abs()
        self.add(total=error.sum(), count=error.numel())

    def compute(self) -> float:
        """The mean absolute error."""
        return self._ratio("total", "count")


class MSE(Metric):
    """Mean of ``(preds - target)²`` over all elements of all batches; otherwise as ``MAE``.

    >>> mse = MSE()
    >>> mse.update(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0]))
    >>> mse.compute()
    2.5
    """

    state: ClassVar[Mapping[str, str]] = {"total": "sum", "count": "sum"}
    keys = ()

    def __init__(self, *, preds: str = "preds", target: str = "target") -> None:
        self.inputs = (preds, target)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        check_tensors(preds, target)
        error = difference(preds.detach(), target).square()
        self.add(total=error.sum(), count=error.numel())

    def compute(self) -> float:
        """The mean squared error."""
        return self._ratio("total", "count")


class RMSE(Derived):
    """Square root of the mean squared error over all elements, from the same totals as ``MSE``.

    >>> rmse = RMSE()
    >>> rmse.update(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 1.0]))
    >>> round(rmse.compute(), 4)
    2.2361
    """

    keys = ()

    def __init__(self, *, preds: str = "preds", target: str = "target") -> None:
        super().__init__(torch.sqrt, MSE(preds=preds, target=target))

    def _value(self, known: dict[int, Any]) -> Any:
        if not int(self.args[0].total("count")):  # the MSE would say that it was given nothing
            return torch.tensor(self._nothing(), dtype=torch.float64)
        return super()._value(known)


class R2(Metric):
    """Coefficient of determination, 1 - sum of squared errors / sum of squared deviations from the mean target.

    ``preds`` and ``target`` have one shape, [N] or [N, M] with M outputs; ``average="macro"`` is the mean over outputs,
    None gives each as a vector. Sums are float64. Where all targets of an output are the same, or fewer than two were
    seen, it is nan, and a warning says so. Raises MetricError for other shapes.

    >>> r2 = R2()
    >>> r2.update(torch.tensor([2.5, 0.0, 2.0, 8.0]), torch.tensor([3.0, -0.5, 2.0, 7.0]))
    >>> round(r2.compute(), 4)
    0.9486
    """

    state: ClassVar[Mapping[str, str]] = {"errors": "sum", "total": "sum", "squares": "sum", "count": "sum"}

    def __init__(self, *, average: str | None = "macro", preds: str = "preds", target: str = "target") -> None:
        if average not in ("macro", None):
            raise SettingError(f"average={average!r}: expected 'macro', the mean over outputs, or None for each")
        self.average, self.inputs = average, (preds, target)
        self._said = False

    @property
    def keys(self) -> tuple[str, ...] | None:
        """() for the mean over outputs; how many there are is seen with the data."""
        return () if self.average == "macro" else None

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        check_tensors(preds, target)
        if preds.shape != target.shape or preds.ndim not in (1, 2):
            raise MetricError(
                f"preds {describe(preds)} and target {describe(target)} do not fit: R2 expects one shape for both, [N] "
                "or [N, M]. Where a last dimension of 1 is too many, write preds.squeeze(1)"
            )
        check_real(preds, target)
        target = target.to(wide(target.device))
        error = difference(preds.detach(), target)
        self.add(
            errors=error.square().sum(0), total=target.sum(0), squares=target.square().sum(0), count=target.shape[0]
        )

    def compute(self) -> Any:
        """The coefficient: a float, or a float64 tensor [M]."""
        if not self._totals:
            return self._nothing()
        errors, total, squares = (self.total(name).double().cpu() for name in ("errors", "total", "squares"))
        value = explained(errors, total, squares, int(self.total("count")))
        if not self._said and bool(value.isnan().any()):
            self._warn(value, torch.stack([errors, total, squares]))
        if self.average == "macro":
            return float(value.mean())
        return value

    def _warn(self, value: Tensor, sums: Tensor) -> None:
        if bool(sums.isnan().any()):
            return  # NaN came in
        self._said = True
        count = int(self.total("count"))
        outputs = value.isnan().nonzero().flatten().tolist() if value.ndim else []
        where = f" of output {', '.join(map(str, outputs))}" if outputs else ""
        why = f"of {count} sample" if count < 2 else f"the targets{where} are all the same"
        warn(f"R2 is undefined, since {why}: it is nan")


def explained(errors: Tensor, total: Tensor, squares: Tensor, count: int) -> Tensor:
    """R2 from sums over ``count`` samples: nan where the targets do not vary."""
    spread = squares - total.square() / max(count, 1)
    constant = spread <= 1e-14 * squares  # what rounding leaves of 0
    return torch.where(constant | (count < 2), float("nan"), 1 - errors / spread)
