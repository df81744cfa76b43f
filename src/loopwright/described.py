"""Objects told as plain data: their class, and what they were made with, down to the objects within."""

from __future__ import annotations

import argparse
import datetime
import enum
import functools
import inspect
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopwright.provenance import is_own

__all__ = ["Description", "described", "plain"]

_LONG, _SIZE = 100, 32  # entries of a list, elements of an array that are settings; more of them are data
_MOST, _DEEP = 500, 12  # objects that one description goes into, and how deep; of more the class is told
_SECRET = re.compile(r"api_?key|secret|passw|credential|token$|^auth", re.IGNORECASE)
_NOT_KEPT = "<not kept as an attribute>"
_PLAIN = (str, int, float, type(None))
_TEXT = (torch.device, torch.dtype, torch.Size, range, slice, datetime.date, datetime.timedelta, PurePath, re.Pattern)


def described(obj: Any) -> Any:
    """The class of an object, with what it keeps of the arguments of its constructor; so with objects in these.

    An argument is kept as an attribute of its name, or of its name after an underscore. What a class of the user's says
    in its body is told as well, and which arguments it does not keep. Left out is what is data and no setting (more
    than 100 entries), and what looks like a secret. No property is asked, and nothing is called.

    >>> described(nn.CrossEntropyLoss(label_smoothing=0.1))["label_smoothing"]
    0.1
    >>> described(torch.utils.data.RandomSampler(range(3), num_samples=2))["num_samples"]
    2
    """
    return Description().of(obj)


class Description:
    """Tells objects, each once: a second time, and if it is among those ``known``, by its class only.

    Of tensors that are among ``trained``, what is in them is not told.
    """

    def __init__(self, *known: Any, trained: Iterable[Tensor] = ()) -> None:
        self._known = {id(one): one for one in known}  # kept, since the next object could have the same id
        self._trained = {id(one) for one in trained}
        self._deep = 0

    def of(self, obj: Any) -> Any:
        """``obj`` by its class and arguments; classes stay what they are, for ``plain`` to name."""
        if id(obj) in self._known or len(self._known) > _MOST or self._deep > _DEEP:
            return type(obj)
        self._known[id(obj)] = obj
        self._deep += 1
        try:
            return {"class": type(obj), **self._arguments(obj)}
        finally:
            self._deep -= 1

    def _arguments(self, obj: Any) -> dict[str, Any]:
        if isinstance(obj, functools.partial):
            more = {"args": self.value("", obj.args)} if obj.args else {}
            return {"func": obj.func, **more, **self.value("", obj.keywords)}
        if isinstance(obj, (argparse.Namespace, types.SimpleNamespace)):
            return {name: self.value(name, value) for name, value in vars(obj).items()}
        if isinstance(obj, torch.Generator):
            return {"seed": obj.initial_seed()}
        kind: type = type(obj)
        held = _held(obj)
        found = {name: next((k for k in (name, f"_{name}") if k in held), None) for name in _arguments(kind)}
        told = {name: self.value(name, held[key]) for name, key in found.items() if key is not None}
        if is_own(kind.__module__):
            told |= {name: _NOT_KEPT for name, key in found.items() if key is None and not _is_open(kind, name)}
        said = {name: held.get(name, value) for name, value in _said(kind).items() if name not in told}
        return told | {name: self.value(name, value) for name, value in said.items()}

    def value(self, name: str, value: Any) -> Any:
        """An argument called ``name``: plain data as it is, objects described, long ones by their length."""
        if _SECRET.search(name) or (isinstance(value, str) and re.search(r"://[^/]*@", value)):
            return "<not kept>"
        if isinstance(value, (list, tuple, set, frozenset, Mapping, str)):
            limit = 10 * _LONG if isinstance(value, str) else _LONG
            if len(value) > limit:
                return f"<{type(value).__name__} of {len(value)}>"
        if isinstance(value, (*_PLAIN, type)) or hasattr(value, "__qualname__"):
            return value
        if isinstance(value, (*_TEXT, enum.Enum)):
            return str(value)
        if isinstance(value, (Tensor, np.ndarray)):
            return _array(value, size=-1 if id(value) in self._trained else _SIZE)
        if isinstance(value, Mapping):
            return {str(key): self.value(str(key), item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(name, item) for item in value]
        return value if isinstance(value, (set, frozenset)) else self.of(value)


def _held(obj: Any) -> Mapping[str, Any]:
    """What an object keeps, by name; also what torch puts aside for a module."""
    kind: type = type(obj)
    slots = (name for name in _arguments(kind) if name in getattr(kind, "__slots__", ()))
    names: dict[str, Any] = getattr(obj, "__dict__", None) or {name: getattr(obj, name) for name in slots}
    return {**names, **obj._buffers, **obj._modules} if isinstance(obj, nn.Module) else names


def _array(value: Any, *, size: int) -> Any:
    """A few numbers, such as the weights of classes, are settings; more are data."""
    count = value.numel() if isinstance(value, Tensor) else value.size
    plain = type(value) is np.ndarray or (type(value) is Tensor and value.layout is torch.strided and not value.is_meta)
    if count <= size and plain:
        return value.tolist()
    return f"<{type(value).__name__} {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"


def _said(kind: type) -> dict[str, Any]:
    """What the bodies of the user's classes set, such as ``temperature = 0.5``: no method, nothing private."""
    own = [vars(one) for one in reversed(kind.__mro__) if is_own(one.__module__)]
    named = {name: value for body in own for name, value in body.items() if not name.startswith("_")}
    return {name: value for name, value in named.items() if not (hasattr(value, "__get__") or isinstance(value, type))}


@functools.cache
def _arguments(kind: type) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(kind).parameters)
    except (TypeError, ValueError):  # a class that is not written in Python
        return ()


def _is_open(kind: type, name: str) -> bool:
    """True for ``*args`` and ``**kwargs``."""
    one = inspect.signature(kind).parameters[name]
    return one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)


def plain(value: Any) -> Any:
    """Plain data for people to read: what is no plain value is named by its class.

    >>> plain({"size": (3, 3), "kind": dict})
    {'size': [3, 3], 'kind': '<builtins.dict>'}
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=repr)  # their own order changes from process to process
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (PurePath, int, float, str)):
        return str(value)
    kind = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    return f"<{kind.__module__}.{kind.__qualname__}>"
