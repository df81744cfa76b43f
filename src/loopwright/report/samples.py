"""What is kept of an evaluation: how classes were confused or numbers missed, and the worst and best samples."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from loopwright.events import describe
from loopwright.report.png import as_png

__all__ = ["Samples", "misnamed"]

_CLASSES = 1000  # of which confusions are counted
_POINTS = 1500  # predictions that are drawn against their targets
_TEXT, _ROW = 2000, 40  # characters and numbers that are kept of a sample
_TARGETS = ("labels", "label", "target", "y")

Kept = tuple[float, int, dict[str, Any]]  # how good it is, a number that tells equals apart, what is shown of it


class Samples:
    """Fed with the output and the batch of each evaluation step; ``as_dict`` is what a report shows.

    Outputs with ``preds`` and ``target`` are understood where they are classes (scores [N, C] or [N], targets [N]) or
    numbers (both [N] or [N, D]); of others nothing is kept. Only the samples among the ``keep`` worst and best so far
    are held, on the CPU.

    >>> seen = Samples(keep=1)
    >>> seen.add({"preds": torch.tensor([[2.0, 0.0], [1.0, 0.0]]), "target": torch.tensor([0, 1])}, [torch.eye(2)])
    >>> told = seen.as_dict()
    >>> told["counts"], told["worst"][0]["target"], told["worst"][0]["row"]
    ([[1, 0], [1, 0]], 1, [0.0, 1.0])
    """

    def __init__(self, *, keep: int, show: Callable[[Any], Any] | None = None, loss: Any = None) -> None:
        self.keep, self.show, self.loss = keep, show, loss
        self.kind: str | None = None
        self.counts: NDArray[np.int64] | None = None
        self.points: list[tuple[float, float]] = []
        self.stride = 1  # one of so many samples is a point
        self.seen = 0
        self.worst: list[Kept] = []
        self.best: list[Kept] = []
        self.wrong: list[str] = []  # what ``show`` gave that fits no batch, a sentence

    def add(self, output: Mapping[str, Any], batch: Any) -> None:
        """Take note of a batch. It reads predictions and targets from their device."""
        preds, target = output.get("preds"), output.get("target")
        if not isinstance(preds, Tensor) or not isinstance(target, Tensor) or not preds.dim() * target.dim():
            return
        if not len(target):
            return
        preds, target = preds.detach().cpu(), target.detach().cpu()
        classes = as_classes(preds, target, self.loss)
        if classes is not None:
            if self.kind in (None, "classes"):
                self.kind = "classes"
                self._add_classes(*classes, batch)
        elif _are_numbers(preds, target) and self.kind in (None, "numbers"):
            self.kind = "numbers"
            self._add_numbers(preds.double().reshape(len(target), -1), target.double().reshape(len(target), -1), batch)
        self.seen += len(target)

    def _add_classes(self, chances: Tensor, labels: Tensor, batch: Any) -> None:
        count = chances.shape[1]
        known = (labels >= 0) & (labels < count)  # an ignored target is none of them
        rows = known.nonzero()[:, 0]
        if not len(rows):
            return
        right = chances[rows, labels[rows]]
        guesses = chances[rows].argmax(dim=1)
        if count <= _CLASSES:
            counts = torch.bincount(labels[rows] * count + guesses, minlength=count * count).view(count, count).numpy()
            self.counts = counts if self.counts is None else _sum_of(self.counts, counts)
        scores = right.log().nan_to_num(nan=-1e30, neginf=-1e30)
        scores = torch.where(guesses == labels[rows], scores, scores - 1.0)  # among equals, the wrong one is worse
        top = chances[rows].topk(min(3, count), dim=1)

        def told(i: int) -> dict[str, Any]:
            best = list(zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True))
            return {"target": int(labels[rows[i]]), "guess": int(guesses[i]), "p": float(right[i]), "top": best}

        self._rank(scores.numpy(), rows.numpy(), told, batch, len(labels))

    def _add_numbers(self, preds: Tensor, target: Tensor, batch: Any) -> None:
        for i in range(-self.seen % self.stride, len(target), self.stride):
            self.points += zip(target[i].tolist(), preds[i].tolist(), strict=True)
        while len(self.points) > _POINTS and self.stride < 1 << 60:
            width = target.shape[1]
            kept = range(0, len(self.points), 2 * width)
            self.points = [self.points[j] for i in kept for j in range(i, min(i + width, len(self.points)))]
            self.stride *= 2
            if width > _POINTS:
                break

        def told(i: int) -> dict[str, Any]:
            return {"target": target[i, :_ROW].tolist(), "guess": preds[i, :_ROW].tolist()}

        scores = -(preds - target).square().mean(dim=1).nan_to_num(nan=1e300, posinf=1e300)
        self._rank(scores.numpy(), np.arange(len(target)), told, batch, len(target))

    def _rank(
        self, scores: NDArray[Any], rows: NDArray[Any], told: Callable[[int], dict[str, Any]], batch: Any, count: int
    ) -> None:
        """Keep what is worse or better than what was kept before; only that is looked at."""
        order = scores.argsort(kind="stable")
        inputs = None
        for kept, sign, places in ((self.worst, -1, order[: self.keep]), (self.best, 1, order[::-1][: self.keep])):
            for i in places.tolist():
                value = sign * float(scores[i])
                if len(kept) >= self.keep and value <= kept[0][0]:
                    break
                if inputs is None:
                    inputs = self._shown(batch, count)
                number = self.seen + int(rows[i])
                entry = (value, -number, {"n": number, **told(i), **_input(inputs, int(rows[i]))})
                (heapq.heappush if len(kept) < self.keep else heapq.heappushpop)(kept, entry)

    def _shown(self, batch: Any, count: int) -> Any:
        """What is shown of a batch of ``count`` samples: what the user says, or its first part that is no target."""
        if self.show is not None:
            shown = self.show(batch)
            if shown is None or _has_each(shown, count):
                return shown
            if not self.wrong:
                self.wrong.append(
                    f"show= returned {describe(shown)}, and the batch has {count} samples: return one for each, "
                    "images [N, C, H, W] or [N, H, W], rows of numbers [N, D], or a list of texts"
                )
            return None
        if isinstance(batch, Mapping):
            return next((value for name, value in batch.items() if name not in _TARGETS), None)
        while isinstance(batch, (list, tuple)) and batch and not isinstance(batch[0], str):
            batch = batch[0]
        return batch

    def include(self, other: Samples) -> None:
        """Add what another rank has seen. Positions in the data are not known then."""
        self.kind = self.kind or other.kind
        if other.counts is not None:
            self.counts = other.counts if self.counts is None else _sum_of(self.counts, other.counts)
        self.points = (self.points + other.points)[:_POINTS]
        self.seen += other.seen
        self.wrong = self.wrong or other.wrong
        self.worst = sorted([*self.worst, *other.worst], key=lambda kept: kept[:2], reverse=True)[: self.keep]
        self.best = sorted([*self.best, *other.best], key=lambda kept: kept[:2], reverse=True)[: self.keep]
        for _, _, told in (*self.worst, *self.best):
            told.pop("n", None)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; empty where nothing was understood."""
        if self.kind is None:
            return {}
        worst, best = ([told for *_, told in sorted(kept, key=lambda one: one[:2], reverse=True)]
                       for kept in (self.worst, self.best))  # fmt: skip
        if self.kind == "classes":
            best = [one for one in best if one["target"] == one["guess"]]
        counts = None if self.counts is None else self.counts.tolist()
        return {"kind": self.kind, "samples": self.seen, "counts": counts, "points": self.points, "worst": worst,
                "best": best}  # fmt: skip


