"""Batches chosen by something else than a shuffle: by weights, by length, or by a rule of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from loopwright.data.arrays import as_tensors, check_classes, pick
from loopwright.data.plan import Plan, Planned, seed_from, shuffled
from loopwright.errors import DataError, SettingError

__all__ = ["BatchSampler", "BucketSampler", "WeightedSampler"]


@runtime_checkable
class BatchSampler(Protocol):
    """What ``Loader(data, sampler=...)`` asks: the batches of an epoch, as a pure function of epoch and key.

    Being pure is what lets a run go on in the middle of an epoch, in any process. ``length``, where the sampler has
    it, is the number of samples that it was made for, and is compared with the data.

    >>> class EveryOther:
    ...     def batches(self, epoch, key):
    ...         return [[0, 2], [4]] if epoch % 2 == 0 else [[1, 3]]
    >>> isinstance(EveryOther(), BatchSampler)
    True
    """

    def batches(self, epoch: int, key: int) -> Sequence[Sequence[int] | Tensor]:
        """Sample indices of each batch of ``epoch``; the same whenever asked with the same arguments."""
        ...


class WeightedSampler:
    """Batches drawn with replacement: each sample comes up as often as its weight says.

    ``weights`` holds a number >= 0 for each sample of the data, which need not sum to 1. An epoch has ``samples``
    draws (None: as many as there are weights) in batches of ``batch_size``, the last one maybe shorter.
    A sample that comes twice in an epoch is augmented in two ways.

    Raises DataError for weights that are negative, not finite or all 0, and SettingError for sizes
    below 1.

    >>> sampler = WeightedSampler([0, 1, 1, 0], batch_size=3)
    >>> [len(batch) for batch in sampler.batches(0, key=1)]
    [3, 1]
    >>> set(torch.cat(list(sampler.batches(0, key=1))).tolist()) <= {1, 2}
    True
    """

    def __init__(self, weights: Any, batch_size: int = 64, *, samples: int | None = None) -> None:
        self.weights = _column(weights, "weights").double()
        if not bool((self.weights.isfinite() & (self.weights >= 0)).all()) or not bool(self.weights.any()):
            raise DataError("weights must be finite numbers >= 0, one of them at least above 0")
        self.length = len(self.weights)
        self.batch_size = _at_least_1("batch_size", batch_size)
        self.samples = self.length if samples is None else _at_least_1("samples", samples)
        self._sums = (self.weights / self.weights.max()).cumsum(0)

    @classmethod
    def balanced(cls, labels: Any, batch_size: int = 64, *, samples: int | None = None) -> WeightedSampler:
        """Every class equally often, whatever its share of the data; ``labels``: the class of each sample.

        A class is a name or a whole number; raises DataError for other numbers.

        >>> WeightedSampler.balanced(["cat", "dog", "dog"]).weights.tolist()
        [1.0, 0.5, 0.5]
        """
        check_classes(labels, "labels")
        values = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        _, found, counts = np.unique(values, return_inverse=True, return_counts=True)
        return cls(torch.from_numpy(1.0 / counts[found]), batch_size, samples=samples)

    def batches(self, epoch: int, key: int) -> Sequence[Tensor]:
        generator = torch.Generator(device="cpu").manual_seed(seed_from("weighted", key, epoch))
        drawn = torch.rand(self.samples, generator=generator, dtype=torch.float64, device="cpu") * self._sums[-1]
        rows = torch.searchsorted(self._sums, drawn, right=True)  # torch.multinomial takes 2**24 weights at most
        return Planned(Plan(self.samples, self.batch_size), lambda start, stop: rows[start:stop])

    def __repr__(self) -> str:
        return f"WeightedSampler({self.length} weights, batch_size={self.batch_size}, samples={self.samples})"


class BucketSampler:
    """Batches of samples of similar length, each sample once an epoch, so that little is padded.

    ``lengths`` holds the length of each sample (tokens, frames). Samples sorted by length are parted into ``buckets``
    of the same number; each epoch shuffles within the buckets, and the batches among each other. A batch has at
    most ``batch_size`` samples; with ``tokens`` also at most that many tokens with its padding:
    ``samples * longest sample <= tokens``.

    Raises SettingError if neither limit is given or a number is below 1, DataError for a length that is no whole
    number from 0, and for a sample that is longer than ``tokens``.

    >>> sampler = BucketSampler([5, 1, 4, 1, 5, 9, 2, 6], tokens=12, buckets=4)
    >>> sorted(len(batch) for batch in sampler.batches(0, key=1))
    [1, 1, 1, 2, 3]
    """

    def __init__(
        self, lengths: Any, batch_size: int | None = None, *, tokens: int | None = None, buckets: int = 16
    ) -> None:
        if batch_size is None and tokens is None:
            raise SettingError("BucketSampler needs a limit: batch_size=... samples, or tokens=... a batch, or both")
        self.lengths = _whole(_column(lengths, "lengths"))
        self.length = len(self.lengths)
        self.batch_size = None if batch_size is None else _at_least_1("batch_size", batch_size)
        self.tokens = None if tokens is None else _at_least_1("tokens", tokens)
        self.buckets = min(_at_least_1("buckets", buckets), self.length)
        self._sorted = self.lengths.argsort(stable=True)
        if tokens is not None and int(self.lengths.max()) > tokens:
            worst = int(self._sorted[-1])
            raise DataError(
                f"sample {worst} has length {int(self.lengths.max())}, more than tokens={tokens}. Cut the sample, "
                "leave it out, or raise tokens"
            )
        self._parts = [len(part) for part in self._sorted.tensor_split(self.buckets)]
        self._sizes = self._cut()

    def _cut(self) -> list[int]:
        """Sizes of the batches along the sorted samples; the same in each epoch, whoever is where in a bucket."""
        ends = np.cumsum(self._parts)
        lengths = self.lengths[self._sorted].numpy()
        longest = np.repeat(lengths[ends - 1], self._parts)  # that may come at each place
        sizes, start = [], 0
        while start < self.length:
            size = min(self.batch_size or self.length, self.length - start)
            if self.tokens is not None:
                size = min(size, int(self.tokens // max(longest[start], 1)))
                size = int((longest[start : start + size] * np.arange(1, size + 1) <= self.tokens).sum())
            sizes.append(size)
            start += size
        return sizes

    def batches(self, epoch: int, key: int) -> Sequence[Tensor]:
        parts = self._sorted.split(self._parts)
        mixed = [part[shuffled(len(part), key, epoch, "bucket", i)] for i, part in enumerate(parts)]
        batches = torch.cat(mixed).split(self._sizes)
        return [batches[i] for i in shuffled(len(batches), key, epoch).tolist()]

    def __repr__(self) -> str:
        limits = f"batch_size={self.batch_size}, tokens={self.tokens}, buckets={self.buckets}"
        return f"BucketSampler({self.length} lengths, {limits})"


def _column(values: Any, name: str) -> Tensor:
    # through NumPy, which keeps the precision of Python numbers
    found = as_tensors(values if isinstance(values, Tensor) else np.asarray(values), name)
    column: Tensor = (found if isinstance(found, Tensor) else pick(found, torch.arange(len(found)))).cpu()
    if column.dim() != 1 or not len(column):
        raise DataError(f"{name} has shape {tuple(column.shape)}; expected one number for each sample")
    return column


def _whole(lengths: Tensor) -> Tensor:
    wrong = ~((lengths >= 0) & (lengths == lengths.trunc()) & lengths.isfinite())
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise DataError(f"lengths[{first}] is {lengths[first].item()}; expected a whole number from 0 for each sample")
    return lengths.long()


def _at_least_1(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise SettingError(f"{name}={value!r}; expected a whole number of at least 1")
    return value
