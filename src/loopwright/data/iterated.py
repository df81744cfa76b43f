"""Any other iterable of batches: a list, a generator function, a stream that keeps its own position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, repeat
from time import perf_counter
from typing import Any

from torch.utils.data import DataLoader

from loopwright import rng
from loopwright._compat import has_ended, stop_workers
from loopwright.data.batch import samples
from loopwright.data.fetching import add_fetch_note
from loopwright.data.generators import Streams, get_globals, set_globals
from loopwright.data.plan import check_state
from loopwright.errors import DataError
from loopwright.state import has_state

__all__ = ["Iterated", "planned_sizes"]


class Iterated:
    """A source over batches that are simply iterated, once an epoch.

    ``data`` is a list, tuple or range of batches, any iterable, or a function without arguments that returns one (a
    generator function is called anew each epoch). An iterator is good for one epoch: DataError at the second.
    ``holder`` has ``state_dict`` and ``load_state_dict`` and knows its position; it is ``data`` where that has them.
    Without one, a resume reads again what was seen, starting from the random state in which the epoch began: exact for
    lists, and for streams that always give the same; ``exact`` says so, or ``why`` in its place. What has
    ``set_epoch`` is told the epoch, unless ``tells`` is False.

    >>> list(Iterated([10, 20, 30]).at(0, 1))
    [20, 30]
    """

    def __init__(
        self,
        data: Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        holder: Any = None,
        why: str | None = None,
        tells: bool = True,
    ) -> None:
        self.data: Any = data
        self.why, self.tells = why, tells
        self.holder: Any = data if holder is None and has_state(data) else holder
        self._listed = isinstance(data, (list, tuple, range))
        self.streams = Streams({} if self._listed else {"data": getattr(data, "__self__", data)})
        self._used = self._ended = self._opened = False
        self._running: Any = None
        self._at = (0, 0)
        self.waited = 0.0  # seconds, for batches
        self._made: dict[str, Any] | None = None
        self._loaded: Mapping[str, Any] | None = None

    @property
    def batches(self) -> int | None:
        try:
            return len(self.data)
        except (TypeError, NotImplementedError):
            return None

    @property
    def exact(self) -> list[str]:
        if self._listed or self.holder is not None:
            kind, workers = type(self.data).__name__, getattr(self.data, "num_workers", 0)
            return [f"the workers of {kind} keep no random state that can be saved"] if workers else []
        name = getattr(self.data, "__qualname__", type(self.data).__name__)
        return [
            self.why
            or f"{name} has no position to save, as an iterable with state_dict and load_state_dict has; a resume "
            "reads it again from the start of the epoch"
        ]

    def sizes(self, batch: int) -> Iterator[int] | None:
        return map(samples, self.data[batch:]) if self._listed else None

    def state_dict(self) -> dict[str, Any]:
        own: dict[str, Any] = {"batches": self.batches if self._listed else None}
        if self.holder is not None:  # the others can go to any batch
            own |= {"epoch": self._at[0], "batch": self._at[1]}
        if self._loaded is not None:
            return dict(self._loaded)  # nothing has been read since
        held = generators = None
        if self.holder is not None and self._opened:  # torchdata's would begin to read, and draw, if asked before
            held, generators = self.holder.state_dict(), self.streams.get_found()
        ended = self._ended or has_ended(self._running)
        return {**own, "held": held, "generators": generators, "made": self._made, "ended": ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError if a list of batches has another length than in the saved run."""
        check_state({"batches": self.batches if self._listed else None}, state)
        self._loaded = state

    def at(self, epoch: int, batch: int) -> Iterator[Any]:
        """Raises DataError if there are fewer than ``batch`` batches, or an iterator is used up."""
        state, self._loaded = self._loaded, None
        if self._listed:
            return iter(self.data[batch:])
        held, found = (None, {}) if state is None else (state["held"], state.get("generators") or {})
        if held is not None:
            self.holder.load_state_dict(held)
            self._opened = True
        elif state is None and self.holder is None and batch and (epoch, batch) == self._at and self._is_iterator:
            return self._batches(self.data, epoch, batch)  # it stands where it was left
        self._at, self._ended = (epoch, batch), state is not None and state["ended"]
        if held is not None and (self._ended or not batch):
            self._pass_over()
            self.streams.set_found(found)
        if batch and self._ended:
            return self._batches(iter(()), epoch, batch)
        if not batch:
            self._made = get_globals()
            return self._batches(self._open(epoch), epoch, batch)
        with rng.forked():
            if state is not None:
                self._made = state["made"]
            if self.holder is None and self._made is not None:
                set_globals(self._made)
            iterator = self._skip(self._open(epoch), 0 if self.holder else batch)
            if held is not None:
                self.streams.set_found(found)  # a loader draws more from its own than it saves
        return self._batches(iterator, epoch, batch)

    def _pass_over(self) -> None:
        """Where a loader puts its loaded state into the next iterator, as torchdata's does, that one is not wanted."""
        if getattr(self.data, "next_iter_state", None) is not None:
            with rng.forked():
                iterator = iter(self.data)
            if self.data.num_workers and not self.data.persistent_workers:
                stop_workers(iterator)

    @property
    def _is_iterator(self) -> bool:
        return isinstance(self.data, Iterator)

    def _open(self, epoch: int) -> Iterator[Any]:
        self._opened = True
        tell = getattr(getattr(self.data, "dataset", self.data), "set_epoch", None)
        if self.tells and callable(tell):
            tell(epoch)
        made = self.data() if callable(self.data) and not isinstance(self.data, Iterable) else self.data
        if not isinstance(made, Iterable) and not hasattr(made, "__getitem__"):
            raise DataError(
                f"{self.data!r} returned {type(made).__name__}; expected batches to iterate. Write it as a generator "
                "function: def batches(): ... yield batch"
            )
        return iter(made)

    def _skip(self, iterator: Iterator[Any], batch: int) -> Iterator[Any]:
        seen = sum(1 for _ in islice(iterator, batch))
        if seen < batch:
            raise DataError(
                f"cannot resume at batch {batch}: the data ended after {seen} batches. It must give at least as many "
                "as in the saved run"
            )
        return iterator

    def _batches(self, iterator: Iterator[Any], epoch: int, batch: int) -> Iterator[Any]:
        self._at, self._running, self._ended, first = (epoch, batch), iterator, False, batch
        try:
            while True:
                began = perf_counter()
                try:
                    item = next(iterator)
                except StopIteration:
                    break
                except Exception as error:
                    add_fetch_note(error, epoch, batch)
                    raise
                batch += 1
                self.waited += perf_counter() - began
                self._at, self._used = (epoch, batch), True
                yield item
                del item
        finally:
            self._ended, self._running = has_ended(iterator), None
            if hasattr(iterator, "close") and not self._is_iterator:
                iterator.close()  # a generator's own finally runs now
            elif isinstance(self.data, DataLoader) and self.data.num_workers and not self.data.persistent_workers:
                stop_workers(iterator)
        if batch == first and self._used and self._is_iterator:
            raise DataError(
                f"the iterator {type(self.data).__name__} was used up in an earlier epoch. Pass a list of batches, or "
                "a generator function (the function itself, not its result), which can be started anew each epoch"
            )


def planned_sizes(source: Any, batch: int) -> Iterator[int | None]:
    """Samples that the plan of ``source`` has in each batch from ``batch`` on; None where only the batches tell."""
    told = None if isinstance(source, Iterated) else source.sizes(batch)
    return repeat(None) if told is None else iter(told)