def misnamed(told: Mapping[str, Any], classes: Sequence[str], columns: Sequence[str]) -> Iterator[str]:
    """What is wrong with the names that were given for what ``Samples.as_dict`` told, a sentence each.

    >>> next(misnamed({"kind": "classes", "counts": [[0] * 10] * 10, "worst": []}, ["cat", "dog"], []))
    "classes=['cat', 'dog'] names 2 classes, and the predictions have 10: give 10 names, in the order of the scores"
    """
    counts, width = told["counts"], max((len(one["row"]) for one in told["worst"] if "row" in one), default=0)
    if classes and told["kind"] != "classes":
        yield f"classes={_short(classes)} is for classes, and the predictions are numbers: leave it out"
    elif classes and counts and len(counts) != len(classes):
        n = len(counts)
        yield (
            f"classes={_short(classes)} names {len(classes)} classes, and the predictions have {n}: give {n} names, "
            "in the order of the scores"
        )
    if columns and told["worst"] and not width:
        yield f"columns={_short(columns)} is for rows of a table, and the samples are none: leave it out"
    elif columns and width < _ROW and width != len(columns):
        yield f"columns={_short(columns)} names {len(columns)} columns, the samples have {width}: give {width} names"


def _short(names: Sequence[str]) -> str:
    text = repr(list(names))
    return text if len(text) <= 80 else f"{text[:77]}..."


