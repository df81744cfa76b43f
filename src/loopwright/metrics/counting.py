"""Confusion counts of a batch, as functions of tensors: nothing is read from the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from loopwright.errors import MetricError, SettingError, choose
from loopwright.events import describe
from loopwright.metrics.base import wide
from loopwright.metrics.shapes import check_tensors, fit

__all__ = [
    "averaged", "binned", "check_average", "check_shapes", "check_zero_division", "count", "rate", "rates_of",
    "size_of", "stats",
]  # fmt: skip

# N samples, C classes, L labels, ... further dimensions; counts end with bins for what cannot be counted

BAD, ODD, IGNORED = 0, 1, 2  # bins after the counts: a class out of range, a score that is none, left out
AVERAGES = ("macro", "micro", "weighted", None)

# numerator and what is added to it in the denominator, as weights of tp, fp, fn, tn
RATES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "precision": ((1, 0, 0, 0), (0, 1, 0, 0)),
    "recall": ((1, 0, 0, 0), (0, 0, 1, 0)),
    "specificity": ((0, 0, 0, 1), (0, 1, 0, 0)),
    "iou": ((1, 0, 0, 0), (0, 1, 1, 0)),
    "dice": ((2, 0, 0, 0), (0, 1, 1, 0)),
}


def size_of(kind: str, given: int | Sequence[str] | None) -> tuple[int, tuple[str, ...]]:
    """How many classes or labels, and their names if they were given."""
    names = tuple(given) if isinstance(given, Iterable) else ()
    number = len(names) if names else given
    least = 2 if kind == "classes" else 1
    good = isinstance(number, int) and not isinstance(number, bool) and number >= least
    if isinstance(given, str) or not good or not all(isinstance(name, str) and "/" not in name for name in names):
        raise SettingError(
            f"{kind}={given!r}: expected how many there are, from {least}, or a list of their names without '/'"
        )
    if len(set(names)) < len(names):
        raise SettingError(f"{kind}={given!r}: each name may stand there once")
    assert isinstance(number, int)
    return number, names


def count(
    preds: Tensor,
    target: Tensor,
    *,
    classes: int = 0,
    labels: int = 0,
    threshold: float | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """int64 counts [C*C + 3] or [L*4 + 3]: of (target, prediction), then of what could not be counted."""
    if classes:
        return _of_classes(preds, target, classes, ignore_index)
    return _of_labels(preds, target, labels, threshold, ignore_index)


def check_shapes(preds: Tensor, target: Tensor, classes: int, labels: int) -> None:
    """Raise MetricError, with the way out, for shapes and dtypes that do not fit."""
    check_tensors(preds, target)
    told = f"preds {describe(preds)} and target {describe(target)}"
    if target.is_complex() or (classes and target.is_floating_point()):  # BCEWithLogitsLoss asks for 0.0 and 1.0
        raise MetricError(f"{told}: targets are class indices. Write target.long()")
    if classes:
        found = fit(preds, target, 1)
        if found and found != classes:
            raise MetricError(f"{told}: {found} scores a sample, but classes={classes}. Write classes={found}")
        if not found and preds.is_floating_point():
            raise MetricError(f"{told}: scores [N, {classes}, ...] or integer class indices were expected as preds")
        return
    fit(preds, target, 1)
    if preds.shape != target.shape:
        way = f"classes={preds.shape[1]}" if preds.ndim == target.ndim + 1 else "one shape for both"
        raise MetricError(f"{told}: without classes= both have one shape. Write {way}")
    if labels and (preds.ndim < 2 or preds.shape[1] != labels):
        size = preds.shape[1] if preds.ndim > 1 else None
        raise MetricError(f"{told}: expected [N, {labels}, ...]. Write {f'labels={size}' if size else 'no labels='}")


def _of_classes(preds: Tensor, target: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    odd = None
    if preds.shape != target.shape:
        if preds.is_floating_point():
            top, preds = preds.max(1)  # the largest is NaN where any is
            odd = top.isnan()
        else:
            preds = (preds.byte() if preds.dtype is torch.bool else preds).argmax(1)
    target = target.long()
    bad = (target < 0) | (target >= classes)
    if not preds.is_floating_point() and odd is None:
        bad = bad | (preds < 0) | (preds >= classes)
    return binned(target * classes + preds, classes * classes, bad, odd, target, ignore_index)


def _of_labels(preds: Tensor, target: Tensor, labels: int, threshold: float | None, ignore_index: int | None) -> Tensor:
    odd = None
    if preds.is_floating_point():
        odd = preds.isnan() if threshold is not None else ~((preds >= 0) & (preds <= 1))
        preds = preds > (0.5 if threshold is None else threshold)
    bad = (target != 0) & (target != 1)
    target, preds = target.long(), preds.long()
    bad = bad | (preds < 0) | (preds > 1)
    code = target * 2 + preds
    if labels:
        place = torch.arange(labels, device=code.device).view(-1, *[1] * (code.ndim - 2))
        code = code + 4 * place
    return binned(code, 4 * max(labels, 1), bad, odd, target, ignore_index)


def binned(
    code: Tensor,
    size: int,
    bad: Tensor,
    odd: Tensor | None = None,
    target: Tensor | None = None,
    ignore_index: int | None = None,
) -> Tensor:
    """int64 [size + 3]: how often each code occurs, then what is bad, odd or to be ignored, the later before."""
    code = torch.where(bad, size + BAD, code)
    if odd is not None:
        code = torch.where(odd, size + ODD, code)
    if target is not None and ignore_index is not None:
        code = torch.where(target == ignore_index, size + IGNORED, code)
    code = code.flatten()
    if code.is_cpu:
        return torch.bincount(code, minlength=size + 3)
    # bincount would read the largest code from the device
    return torch.zeros(size + 3, dtype=torch.int64, device=code.device).index_add_(0, code, torch.ones_like(code))


def stats(counts: Tensor, kind: str) -> Tensor:
    """tp, fp, fn, tn of what was counted: [4] of "binary", [C, 4] of "classes", [L, 4] of "labels"."""
    if kind != "classes":
        tn, fp, fn, tp = counts.flatten(-2).unbind(-1)
        return torch.stack([tp, fp, fn, tn], -1)
    tp = counts.diagonal()
    fp, fn = counts.sum(0) - tp, counts.sum(1) - tp
    return torch.stack([tp, fp, fn, counts.sum() - tp - fp - fn], -1)


def rates_of(name: str, beta: float = 1.0) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The weights of tp, fp, fn, tn in the numerator, and in what the denominator has besides."""
    if name == "fbeta":
        square = beta * beta
        return (1 + square, 0, 0, 0), (0, 1, square, 0)
    return RATES[name]


