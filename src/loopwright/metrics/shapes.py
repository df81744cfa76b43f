"""Which shapes of predictions and targets go together, and what to write where they do not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loopwright.errors import MetricError, SettingError
from loopwright.events import describe
from loopwright.metrics.base import wide

__all__ = [
    "best",
    "check_real",
    "check_tensors",
    "check_threshold",
    "check_top_k",
    "difference",
    "fit",
    "hits",
    "is_one_hot",
]

# N samples, C classes, k guesses, ... further dimensions such as height and width

_COMPLEX = frozenset({torch.complex32, torch.complex64, torch.complex128})
_NO_NUMBERS = _COMPLEX | {torch.bool}


def check_tensors(preds: Any, target: Any) -> None:
    """Raise MetricError for what is no tensor: a list, an array."""
    if isinstance(preds, Tensor) and isinstance(target, Tensor):
        return
    for name, value in (("preds", preds), ("target", target)):
        if not isinstance(value, Tensor):
            raise MetricError(f"{name} is {describe(value)}: expected a tensor. Write torch.as_tensor({name})")


def check_real(preds: Tensor, target: Tensor) -> None:
    """Raise MetricError for what is not subtracted as real numbers are: complex numbers and bools."""
    if preds.dtype in _NO_NUMBERS or target.dtype in _NO_NUMBERS:
        name, value = ("preds", preds) if preds.dtype in _NO_NUMBERS else ("target", target)
        way = f"{name}.abs(), or torch.view_as_real({name})" if value.is_complex() else f"{name}.float()"
        raise MetricError(
            f"preds {describe(preds)} and target {describe(target)}: an error is the difference of real numbers. Write "
            f"{way}"
        )


def fit(preds: Tensor, target: Tensor, top_k: int) -> int:
    """Classes that ``preds`` [N, C, ...] have scores for; 0 where they have the shape of ``target``.

    Raises MetricError, with the way out where there is one, if the shapes fit in neither way.
    """
    check_tensors(preds, target)
    if preds.dtype in _COMPLEX:
        raise MetricError(f"preds {describe(preds)}: of complex scores none is the largest. Write preds.abs()")
    if target.dtype in _COMPLEX:
        raise MetricError(f"target {describe(target)}: class indices are integers. Write target.real.long()")
    if preds.shape == target.shape and top_k == 1:
        return 0
    scores = preds.ndim > 1 and preds.shape[:1] + preds.shape[2:] == target.shape
    if not scores or preds.shape[1] < max(top_k, 2) or target.is_floating_point():
        raise _unfit(preds, target, top_k)
    return preds.shape[1]


def best(scores: Tensor, top_k: int) -> Tensor:
    """Indices [N, ...] of the largest score in [N, C, ...], or [N, k, ...] of the k largest."""
    return scores.argmax(1) if top_k == 1 else scores.topk(top_k, 1).indices


def hits(answer: Tensor, target: Tensor, top_k: int, threshold: float) -> Tensor:
    """Bool, in the shape of ``target``: whether the answer (indices, or probabilities of class 1) is right."""
    if top_k > 1:
        return (answer == target.unsqueeze(1)).any(1)
    if answer.is_floating_point():
        answer = answer > threshold
    return answer == target


def is_one_hot(target: Tensor) -> bool:
    """True for targets [N, C, ...] with a single 1 among zeros for each sample: classes written out.

    >>> is_one_hot(torch.eye(3)), is_one_hot(torch.ones(3, 3)), is_one_hot(torch.ones(3, 1))
    (True, False, False)
    """
    wide = target.ndim > 1 and target.shape[1] > 1 and target.numel() > 0
    return wide and bool(((target == 0) | (target == 1)).all()) and bool((target.sum(1) == 1).all())


def difference(preds: Tensor, target: Tensor, least: torch.dtype | None = None) -> Tensor:
    """``preds - target`` in floats that can hold it: an unsigned difference would wrap, a float16 one overflow."""
    check_tensors(preds, target)
    if preds.shape != target.shape:
        raise MetricError(
            f"preds {describe(preds)} and target {describe(target)} do not fit: "
            f"{_squeeze(preds, target) or _scores(preds, target) or 'expected one shape for both'}"
        )
    check_real(preds, target)
    dtype = torch.promote_types(preds.dtype, target.dtype)
    if dtype not in (torch.float32, torch.float64):
        preds = preds.to(least or wide(preds.device))
    return preds - target


def check_top_k(top_k: int) -> int:
    """``top_k`` if it is a whole number from 1; SettingError otherwise."""
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise SettingError(f"top_k={top_k!r}: expected a whole number from 1, such as top_k=5")
    return top_k


def check_threshold(threshold: Any) -> None:
    """SettingError for a threshold that is no finite number. Logits have thresholds outside of [0, 1]."""
    if threshold is None:
        return
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not math.isfinite(threshold):
        raise SettingError(
            f"threshold={threshold!r}: expected a finite number, above which a score says 1: 0.5 for probabilities, "
            "0.0 for logits"
        )


def _unfit(preds: Tensor, target: Tensor, top_k: int) -> MetricError:
    shapes = f"preds {describe(preds)} and target {describe(target)}"
    if preds.shape == target.shape:
        return MetricError(f"{shapes}: top_k={top_k} needs a score for each class, preds of shape [N, C, ...]")
    if preds.ndim > 1 and preds.shape[:1] + preds.shape[2:] == target.shape:
        classes = preds.shape[1]
        if classes == 1:
            return MetricError(f"{shapes}: one class only. Where one output means two, write preds.squeeze(1)")
        if target.is_floating_point():
            return MetricError(f"{shapes}: class indices are integers. Write target.long()")
        fewer = f"{classes} classes are fewer than top_k={top_k}"
        return MetricError(f"{shapes}: {fewer}; write top_k={classes - 1} or less")
    expected = "one shape for both, or scores [N, C, ...] with class indices [N, ...]"
    if preds.ndim > 2 and preds.shape[:-1] == target.shape and not target.is_floating_point():
        expected += ". The classes are last here: let the step return preds.movedim(-1, 1)"
    return MetricError(f"{shapes} do not fit: {_squeeze(preds, target) or f'expected {expected}'}")


def _scores(preds: Tensor, target: Tensor) -> str | None:
    """What to write where scores of classes meet class indices, of which there is no difference to measure."""
    if preds.ndim < 2 or target.is_floating_point() or preds.shape[:1] + preds.shape[2:] != target.shape:
        return None
    return f"these are scores of {preds.shape[1]} classes and class indices; take lw.metrics.Accuracy()"


def _squeeze(preds: Tensor, target: Tensor) -> str | None:
    """What to write where a last dimension of 1 is all that is wrong."""
    p, t = preds.shape, target.shape
    if t[-1:] == (1,) and t[:-1] in (p, p[:1] + p[2:]):
        return f"write target.squeeze({target.ndim - 1})"
    if p[-1:] == (1,) and p[:-1] == t:
        return f"write preds.squeeze({preds.ndim - 1})"
    return None
