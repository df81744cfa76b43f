"""The order of a user's own sampler: noted while it is used, and taken up again in the middle."""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from loopwright.data.fetching import Indices
from loopwright.data.generators import Streams, get_globals
from loopwright.data.share import Cut, Part
from loopwright.errors import DataError
from loopwright.state import has_state

__all__ = ["Order"]

_KNOWN = {BatchSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler}
_GATHERED = 1024  # indices that are digested at a time: one by one it takes ten times as long
_WATCHED = 4  # batches of an unknown sampler during which the generators are compared


class Order:
    """Stands in for the index sampler of a DataLoader: gives the same indices, with the same draws at the same moments.

    The generators are noted when the sampler is opened and when it is first asked (samplers draw at either), so that
    ``seek`` can run it again to any batch. ``used`` is told by the loader for every batch that arrived and keeps a
    digest of the indices, by which ``seek`` sees whether the sampler has repeated itself.
    """

    def __init__(self, sampler: Any, streams: Streams, *, ahead: bool, mark: bool) -> None:
        self.sampler, self.streams, self.ahead, self.mark = sampler, streams, ahead, mark
        self.cut: Cut | None = None  # the part of this rank, among several
        self.draws = False  # seen to draw from the global generators while it yields
        inner = getattr(sampler, "sampler", None)
        self._unknown = type(sampler) not in _KNOWN or not (inner is None or type(inner) in _KNOWN)
        self.name = type(inner if type(sampler) is BatchSampler else sampler).__name__
        self._watched = _WATCHED if self._unknown else 0
        self.reset()

    def reset(self) -> None:
        """Forget what is on its way: a new epoch begins."""
        self.pending: deque[Any] = deque()
        self.whole: deque[tuple[int, Any]] = deque()  # the same of all ranks, with the number of the batch
        self._digest, self._taken = 0, list[Any]()
        self.made: dict[str, Any] | None = None  # the generators when torch draws the seed of new workers
        self._note: dict[str, Any] = {}
        self._next: Callable[[], Iterator[Any]] | None = None  # in place of opening the sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        return self._opened() if self._next is None else self._next()

    def silence(self) -> None:
        """Give nothing until ``reset``: a worker iterator can then be made without sending it work."""
        self._next = lambda: iter(())

    def _opened(self) -> Iterator[Any]:
        self._note = {"opened": self.streams.get() if self._unknown else None, "sampler": _state_of(self.sampler)}
        indices = iter(self.sampler)
        if self.ahead and self.made is None:
            self.made = self.streams.get()
        return self._start(indices)

    def _start(self, indices: Iterator[Any]) -> Iterator[Any]:
        self._note["started"] = self.streams.get(only_torch=not self._unknown)
        watched, self._watched = self._watched, 0
        yield from self._follow(indices, watched)

    def _follow(self, indices: Iterator[Any], watched: int = 0, given: int = 0) -> Iterator[Any]:
        for number in range(watched):
            before = get_globals() if number else None  # the first may draw the whole order
            try:
                index = next(indices)
            except StopIteration:
                return
            if before is not None and get_globals() != before:
                self.draws = True
            if self.cut is None:
                yield self._sent(index)
            else:
                yield from self._shared(index, given + number)
        if self.cut is None:
            for index in indices:
                yield self._sent(index)
            return
        for number, index in enumerate(indices, given + watched):
            yield from self._shared(index, number)

    def _shared(self, index: Any, number: int) -> Iterator[Any]:
        """This rank's part of a batch, if it has any."""
        assert self.cut is not None
        self.whole.append((number, index))
        mine = _part(index, self.cut, number)
        if mine is not None:
            yield self._sent(mine)

    def _sent(self, index: Any) -> Any:
        if self.mark and type(index) is list:
            index = Indices(index)
        self.pending.append(index)
        return index

    def used(self) -> None:
        """A batch has arrived: its indices are no longer on their way."""
        self._take(self.pending.popleft())

    def parts(self, item: Any = None, *, ended: bool = False) -> Iterator[Part]:
        """With several ranks: ``item`` has arrived, after batches that this one leaves out; or the data has ended."""
        assert self.cut is not None
        while self.whole:
            number, index = self.whole[0]
            left_out = self.cut.whole and self.cut.rows(index, number) is None
            if ended and not left_out:
                return
            self.whole.popleft()
            self._take(index)
            if left_out:
                yield Part(None, 0)
                continue
            self.pending.popleft()
            if isinstance(index, (list, tuple)) or self.cut.whole:
                yield self.cut.given(item, _length(index), number)
            else:
                yield self.cut.part(item, number)
            return

    @property
    def digest(self) -> int:
        """Stands for all indices that have been used in this epoch."""
        return self._fold()

    def _take(self, index: Any) -> None:
        if isinstance(index, (list, tuple)):
            self._taken += index  # not kept themselves: a sampler may fill one list again and again
            if len(self._taken) < _GATHERED:
                return
        else:
            self._taken.append(index)
        self._fold()

    def _fold(self) -> int:
        """The digest of all that was taken; it does not depend on how much was folded at a time."""
        self._digest = zlib.crc32(_raw(self._taken), self._digest)
        self._taken.clear()
        return self._digest

    def state_dict(self) -> dict[str, Any]:
        return {**self._note, "digest": None if self.draws else self._fold(), "now": _state_of(self.sampler)}

    def seek(self, state: Mapping[str, Any], batch: int) -> Iterator[Any]:
        """The indices after the first ``batch`` batches, from the sampler run again from its noted start.

        Leaves the generators moved. Raises DataError if it ends too soon, or gives other indices than it gave.
        """
        self.reset()
        self._note = {name: state[name] for name in ("opened", "started", "sampler")}
        _load_state(self.sampler, state["sampler"])
        if state["opened"] is not None:
            self.streams.set(state["opened"])
        indices = iter(self.sampler)
        self.streams.set(state["started"])
        for number in range(batch):
            try:
                self._take(next(indices))
            except StopIteration:
                self._refuse(f"ended after {number} batches, before the {batch} of the saved position")
        if state["digest"] not in (None, self._fold()):
            self._refuse(f"gave other indices for the first {batch} batches than in the saved run")
        return self._follow(indices, given=batch)

    def hand_out(self, indices: Iterator[Any]) -> None:
        """Let the next ``iter`` give ``indices``."""
        self._next = lambda: indices

    def renew(self, state: Mapping[str, Any]) -> None:
        """Put the sampler where it was when ``state`` was taken, to begin a new epoch there."""
        _load_state(self.sampler, state["now"])

    def _refuse(self, what: str) -> NoReturn:
        raise DataError(
            f"cannot resume: the sampler {self.name} {what}, so its order depends on more than the "
            "random generators. Give it set_epoch(epoch), or state_dict() and load_state_dict(state), or use "
            "lw.Loader(dataset, shuffle=True)"
        )

    def skip(self, batch: int) -> None:
        """Leave out the first ``batch`` batches of the next pass without loading them."""

        def skipping() -> Iterator[Any]:
            indices = self._opened()
            for _ in range(batch):
                next(indices, None)
                if self.pending:
                    self.used()
            yield from indices

        self._next = skipping


