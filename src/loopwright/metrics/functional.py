"""The metrics of this package as functions of one batch: tensors on its device, nothing read from there.

What a class finds out when it computes (a class out of range, logits where probabilities are expected, why a value is
nan) is not checked here, since it takes a read of the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopwright.metrics.base import wide
from loopwright.metrics.counting import (
    averaged,
    check_average,
    check_shapes,
    check_zero_division,
    count,
    rates_of,
    stats,
)
from loopwright.metrics.perplexity import surprise
from loopwright.metrics.regression import explained
from loopwright.metrics.shapes import best, check_real, check_tensors, check_top_k, difference, fit, hits

__all__ = [
    "accuracy", "confusion_matrix", "dice", "f1", "fbeta", "iou", "mae", "maximum", "mean", "minimum", "mse",
    "perplexity", "precision", "r2", "recall", "rmse", "specificity", "sum",
]  # fmt: skip

# N samples, C classes, k guesses, ... further dimensions such as height and width


def accuracy(
    preds: Tensor,
    target: Tensor,
    top_k: int = 1,
    *,
    threshold: float = 0.5,
    ignore_index: int | None = None,
) -> Tensor:
    """Fraction of right answers in a batch: a float32 scalar in [0, 1], nan if there is nothing to count.

    ``preds`` and ``target`` as for ``Accuracy``; what that class finds out when it computes (a class out of range,
    logits where probabilities are expected) is not checked here, since it takes a read of the device.
    Raises MetricError for shapes that do not fit.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor(0.5000)
    """
    classes = fit(preds, target, check_top_k(top_k))
    right = hits(best(preds, top_k) if classes else preds, target, top_k, threshold)
    if ignore_index is None:
        return right.float().mean()
    kept = target != ignore_index
    return (right & kept).sum() / kept.sum()


def mae(preds: Tensor, target: Tensor) -> Tensor:
    """Mean of ``|preds - target|`` over all elements: a scalar with a gradient.

    Both have one shape; below float32, and for integers, the difference is taken in float32.
    Raises MetricError for shapes that differ.

    >>> mae(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0]))
    tensor(1.5000)
    """
    return difference(preds, target, torch.float32).abs().mean()


def mse(preds: Tensor, target: Tensor) -> Tensor:
    """Mean of ``(preds - target)²`` over all elements: a scalar with a gradient; otherwise as ``mae``.

    >>> mse(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0]))
    tensor(2.5000)
    """
    return difference(preds, target, torch.float32).square().mean()


def rmse(preds: Tensor, target: Tensor) -> Tensor:
    """Square root of ``mse``.

    >>> rmse(torch.tensor([1.0, 4.0]), torch.tensor([0.0, 1.0]))
    tensor(2.2361)
    """
    return mse(preds, target).sqrt()


def r2(preds: Tensor, target: Tensor, *, average: str | None = "macro") -> Tensor:
    """Coefficient of determination as of ``R2``: a float64 scalar, or [M] for ``average=None``; nan where undefined.

    >>> r2(torch.tensor([2.5, 0.0, 2.0, 8.0]), torch.tensor([3.0, -0.5, 2.0, 7.0]))
    tensor(0.9486, dtype=torch.float64)
    """
    check_tensors(preds, target)
    check_real(preds, target)
    target = target.to(wide(target.device))
    error = difference(preds, target)
    value = explained(error.square().sum(0), target.sum(0), target.square().sum(0), len(target))
    return value.mean() if average == "macro" else value


def perplexity(preds: Tensor, target: Tensor, *, ignore_index: int | None = None) -> Tensor:
    """exp of the mean negative log-likelihood as of ``Perplexity``: a float64 scalar with a gradient.

    >>> perplexity(torch.zeros(3, 8), torch.tensor([1, 2, 3]))
    tensor(8.0000, dtype=torch.float64)
    """
    total, counted, _ = surprise(preds, target, ignore_index)
    return torch.exp(total / counted)


def mean(value: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of all elements, weighted if ``weight`` is given in the same shape: a scalar with a gradient.

    >>> mean(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]))
    tensor(2.)
    """
    return value.float().mean() if weight is None else (value * weight).sum() / weight.sum()


def sum(value: Tensor) -> Tensor:
    """Sum of all elements.

    >>> sum(torch.tensor([1.0, 4.0]))
    tensor(5.)
    """
    return value.sum()


def minimum(value: Tensor) -> Tensor:
    """Smallest element.

    >>> minimum(torch.tensor([1.0, 4.0]))
    tensor(1.)
    """
    return value.amin()


