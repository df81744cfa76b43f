"""Tensors, arrays of any library, tables, sparse matrices, and tuples, lists and dicts of them: columns alike long."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.dlpack import from_dlpack

from loopwright.data.picked import PickedRows, SparseRows, array_rows, is_sparse
from loopwright.data.tables import arrow_column, arrow_rows, frame_rows, is_arrow, is_frame, is_table
from loopwright.errors import DataError

__all__ = ["as_tensors", "check_classes", "is_array", "mapped", "pick", "shared_length"]

_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}  # torch selects no rows of these

_TOLD = 8  # lengths in a message: a list of samples has one for each
_CLASSES = ". Names of classes are numbered by np.unique(names, return_inverse=True)[1]"
_TIMES = '. Times are numbers as in times.astype("int64")'
_NUMBERS_OF = {  # what numbers are made of an array, by the kind of its dtype
    "U": _CLASSES,
    "S": _CLASSES,
    "O": ". Of samples of different lengths make a dataset, torch.utils.data.StackDataset(x, y), and pass a collate "
    "function that pads them; numbers kept as objects are such again as in x.astype(float)",
    "M": _TIMES,
    "m": _TIMES,
    "V": ". Fields are columns, as in {name: x[name] for name in x.dtype.names}",
}


def is_array(data: object) -> bool:
    """True for a tensor, array, data frame, Arrow table or sparse matrix, and for a tuple, list or dict of these.

    An array is what NumPy or torch can take over: it has ``__array__`` or ``__dlpack__``.
    """
    if isinstance(data, (Tensor, np.ndarray)) or is_frame(data) or is_sparse(data) or _is_foreign(data):
        return True
    parts = list(data.values()) if isinstance(data, Mapping) else data
    return isinstance(parts, (list, tuple)) and len(parts) > 0 and all(map(is_array, parts))


def _is_foreign(data: object) -> bool:
    """An array of another library; a dataset is none, whatever else it can be turned into."""
    kind = type(data)
    return (hasattr(kind, "__dlpack__") or hasattr(kind, "__array__")) and not isinstance(data, (Dataset, np.generic))


def as_tensors(data: Any, path: str = "data") -> Any:
    """The same structure with what rows are picked from at its leaves: tensors, in the memory of the data.

    Dtypes stay as they are; the columns of a data frame or Arrow table get one that holds them all. What torch cannot
    read where it lies stays there, as ``PickedRows``, and only the rows that are picked become tensors: columns in
    several pieces, values that are missing, sparse matrices (rows become dense), another byte order. A sparse matrix
    that is not in CSR form is converted once. Raises DataError for what is not numeric, naming the columns.
    """
    if is_sparse(data):  # of which one form is a dict
        return SparseRows(data, path)
    if isinstance(data, Mapping):
        return {key: as_tensors(part, f"{path}[{key!r}]") for key, part in data.items()}
    if isinstance(data, (list, tuple)):
        return _like(data, [as_tensors(part, f"{path}[{i}]") for i, part in enumerate(data)])
    leaf = _leaf(data, path)
    if leaf.ndim == 0:
        raise DataError(f"{path} is a single number; expected an array whose first dimension counts the samples")
    return leaf


def _leaf(data: Any, path: str) -> Tensor | PickedRows:
    if isinstance(data, Tensor):
        return SparseRows(data, path) if data.layout in _COMPRESSED else data
    if is_frame(data):
        rows = frame_rows(data, path)
    elif is_table(data):
        rows = arrow_rows(data, path)
    elif is_arrow(data):
        rows = arrow_column(data, path)
    else:
        return _from_dlpack(data, path)
    return rows if isinstance(rows, PickedRows) else _from_numpy(rows, path)


def mapped(data: Any, change: Callable[[Any], Any]) -> Any:
    """The same tuple, list or dict with ``change`` made to each of its parts.

    >>> mapped({"a": (1, 2)}, len)
    {'a': 2}
    """
    if isinstance(data, Mapping):
        return {key: change(part) for key, part in data.items()}
    return _like(data, [change(part) for part in data])


def _like(data: Any, parts: list[Any]) -> Any:
    """``parts`` in a container of the kind of ``data``; named tuples too."""
    make = cast(Callable[[list[Any]], Any], data._make if hasattr(data, "_make") else type(data))
    return make(parts)


def _from_dlpack(data: Any, path: str) -> Tensor | PickedRows:
    """Without a copy, and on its own device, where the library offers that; else by way of NumPy."""
    if isinstance(data, np.ndarray) or not hasattr(data, "__dlpack__"):
        return _from_numpy(data, path)
    try:
        return from_dlpack(data)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        if hasattr(data, "__array__"):
            return _from_numpy(data, path)
        raise DataError(f"{path} ({type(data).__name__}) cannot be taken over by torch.from_dlpack: {error}") from error


class _Readable:
    """A read-only array offered as a writable one: torch would warn, and nothing here writes to it."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__, self.array = interface, array