def as_classes(preds: Tensor, target: Tensor, loss: Any) -> tuple[Tensor, Tensor] | None:
    """Probabilities [N, C] and classes [N] of what are predictions of classes, else None.

    >>> chances, classes = as_classes(torch.tensor([0.0]), torch.tensor([1.0]), nn.BCEWithLogitsLoss())
    >>> chances, classes
    (tensor([[0.5000, 0.5000]]), tensor([1]))
    """
    if preds.dim() == 2 and preds.shape[1] > 1 and preds.is_floating_point() and target.dim() == 1:
        if target.is_floating_point() or len(preds) != len(target):
            return None
        preds = preds.float()
        if isinstance(loss, nn.NLLLoss):
            return preds.exp(), target.long()
        whole = bool((preds >= 0).all()) and bool(torch.allclose(preds.sum(dim=1), torch.ones(()), atol=1e-3))
        return preds if whole else preds.softmax(dim=1), target.long()
    two = isinstance(loss, (nn.BCELoss, nn.BCEWithLogitsLoss)) or not target.is_floating_point()
    if not two or preds.numel() != len(target) or target.numel() != len(target) or not preds.is_floating_point():
        return None
    score = preds.float().reshape(-1)
    chance = score if isinstance(loss, nn.BCELoss) else score.sigmoid()
    return torch.stack([1 - chance, chance], dim=1), (target.reshape(-1) > 0.5).long()


def _are_numbers(preds: Tensor, target: Tensor) -> bool:
    """True for one number or a row of numbers a sample."""
    return target.is_floating_point() and target.dim() in (1, 2) and preds.numel() == target.numel()


def _has_each(shown: Any, count: int) -> bool:
    """True for what has one entry for each sample of a batch."""
    if isinstance(shown, (str, bytes, Mapping)):
        return False
    try:
        return len(shown) == count
    except TypeError:
        return False


def _sum_of(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    return one + other if one.shape == other.shape else one


def _input(inputs: Any, i: int) -> dict[str, Any]:
    """A sample as ``text``, as ``image`` (a PNG) or as ``row`` of numbers."""
    try:
        sample = inputs[i]
    except (TypeError, IndexError, KeyError):
        return {}
    if isinstance(sample, str):
        return {"text": sample[:_TEXT]}
    if isinstance(sample, Tensor):
        sample = sample.detach().cpu()
        sample = sample.float().numpy() if sample.is_floating_point() else sample.numpy()
    if not isinstance(sample, np.ndarray):
        plain = isinstance(sample, Sequence) and all(isinstance(one, (int, float)) for one in sample)
        return {"row": list(sample[:_ROW])} if plain else {}
    if sample.ndim <= 1 and sample.dtype.kind in "biuf":
        return {"row": sample.reshape(-1)[:_ROW].tolist()}
    image = as_png(sample)
    return {} if image is None else {"image": image}
