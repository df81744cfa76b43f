"""Precision, recall and their like: rates of confusion counts, which metrics with the same settings share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loopwright.errors import SettingError
from loopwright.metrics.algebra import Derived
from loopwright.metrics.confusion import ConfusionMatrix
from loopwright.metrics.counting import averaged, check_average, check_zero_division, rate, rates_of, stats
from loopwright.written import warn

__all__ = ["F1", "Dice", "FBeta", "IoU", "Precision", "Rate", "Recall", "Specificity"]

# what is missing where the denominator is 0
_MISSING = {
    "precision": "was never predicted",
    "recall": "has no target",
    "specificity": "has no target of another class",
    "iou": "is in neither targets nor predictions",
    "dice": "is in neither targets nor predictions",
    "fbeta": "is in neither targets nor predictions",
}


class Rate(Derived):
    """A rate of confusion counts; the base of ``Precision``, ``Recall``, ``Specificity``, ``FBeta``, ``IoU``.

    With neither ``classes`` nor ``labels`` it is that of class 1 of two; with ``classes=C`` (a number, or a list of
    names) of one class a sample, with ``labels=L`` of any number of them; inputs, ``threshold`` and ``ignore_index`` as
    for ``ConfusionMatrix``. ``average`` over classes or labels: "macro" (mean), "weighted" (by number of targets),
    "micro" (of all counts together), None (each: a float64 vector, recorded under the names if there are any).

    A rate of 0/0 is nan, and a warning says which class lacks what, once. In a macro or weighted mean such a
    class counts 0, as in torchmetrics and scikit-learn, with the same warning; a class (not a label) that occurs in
    neither targets nor predictions is left out of the macro mean. ``zero_division=0.0`` gives a number instead.

    >>> each = Precision(classes=["cat", "dog"], average=None)
    >>> isinstance(each, Rate), each.keys
    (True, ('cat', 'dog'))
    """

    name: str = ""
    beta: float = 1.0

    def __init__(
        self,
        classes: int | Sequence[str] | None = None,
        *,
        labels: int | Sequence[str] | None = None,
        average: str | None = "macro",
        threshold: float | None = None,
        ignore_index: int | None = None,
        zero_division: float | None = None,
        preds: str = "preds",
        target: str = "target",
    ) -> None:
        check_average(average, "" if classes is not None or labels is not None else None)
        check_zero_division(zero_division)
        counts = ConfusionMatrix(
            classes, labels=labels, threshold=threshold, ignore_index=ignore_index, preds=preds, target=target
        )
        self.kind, self.names, self.size = counts.kind, counts.names, counts.size
        self.average, self.zero_division = average, zero_division
        self._said = False
        super().__init__(_counts, counts)

    @property
    def keys(self) -> tuple[str, ...] | None:
        """The keys of the values in a record; () for a single number."""
        if self.average is not None or self.kind == "binary":
            return ()
        return self.names or tuple(map(str, range(self.size)))

    def combine(self, *args: Any, **kwargs: Any) -> Any:
        """The rate of the counts."""
        counted = stats(args[0], self.kind)
        weights = rates_of(self.name, self.beta)
        drops = self.kind == "classes"
        if self.zero_division is None and not self._said:
            self._say_what_is_missing(counted, rate(counted if self.average != "micro" else counted.sum(0), weights)[1])
        return averaged(counted, weights, self.average, drops_absent=drops, zero_division=self.zero_division)

    def _say_what_is_missing(self, counted: Tensor, under: Tensor) -> None:
        if not bool(counted.sum()):
            self._nothing()
            return
        missing = under == 0
        if self.average == "macro" and self.kind == "classes":  # those that occur nowhere are left out
            missing = torch.logical_and(missing, counted[:, :3].sum(1) > 0)
        elif self.average == "weighted":
            targets = counted[:, 0] + counted[:, 2]
            if not bool(targets.any()):
                self._said = True
                warn(
                    f"{type(self).__name__} is a mean weighted by the number of targets, and no label has one: it is "
                    "nan. Write zero_division=0.0 for a number without this warning"
                )
                return
            missing = torch.logical_and(missing, targets > 0)
        if not bool(missing.any()):
            return
        self._said = True
        names = self.names or tuple(map(str, range(self.size)))
        found = [names[i] for i in missing.nonzero().flatten().tolist()] if missing.ndim else []
        shown = f"{', '.join(map(repr, found[:5]))}{f' and {len(found) - 5} more' if len(found) > 5 else ''}"
        one = "label" if self.kind == "labels" else "class"
        many = "classes" if self.kind == "classes" else "labels"
        alone = "class 1" if self.kind == "binary" else f"all {many} together"
        who = f"{one if len(found) == 1 else many} {shown}" if found else alone
        counts = "nan" if self.average in (None, "micro") or not found else "0 in the mean"
        warn(
            f"{type(self).__name__} is 0/0 for {who}, which {_MISSING[self.name]}: it counts as {counts}. Write "
            "zero_division=0.0 for a number without this warning"
        )


class Precision(Rate):
    """Of what was predicted as a class, the fraction that is: tp / (tp + fp); arguments as for ``Rate``.

    >>> precision = Precision(classes=2, average=None)
    >>> precision.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]))
    >>> precision.compute()
    tensor([1.0000, 0.6667], dtype=torch.float64)
    """

    name = "precision"


class Recall(Rate):
    """Of what is of a class, the fraction that was predicted so: tp / (tp + fn); arguments as for ``Rate``.

    >>> recall = Recall()
    >>> recall.update(torch.tensor([0.2, 0.9, 0.4]), torch.tensor([0, 1, 1]))
    >>> recall.compute()
    0.5
    """

    name = "recall"


class Specificity(Rate):
    """Of what is not of a class, the fraction that was not predicted so: tn / (tn + fp); arguments as for ``Rate``.

    >>> specificity = Specificity()
    >>> specificity.update(torch.tensor([0.2, 0.9, 0.4]), torch.tensor([0, 1, 1]))
    >>> specificity.compute()
    1.0
    """

    name = "specificity"


class IoU(Rate):
    """Intersection over union, the Jaccard index: tp / (tp + fp + fn); arguments as for ``Rate``.

    >>> iou = IoU()
    >>> iou.update(torch.tensor([[1, 1], [0, 0]]), torch.tensor([[1, 0], [0, 0]]))
    >>> iou.compute()
    0.5
    """

    name = "iou"


class Dice(Rate):
    """Twice the intersection over the sum of both: 2 tp / (2 tp + fp + fn), which is F1; arguments as for ``Rate``.

    >>> dice = Dice()
    >>> dice.update(torch.tensor([[1, 1], [0, 0]]), torch.tensor([[1, 0], [0, 0]]))
    >>> round(dice.compute(), 4)
    0.6667
    """

    name = "dice"


class F1(Dice):
    """The harmonic mean of precision and recall: 2 tp / (2 tp + fp + fn); arguments as for ``Rate``.

    >>> f1 = F1(classes=["cat", "dog"], average=None)
    >>> f1.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]))
    >>> f1.compute(), f1.keys
    (tensor([0.6667, 0.8000], dtype=torch.float64), ('cat', 'dog'))
    """


class FBeta(Rate):
    """Precision and recall in one, recall ``beta`` times as important; other arguments as for ``Rate``.

    (1 + beta²) tp / ((1 + beta²) tp + beta² fn + fp). Raises SettingError unless ``beta`` is above 0.

    >>> fbeta = FBeta(2.0)
    >>> fbeta.update(torch.tensor([0.2, 0.9, 0.4]), torch.tensor([0, 1, 1]))
    >>> round(fbeta.compute(), 4)
    0.5556
    """

    name = "fbeta"

    def __init__(self, beta: float, classes: int | Sequence[str] | None = None, **settings: Any) -> None:
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < float("inf"):
            raise SettingError(f"beta={beta!r}: expected a number above 0, such as 2.0; its square weighs the recall")
        super().__init__(classes, **settings)
        self.beta = float(beta)


def _counts(counts: Tensor) -> Tensor:
    return counts
