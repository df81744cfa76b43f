"""What is known when fetching a batch goes wrong: which batch it was, which samples it holds, and which one raised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["Indices", "add_fetch_note", "fetch_samples", "keep_fetch_note", "place_of"]


_BEGIN = "[loopwright] while fetching "


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


def add_fetch_note(error: BaseException, epoch: int, batch: int, indices: Any = None) -> None:
    """Note on ``error`` where in the data it happened; ``epoch`` and ``batch`` are completed units."""
    note = f"{_BEGIN}{place_of(epoch, batch, indices)}"
    culprit = indices.open() if isinstance(indices, Indices) else None
    if culprit is not None:
        note += f"; it was dataset[{culprit!r}] that raised"
    error.add_note(note)


def keep_fetch_note(error: BaseException) -> None:
    """Note on ``error`` what was noted on it in a worker: torch hands it on as text, and not as a note."""
    for line in str(error).splitlines():
        if line.startswith(_BEGIN):
            error.add_note(line)


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
