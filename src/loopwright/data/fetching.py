"""What is known when fetching a batch goes wrong: which batch it was, which samples it holds, and which one raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from loopwright import rng
from loopwright.data.generators import Streams, kept
from loopwright.errors import DataError

__all__ = ["Indices", "add_fetch_note", "fetch_samples", "keep_fetch_note", "place_of", "stopped_early"]


_BEGIN = "[loopwright] while fetching "
_FROM_WORKER = "in DataLoader worker process"  # torch's words on an error that a worker hands on
_OF_SIZES = ("stack expects each tensor to be equal size", "resize storage that is not resizable")  # torch's words
_SIZES = (
    "[loopwright] samples of one batch have different sizes: print(lw.data.summary(data)) shows them. Bring them to "
    "one size in the dataset, or pass a collate function that pads them"
)


class Indices(list[Any]):
    """Indices of one batch that remember their iterator, which knows how far a failed ``for`` had come.

    It costs nothing an index, and leaves the dataset as it is.

    >>> batch = Indices([7, 3, 5])
    >>> for i in batch:
    ...     if i == 3: break
    >>> batch.open()
    3
    """

    __slots__ = ("iterator",)  # one is made for each batch

    def __iter__(self) -> Iterator[Any]:
        self.iterator = list.__iter__(self)
        return self.iterator

    def open(self) -> Any:
        """The index that was handed out last, while others were still to come or the end had not been asked for."""
        iterator: Any = getattr(self, "iterator", None)
        if iterator is None:
            return None
        place = iterator.__reduce__()[2:]  # a list's iterator pickles as (iter, (list,), place) until it has ended
        return self[place[0] - 1] if place and place[0] else None


def fetch_samples(dataset: Any, indices: list[Any]) -> Any:
    """The samples of one batch: with one ``__getitems__`` where the dataset has it, as torch does."""
    many = getattr(dataset, "__getitems__", None)
    return many(list(indices)) if many else [dataset[i] for i in indices]


def add_fetch_note(
    error: BaseException, epoch: int, batch: int, indices: Any = None, *, dataset: Any = None, by_worker: bool = False
) -> None:
    """Note on ``error`` where in the data it happened; ``epoch`` and ``batch`` are completed units.

    Of a ``dataset`` whose samples were read out of sight, those of the batch are read again, one by one, for the one
    that raises the same: not if a worker has died of it.
    """
    note = f"{_BEGIN}{place_of(epoch, batch, indices)}"
    culprit = indices.open() if isinstance(indices, Indices) else None
    if culprit is not None:
        note += f"; it was dataset[{culprit!r}] that raised"
    elif dataset is not None and (not by_worker or _FROM_WORKER in str(error)):
        found = _raising(dataset, indices, error)
        note += "" if found is None else f"; read again, it was dataset[{found!r}] that raised"
    error.add_note(note)
    _add_sizes(error)


def _add_sizes(error: BaseException) -> None:
    """Where samples of several sizes cannot become one batch, note how to find them and what to do."""
    if any(words in str(error) for words in _OF_SIZES) and _SIZES not in getattr(error, "__notes__", ()):
        error.add_note(_SIZES)


def stopped_early(stop: StopIteration) -> DataError:
    """In place of a StopIteration of a sample, which a loop over batches would take for the end of its data."""
    error = DataError(
        "a sample raised StopIteration, which would end the epoch as if there were no more data. The dataset, a "
        "transform or the collate function calls next() on an iterator that has ended: give it a default, "
        "next(iterator, None), or begin the iterator anew"
    )
    error.add_note(stop.__notes__[-1])
    return error


def _raising(dataset: Any, indices: Any, error: BaseException) -> Any:
    """The first of ``indices`` whose sample raises an error of the type of ``error``; no generator moves."""
    if not isinstance(indices, (list, tuple)) or isinstance(error, MemoryError):
        return None
    with rng.forked(), kept(Streams({"dataset": dataset}).find().values()):
        for i in indices:
            try:
                dataset[i]
            except Exception as again:  # the first error is the one that is told
                if type(again) is type(error) or f"Caught {type(again).__name__} {_FROM_WORKER}" in str(error):
                    return i
    return None


def keep_fetch_note(error: BaseException, place: Callable[[], str]) -> None:
    """Note on ``error`` what was noted on it in a worker: torch hands it on as text, and not as a note.

    Of one that came from a worker, and on which nothing was noted there, its ``place``.
    """
    text = str(error)
    found = {line: None for line in text.splitlines() if line.startswith(_BEGIN)}  # each once: errors have causes
    for line in found or ([f"{_BEGIN}{place()}"] if _FROM_WORKER in text else []):
        error.add_note(line)
    _add_sizes(error)


def place_of(epoch: int, batch: int, indices: Any = None) -> str:
    """Words for a batch and what it holds.

    >>> place_of(0, 4, [7, 3])
    'batch 5 of epoch 1, dataset indices [7, 3]'
    """
    return f"batch {batch + 1} of epoch {epoch + 1}" + (
        "" if indices is None else f", dataset indices {_shown(indices)}"
    )


def _shown(indices: Any) -> str:
    text = repr(indices)
    return text if len(text) <= 400 else f"{text[:397]}..."
