"""How many tokens a language model hesitates between."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loopwright.errors import MetricError
from loopwright.events import describe
from loopwright.metrics.base import Metric, wide
from loopwright.metrics.shapes import check_tensors

__all__ = ["Perplexity"]

_PRECISE = (torch.float32, torch.float64)
_NONE = torch.iinfo(torch.int64).min  # cross_entropy has an index to ignore always


class Perplexity(Metric):
    """exp of the mean negative log-likelihood of the targets over all tokens of all batches; a float, nan of nothing.

    ``preds [..., V]`` are logits or log-probabilities with the vocabulary last, ``target [...]`` token indices; those
    that are ``ignore_index`` are left out. ``preds`` and ``target`` name what is read of a step's output. Raises
    MetricError for other shapes (at once), and for tokens that are none (on a CPU at once, else in ``compute``).

    >>> perplexity = Perplexity()
    >>> perplexity.update(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64))
    >>> round(perplexity.compute(), 4)
    8.0
    """

    state: ClassVar[Mapping[str, str]] = {"total": "sum", "count": "sum", "bad": "sum"}
    keys = ()

    def __init__(self, *, ignore_index: int | None = None, preds: str = "preds", target: str = "target") -> None:
        self.ignore_index, self.inputs = ignore_index, (preds, target)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        check_tensors(preds, target)
        total, count, bad = surprise(preds.detach() if preds.requires_grad else preds, target, self.ignore_index)
        if bad is None:
            self.add(total=total, count=count)
            return
        self.add(total=total, count=count, bad=bad)
        if target.is_cpu and bad:
            self._refuse(int(bad), preds.shape[-1])

    def compute(self) -> float:
        """The perplexity."""
        bad = int(self.total("bad"))
        if bad:
            self._refuse(bad, None)
        mean = self._ratio("total", "count")
        return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan

    def _refuse(self, bad: int, size: int | None) -> None:
        raise MetricError(
            f"{bad} targets are no tokens{f' (0 to {size - 1})' if size else ''}. To leave out what has a certain "
            "target, name it: Perplexity(ignore_index=-100)"
        )


def surprise(preds: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Any, Any]:
    """Sum of negative log-likelihoods, how many were counted, and how many targets are no tokens (None: none is)."""
    check_tensors(preds, target)
    if preds.ndim < 2 or preds.shape[:-1] != target.shape or not preds.is_floating_point():
        raise MetricError(
            f"preds {describe(preds)} and target {describe(target)} do not fit: expected float logits [..., V] with "
            "the vocabulary last, and token indices [...]. Where it is in dimension 1, write preds.movedim(1, -1)"
        )
    if target.is_floating_point():
        raise MetricError(f"target {describe(target)}: token indices are integers. Write target.long()")
    if preds.dtype not in _PRECISE:
        preds = preds.to(torch.promote_types(preds.dtype, torch.float32))
    target, size = target if target.dtype is torch.int64 else target.long(), preds.shape[-1]
    if target.is_cpu:
        try:
            ignored = _NONE if ignore_index is None else ignore_index
            each = cross_entropy(preds.reshape(-1, size), target.reshape(-1), ignore_index=ignored, reduction="none")
        except IndexError:
            pass  # a token that is none: counted below
        else:
            count = target.numel() if ignore_index is None else int((target != ignore_index).sum())
            return each.sum(dtype=torch.float64), count, None
    bad = (target < 0) | (target >= size)
    keep = ~bad
    if ignore_index is not None:
        counts = target != ignore_index
        bad, keep = bad & counts, keep & counts
    chosen = preds.log_softmax(-1).gather(-1, target.clamp(0, size - 1).unsqueeze(-1)).squeeze(-1)
    total = -torch.where(keep, chosen, 0.0).sum(dtype=wide(preds.device))
    return total, keep.sum(), bad.sum()
