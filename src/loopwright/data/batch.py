"""A batch, whatever it is made of: how many samples it holds, and how it gets to the device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, cast

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


def move(batch: Any, device: torch.device | str) -> Any:
    """The same nested batch with everything that has ``.to`` on ``device``; copies from pinned memory do not block.

    Lists, tuples, named tuples, mappings and dataclasses keep their type; what has no ``.to`` (strings, numbers,
    arrays) stays as it is, and so does a tensor that is there already. Raises DataError with the path of the leaf
    when its ``.to`` fails.

    >>> move({"x": torch.zeros(2), "name": "a"}, "cpu")
    {'x': tensor([0., 0.]), 'name': 'a'}
    """
    device = torch.device(device)
    try:
        return _move(batch, device)
    except _Unmovable as failed:
        cause = failed.__cause__
        raise DataError(
            f"batch{failed.path} ({describe(failed.leaf)}) cannot be moved to {device}: {cause}. Return tensors, or "
            "objects whose .to(device) works, from the dataset or its collate_fn"
        ) from cause


class _Unmovable(Exception):  # noqa: N818 - never leaves this file
    def __init__(self, leaf: Any) -> None:
        self.leaf, self.path = leaf, ""


def _move(value: Any, device: torch.device) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        return _move_tensor(value, device)
    if kind is list:
        return _parts(value, range(len(value)), device)
    if kind is tuple:
        return tuple(_parts(value, range(len(value)), device))
    if kind is dict:
        return dict(zip(value, _parts(value, value, device), strict=True))
    if callable(getattr(value, "to", None)) and not isinstance(value, type):
        return _call_to(value, device)
    return _rebuild(value, device)


def _move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    at = tensor.device
    if at == device or (device.type == "cpu" and at.type == "cpu"):
        return tensor
    return cast(Tensor, _call_to(tensor, device, non_blocking=at.type == "cpu" and tensor.is_pinned()))


def _call_to(value: Any, device: torch.device, **options: bool) -> Any:
    try:
        return value.to(device, **options)
    except Exception as error:
        raise _Unmovable(value) from error


def _parts(value: Any, keys: Any, device: torch.device) -> list[Any]:
    return [_part(value[key], f"[{key!r}]", device) for key in keys]


def _part(value: Any, step: str, device: torch.device) -> Any:
    try:
        return _move(value, device)
    except _Unmovable as failed:
        failed.path = step + failed.path
        raise


def _rebuild(value: Any, device: torch.device) -> Any:
    """Containers that are not plain ones."""
    kind: Any = type(value)
    if isinstance(value, tuple) and hasattr(kind, "_make"):
        return kind._make(_part(v, f".{n}", device) for n, v in zip(kind._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return kind(_parts(value, range(len(value)), device))
    if isinstance(value, Mapping):
        moved = dict(zip(value, _parts(value, list(value), device), strict=True))
        if not isinstance(value, MutableMapping):
            return kind(moved)
        clone: Any = copy.copy(value)  # it may have more than its items
        clone.update(moved)
        return clone
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        clone = copy.copy(value)
        for field in dataclasses.fields(value):
            moved_part = _part(getattr(value, field.name), f".{field.name}", device)
            object.__setattr__(clone, field.name, moved_part)  # frozen ones too
        return clone
    return value
