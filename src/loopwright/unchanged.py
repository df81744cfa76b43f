"""Whether all that Python finds on modules and optimizers is what it was, told far faster than by reading it anew."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopwright.data.generators import OF_MODULES

__all__ = ["Unchanged"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_LEAVES = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, torch.Generator)
_OWN = OF_MODULES - set(vars(nn.Module()))  # what this package keeps on modules
_LONG, _DEPTH = 1000, 4  # of longer lists, and further down, it is not looked at what they hold
_ARRAY = 2**16  # bytes
_SHORT = 16  # numbers of a tensor on the host that are compared themselves


class Unchanged:
    """What a task and its optimizers hold now: numbers, texts, tensors and where they lie, lists, dicts, objects.

    ``changed()`` names the first place where there is something else since, or is None. The content of tensors on
    ``device`` is not looked at, nor are tensors that a forward has left on a module with their graph.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    >>> before = Unchanged(net, [], torch.device("cuda"))
    >>> net[1].p = 0.2
    >>> before.changed()
    "p of Dropout '1'"
    """

    def __init__(self, task: nn.Module, optimizers: Iterable[Optimizer], device: torch.device) -> None:
        self.device = device.type
        self._held: list[tuple[Any, Callable[[], Iterable[Any]], list[Any], str]] = []
        self._empty: list[Any] = []
        self._empty_at: list[str] = []
        self._tensors: list[tuple[Tensor, str]] = []
        self._arrays: list[tuple[Any, Any, str]] = []
        self._met: dict[int, Any] = {}
        self._optimizers = [(one, one.state, one.param_groups) for one in optimizers]
        for path, module in task.named_modules():
            name = f"{type(module).__name__} {path!r}" if path else type(module).__name__
            self._take(vars(module), f"of {name}", 0)
        for optimizer, state, groups in self._optimizers:
            name = type(optimizer).__name__
            self._take(state, f"of the state of {name}", 0)
            for group in groups:
                self._take(group, f"of a group of {name}", 0)
        self._own_tensors = [one for one, _ in self._tensors]
        self._places = self._where()

    def changed(self) -> str | None:
        """The first place where there is something else; None if there is none."""
        for optimizer, state, groups in self._optimizers:
            if optimizer.state is not state or optimizer.param_groups is not groups:
                return f"what {type(optimizer).__name__} holds"
        for held, values, before, where in self._held:
            if len(held) != len(before) or not all(map(is_, values(), before)):
                name = _differs(held, values(), before)
                if name is not None:
                    return f"{name} {where}".strip()
        if any(self._empty):
            held, where = next(pair for pair in zip(self._empty, self._empty_at, strict=True) if pair[0])
            return f"{_last(held)} {where}".strip()
        now = self._where()
        if now != self._places:
            i = next(i for i, (a, b) in enumerate(zip(now, self._places, strict=True)) if a != b)
            return self._tensors[i % len(self._tensors)][1]
        for array, before, where in self._arrays:
            if not np.array_equal(array, before):
                return where
        return None

    def _where(self) -> list[Any]:
        """Where every tensor lies, which are trained, and what the host can read."""
        tensors = self._own_tensors
        return [
            *(one.data_ptr() for one in tensors),
            *(one.requires_grad for one in tensors),
            *(None if one.device.type == self.device else _content(one) for one in tensors),
        ]

    def _take(self, value: Any, where: str, depth: int) -> None:
        """Keep ``value``, and what hangs on it; ``where`` is said after the name of what it holds."""
        if isinstance(value, (*_PLAIN, *_LEAVES)) or id(value) in self._met or depth > _DEPTH:
            return
        self._met[id(value)] = value
        if isinstance(value, Tensor):
            if value.grad_fn is None and value.layout is torch.strided:
                self._tensors.append((value, where))
        elif isinstance(value, np.ndarray):
            if value.nbytes <= _ARRAY:
                self._arrays.append((value, value.copy(), where))
        elif isinstance(value, Mapping):
            self._take_all(value, value.values, value.keys(), where, depth)
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            self._take_all(value, value.__iter__, repeat(""), where, depth)
        elif not isinstance(value, (nn.Module, Optimizer)) and hasattr(value, "__dict__"):
            self._take(vars(value), where, depth)

    def _take_all(
        self, held: Any, values: Callable[[], Iterable[Any]], keys: Iterable[Any], where: str, depth: int
    ) -> None:
        if not held:
            self._empty.append(held)
            self._empty_at.append(where)
            return
        if len(held) <= _LONG or depth == 0:
            self._held.append((held, values, [_kept(one) for one in values()], where))
            for key, one in zip(keys, list(values()), strict=False):
                if key not in _OWN:
                    named = isinstance(key, str) and not key.startswith("_")
                    self._take(one, f"{key} {where}" if named else where, depth + 1)


def _kept(value: Any) -> Any:
    """``value``, or None for a tensor that would keep the graph of a forward alive."""
    return None if isinstance(value, Tensor) and value.grad_fn is not None else value


def _differs(held: Any, values: Iterable[Any], before: list[Any]) -> str | None:
    """The name of the first of ``values`` that is not equal to what it was; None if all are, which are kept then."""
    now = list(values)
    names: Iterator[Any] = iter(held) if isinstance(held, Mapping) else repeat("an entry")
    if len(now) != len(before):
        return _last(held)
    for i, (name, a, b) in enumerate(zip(names, now, before, strict=False)):
        same = a is b or _kept(a) is b or name in _OWN
        if not (same or (type(a) is type(b) and isinstance(a, _PLAIN) and a == b)):
            return str(name) if isinstance(name, str) else "an entry"
        before[i] = _kept(a)
    return None


def _last(held: Any) -> str:
    """What came last into what has another size."""
    last = list(held)[-1:]
    return last[0] if last and isinstance(last[0], str) else "an entry"


def _content(tensor: Tensor) -> Any:
    return tensor._version, tensor.tolist() if tensor.numel() <= _SHORT else None
