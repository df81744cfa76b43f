"""A batch, whatever it is made of: how many samples it holds, and how it gets to the device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from loopwright.errors import DataError
from loopwright.events import describe

__all__ = ["move", "samples"]


def samples(batch: Any) -> int:
    """Samples in ``batch``: dimension 0 of its first tensor or NumPy array that has one.

    Lists, tuples, mappings and dataclasses are searched in their order. Raises DataError, which asks for
    ``weight=``, when there is no such array.

    >>> samples([torch.zeros(3, 2), torch.zeros(3)])
    3
    """
    kind = type(batch)
    if (kind is list or kind is tuple) and batch:
        first = batch[0]
        if type(first) is Tensor and first.dim():
            return first.size(0)
    for leaf in _leaves(batch):
        if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim:
            return int(leaf.shape[0])
    raise DataError(
        f"cannot tell how many samples this batch holds: {describe(batch)} has no tensor with a first "
        "dimension. Pass weight=..., a function of the batch that returns the number"
    )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (Tensor, np.ndarray, str, bytes)):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name))
    else:
        yield value


class _Place(NamedTuple):
    device: torch.device
    dtype: torch.dtype | None  # of floating tensors; None leaves theirs


def move(batch: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """The same nested batch with everything that has ``.to`` on ``device``; copies from pinned memory do not block.

    Lists, tuples, named tuples, mappings and dataclasses keep their type; what has no ``.to`` (strings, numbers,
    arrays) stays as it is, and so does a tensor that is there already. With ``dtype``, floating tensors are converted.
    Raises DataError with the path of the leaf when its ``.to`` fails.

    >>> move({"x": torch.zeros(2), "name": "a"}, "cpu")
    {'x': tensor([0., 0.]), 'name': 'a'}
    >>> move([torch.zeros(1), torch.tensor([3])], "cpu", torch.float64)
    [tensor([0.], dtype=torch.float64), tensor([3])]
    """
    place = _Place(torch.device(device), dtype)
    try:
        return _move(batch, place)
    except _Unmovable as failed:
        cause = failed.__cause__
        raise DataError(
            f"batch{failed.path} ({describe(failed.leaf)}) cannot be moved to {device}: {cause}. Return tensors, or "
            "objects whose .to(device) works, from the dataset or its collate_fn"
        ) from cause


class _Unmovable(Exception):  # noqa: N818 - never leaves this file
    def __init__(self, leaf: Any) -> None:
        self.leaf, self.path = leaf, ""


def _move(value: Any, place: _Place) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        return _move_tensor(value, place)
    if kind is list:
        return _parts(value, range(len(value)), place)
    if kind is tuple:
        return tuple(_parts(value, range(len(value)), place))
    if kind is dict:
        return dict(zip(value, _parts(value, value, place), strict=True))
    if callable(getattr(value, "to", None)) and not isinstance(value, type):
        return _call_to(value, place)
    return _rebuild(value, place)


def _move_tensor(tensor: Tensor, place: _Place) -> Tensor:
    at, (device, dtype) = tensor.device, place
    options: dict[str, Any] = {}
    if dtype is not None and dtype != tensor.dtype and tensor.is_floating_point():
        options["dtype"] = dtype
    there = at == device or (device.type == "cpu" and at.type == "cpu")
    if there and not options:
        return tensor
    non_blocking = not there and at.type == "cpu" and tensor.is_pinned()
    return cast(Tensor, _call_to(tensor, place, non_blocking=non_blocking, **options))


def _call_to(value: Any, place: _Place, **options: Any) -> Any:
    try:
        return value.to(place.device, **options)
    except Exception as error:
        raise _Unmovable(value) from error


def _parts(value: Any, keys: Any, place: _Place) -> list[Any]:
    return [_part(value[key], f"[{key!r}]", place) for key in keys]


def _part(value: Any, step: str, place: _Place) -> Any:
    try:
        return _move(value, place)
    except _Unmovable as failed:
        failed.path = step + failed.path
        raise


def _rebuild(value: Any, place: _Place) -> Any:
    """Containers that are not plain ones."""
    kind: Any = type(value)
    if isinstance(value, tuple) and hasattr(kind, "_make"):
        return kind._make(_part(v, f".{n}", place) for n, v in zip(kind._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return kind(_parts(value, range(len(value)), place))
    if isinstance(value, Mapping):
        moved = dict(zip(value, _parts(value, list(value), place), strict=True))
        if not isinstance(value, MutableMapping):
            return kind(moved)
        clone: Any = copy.copy(value)  # it may have more than its items
        clone.update(moved)
        return clone
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        clone = copy.copy(value)
        for field in dataclasses.fields(value):
            moved_part = _part(getattr(value, field.name), f".{field.name}", place)
            object.__setattr__(clone, field.name, moved_part)  # frozen ones too
        return clone
    return value