def maximum(value: Tensor) -> Tensor:
    """Largest element.

    >>> maximum(torch.tensor([1.0, 4.0]))
    tensor(4.)
    """
    return value.amax()


def confusion_matrix(
    preds: Tensor,
    target: Tensor,
    classes: int | None = None,
    *,
    labels: int | None = None,
    threshold: float | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """Counts of (target, prediction) as of ``ConfusionMatrix``: int64 [C, C], [2, 2] or [L, 2, 2].

    What is out of range or NaN is left out. Raises MetricError for shapes that do not fit.

    >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
    tensor([[1, 1],
            [0, 1]])
    """
    check_shapes(preds, target, classes or 0, labels or 0)
    counts = count(
        preds, target, classes=classes or 0, labels=labels or 0, threshold=threshold, ignore_index=ignore_index
    )
    return counts[:-3].view((classes, classes) if classes else (labels, 2, 2) if labels else (2, 2))


def precision(preds: Tensor, target: Tensor, classes: int | None = None, **settings: Any) -> Tensor:
    """tp / (tp + fp), with the settings of ``Precision``: float64, [C] or [L] for ``average=None``; 0/0 is nan.

    >>> precision(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 2, average=None)
    tensor([0.6667, 1.0000], dtype=torch.float64)
    """
    return _rate("precision", 1.0, preds, target, classes, **settings)


def recall(preds: Tensor, target: Tensor, classes: int | None = None, **settings: Any) -> Tensor:
    """tp / (tp + fn), with the settings of ``Recall``; otherwise as ``precision``.

    >>> recall(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 2, average=None)
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    return _rate("recall", 1.0, preds, target, classes, **settings)


def specificity(preds: Tensor, target: Tensor, classes: int | None = None, **settings: Any) -> Tensor:
    """tn / (tn + fp), with the settings of ``Specificity``; otherwise as ``precision``.

    >>> specificity(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 2, average=None)
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    return _rate("specificity", 1.0, preds, target, classes, **settings)


def iou(preds: Tensor, target: Tensor, classes: int | None = None, **settings: Any) -> Tensor:
    """tp / (tp + fp + fn), with the settings of ``IoU``; otherwise as ``precision``.

    >>> iou(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 2, average=None)
    tensor([0.6667, 0.5000], dtype=torch.float64)
    """
    return _rate("iou", 1.0, preds, target, classes, **settings)


def dice(preds: Tensor, target: Tensor, classes: int | None = None, **settings: Any) -> Tensor:
    """2 tp / (2 tp + fp + fn), with the settings of ``Dice``; otherwise as ``precision``.

    >>> dice(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 2, average=None)
    tensor([0.8000, 0.6667], dtype=torch.float64)
    """
    return _rate("dice", 1.0, preds, target, classes, **settings)


def f1(preds: Tensor, target: Tensor, classes: int | None = None, **settings: Any) -> Tensor:
    """2 tp / (2 tp + fp + fn), with the settings of ``F1``; otherwise as ``precision``.

    >>> f1(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 2, average=None)
    tensor([0.8000, 0.6667], dtype=torch.float64)
    """
    return _rate("dice", 1.0, preds, target, classes, **settings)


def fbeta(preds: Tensor, target: Tensor, beta: float, classes: int | None = None, **settings: Any) -> Tensor:
    """(1 + beta²) tp / ((1 + beta²) tp + beta² fn + fp), with the settings of ``FBeta``; otherwise as ``precision``.

    >>> fbeta(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 2.0, 2, average=None)
    tensor([0.9091, 0.5556], dtype=torch.float64)
    """
    return _rate("fbeta", beta, preds, target, classes, **settings)


def _rate(
    name: str,
    beta: float,
    preds: Tensor,
    target: Tensor,
    classes: int | None,
    *,
    labels: int | None = None,
    average: str | None = "macro",
    threshold: float | None = None,
    ignore_index: int | None = None,
    zero_division: float | None = None,
) -> Tensor:
    kind = "classes" if classes else "labels" if labels else "binary"
    check_average(average, None if kind == "binary" else kind)
    check_zero_division(zero_division)
    counts = confusion_matrix(preds, target, classes, labels=labels, threshold=threshold, ignore_index=ignore_index)
    return averaged(
        stats(counts, kind), rates_of(name, beta), average, drops_absent=kind == "classes", zero_division=zero_division
    )
