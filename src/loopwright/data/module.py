"""Data as one object: how it is got, split and loaded, apart from any model."""

from __future__ import annotations

from inspect import signature
from typing import Any

from loopwright.errors import DataError, SettingError, choose
from loopwright.state import Comm

__all__ = ["DataModule", "data_of", "opened"]

KINDS = ("train", "valid", "test", "predict")


class DataModule:
    """Base class for data that belongs together; hand an instance to ``fit``, ``test`` or ``predict``.

    The methods that return data may return anything that ``fit`` takes as data: a DataLoader, a dataset, arrays, a
    list of batches. Override those that you need.

    >>> import torch
    >>> class Squares(DataModule):
    ...     def setup(self):
    ...         self.x = torch.linspace(-1, 1, 20)[:, None]
    ...     def train_data(self):
    ...         return self.x, self.x**2
    >>> squares = Squares(); squares.setup()
    >>> len(squares.train_data())
    2
    """

    def prepare_data(self) -> None:
        """Download and convert, once: called in the first process only. Attributes set here reach no other process."""

    def setup(self) -> None:
        """Read and split: called in every process, after ``prepare_data`` and before the data is asked for."""

    def train_data(self) -> Any:
        """What to train on."""
        return None

    def valid_data(self) -> Any:
        """What to validate on during training; None for nothing."""
        return None

    def test_data(self) -> Any:
        """What ``trainer.test`` measures."""
        return None

    def predict_data(self) -> Any:
        """What ``trainer.predict`` reads."""
        return None


def opened(data: Any, kind: str, comm: Comm) -> Any:
    """``data`` itself, or that of a DataModule, which rank 0 prepares and every rank sets up for it.

    >>> from loopwright.parallel import Single
    >>> opened([1, 2], "train", Single())
    [1, 2]
    """
    if not isinstance(data, DataModule):
        return data
    for method in (data.prepare_data, data.setup):
        try:
            signature(method).bind()
        except TypeError as error:
            who = f"{type(data).__name__}.{method.__name__}"
            raise SettingError(
                f"{who}() is called without arguments: {error}; write: def {method.__name__}(self)"
            ) from None
    comm.first(data.prepare_data)
    data.setup()
    return data_of(data, kind)


def data_of(module: DataModule, kind: str) -> Any:
    """The module's data for "train", "valid", "test" or "predict".

    Raises DataError if there is none and it is needed: only validation may have none.

    >>> data_of(DataModule(), "valid") is None
    True
    """
    if kind not in KINDS:
        raise SettingError(f"unknown kind of data {kind!r}. {choose(kind, KINDS)}")
    data = getattr(module, f"{kind}_data")()
    if data is None and kind != "valid":
        raise DataError(
            f"{type(module).__name__}.{kind}_data() gave None; define it: def {kind}_data(self): return loader"
        )
    return data