def _from_numpy(array: Any, path: str) -> Tensor | PickedRows:
    array = np.asarray(array)
    if array.dtype.kind in "OSUMmV":
        how = _NUMBERS_OF.get(array.dtype.kind, "")
        raise DataError(f"{path} is a NumPy array of dtype {array.dtype}; expected numbers or booleans{how}")
    if not array.dtype.isnative or any(stride < 0 for stride in array.strides):
        return array_rows(array)
    if not array.flags.writeable:
        array = np.asarray(_Readable(array))
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise DataError(f"{path} is a NumPy array of dtype {array.dtype}, which torch does not have") from error


def _paths(data: Any, path: str) -> Iterator[tuple[str, Tensor | PickedRows]]:
    if isinstance(data, (Tensor, PickedRows)):
        yield path, data
    else:
        for key, part in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _paths(part, f"{path}[{key!r}]")


def shared_length(data: Any) -> int:
    """Length of the first dimension of all tensors in ``data``; raises DataError, naming them, if they differ."""
    lengths = {path: len(leaf) for path, leaf in _paths(data, "data")}
    if len(set(lengths.values())) != 1:
        few = [f"len({path}) == {length}" for path, length in islice(lengths.items(), _TOLD)]
        told = ", ".join([*few, f"and {len(lengths) - _TOLD} more"] if len(lengths) > _TOLD else few)
        raise DataError(
            f"the arrays have different lengths: {told}. All must have one entry a sample along dimension 0. A list of "
            "ready batches goes to fit as a list; of samples of different lengths make a dataset, "
            "torch.utils.data.StackDataset(x, y), or of a list of them torch.utils.data.Subset(samples, "
            "range(len(samples))), and pass a collate function that pads them"
        )
    return next(iter(lengths.values()))


def check_classes(labels: Any, name: str) -> None:
    """Raise DataError for labels that are measured and not classes: floats that are no whole numbers."""
    column = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    odd = np.flatnonzero(column != np.floor(column)).tolist() if column.dtype.kind == "f" else []
    if odd:
        raise DataError(
            f"{name}[{odd[0]}] is {column.flat[odd[0]]:g}; expected a class for each sample, a name or a whole number. "
            "Of measured values make classes first: numpy.digitize(values, edges)"
        )


def pick(data: Any, rows: Tensor) -> Any:
    """The same structure with only ``rows`` of each tensor, in memory of its own."""
    kind = type(data)
    if kind is Tensor or isinstance(data, Tensor):
        return torch.index_select(data, 0, rows)
    if kind is tuple:
        return tuple([pick(part, rows) for part in data])
    if kind is dict:
        return {key: pick(part, rows) for key, part in data.items()}
    if isinstance(data, PickedRows):
        return data.pick(rows)
    return _like(data, [pick(part, rows) for part in data])
