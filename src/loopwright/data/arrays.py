"""Tensors, arrays of any library, data frames, and tuples, lists and dicts of them: columns of the same length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.dlpack import from_dlpack

from loopwright.errors import DataError

__all__ = ["as_tensors", "check_classes", "is_array", "pick", "shared_length"]


def is_array(data: object) -> bool:
    """True for a tensor, an array, a data frame or series, and for a tuple, list or dict of these.

    An array is what NumPy or torch can take over: it has ``__array__`` or ``__dlpack__``.
    """
    if isinstance(data, (Tensor, np.ndarray)) or _is_frame(data) or _is_foreign(data):
        return True
    parts = list(data.values()) if isinstance(data, Mapping) else data
    return isinstance(parts, (list, tuple)) and len(parts) > 0 and all(map(is_array, parts))


def _is_frame(data: object) -> bool:
    return callable(getattr(data, "to_numpy", None)) and hasattr(data, "iloc")


def _is_foreign(data: object) -> bool:
    """An array of another library; a dataset is none, whatever else it can be turned into."""
    kind = type(data)
    return (hasattr(kind, "__dlpack__") or hasattr(kind, "__array__")) and not isinstance(data, (Dataset, np.generic))


def as_tensors(data: Any, path: str = "data") -> Any:
    """The same structure with tensors at its leaves: dtypes stay as they are, memory is shared where it can be.

    A data frame becomes one 2-D tensor, whose dtype holds all its columns. Raises DataError for what is not
    numeric, naming the columns.
    """
    if isinstance(data, Tensor):
        leaf = data
    elif isinstance(data, Mapping):
        return {key: as_tensors(part, f"{path}[{key!r}]") for key, part in data.items()}
    elif isinstance(data, (list, tuple)):
        return _like(data, [as_tensors(part, f"{path}[{i}]") for i, part in enumerate(data)])
    elif _is_frame(data):
        leaf = _from_numpy(_frame_values(data, path), path)
    else:
        leaf = _from_dlpack(data, path)
    if leaf.dim() == 0:
        raise DataError(f"{path} is a single number; expected an array whose first dimension counts the samples")
    return leaf


def _like(data: Any, parts: list[Any]) -> Any:
    """``parts`` in a container of the kind of ``data``; named tuples too."""
    make = cast(Callable[[list[Any]], Any], data._make if hasattr(data, "_make") else type(data))
    return make(parts)


def _frame_values(frame: Any, path: str) -> Any:
    columns = dict(frame.dtypes) if hasattr(frame, "columns") else {frame.name: frame.dtype}
    wrong = [f"{name!r} ({dtype})" for name, dtype in columns.items() if getattr(dtype, "kind", "O") not in "biuf"]
    if wrong:
        raise DataError(
            f"{path} has columns that are not numbers: {', '.join(wrong)}. Turn them into numbers first, as in "
            'frame["name"].astype("category").cat.codes, or drop them'
        )
    values = frame.to_numpy()
    if values.dtype.kind not in "biuf":  # nullable columns, or booleans beside numbers
        values = frame.to_numpy(dtype="float64", na_value=np.nan)
    return values


def _from_dlpack(data: Any, path: str) -> Tensor:
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


def _from_numpy(array: Any, path: str) -> Tensor:
    array = np.asarray(array)
    if array.dtype.kind in "OSUMmV":
        raise DataError(f"{path} is a NumPy array of dtype {array.dtype}; expected numbers or booleans")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    if not array.flags.writeable:
        array = np.asarray(_Readable(array))
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise DataError(f"{path} is a NumPy array of dtype {array.dtype}, which torch does not have") from error


def _paths(data: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(data, Tensor):
        yield path, data
    else:
        for key, part in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _paths(part, f"{path}[{key!r}]")


def shared_length(data: Any) -> int:
    """Length of the first dimension of all tensors in ``data``; raises DataError, naming them, if they differ."""
    lengths = {path: len(leaf) for path, leaf in _paths(data, "data")}
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"len({path}) == {length}" for path, length in lengths.items())
        raise DataError(
            f"the arrays have different lengths: {told}. All must have one entry a sample along dimension 0; a list of "
            "ready batches must be given as a list"
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
    return _like(data, [pick(part, rows) for part in data])