def rate(counted: Tensor, weights: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[Tensor, Tensor]:
    """Numerators and denominators [...] of counts [..., 4] of tp, fp, fn, tn."""
    counted = counted.to(wide(counted.device))
    over = counted @ counted.new_tensor(weights[0])
    return over, over + counted @ counted.new_tensor(weights[1])


def averaged(
    counted: Tensor,
    weights: tuple[tuple[float, ...], tuple[float, ...]],
    average: str | None,
    *,
    drops_absent: bool,
    zero_division: float | None = None,
) -> Tensor:
    """A rate of counts [4], or its mean over classes or labels [C, 4]; [C] for ``average=None``. 0/0 is nan.

    In a macro or weighted mean a class whose rate is 0/0 counts 0, as in torchmetrics and scikit-learn; with
    ``drops_absent`` a class that is in neither targets nor predictions is left out of the macro mean.
    """
    if average == "micro":
        counted = counted.sum(0)
    over, under = rate(counted, weights)
    undefined = float("nan") if zero_division is None else zero_division
    each = torch.where(under == 0, undefined, over / under)
    if average in ("micro", None) or counted.ndim == 1:
        return each
    tp, fp, fn, _ = counted.to(over.dtype).unbind(-1)
    share = tp + fn if average == "weighted" else torch.ones_like(tp)
    if average == "macro" and drops_absent:
        share = torch.where(tp + fp + fn == 0, 0.0, share)
    total = share.sum()
    mean = (share * torch.where(under == 0, zero_division or 0.0, each)).sum() / total
    return torch.where((total == 0) | (counted.sum() == 0), undefined, mean)


def check_average(average: str | None, kinds: str | None) -> None:
    """Raise SettingError for an average that is none, or that has nothing to be taken over."""
    if average not in AVERAGES:
        raise SettingError(
            f"average={average!r} is unknown. {choose(average, map(str, AVERAGES))} None gives each class"
        )
    if kinds is None and average != "macro":
        raise SettingError(
            f"average={average!r} is over classes or labels: add classes=... or labels=..., or leave it out"
        )


def check_zero_division(value: Any) -> None:
    """Raise SettingError for what cannot stand for 0/0."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise SettingError(
            f"zero_division={value!r}: expected a number that 0/0 counts as, such as 0.0 or 1.0, or None (nan, and a "
            "warning that says which class lacks what)"
        )