def _state_of(sampler: Any) -> Any:
    if has_state(sampler):
        return sampler.state_dict()
    inner = getattr(sampler, "sampler", None)  # a batch sampler around one that has a state
    return None if inner is None else _state_of(inner)


def _load_state(sampler: Any, state: Any) -> None:
    if state is not None and hasattr(sampler, "load_state_dict"):
        sampler.load_state_dict(state)
    elif state is not None:
        _load_state(sampler.sampler, state)


def _length(index: Any) -> int:
    return len(index) if isinstance(index, (list, tuple)) else 1


def _part(index: Any, cut: Cut, number: int) -> Any:
    """What this rank reads of a batch: at least a sample of what it has to train on, which is not much to drop."""
    if not isinstance(index, (list, tuple)) and not cut.whole:
        return index  # one sample that is a batch: read whole, and sliced
    mine = cut.rows(index, number)
    return index[:1] if mine is None and not cut.whole else mine


def _raw(indices: list[Any]) -> bytes:
    """Bytes that stand for indices, the same in every process."""
    try:
        return struct.pack(f"{len(indices)}q", *indices)
    except (TypeError, struct.error):  # keys that are not integers
        if len(indices) == 1:
            return repr(indices[0]).encode()
        return b"".join(_raw([index]) for index in indices)
