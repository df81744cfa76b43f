"""Random generators as plain data that can be compared: the global ones, and those that objects carry."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from loopwright import rng

__all__ = ["OF_MODULES", "Streams", "find_on_modules", "get_globals", "kept", "set_globals", "streams_of"]

State = dict[str, Any]
_KINDS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_DEPTH, _WIDTH = 6, 32  # how deep and how wide objects are searched for generators
_LEAVES = (torch.Tensor, np.ndarray, type, str, bytes, int, float, Optimizer, type(None))
_PLAIN = frozenset((bool, int, float, str, type(None), torch.Tensor, nn.Parameter))
_OF_TORCH = "__composable_api_"  # what FSDP and the like keep on a module: no generator of the user's
# what torch and this package keep on modules: children are modules themselves, hooks are told elsewhere
OF_MODULES = frozenset({*vars(nn.Module()), "_run", "_trained_on", "_made_at", "_compared"})


def get_globals() -> State:
    """State of the global generators as bytes and numbers: can be compared, and sent from a worker without a copy.

    >>> before = get_globals()
    >>> drawn = torch.rand(2), random.random(), np.random.rand()
    >>> get_globals() == before
    False
    >>> set_globals(before); get_globals() == before
    True
    """
    return {name: _pack(state) for name, state in rng.get().items()}


def set_globals(state: Mapping[str, Any]) -> None:
    """Put back what ``get_globals`` returned, or a part of it."""
    rng.set({**rng.get(), **{name: _unpack(packed) for name, packed in state.items()}})


def find_generators(roots: Mapping[str, object]) -> dict[str, Any]:
    """Generators held by ``roots`` and by what hangs on their attributes, by a path such as ``"dataset.rng"``.

    A generator that hangs on several paths is given once, under the first.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    level: list[tuple[str, object]] = list(roots.items())
    for _ in range(_DEPTH):
        below: list[tuple[str, object]] = []
        for path, value in level:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, _KINDS) and not isinstance(value, random.SystemRandom):
                found[path] = value
            else:
                below.extend(_parts(path, value))
        level = below
    return found


def find_on_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """Generators that hang on attributes of ``modules``; on each of them alone, its children are not visited."""
    roots = _roots((str(i), module) for i, module in enumerate(modules))
    return list(find_generators(roots).values()) if roots else []


def streams_of(models: Mapping[str, Any]) -> Streams:
    """The generators that hang on attributes of modules, by model, module and attribute.

    >>> net = nn.Linear(1, 1)
    >>> net.noise = torch.Generator()
    >>> list(streams_of({"model": nn.Sequential(net)}).get_found())
    ['model.0.noise']
    """
    named = [(name, model) for name, model in models.items() if isinstance(model, nn.Module)]
    return Streams(
        _roots((f"{n}.{path}".rstrip("."), one) for n, model in named for path, one in model.named_modules())
    )


def _roots(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, object]:
    return {
        f"{path}.{name}": value
        for path, module in modules
        for name, value in vars(module).items()
        if name not in OF_MODULES and type(value) not in _PLAIN and not name.startswith(_OF_TORCH)
    }


@contextmanager
def kept(generators: Iterable[Any]) -> Iterator[None]:
    """Leave ``generators`` afterwards as they were before, whatever is drawn inside, also after an exception.

    >>> generator = random.Random(0)
    >>> with kept([generator]):
    ...     inside = generator.random()
    >>> generator.random() == inside
    True
    """
    states = [(generator, _get(generator)) for generator in generators]
    try:
        yield
    finally:
        for generator, state in states:
            _set(generator, state)


def _parts(path: str, value: object) -> Iterable[tuple[str, object]]:
    if isinstance(value, _LEAVES):
        return ()
    if isinstance(value, (list, tuple)):
        return [(f"{path}[{i}]", part) for i, part in enumerate(value[:_WIDTH])]
    if isinstance(value, dict):
        return [(f"{path}[{k!r}]", part) for k, part in list(value.items())[:_WIDTH]]
    held = getattr(value, "__dict__", None)
    return [(f"{path}.{k}", part) for k, part in list(held.items())] if isinstance(held, dict) else ()


class Streams:
    """The global generators together with those that hang on ``roots``, which are looked for anew at every call.

    A generator that has gone, or has come since its state was taken, is left alone.

    >>> streams = Streams({"dataset": {"rng": random.Random(0)}})
    >>> list(streams.get_found())
    ["dataset['rng']"]
    """

    def __init__(self, roots: Mapping[str, object]) -> None:
        self.roots = roots

    def get(self, *, only_torch: bool = False) -> State:
        """``only_torch`` leaves out the others, which cost fifty times as much, where nobody draws from them."""
        known = {"torch": _pack(torch.get_rng_state())} if only_torch else get_globals()
        return {"globals": known, "found": self.get_found()}

    def set(self, state: Mapping[str, Any]) -> None:
        set_globals(state["globals"])
        self.set_found(state["found"])

    def find(self) -> dict[str, Any]:
        """The generators on ``roots``, by path."""
        return find_generators(self.roots) if self.roots else {}

    def get_found(self) -> State:
        return {path: _get(generator) for path, generator in self.find().items()}

    def set_found(self, states: Mapping[str, Any]) -> None:
        found = self.find()
        for path, state in states.items():
            if path in found:
                _set(found[path], state)


def _get(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return _pack(generator.get_state())
    if isinstance(generator, np.random.Generator):
        return _pack(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return _pack(generator.get_state(legacy=False))
    return _pack(generator.getstate())


def _set(generator: Any, packed: Any) -> None:
    state = _unpack(packed)
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


def _pack(value: Any) -> Any:
    """The same tree, with tensors, arrays and the 625 words of ``random`` as bytes."""
    if isinstance(value, torch.Tensor):
        return {"tensor": value.cpu().numpy().tobytes()}
    if isinstance(value, np.ndarray):
        return {"array": value.tobytes(), "dtype": value.dtype.str}
    if isinstance(value, tuple) and len(value) > 64:
        return {"words": array("I", value).tobytes()}
    if isinstance(value, Mapping):
        return {k: _pack(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_pack(v) for v in value)
    return value.item() if isinstance(value, np.generic) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, Mapping):
        if "tensor" in value:
            return torch.frombuffer(bytearray(value["tensor"]), dtype=torch.uint8)
        if "array" in value:
            return np.frombuffer(value["array"], dtype=value["dtype"]).copy()
        if "words" in value:
            return tuple(array("I", value["words"]))
        return {k: _unpack(v) for k, v in value.items()}
    return type(value)(_unpack(v) for v in value) if isinstance(value, (list, tuple)) else value
