"""What a worker process sends back: an error or a batch that cannot be sent would be lost, and waited for for ever."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from operator import getitem
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import get_worker_info

from loopwright.errors import DataError
from loopwright.events import describe

__all__ = ["SentDataset", "Sendable", "sent"]

_PLAIN = {Tensor, np.ndarray, str, bytes, int, float, bool, complex, type(None)}


def sent(read: Callable[..., Any], *arguments: Any, what: str) -> Any:
    """``read(*arguments)`` in a worker; an error of a class that cannot be sent is told by one that can.

    Its text begins with ``what`` (which may have the last of the ``arguments`` in it), type and message; torch adds
    the traceback of both.

    >>> class Odd(Exception):
    ...     "Of a class that no other process finds."
    >>> Odd.__qualname__ = "made.<locals>.Odd"
    >>> def fails(i): raise Odd(f"no sample {i}")
    >>> sent(fails, 3, what="dataset[{}]")
    Traceback (most recent call last):
    loopwright.errors.DataError: dataset[3] raised made.<locals>.Odd: no sample 3
    """
    try:
        return read(*arguments)
    except Exception as error:
        if _can_be_sent(type(error)):
            raise
        raise DataError(f"{what.format(*arguments[-1:])} raised {type(error).__qualname__}: {error}") from error


def _can_be_sent(kind: type) -> bool:
    """True if another process finds the class; torch sends an error as its class and its text."""
    try:
        ForkingPickler.dumps(kind)
    except Exception:  # whatever pickle says of it
        return False
    return True


class SentDataset:
    """Stands in for a dataset in worker processes: gives its samples, and ``sent`` errors.

    >>> SentDataset("abc")[1]
    'b'
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = self._many  # torch looks whether it is there

    def __getitem__(self, i: Any) -> Any:
        return sent(getitem, self.dataset, i, what="dataset[{}]")

    def _many(self, indices: list[Any]) -> Any:
        return sent(self.dataset.__getitems__, indices, what="dataset.__getitems__({})")

    def __len__(self) -> int:
        return len(self.dataset)

    def step_aside(self) -> None:
        """In a worker: let ``get_worker_info().dataset`` be the dataset itself."""
        object.__setattr__(get_worker_info(), "dataset", self.dataset)  # which says that it cannot be changed


class Sendable:
    """Checks what a worker is about to send: of each type that is not known to be sent, the first one.

    >>> check = Sendable()
    >>> check({"x": 1, "names": ["a"]})
    >>> check({"x": 1, "open": (i for i in range(3))})
    Traceback (most recent call last):
    loopwright.errors.DataError: batch['open'] (generator) cannot be sent from a worker process: cannot pickle
    'generator' object. Return tensors, arrays, numbers and texts from the dataset or the collate function, or read
    without workers
    """

    def __init__(self) -> None:
        self._known = set(_PLAIN)

    def __call__(self, value: Any, path: str = "batch") -> None:
        """Raise DataError with the path of what cannot be sent."""
        kind = type(value)
        if kind in self._known:
            return
        if kind in (list, tuple):
            for i, part in enumerate(value):
                if type(part) not in self._known:
                    self(part, f"{path}[{i}]")
        elif kind is dict:
            for key, part in value.items():
                if type(part) not in self._known:
                    self(part, f"{path}[{key!r}]")
        else:
            self._try(value, path)
            self._known.add(kind)

    def _try(self, value: Any, path: str) -> None:
        try:
            ForkingPickler.dumps(value)  # as the queue does, to which torch has taught tensors
        except Exception as error:
            raise DataError(
                f"{path} ({describe(value)}) cannot be sent from a worker process: {error}. Return tensors, arrays, "
                "numbers and texts from the dataset or the collate function, or read without workers"
            ) from error
