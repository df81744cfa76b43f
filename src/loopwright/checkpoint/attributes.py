"""What training changes of the plain attributes of modules, such as a running centre that is no buffer."""

from __future__ import annotations

import copy
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopwright.checkpoint.encode import check
from loopwright.errors import CheckpointError
from loopwright.written import warn

__all__ = ["Attributes", "put_back"]

_OF_MODULES = {*vars(nn.Module()), "_run", "_trained_on"}  # what torch and this package keep there
_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_LISTS, _DICTS = (list, tuple, deque, set, frozenset), (dict, OrderedDict, defaultdict, Counter)
_ITEMS, _BYTES, _DEPTH = 10_000, 256 * 2**20, 8


class _OtherError(Exception):
    """Something else hangs there, which checkpoints cannot hold."""


class _Same:
    """A tensor or an array by itself, which it does not keep alive."""

    def __init__(self, value: Any) -> None:
        self._value = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value() is not None and self._value() is other._value()

    __hash__ = None  # type: ignore[assignment]


class Attributes:
    """The plain attributes of ``models`` as they are now: numbers, texts, tensors, arrays, lists and dicts of them.

    ``changed()`` gives those that have another value since, and ``load`` puts such values back. Attributes of modules
    of torch itself are left alone, and so are objects of any other kind.

    >>> class Net(nn.Linear):
    ...     seen = 0
    >>> net = Net(1, 1)
    >>> before = Attributes({"model": net})
    >>> net.seen, net.center = 3, torch.ones(1)
    >>> before.changed()
    {'model': {'seen': 3, 'center': tensor([1.])}}
    >>> other = Net(1, 1)
    >>> Attributes({"model": other}).load(before.changed(), torch.device("cpu"))
    >>> other.seen, other.center
    (3, tensor([1.]))
    """

    def __init__(self, models: Mapping[str, Any]) -> None:
        self.models = dict(models)
        self._before = {(id(module), name): _now(value) for _, module, name, value in _found(models)}
        self._told: set[str] = set()

    def changed(self) -> dict[str, dict[str, Any]]:
        """By the path of a module, its attributes that are not what they were; tensors themselves, not copies.

        What has more than 10,000 items or 256 MiB is told in a warning, once, and left out.
        """
        changed: dict[str, dict[str, Any]] = {}
        for path, module, name, value in _found(self.models):
            now = _now(value)
            if now is None or now == self._before.get((id(module), name)):
                continue
            who = f"{type(module).__name__}.{name}"
            why = _too_much(value, who)
            if why is None:
                changed.setdefault(path, {})[name] = value
            elif who not in self._told:
                self._told.add(who)
                warn(
                    f"{who} changes in training and is not in checkpoints: {why}. If a step reads it, a resumed run "
                    "will differ: make it a buffer (register_buffer), or keep it in an object with state_dict and "
                    "load_state_dict that you give to fit(state={...})"
                )
        return changed

    def load(self, saved: Mapping[str, Mapping[str, Any]], device: torch.device) -> None:
        """Put back what ``changed`` gave, and what has been read of it from a file; tensors come to ``device``."""
        modules = dict(_modules(self.models))
        for path, values in saved.items():
            for name, value in values.items() if path in modules else ():
                vars(modules[path])[name] = _moved(value, device)


@contextmanager
def put_back(models: Mapping[str, Any]) -> Iterator[None]:
    """Afterwards the plain attributes of ``models`` are as they were before."""
    before = {(id(module), name): copy.deepcopy(value) for _, module, name, value in _found(models) if _now(value)}
    try:
        yield
    finally:
        for _, module, name, value in list(_found(models)):
            if (id(module), name) in before:
                vars(module)[name] = before[id(module), name]
            elif _now(value):
                del vars(module)[name]


def _modules(models: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    seen = set()
    for name, model in models.items():
        for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
            if not type(module).__module__.startswith("torch.nn.") and id(module) not in seen:
                seen.add(id(module))
                yield f"{name}.{path}".rstrip("."), module


def _found(models: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module, str, Any]]:
    for path, module in _modules(models):
        for name, value in vars(module).items():
            if name not in _OF_MODULES:
                yield path, module, name, value


def _now(value: Any) -> Any:
    """What tells ``value`` from another one and from itself when it is changed; None where it is not plain."""
    try:
        return _told(value, 0)
    except _OtherError:
        return None


def _told(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind in _NUMBERS:
        return kind, repr(value) if kind is float else value  # nan is nan, and 0.0 is not -0.0
    if isinstance(value, Tensor):
        return _Same(value), None if value.is_inference() else value._version
    if isinstance(value, np.generic):
        return kind, repr(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return _Same(value), value.tobytes() if value.nbytes <= 2**20 else None
    if depth < _DEPTH and kind in _LISTS:
        return kind, len(value), () if len(value) > _ITEMS else tuple(_told(one, depth + 1) for one in value)
    if depth < _DEPTH and kind in _DICTS:
        pairs = () if len(value) > _ITEMS else value.items()
        return kind, len(value), tuple((_told(k, depth + 1), _told(v, depth + 1)) for k, v in pairs)
    raise _OtherError


def _too_much(value: Any, who: str) -> str | None:
    """Why ``value`` is not saved; None where it is."""
    items, size = _extent(value)
    if items > _ITEMS or size > _BYTES:
        return f"it has {items:,} items, {size:,} bytes"
    try:
        check(value, who)
    except CheckpointError as error:
        return str(error)
    return None


def _extent(value: Any) -> tuple[int, int]:
    """How many items there are in ``value``, and the bytes of its tensors and arrays."""
    if isinstance(value, (Tensor, np.ndarray)):
        return 1, value.nbytes
    if isinstance(value, (*_LISTS, *_DICTS)):
        if len(value) > _ITEMS:
            return len(value), 0
        inside = [_extent(one) for one in (value.values() if isinstance(value, dict) else value)]
        return sum(items for items, _ in inside), sum(size for _, size in inside)
    return 1, 0


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        for key in value:
            value[key] = _moved(value[key], device)
    elif isinstance(value, (list, deque)):
        for i, one in enumerate(value):
            value[i] = _moved(one, device)
    elif type(value) is tuple:
        return tuple(_moved(one, device) for one in value)
    return value
