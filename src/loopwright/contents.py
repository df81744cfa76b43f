"""What objects hold and what their code does, as bytes for a digest: the same in every process."""

from __future__ import annotations

import dis
import functools
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from loopwright.bodies import closed_over, code_of, names_in
from loopwright.data import fingerprint
from loopwright.data.generators import OF_MODULES
from loopwright.events import Callback
from loopwright.provenance import is_own
from loopwright.state import Run, Stage, has_state

__all__ = ["Contents", "contents"]

_DEPTH = 100
_LONG, _SAMPLE, _BYTES = 10_000, 1000, 2**26  # of longer lists and larger arrays a sample is looked at
_PLAIN = (bool, int, float, complex, str, bytes, PurePath, types.NoneType)
_APART = (Run, Stage, Optimizer, LRScheduler, types.ModuleType)  # told by themselves, or by what is read of them
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OF_CLASSES = frozenset(dir(type("", (), {}))) | {"__annotations__", "__doc__", "__firstlineno__", "__module__"}


class Contents:
    """Objects that were told already, which are told by their number when they come again."""

    def __init__(self) -> None:
        self._met: dict[int, tuple[str, Any]] = {}  # kept, since the next object could have the same id
        self._told = 0

    def leave(self, value: Any, name: str) -> None:
        """Do not look into ``value``, which is told elsewhere; it is told by ``name``."""
        self._met.setdefault(id(value), (name, value))

    def of(self, value: Any, depth: int = 0) -> Iterator[bytes]:
        """``value``, all that hangs on it, and the code of the user's functions and classes among that.

        Of objects of the user's classes also what is private; of others what is not. What a callback gives as its state
        is left out.
        """
        if isinstance(value, _PLAIN):
            yield f"{type(value).__name__}:{value!r};".encode()
        elif depth > _DEPTH or isinstance(value, _APART):
            yield f"<{type(value).__qualname__}>;".encode()
        elif id(value) in self._met:
            yield f"<{self._met[id(value)][0]}>;".encode()
        else:
            self._met[id(value)] = str(self._told), value
            self._told += 1
            yield f"<{type(value).__module__}.{type(value).__qualname__} ".encode()
            if isinstance(value, (Tensor, np.ndarray)):
                yield from _array(value)
            for part in _parts(value):
                yield from self.of(part, depth + 1)
            yield b">;"


def contents(value: Any) -> list[bytes]:
    """``value`` alone.

    >>> contents({"a": [1, 2.0]}) == contents({"a": [1, 2.0]}), contents(nn.Dropout(0.1)) == contents(nn.Dropout(0.2))
    (True, False)
    """
    return list(Contents().of(value))


def _parts(value: Any) -> Iterator[Any]:
    """What an object is made of."""
    if isinstance(value, (Tensor, np.ndarray)):
        return
    if isinstance(value, Mapping):
        for name, part in _sampled(list(value.items())):
            yield from (str(name), part)
    elif isinstance(value, (list, tuple)):
        yield from _sampled(value)
    elif isinstance(value, (set, frozenset)):
        yield sorted(map(_shown, value))  # their own order changes from process to process
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}"
        for kind in (one for one in value.__mro__ if is_own(one.__module__)):
            yield from _named({name: part for name, part in vars(kind).items() if name not in _OF_CLASSES})
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, (property, staticmethod, classmethod)):
        yield from (getattr(value, name, None) for name in ("__func__", "fget", "fset"))
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    else:
        yield from _of_object(value)


def _sampled(values: Sequence[Any]) -> Iterator[Any]:
    if len(values) > _LONG:
        yield len(values)
    yield from values if len(values) <= _LONG else values[:: len(values) // _SAMPLE]


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    """Its code where that is the user's, and what it has by default, has closed over, and reads of its module."""
    yield from (function.__qualname__, function.__defaults__, function.__kwdefaults__)
    yield from (closed_over(function), getattr(function, "__wrapped__", None))
    if not is_own(function.__module__) and not is_own(function.__globals__.get("__name__", "")):
        return
    yield code_of(function)
    names = names_in(function.__code__)
    for name in sorted(_names_of_globals(function.__code__)):
        used = function.__globals__.get(name)
        if isinstance(used, types.ModuleType) and is_own(used.__name__):  # helpers.scale, helpers.noise(x)
            yield from _named({one: vars(used)[one] for one in names & vars(used).keys()})
        else:
            yield from (name, used)


def _names_of_globals(code: types.CodeType) -> set[str]:
    found = {str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(_names_of_globals(one) for one in code.co_consts if isinstance(one, types.CodeType)))


def _of_object(value: Any) -> Iterator[Any]:
    """Of an object that is no container: its class, if that is the user's, and its attributes."""
    kind = type(value)
    own = is_own(kind.__module__)
    if own:
        yield kind
    held = {**getattr(value, "__dict__", {})}
    held |= {name: getattr(value, name, None) for one in kind.__mro__ for name in _slots(one)} if own else {}
    if isinstance(value, nn.Module):
        held = {name: part for name, part in held.items() if name not in OF_MODULES}
        held |= {**value._parameters, **value._buffers, **value._modules}
        yield [[*getattr(value, hooks).values()] for hooks in _HOOKS]
    elif not own and (callable(value) or not held):
        yield getattr(value, "__qualname__", None) or _shown(value)
    kept = value.state_dict() if isinstance(value, Callback) and has_state(value) else {}
    yield from _named({
        name: part for name, part in held.items()
        if (own or not name.startswith("_")) and name.lstrip("_") not in kept
    })  # fmt: skip


def _slots(kind: type) -> tuple[str, ...]:
    said = getattr(kind, "__slots__", ()) if is_own(kind.__module__) else ()
    names = (said,) if isinstance(said, str) else tuple(said)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _named(parts: Mapping[str, Any]) -> Iterator[Any]:
    for name in sorted(parts):
        yield from (name, parts[name])


def _array(value: Any) -> Iterator[bytes]:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        yield _shown(value.tolist() if value.dtype.hasobject else value.tobytes()).encode()
        return
    if isinstance(value, Tensor) and (value.is_meta or value.layout is not torch.strided or value.is_quantized):
        yield _shown(value).encode()
        return
    if value.nbytes > _BYTES:
        yield str(fingerprint(value)).encode()
        return
    torchs = isinstance(value, Tensor)
    held = value.detach().cpu().resolve_conj().contiguous() if torchs else np.ascontiguousarray(value)
    yield f"{held.dtype}{tuple(held.shape)};".encode()
    if isinstance(held, Tensor):
        held = held.reshape(-1).view(torch.uint8).numpy() if held.numel() else np.empty(0)
    yield held.tobytes()


def _shown(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
