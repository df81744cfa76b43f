"""Data that is split: what can be counted, how rows of it are taken, and what is said of all else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from loopwright.data.arrays import is_array, mapped
from loopwright.data.loader import Loader
from loopwright.data.picked import is_sparse
from loopwright.data.tables import is_arrow, is_table
from loopwright.data.words import count
from loopwright.errors import DataError

__all__ = ["Index", "by_rows", "length", "parts"]

Index = np.ndarray[Any, np.dtype[np.intp]]


def parts(data: Any, chosen: Index, n: int) -> tuple[Any, Any]:
    """Of ``n`` samples all but those that were ``chosen``, and those.

    >>> parts(np.arange(4), np.array([2]), 4)
    (array([0, 1, 3]), array([2]))
    """
    kept = np.ones(n, bool)
    kept[chosen] = False
    train, valid = np.flatnonzero(kept), np.flatnonzero(~kept)
    if isinstance(data, list):
        return [data[i] for i in train], [data[i] for i in valid]
    if is_array(data):
        return _taken(data, train), _taken(data, valid)
    select: Callable[[list[int]], Any] = data.select if callable(getattr(data, "select", None)) else _subset(data)
    return select(train.tolist()), select(valid.tolist())


def _subset(data: Any) -> Callable[[Sequence[int]], Any]:
    return lambda rows: Subset(data, rows)


def _taken(data: Any, rows: Index) -> Any:
    if isinstance(data, (Mapping, list, tuple)):
        return mapped(data, lambda part: _taken(part, rows))
    if is_table(data) or is_arrow(data):
        return data.take(rows)
    if isinstance(data, Tensor) and data.layout is not torch.strided:
        part = data.to_sparse_coo().index_select(0, torch.from_numpy(rows).to(data.device))
        return part if data.layout is torch.sparse_coo else part.to_sparse_csr()
    one = data.iloc if hasattr(data, "iloc") else data if hasattr(data, "shape") else np.asarray(data)
    return one[rows[0] : rows[-1] + 1] if rows[-1] - rows[0] + 1 == len(rows) else one[rows]


def by_rows(data: Any) -> Any:
    """The same data, with sparse matrices in the form whose rows can be taken: once, for all parts."""
    if is_sparse(data):
        return data.tocsr()
    return mapped(data, by_rows) if isinstance(data, (tuple, Mapping)) and is_array(data) else data


def length(data: Any) -> int:
    """Samples in ``data``, or batches in a list of them; raises DataError for what cannot be split, and why."""
    if isinstance(data, list):
        _check_list(data)
        n = len(data)
    elif is_array(data):
        n = _common(data)
    elif _is_counted(data):
        n = len(data)
    else:
        raise DataError(f"cannot split {_refused(data)}")
    if n < 2:
        what = "batch" if isinstance(data, list) else "sample"
        raise DataError(f"cannot split {count(n, what)} into two parts")
    return n


def _common(data: Any) -> int:
    lengths = {path: _entries(one) for path, one in _columns(data, "data")}
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{path} has {length}" for path, length in lengths.items())
        raise DataError(
            f"the arrays have different lengths: {told}. Columns must have one entry a sample. Where the samples "
            "themselves are of different lengths, split a dataset of them: torch.utils.data.StackDataset(x, y)"
        )
    return next(iter(lengths.values()))


def _entries(column: Any) -> int:
    shape = column.shape if hasattr(column, "shape") else (len(column),)
    return int(shape[0]) if shape else 0


def _check_list(data: list[Any]) -> None:
    """A list is one of batches to ``fit``. Raises DataError for one that may just as well be one of columns."""
    structures = {_structure(one) for one in data}
    if not is_array(data) or (len(structures) == 1 and None not in structures):
        return  # each is a tuple or dict of the same parts
    lengths = {_entries(one) for _, one in _columns(data, "")}
    if len(lengths) == 1 and len(data) < (n := lengths.pop()):
        raise DataError(
            f"cannot split a list of {count(len(data), 'array')} with {n} entries each: it may be one of columns, or "
            "of ready batches. Give columns as a tuple, (x, y). Of batches split the numbers, "
            f"np.arange({len(data)}), and pick from the list"
        )


def _structure(one: Any) -> Any:
    if isinstance(one, Mapping):
        return tuple(one)
    return len(one) if isinstance(one, (list, tuple)) else None


def _is_counted(data: Any) -> bool:
    """True for a dataset whose samples have numbers."""
    counted = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return counted and not isinstance(data, (str, bytes, tuple, Mapping, IterableDataset, type))


def _refused(data: Any) -> str:
    """What ``data`` is that cannot be split, and what can be split in its place."""
    name = getattr(data, "__name__", None) or type(data).__name__
    if isinstance(data, (DataLoader, Loader)):
        held = "data" if isinstance(data, Loader) else "dataset"
        return f"a loader, which reads in batches: split what it reads, loader.{held}, and make two loaders"
    if isinstance(data, (tuple, Mapping)):
        odd = next((path for path, one in _columns(data, "data") if not is_array(one)), "data")
        return (
            f"{type(data).__name__}: it is one of columns, and {odd} is no array. Turn numbers into one, "
            "np.asarray(y); of texts, or of samples of different lengths, split a dataset: "
            "torch.utils.data.StackDataset(x, y)"
        )
    one_by_one = "come one after the other, and have no numbers. Where they fit into memory, make a list of them"
    if isinstance(data, IterableDataset):
        return (
            f"{name}, a stream: its samples {one_by_one}, samples = list(data), and split the dataset of that: "
            "torch.utils.data.Subset(samples, range(len(samples)))"
        )
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, Mapping)):
        return f"{name}, which is only iterated: its batches {one_by_one}, and split that: list(data)"
    if callable(data) and not isinstance(data, type):
        return f"{name}, a function: its batches {one_by_one}, and split that: list({name}())"
    return f"{type(data).__name__}; expected arrays, a data frame, a list, or a dataset with __getitem__ and __len__"


def _columns(data: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(data, (Mapping, list, tuple)):
        for key, part in data.items() if isinstance(data, Mapping) else enumerate(data):
            yield from _columns(part, f"{path}[{key!r}]")
    else:
        yield path, data
