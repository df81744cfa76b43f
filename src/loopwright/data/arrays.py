"""Tensors, NumPy arrays, data frames, and tuples, lists and dicts of them: read as columns of the same length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from loopwright.errors import DataError

__all__ = ["as_tensors", "is_array", "pick", "shared_length"]


def is_array(data: object) -> bool:
    """True for a tensor, a NumPy array, a data frame or series, and for a tuple, list or dict of these."""
    if isinstance(data, (Tensor, np.ndarray)) or _is_frame(data):
        return True
    parts = list(data.values()) if isinstance(data, Mapping) else data
    return isinstance(parts, (list, tuple)) and len(parts) > 0 and all(map(is_array, parts))


def _is_frame(data: object) -> bool:
    return callable(getattr(data, "to_numpy", None)) and hasattr(data, "iloc")


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
    else:
        leaf = _from_numpy(_frame_values(data, path) if _is_frame(data) else data, path)
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
