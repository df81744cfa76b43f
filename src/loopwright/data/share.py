"""Which part of each batch a rank reads: a slice of it in training, every so many-th whole batch in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from loopwright.data.batch import samples
from loopwright.data.generators import Streams
from loopwright.data.held import close, streams_of
from loopwright.errors import DataError
from loopwright.events import describe
from loopwright.state import Source

__all__ = ["Cut", "Part", "shared"]


class Part(NamedTuple):
    """What a rank has of a batch: ``batch`` is None where that is nothing; ``size`` samples are in the whole batch.

    ``spare``: the batch is not its own, but something to compute on while the others do.
    """

    batch: Any
    size: int
    spare: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """The part of ``rank`` among ``world`` ranks: a contiguous slice, or with ``whole`` every ``world``-th batch.

    Slices differ by one sample at most; those of a batch smaller than ``world`` are empty for some ranks. ``fills``
    gives these a sample that others have as well; of whole batches each rank gets one of the first at least.

    >>> [Cut(rank, 3).rows([10, 11, 12, 13], number=0) for rank in range(3)]
    [[10], [11], [12, 13]]
    >>> [Cut(rank, 2, whole=True).rows([10, 11], number=5) for rank in range(2)]
    [None, [10, 11]]
    """

    rank: int
    world: int
    whole: bool = False
    fills: bool = False

    def bounds(self, size: int) -> tuple[int, int]:
        """First and one past the last position of this rank's slice of a batch of ``size``."""
        return size * self.rank // self.world, size * (self.rank + 1) // self.world

    def has(self, size: int, number: int) -> bool:
        """True if this rank has a part of its own in batch ``number``, of ``size`` samples."""
        low, high = self.bounds(size)
        return number % self.world == self.rank if self.whole else high > low

    def rows(self, indices: Any, number: int) -> Any:
        """What this rank reads of the ``indices`` of batch ``number``; None if that is nothing."""
        if self.whole:
            mine = self.has(0, number) or (self.fills and number == 0)
            return indices if mine else None
        low, high = self.bounds(len(indices))
        return indices[low:high] if high > low else indices[:1] if self.fills else None

    def given(self, item: Any, size: int, number: int) -> Part:
        """What was read of batch ``number``, None for nothing, as a part."""
        mine = self.has(size, number)
        return Part(item if mine or self.fills else None, size, item is not None and not mine and self.fills)

    def part(self, batch: Any, number: int) -> Part:
        """This rank's part of a batch that was read whole. Raises DataError where it cannot be sliced."""
        if self.whole:
            return self.given(None if self.rows((), number) is None else batch, 0, number)
        size = samples(batch)
        low, high = self.bounds(size)
        if high == low and self.fills and size:
            low, high = 0, 1
        return self.given(_sliced(batch, low, high, size) if high > low else None, size, number)


def shared(source: Source, cut: Cut) -> Source:
    """``source``, whose ``at`` gives a ``Part`` for each batch from now on.

    Our own sources read their part only. Others are read whole on every rank, and sliced.

    >>> import torch
    >>> from loopwright.data import as_source
    >>> source = shared(as_source([torch.arange(5)], train=True, key=0), Cut(1, 2))
    >>> [(part.batch.tolist(), part.size) for part in source.at(0, 0)]
    [([2, 3, 4], 5)]
    """
    inner: Any = source
    while hasattr(inner, "source"):  # a limit, a dataset with a state: they pass on what they are given
        inner = inner.source
    if hasattr(inner, "cut"):
        inner.cut = cut
        return source
    return Shared(source, cut)


class Shared:
    """A source of which every rank reads all, and gives its part."""

    def __init__(self, source: Source, cut: Cut) -> None:
        self.source, self.cut = source, cut

    @property
    def streams(self) -> Streams:
        return streams_of(self.source)

    @property
    def waited(self) -> float:
        return getattr(self.source, "waited", 0.0)

    @property
    def batches(self) -> int | None:
        return self.source.batches

    @property
    def exact(self) -> list[str]:
        return self.source.exact

    def sizes(self, batch: int) -> Iterator[int] | None:
        return self.source.sizes(batch)

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state)

    def at(self, epoch: int, batch: int) -> Iterator[Part]:
        batches = self.source.at(epoch, batch)
        try:
            for number, one in enumerate(batches, batch):
                yield self.cut.part(one, number)
        finally:
            close(batches)

    def close(self) -> None:
        close(self.source)


def _sliced(value: Any, low: int, high: int, size: int) -> Any:
    """Every array of ``size`` entries in a nested batch, and every list of as many numbers or texts, cut."""
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim and len(value) != size:
            raise DataError(
                f"a batch of {size} samples cannot be shared out over the ranks: {describe(value)} in it has another "
                "first dimension. Give every rank its own part of the data, or let the model make what is not by sample"
            )
        return value[low:high] if value.ndim else value
    if isinstance(value, Mapping):
        return type(value)({k: _sliced(v, low, high, size) for k, v in value.items()})  # type: ignore[call-arg]
    if isinstance(value, (list, tuple)):
        plain = not any(isinstance(v, (Tensor, np.ndarray, Mapping, list, tuple)) for v in value)
        if plain and len(value) == size:
            return value[low:high]
        parts = [_sliced(v, low, high, size) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
