"""A batch, whatever it is made of: how many samples it holds, and how it gets to the device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from loopwright.data.words import count
from loopwright.errors import DataError
from loopwright.events import describe
from loopwright.written import warn

__all__ = ["check_count", "move", "samples"]


def samples(batch: Any) -> int:
    """Samples in ``batch``: dimension 0 of its tensors and NumPy arrays, or the length of a list of samples.

    Lists, tuples, mappings and dataclasses are searched in their order. A list of arrays of several lengths holds one
    for each sample, and so does a list of records with a number or a text in each. Where the parts do not agree it is
    the first that counts; ``check_count`` tells. Raises DataError, which asks for ``weight=``, where there is no array.

    >>> samples([torch.zeros(3, 2), torch.zeros(3)])
    3
    >>> samples(([torch.zeros(7), torch.zeros(5)], torch.zeros(2)))
    2
    """
    kind = type(batch)
    if (kind is list or kind is tuple) and batch and type(batch[0]) is Tensor and batch[0].dim():
        n = batch[0].size(0)  # most batches are such, and this is asked for each
        if len(batch) == 1 or (len(batch) == 2 and type(y := batch[1]) is Tensor and y.dim() and y.size(0) == n):
            return n
    parts = list(_counts(batch, top=True))
    if not parts:
        raise DataError(
            f"cannot tell how many samples this batch holds: {describe(batch)} has no tensor with a first "
            "dimension. Pass weight=..., a function of the batch that returns the number"
        )
    return next((n for n in parts[0] if all(n in part for part in parts)), parts[0][0])


def check_count(batch: Any, planned: int | None, what: str) -> None:
    """Raise DataError where ``batch`` has the ``planned`` samples of its loader, and is counted as something else.

    Warns where nothing is planned and its parts do not agree. Without any array there is nothing to compare.
    """
    parts = list(_counts(batch, top=True))
    if not parts:
        return
    n, found = samples(batch), {n for part in parts for n in part}
    if type(batch) is list and not any(isinstance(part, Tensor) for part in batch):
        found.add(len(batch))
    odd = planned is not None and n != planned and planned in found
    if not odd and (planned is not None or any(all(n in part for part in parts) for n in parts[0])):
        return
    said = f"the {what} batch {describe(batch)} is counted as {count(n, 'sample')}"
    mend = "pass weight=..., a function of the batch that returns how many it has"
    if odd:
        raise DataError(
            f"{said}, the first dimension of its first array; its loader has put {planned} into it. Means would be "
            f"weighted wrongly: {mend}"
        )
    told = " and ".join(str(one) for one in dict.fromkeys(part[0] for part in parts))
    warn(f"{said}, while the first dimensions of its parts are {told}. If {n} is not right, {mend}")


def _counts(value: Any, *, top: bool = False) -> Iterator[tuple[int, ...]]:
    """For each part of a batch, how many samples it may hold, the likeliest first."""
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim:
            yield (int(value.shape[0]),)
    elif type(value) is list and value and (one := _listed(value, top=top)):
        yield one
    else:
        for part in _held(value):
            yield from _counts(part)


def _listed(values: list[Any], *, top: bool) -> tuple[int, ...]:
    """How many samples are in a list that is one of samples, or may be; empty where it is none."""
    lengths = {len(one) for one in values if isinstance(one, (Tensor, np.ndarray)) and one.ndim}
    if lengths and all(isinstance(one, (Tensor, np.ndarray)) and one.ndim for one in values):
        if len(lengths) == 1:  # columns, or samples of one length
            return (*lengths, len(values))
        return () if top else (len(values),)
    records = all(isinstance(one, (tuple, list, Mapping)) for one in values)
    if top and records and all(any(_is_scalar(part) for part in _held(one)) for one in values):
        return (len(values),)
    return ()


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, (Tensor, np.generic)) and not value.ndim)


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, (list, tuple)):
        yield from value
    elif dataclasses.is_dataclass(value):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))


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


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value with ``change`` made to every tensor in it.

    >>> with_tensors({"x": torch.ones(1), "names": ["a"]}, lambda tensor: tensor + 1)
    {'x': tensor([2.]), 'names': ['a']}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: with_tensors(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [with_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested value, in the order in which ``with_tensors`` changes them.

    >>> list(tensors_in({"x": torch.ones(1), "names": ["a"]}))
    [tensor([1.])]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


_BEGUN = "_loopwright_begun"  # on a tensor: its copy on a device, and of which of its versions that is


def note_begun(tensor: Tensor, copy: Tensor) -> None:
    """Let ``move`` take ``copy``, once, where it is to copy ``tensor`` to that device.

    >>> batch, copy = [torch.zeros(2)], torch.zeros(2, device="meta")
    >>> note_begun(batch[0], copy)
    >>> move(batch, "meta")[0] is copy, move(batch, "meta")[0] is copy
    (True, False)
    """
    vars(tensor)[_BEGUN] = copy, tensor._version


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested batch that ``move`` copies by itself, bit by bit, to where nothing leads back from."""
    if isinstance(value, Tensor):
        plain = type(value) is Tensor and value.layout is torch.strided and not value.is_inference()
        if plain and not (value.requires_grad or value.is_conj() or value.is_neg() or value.is_quantized):
            dense = value.is_contiguous() or (
                value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
            )
            if dense:  # a copy of any other may get other strides
                yield value
    elif not callable(getattr(value, "to", None)):
        for part in _held(value):
            yield from plain_tensors(part)


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
    copy, version = (None, 0) if options else vars(tensor).pop(_BEGUN, (None, 0))
    if copy is not None and copy.device == device and version == tensor._version:
        return cast(Tensor, copy)
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
