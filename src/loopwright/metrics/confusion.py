"""One accumulator of confusion counts, from which precision, recall and their like are computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from loopwright.errors import MetricError, SettingError
from loopwright.metrics.base import Metric
from loopwright.metrics.counting import check_shapes, count, size_of
from loopwright.metrics.shapes import check_tensors, check_threshold

__all__ = ["ConfusionMatrix"]

SMALL = 8192  # elements of preds in a batch that is kept as it is
HELD = 65_536  # elements kept before they are counted: one pass for many batches is cheaper than one for each
PIECE = 64  # what a kept tensor counts at least


class ConfusionMatrix(Metric):
    """Counts of (target, prediction): an int64 tensor on the CPU, rows are targets.

    ``[C, C]`` with ``classes=C``, from scores ``preds [N, C, ...]`` or class indices ``[N, ...]``; ``[2, 2]`` with
    neither, from ``preds [N, ...]`` as probabilities of class 1 (above ``threshold``, default 0.5; write
    ``threshold=0.0`` for logits) or 0 and 1; ``[L, 2, 2]`` with ``labels=L``, from ``preds [N, L, ...]`` alike. Classes
    and labels may be given as their number or as a list of names. ``target`` holds integers, or 0.0 and 1.0 where there
    are no classes; what is ``ignore_index`` is left out. ``preds`` and ``target`` name what is read of a step's output.

    Counts are exact and take 8 C² bytes. ``update`` reads nothing from the device. Raises MetricError for shapes that
    do not fit (at once), and for classes out of range, NaN scores and logits taken for probabilities (when counted on a
    CPU, at the latest in ``compute``).

    >>> confusion = ConfusionMatrix(["cat", "dog"])
    >>> confusion.update(torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), torch.tensor([1, 1, 0]))
    >>> confusion.compute()
    tensor([[0, 1],
            [1, 1]])
    """

    state: ClassVar[Mapping[str, str]] = {"counts": "sum"}

    def __init__(
        self,
        classes: int | Sequence[str] | None = None,
        *,
        labels: int | Sequence[str] | None = None,
        threshold: float | None = None,
        ignore_index: int | None = None,
        preds: str = "preds",
        target: str = "target",
    ) -> None:
        self.kind, self.size, self.names = kind_of(classes, labels, threshold)
        self.threshold, self.ignore_index, self.inputs = threshold, ignore_index, (preds, target)
        self._forget()

    def _forget(self) -> None:
        self._held: list[tuple[Tensor, Tensor]] = []
        self._room = HELD
        self._seen: Any = None
        self._kind: Any = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the values in a record: ``row/column``."""
        names = self.names or tuple(map(str, range(self.size)))
        if self.kind == "classes":
            return tuple(f"{row}/{column}" for row in names for column in names)
        each = ("0/0", "0/1", "1/0", "1/1")
        return each if self.kind == "binary" else tuple(f"{name}/{key}" for name in names for key in each)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        check_tensors(preds, target)
        if (preds.shape, target.shape, preds.dtype, target.dtype) != self._seen:
            self._check(preds, target)
        preds = preds.detach()
        size = preds.numel()
        if size > SMALL:
            self._count(preds, target)
            return
        self._held.append((preds.clone(), target.clone()))  # a loop may write the next batch into the same memory
        self._room -= max(PIECE, size)
        if self._room < 0:
            self.fold()

    def _check(self, preds: Tensor, target: Tensor) -> None:
        check_shapes(preds, target, *self._sizes())
        kind = (preds.shape[1:], target.shape[1:], preds.dtype, target.dtype)
        if kind != self._kind:  # what is held cannot be joined with it
            self.fold()
        self._kind, self._seen = kind, (preds.shape, target.shape, preds.dtype, target.dtype)

    def _sizes(self) -> tuple[int, int]:
        return self.size if self.kind == "classes" else 0, self.size if self.kind == "labels" else 0

    def fold(self) -> None:
        """Count what is held."""
        if self._held:
            preds, target = (torch.cat(column) for column in zip(*self._held, strict=True))
            self._held, self._room = [], HELD
            self._count(preds, target)

    def _count(self, preds: Tensor, target: Tensor) -> None:
        classes, labels = self._sizes()
        counts = count(
            preds, target, classes=classes, labels=labels, threshold=self.threshold, ignore_index=self.ignore_index
        )
        self.add(counts=counts)
        if counts.is_cpu and bool(counts[-3:-1].any()):
            self._refuse(counts, preds, target)

    def reset(self) -> None:
        """Forget all that was taken in."""
        super().reset()
        self._forget()

    def compute(self) -> Tensor:
        """The counts."""
        self.fold()
        shape = {"binary": (2, 2), "classes": (self.size, self.size), "labels": (self.size, 2, 2)}[self.kind]
        if not self._totals:
            return torch.zeros(shape, dtype=torch.int64)
        counts = self.total("counts").cpu()
        if bool(counts[-3:-1].any()):
            self._refuse(counts)
        return counts[:-3].view(shape)

    def _refuse(self, counts: Tensor, preds: Tensor | None = None, target: Tensor | None = None) -> None:
        bad, odd, _ = counts[-3:].tolist()
        if bad:
            top = self.size - 1 if self.kind == "classes" else 1
            seen = f" ({', '.join(_ranges(preds, target))})" if preds is not None and target is not None else ""
            raise MetricError(
                f"{bad} of {int(counts.sum())} targets or predictions are none of the classes 0 to {top}{seen}. To "
                "leave out what has a certain target, name it: ignore_index=-100"
            )
        if self.kind == "classes" or self.threshold is not None:
            raise MetricError(
                f"the scores of {odd} of {int(counts.sum())} samples are NaN. Look for where they come from with "
                "Trainer(debug=lw.Debug(anomaly=True)), or leave these samples out with lw.metrics.Where"
            )
        raise MetricError(
            f"{odd} of {int(counts.sum())} preds are not in [0, 1], which are no probabilities. For logits, write "
            "threshold=0.0"
        )


def _ranges(preds: Tensor, target: Tensor) -> Iterator[str]:
    """In words, from where to where targets lie, and predictions where they are classes and no scores."""
    yield f"targets range from {target.min().item():g} to {target.max().item():g}"
    if preds.shape == target.shape and not preds.is_floating_point():
        yield f"predictions from {int(preds.min())} to {int(preds.max())}"


def kind_of(
    classes: int | Sequence[str] | None, labels: int | Sequence[str] | None, threshold: float | None
) -> tuple[str, int, tuple[str, ...]]:
    """Which of "binary", "classes", "labels" is meant, with how many, and their names."""
    check_threshold(threshold)
    if classes is not None and labels is not None:
        raise SettingError("classes= (one of them a sample) and labels= (any number of them) exclude each other")
    if classes is not None and threshold is not None:
        raise SettingError(f"threshold={threshold} is for probabilities of one class; with classes= the largest counts")
    if classes is not None:
        return "classes", *size_of("classes", classes)
    return ("labels", *size_of("labels", labels)) if labels is not None else ("binary", 2, ())
