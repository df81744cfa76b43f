"""Epochs of another length than the data has: the first part of each, or a number of batches that goes on and on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate, islice
from typing import Any

from loopwright.data.fingerprint import fingerprint
from loopwright.data.held import close, streams_of
from loopwright.data.plan import check_state
from loopwright.data.sources import as_source
from loopwright.errors import DataError, SettingError
from loopwright.state import Source

__all__ = ["EpochLength", "Limit", "epoch_length", "limit"]


def limit(data: Any, *, batches: int | None = None, samples: int | None = None, fraction: float | None = None) -> Limit:
    """``data`` with only the first batches of every epoch, in the order of the epoch.

    Give one of ``batches``; ``samples``: as many whole batches as are needed for so many; ``fraction`` of its
    batches, rounded up. Shuffled data gives others in each epoch; for always the same take a part of the data itself,
    as in ``x[:1000]``. Hand the result to ``fit``. Raises SettingError unless exactly one is given.

    >>> list(limit([1, 2, 3, 4, 5], fraction=0.5).as_source(train=True, key=0).at(0, 0))
    [1, 2, 3]
    """
    given = {k: v for k, v in {"batches": batches, "samples": samples, "fraction": fraction}.items() if v is not None}
    if len(given) != 1:
        raise SettingError(f"limit takes one of batches=, samples= and fraction=; got {given or 'none'}")
    name, value = next(iter(given.items()))
    whole = type(value) is int and value > 0
    if not (whole if name != "fraction" else isinstance(value, (int, float)) and 0 < value <= 1):
        expected = "a number above 0, at most 1" if name == "fraction" else "a whole number from 1"
        raise SettingError(f"{name}={value!r}; expected {expected}")
    return Limit(data, name, value)


def epoch_length(data: Any, batches: int) -> EpochLength:
    """``data`` in epochs of ``batches`` batches, each of which goes on where the one before has ended.

    For data without an end, or with too long or too short a one: when it ends it begins again, with its next own
    epoch. Hand the result to ``fit``. Raises SettingError if ``batches`` is not a whole number from 1.

    >>> source = epoch_length([1, 2, 3], 2).as_source(train=True, key=0)
    >>> [list(source.at(epoch, 0)) for epoch in range(3)]
    [[1, 2], [3, 1], [2, 3]]
    """
    if type(batches) is not int or batches < 1:
        raise SettingError(f"batches={batches!r}; expected a whole number from 1")
    return EpochLength(data, batches)


class Limit:
    """What ``limit`` returns; ``fit`` makes a source of it."""

    def __init__(self, data: Any, unit: str, value: float) -> None:
        self.data, self.unit, self.value = data, unit, value

    def as_source(self, *, train: bool, key: int) -> Limited:
        """What ``fit`` and the evaluations read; raises DataError where the data does not tell how long it is."""
        source = as_source(self.data, train=train, key=key)
        return Limited(source, self._count(source))

    def _count(self, source: Source) -> int:
        if self.unit == "batches":
            return int(self.value)
        if self.unit == "fraction" and source.batches is not None:
            return math.ceil(self.value * source.batches)
        sizes = source.sizes(0) if self.unit == "samples" else None
        if sizes is None:
            raise DataError(
                f"limit({self.unit}={self.value:g}) needs data whose batches can be counted before they are read; "
                "write limit(data, batches=...)"
            )
        return 1 + sum(1 for total in accumulate(sizes) if total < self.value)

    def fingerprint(self) -> dict[str, Any]:
        return {"limit": f"{self.value:g} {self.unit}"} | fingerprint(self.data)


class Limited:
    """The source of the first ``count`` batches of every epoch."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.count = source, count
        self.streams = streams_of(source)

    @property
    def batches(self) -> int:
        known = self.source.batches
        return self.count if known is None else min(self.count, known)

    @property
    def exact(self) -> list[str]:
        return self.source.exact

    @property
    def waited(self) -> float:
        return float(getattr(self.source, "waited", 0.0))

    def sizes(self, batch: int) -> Iterator[int] | None:
        sizes = self.source.sizes(batch)
        return None if sizes is None else islice(sizes, max(0, self.count - batch))

    def state_dict(self) -> dict[str, Any]:
        return {"limit": self.count, "source": self.source.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if the limit or the data differ from those of the saved run."""
        check_state({"limit": self.count}, state)
        self.source.load_state_dict(state["source"])

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        return self._batches(self.source.at(epoch, batch), self.count - batch)

    def _batches(self, iterator: Iterator[Any], left: int) -> Iterator[Any]:
        try:
            yield from islice(iterator, left)
        finally:
            close(iterator)

    def close(self) -> None:
        close(self.source)


class EpochLength:
    """What ``epoch_length`` returns; ``fit`` makes a source of it."""

    def __init__(self, data: Any, batches: int) -> None:
        self.data, self.batches = data, batches

    def as_source(self, *, train: bool, key: int) -> Lengthened:
        """What ``fit`` and the evaluations read."""
        return Lengthened(as_source(self.data, train=train, key=key), self.batches)

    def fingerprint(self) -> dict[str, Any]:
        return {"epoch_length": self.batches} | fingerprint(self.data)


class Lengthened:
    """The source of epochs of ``batches`` batches; ``source`` stays open from one to the next."""

    def __init__(self, source: Source, batches: int) -> None:
        self.source, self.batches = source, batches
        self.streams = streams_of(source)
        self._total = 0  # batches given
        self._pass, self._given = 0, 0  # the epoch of the data itself, and what it has given of it
        self._running: Iterator[Any] | None = None
        self._loaded: Mapping[str, Any] | None = None

    @property
    def exact(self) -> list[str]:
        return self.source.exact

    @property
    def waited(self) -> float:
        return float(getattr(self.source, "waited", 0.0))

    def sizes(self, batch: int) -> Iterator[int] | None:
        """None: they differ from epoch to epoch."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch_length": self.batches,
            "total": self._total,
            "pass": self._pass,
            "given": self._given,
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if the length or the data differ from those of the saved run."""
        check_state({"epoch_length": self.batches}, state)
        self.source.load_state_dict(state["source"])
        self._loaded = state

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        state, self._loaded, total = self._loaded, None, epoch * self.batches + batch
        if state is not None and state["total"] == total:
            self._shut()
            self._pass, self._given = state["pass"], state["given"]
        elif total != self._total:
            self._shut()
            known = self.source.batches
            self._pass, self._given = divmod(total, known) if known else (0, total)
        self._total = total
        if self._given and self._running is None:
            self._running = self.source.at(self._pass, self._given)
        return self._batches(self.batches - batch)

    def _batches(self, left: int) -> Iterator[Any]:
        try:
            for _ in range(left):
                yield self._next()
        except BaseException:  # closed in the middle, too: nothing may be left running
            self._shut()
            raise

    def _next(self) -> Any:
        while True:
            if self._running is None:
                self._running = self.source.at(self._pass, self._given)
            for item in self._running:
                self._given += 1
                self._total += 1
                return item
            if not self._given:
                raise DataError(
                    f"the data gave no batch in its epoch {self._pass + 1}; is it an iterator that is used up?"
                )
            self._running, self._pass, self._given = None, self._pass + 1, 0

    def _shut(self) -> None:
        running, self._running = self._running, None
        close(running)

    def close(self) -> None:
        self._shut()
        close(self.source)
