"""Accuracy, compared many batches at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from loopwright.errors import MetricError, SettingError
from loopwright.events import describe
from loopwright.metrics.base import Metric
from loopwright.metrics.counting import binned
from loopwright.metrics.shapes import check_tensors, check_threshold, check_top_k, fit, hits, is_one_hot
from loopwright.written import warn

__all__ = ["Accuracy"]

SMALL = 8192  # elements of preds in a batch
HELD = 65_536  # elements kept before they are counted: one comparison for many batches is cheaper than one for each
PIECE = 64  # what a kept tensor counts at least, since its object and its memory block cost as much


class Accuracy(Metric):
    """Fraction of right answers over all batches; a float, nan if there was nothing to count.

    Scores ``preds [N, C, ...]`` (logits or probabilities) with class indices ``target [N, ...]``: right if the target
    is the largest score, or with ``top_k=k`` among the k largest. One shape for both: float ``preds`` are probabilities
    of class 1 and say 1 above ``threshold`` (default 0.5; write ``threshold=0.0`` for logits), integer and bool
    ``preds`` are right where they equal the target; each element counts. Elements whose target is ``ignore_index`` are
    left out. ``average=None`` gives the fraction of each class, of those whose target it is (a vector), "macro" their
    mean over the classes that have a target: balanced accuracy; both need scores. ``preds=`` and ``target=`` name what
    is read of a step's output.

    Counts are exact. ``update`` keeps the answers and a copy of ``target``, counts 64k elements at a time, and reads
    nothing from the device. Raises MetricError for shapes that do not fit (at once), and for targets that are no class
    or ``preds`` that are NaN or no probabilities (when counted on a CPU, at the latest in ``compute``).

    >>> accuracy = Accuracy()
    >>> accuracy.update(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    >>> accuracy.update(torch.tensor([[0.3, 0.7], [0.4, 0.6]]), torch.tensor([1, 1]))
    >>> accuracy.compute()
    0.75
    """

    state: ClassVar[Mapping[str, str]] = {
        "hits": "sum", "count": "sum",
        "classes": "max", "lowest": "min", "highest": "max",  # what is known of the targets
        "least": "min", "most": "max",  # and of probabilities
        "odd": "sum",  # samples whose scores are NaN
        "soft": "sum",  # targets between two classes
        "each": "sum",  # wrong and right answers of each class
    }  # fmt: skip

    def __init__(
        self,
        top_k: int = 1,
        *,
        average: str | None = "micro",
        threshold: float | None = None,
        ignore_index: int | None = None,
        preds: str = "preds",
        target: str = "target",
    ) -> None:
        self.top_k, self.average, self.inputs = check_top_k(top_k), average, (preds, target)
        if average not in ("micro", "macro", None):
            raise SettingError(f"average={average!r}: expected 'micro' (of all samples), 'macro' or None (each class)")
        check_threshold(threshold)
        if top_k > 1 and threshold is not None:
            raise SettingError(f"threshold={threshold} is for two classes, top_k={top_k} for more: give one of them")
        self.threshold = threshold
        self.ignore_index = ignore_index
        self._said = False
        self._forget()

    @property
    def keys(self) -> tuple[str, ...] | None:
        """() for a single number; how many classes there are is seen with the data."""
        return None if self.average is None else ()

    def _forget(self) -> None:
        self._held: list[tuple[Tensor, ...]] = []
        self._size = 0
        self._classes = 0  # that preds have scores for; 0 where they have the shape of the target
        self._bits = 0  # of a class index
        self._packs = False
        self._piece = PIECE
        self._seen: Any = None
        self._kind: Any = None

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        check_tensors(preds, target)
        if (preds.shape, target.shape, preds.dtype, target.dtype) != self._seen:
            self._check_shapes(preds, target)
        if preds.requires_grad:
            preds = preds.detach()
        # whatever is held is a copy: a loop may write the next batch into the same memory
        if self._packs and self._classes and self.top_k == 1:  # both in one number
            top, answer = preds.max(1)
            self._held.append((answer.add_(target, alpha=1 << self._bits).masked_fill_(top.isnan(), -1),))
        else:  # small ones are cheaper to copy than to look at one by one
            self._held.append((self._best(preds) if self.top_k > 1 else preds.clone(), target.clone()))
        self._size += self._piece
        if self._size > HELD:
            self.fold()

    def _check_shapes(self, preds: Tensor, target: Tensor) -> None:
        classes = fit(preds, target, self.top_k)
        if self.average != "micro" and not classes and not preds.is_floating_point():
            raise MetricError(
                f"Accuracy(average={self.average!r}) cannot tell how many classes there are from preds "
                f"{describe(preds)}: give scores [N, C, ...], or take Recall(classes=..., average={self.average!r})"
            )
        kind = (classes, preds.shape[2:], target.shape[1:], preds.dtype, target.dtype)
        if kind != self._kind:  # what is held cannot be joined with it
            self.fold()
            whole = not classes and self.threshold is None and self.ignore_index is None and target.is_cpu
            if whole and preds.is_floating_point() and is_one_hot(target):  # classes, as other losses take them
                least, most = map(float, preds.aminmax())
                if least < 0 or most > 1:
                    raise _no_probabilities(least, most, target.shape)
            self._packs = self.top_k > 1 or preds.numel() > SMALL
        self._kind, self._classes, self._bits = kind, classes, classes.bit_length()
        self._seen = (preds.shape, target.shape, preds.dtype, target.dtype)
        self._piece = max(PIECE, target.numel() if self._packs else preds.numel())

    def _best(self, preds: Tensor) -> Tensor:
        scores, answers = preds.topk(self.top_k, 1)
        self.add(odd=scores[:, 0].isnan().count_nonzero())  # NaN is the largest
        return answers

    def fold(self) -> None:
        """Count what is held."""
        if not self._held:
            return
        answer, target, found = self._joined()
        if target.is_floating_point():
            found["soft"] = (target != target.round()).count_nonzero()
        right = hits(answer, target, self.top_k, 0.5 if self.threshold is None else self.threshold)
        count: Any = target.numel()
        if self.ignore_index is not None:
            kept = target != self.ignore_index
            right, count = right & kept, kept.sum()
            self._count_each(right, target, kept)
            target = target.where(kept, 0)
            answer = answer.where(kept, 0) if answer.is_floating_point() else answer
        else:
            self._count_each(right, target, None)
        found |= {"hits": right.count_nonzero(), "count": count}
        scores, some = answer.is_floating_point(), len(target) > 0
        if (self._classes or scores) and some:
            found["classes"] = self._classes or 2
            found["lowest"], found["highest"] = (target.byte() if target.dtype == torch.bool else target).aminmax()
        if scores and some and self.threshold is None:
            found["least"], found["most"] = answer.aminmax()
        if scores:
            found["odd"] = answer.isnan().count_nonzero()
        if not target.is_cpu:
            self.add(**found)
            return
        # there a number costs less than another tensor
        self.add(**{name: one.item() if isinstance(one, Tensor) else one for name, one in found.items()})
        self._check_values()

    def _count_each(self, right: Tensor, target: Tensor, kept: Tensor | None) -> None:
        classes = self._classes or 2
        if self.average == "micro":
            return
        target = target.long()
        bad = (target < 0) | (target >= classes)
        bad = bad if kept is None else bad | ~kept
        self.add(each=binned(target * 2 + right, 2 * classes, bad)[: 2 * classes])

    def _joined(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Answers [M] or [M, k], targets [M], how many scores are NaN: all that was held, and is no more."""
        held, self._held, self._size = self._held, [], 0
        if len(held[0]) == 1:
            both = torch.cat([code for (code,) in held]).flatten()
            odd = both == -1
            both = both.masked_fill_(odd, 0)
            return both & ((1 << self._bits) - 1), both >> self._bits, {"odd": odd.count_nonzero()}
        answers, targets = (torch.cat(column) for column in zip(*held, strict=True))
        if self.top_k > 1:
            return answers.movedim(1, -1).flatten(0, -2), targets.flatten(), {}
        if not self._classes:
            return answers.flatten(), targets.flatten(), {}
        top, answers = answers.max(1)
        return answers.flatten(), targets.flatten(), {"odd": top.isnan().count_nonzero()}

    def reset(self) -> None:
        """Forget all that was taken in."""
        super().reset()
        self._forget()

    def compute(self) -> Any:
        """The fraction of right answers: a float, or a float64 tensor [C] for ``average=None``."""
        self.fold()
        hits, count = (float(self._totals.get(name, 0)) for name in ("hits", "count"))
        self._check_values()
        if self.average == "micro" or not count:
            return hits / count if count else self._nothing()
        wrong, right = self.total("each").double().cpu().view(-1, 2).unbind(1)
        each = right / (wrong + right)
        if self.average == "macro":
            return float(each.nanmean())
        if not self._said and bool(each.isnan().any()):
            self._said = True
            missing = each.isnan().nonzero().flatten().tolist()
            warn(f"Accuracy of the classes {missing} is 0/0, since they have no target: it is nan")
        return each

    def _check_values(self) -> None:
        """Raise MetricError if what was counted makes no sense."""
        known = {k: v.item() if isinstance(v, Tensor) else v for k, v in self._totals.items() if k != "each"}
        if known.get("odd"):
            raise MetricError(
                f"the scores of {known['odd']} samples are NaN. Look for where they come from with "
                "Trainer(debug=lw.Debug(anomaly=True)), or leave these samples out with lw.metrics.Where"
            )
        if known.get("soft"):
            raise MetricError(
                f"{known['soft']} targets are neither 0 nor 1, and no prediction is equal to them. For the larger side "
                "write target.round(), for a distance take lw.metrics.MAE()"
            )
        if "lowest" in known:
            classes, lowest, highest = self._totals["classes"], known["lowest"], known["highest"]
            if lowest < 0 or highest >= classes:
                raise MetricError(
                    f"targets range from {lowest} to {highest}, but {classes} classes have the indices 0 to "
                    f"{classes - 1}. To leave a target out, name it: "
                    f"Accuracy(ignore_index={lowest if lowest < 0 else highest})"
                )
        if "least" in known and (known["least"] < 0 or known["most"] > 1):
            raise _no_probabilities(known["least"], known["most"], self._seen[1] if self._seen else ())


def _no_probabilities(least: float, most: float, shape: Sequence[int]) -> MetricError:
    """``shape``: that of the targets."""
    way = "For logits, write Accuracy(threshold=0.0)"
    if len(shape) > 1 and shape[1] > 1:
        way = (
            "Where targets are one-hot give the classes, y.argmax(1), which nn.CrossEntropyLoss takes as well; for "
            "logits of several labels write Accuracy(threshold=0.0)"
        )
    return MetricError(f"preds range from {least:.4g} to {most:.4g}, which are no probabilities. {way}")
