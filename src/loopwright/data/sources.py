"""Which adapter reads what the user gave as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from loopwright._compat import is_own_iteration
from loopwright.data.arrays import is_array
from loopwright.data.gather import Gather, is_gatherable
from loopwright.data.held import Held, holder_of
from loopwright.data.iterated import Iterated
from loopwright.data.loader import Loader
from loopwright.data.torch_loader import TorchLoader
from loopwright.data.words import count
from loopwright.errors import DataError
from loopwright.events import describe
from loopwright.state import Source, has_state

__all__ = ["as_source", "as_sources"]

BATCH_SIZE = 64
_EMPTY = "Check the path, the filter or the split that it comes from"
_EXPECTED = (
    "expected a DataLoader, a dataset, arrays (a tensor, NumPy array or data frame, or a tuple or dict of them), "
    "a list of batches, or a generator function of batches"
)
_OF_A_SOURCE = ("at", "sizes", "batches", "exact", "state_dict", "load_state_dict")


def as_source(data: Any, *, train: bool, key: int) -> Source:
    """The source that reads ``data``.

    - a ``DataLoader``: its own batches in its own order;
    - a tensor, NumPy array or data frame, and a **tuple or dict** of them: arrays, whose first dimension counts the
      samples; a dataset likewise. They are read by ``Loader(data, 64, shuffle=train)``;
    - a **list**: ready batches; a range, a function, or any other iterable, likewise;
    - a ``Loader``, or another source, is used as it is.

    ``key`` decides the order of a Loader without a seed. Raises DataError for anything else, for data without a batch,
    and for a DistributedSampler.

    >>> import torch
    >>> source = as_source((torch.zeros(100, 3), torch.zeros(100)), train=True, key=0)
    >>> source.batches, list(source.sizes(0))
    (2, [64, 36])
    """
    source = _adapt(data, train=train, key=key)
    if train and isinstance(data, list) and data and _is_empty(source):
        raise DataError(f"there is not one sample in the {count(len(data), 'batch')} of the list: {_EMPTY}")
    if isinstance(data, list) and len(data) == 2 and _are_columns(*data):
        raise DataError(
            f"{describe(data)} is a list, whose entries are ready batches, and these are two arrays of one length; "
            "arrays go as a tuple: (X, y)"
        )
    if source.batches == 0:
        raise DataError(f"there is not one batch in the data ({_named(data)}): {_why_none(data, source)}")
    return source


def as_sources(data: Any, key: int) -> dict[str, Source]:
    """Evaluation data by name: one source without a name, or those of a dict of loaders.

    >>> import torch
    >>> list(as_sources([torch.ones(2)], key=0)), list(as_sources({"near": [torch.ones(2)]}, key=0))
    ([''], ['near'])
    """
    if data is None:
        return {}
    several = isinstance(data, dict) and data and not any(map(_is_column, data.values()))
    sources: dict[str, Source] = {}
    for name, one in data.items() if several else [("", data)]:
        try:
            sources[name] = as_source(one, train=False, key=key)
        except DataError as error:
            if not name:
                raise
            raise DataError(f"the data {name!r}: {error}") from error
    return sources


def _is_empty(source: Source) -> bool:
    try:
        return not any(source.sizes(0) or (1,))
    except DataError:  # there is no tensor to count by; weight= may know
        return False


def _are_columns(x: Any, y: Any) -> bool:
    """True for inputs and their targets: arrays alike long, that cannot be two batches of the same."""
    if not _is_column(x) or not _is_column(y):
        return False
    first, second = tuple(getattr(x, "shape", ())), tuple(getattr(y, "shape", ()))
    return len(first) != len(second) and first[:1] == second[:1] != (1,)


def _is_column(data: Any) -> bool:
    return is_array(data) and not isinstance(data, (list, tuple, Mapping))


def _adapt(data: Any, *, train: bool, key: int) -> Source:
    if isinstance(data, type):
        raise DataError(f"{data.__name__} is a class; make an instance: {data.__name__}(...)")
    if data is None or isinstance(data, (str, bytes, PurePath, int, float)):
        raise DataError(f"cannot read batches from {data!r}; {_EXPECTED}")
    if isinstance(data, Loader):
        return _held(data.keyed(key), data.data, data.workers)
    if callable(getattr(data, "as_source", None)):  # Mix, limit, epoch_length
        return cast(Source, data.as_source(train=train, key=key))
    lacks = [name for name in _OF_A_SOURCE if not hasattr(data, name)]
    if not lacks:
        return cast(Source, data)
    if isinstance(data, DataLoader):
        return _adapt_loader(data, tells=train)
    if isinstance(data, IterableDataset):
        return _adapt_loader(DataLoader(data, batch_size=BATCH_SIZE), tells=train)
    if isinstance(data, (list, range)):
        return Iterated(data)
    if isinstance(data, Mapping) and any(isinstance(one, (DataLoader, Dataset, Loader)) for one in data.values()):
        raise DataError(
            f"a dict of data sets ({', '.join(map(repr, data))}) is not data to train on; give each its place: "
            "fit(task, train=..., valid=...)"
        )
    if isinstance(data, (Tensor, np.ndarray, tuple, Mapping, Dataset)) or is_array(data) or _is_dataset(data):
        return _held(Loader(data, BATCH_SIZE, shuffle=train).keyed(key), data)
    if callable(data) or isinstance(data, Iterable):
        return Iterated(data, tells=train)
    if callable(getattr(data, "at", None)):
        raise DataError(
            f"{type(data).__name__} has at(epoch, batch), and lacks {', '.join(lacks)} of a loopwright.state.Source; "
            "write them, or pass a generator function of batches, which needs none of them"
        )
    raise DataError(f"cannot read batches from {type(data).__name__} {data!r}; {_EXPECTED}")


def _is_dataset(data: Any) -> bool:
    return hasattr(type(data), "__getitem__") and hasattr(type(data), "__len__")


def _adapt_loader(loader: DataLoader[Any], *, tells: bool) -> Source:
    # evaluation tells no epoch: its dataset may be the one that is being trained on
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        raise DataError(
            "this DataLoader has a DistributedSampler, but every batch is already shared out over the processes. Pass "
            "a loader without it, whose batch_size is that of all processes together: "
            "DataLoader(dataset, batch_size=..., shuffle=True)"
        )
    if has_state(loader):
        return Iterated(loader, tells=tells)
    if isinstance(loader.dataset, IterableDataset):
        return _stream(loader, tells=tells)
    if is_own_iteration(loader):
        return Iterated(loader, why=f"{type(loader).__name__} overrides how a DataLoader is iterated", tells=tells)
    source = Gather(loader) if is_gatherable(loader) else TorchLoader(loader, tells=tells)
    return _held(source, loader.dataset, loader.num_workers)


def _held(source: Source, dataset: Any, workers: int = 0) -> Source:
    holder = holder_of(dataset)
    return source if holder is None else Held(source, holder, workers)


def _stream(loader: DataLoader[Any], *, tells: bool) -> Iterated:
    name, dataset = type(loader.dataset).__name__, loader.dataset
    holds = has_state(dataset)
    if holds and not loader.num_workers:
        return Iterated(loader, holder=dataset, tells=tells)
    lacks = "is read by workers, which do not tell its position" if holds else "has no state_dict and load_state_dict"
    return Iterated(loader, why=f"the IterableDataset {name} {lacks}", tells=tells)


def _named(data: Any) -> str:
    return type(data).__name__ if isinstance(data, (Tensor, np.ndarray, DataLoader, Dataset)) else repr(data)


def _why_none(data: Any, source: Source) -> str:
    planned = getattr(source, "source", source)
    length, size = planned.state_dict().get("length"), getattr(data, "batch_size", None)
    if getattr(data, "drop_last", False) and length:
        return (
            f"drop_last=True leaves nothing of {length} samples in batches of {size}. Use drop_last=False or a "
            f"batch_size of at most {length}"
        )
    return f"it is empty. {_EMPTY}"
