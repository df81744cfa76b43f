"""Nested Python state as JSON data plus tensors that keep its meaning; ``decode`` is the way back.

What JSON can say is said in JSON: None, bool, int, finite float, str, list, dict with string keys. All else
is an object with the key ``"@"``, which names its type: ``{"@": "tuple", "v": [1, 2]}``. Tensors and arrays
are kept apart, by a name that is their path in the state.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopwright.errors import CheckpointError
from loopwright.parallel import is_shard, local
from loopwright.text import with_article

__all__ = ["check", "encode"]

TAG = "@"
DEPTH = 64  # containers within containers; also ends what contains itself
FACTORIES = {"list": list, "dict": dict, "int": int, "float": float, "set": set, "str": str}
NUMPY_KINDS = "biufcSUMm"  # no objects, no records: they may hold anything
_JSON_INT = 2**63  # larger ones as hexadecimal: decimal text of huge numbers is refused by Python itself


def encode(value: Any, where: str = "", *, shards: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """``value`` as JSON data, and its tensors by name; ``where`` is its own name in errors and tensor names.

    The tensors are detached but not copied: write them, or clone them, before the state changes. Tensors that
    are the same memory are named once and stay tied. Sparse COO tensors are coalesced, parameters become
    plain tensors, numpy arrays are kept as their bytes, the device is not kept. Subclasses are refused, since
    what they add would be lost. DTensors are refused as well, unless ``shards`` says that all ranks write together.
    Raises CheckpointError naming the path of a value of unknown type.

    >>> encode({"best": float("inf"), "shape": (2, 3)})
    ({'best': {'@': 'float', 'v': 'inf'}, 'shape': {'@': 'tuple', 'v': [2, 3]}}, {})
    """
    encoder = _Encoder(shards)
    return encoder.encode(value, where, 0), encoder.tensors


def check(value: Any, where: str = "", *, shards: bool = False) -> None:
    """Raise CheckpointError naming the path of the first value that cannot be saved; keeps nothing."""
    encode(value, where, shards=shards)


class _Encoder:
    """Collects the tensors met on the way down."""

    def __init__(self, shards: bool) -> None:
        self.shards = shards
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[Any, str] = {}

    def encode(self, value: Any, where: str, depth: int) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -_JSON_INT <= value < _JSON_INT else {TAG: "int", "v": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {TAG: "float", "v": repr(value)}
        if depth > DEPTH:
            raise CheckpointError(
                f"{where[:200]}... is nested deeper than {DEPTH} levels, or contains itself; it cannot be "
                "saved. Return flat data from state_dict()"
            )
        write = _WRITERS.get(kind)
        if write is not None:
            return write(self, value, where, depth + 1)
        if isinstance(value, Tensor):  # not in the table, since type(parameter) may be a subclass of its own
            return self._tensor(value, where)
        if isinstance(value, np.generic) and value.dtype.kind in NUMPY_KINDS:
            return {TAG: "numpy", "dtype": value.dtype.str, "v": _text(value.tobytes())}
        if isinstance(value, Path):
            return {TAG: "path", "v": str(value)}
        raise _refusal(value, where)

    def items(self, values: Any, where: str, depth: int) -> list[Any]:
        if set(map(type, values)) == {int} and min(values) >= -_JSON_INT and max(values) < _JSON_INT:
            return list(values)  # 624 of them are the state of Python's generator
        return [self.encode(v, f"{where}[{i}]", depth) for i, v in enumerate(values)]

    def pairs(self, value: Mapping[Any, Any], where: str, depth: int) -> list[Any]:
        return [[self.key(k, where, depth), self.encode(v, _inside(where, k), depth)] for k, v in value.items()]

    def mapping(self, value: dict[Any, Any], where: str, depth: int) -> Any:
        if all(type(k) is str for k in value) and TAG not in value:
            return {k: self.encode(v, _inside(where, k), depth) for k, v in value.items()}
        return {TAG: "dict", "v": self.pairs(value, where, depth)}

    def key(self, key: Any, where: str, depth: int) -> Any:
        """A key of a dict or a member of a set: no tensors, which are equal to nothing but themselves."""
        before = len(self.tensors)
        plain = self.encode(key, f"the key {key!r} of {where or 'the state'}", depth)
        if isinstance(key, Tensor) or len(self.tensors) != before:
            raise CheckpointError(
                f"{where or 'the state'} has a tensor as a key or a member of a set, which a copy cannot keep; "
                "use a name or a number"
            )
        return plain

    def default(self, value: defaultdict[Any, Any], where: str, depth: int) -> Any:
        name = next((n for n, f in FACTORIES.items() if f is value.default_factory), None)
        if name is None and value.default_factory is not None:
            raise CheckpointError(
                f"{where} is a defaultdict of {value.default_factory!r}, which cannot be saved; "
                f"use one of {', '.join(FACTORIES)}, or dict(...) in state_dict()"
            )
        return {TAG: "defaultdict", "factory": name, "v": self.pairs(value, where, depth)}

    def _tensor(self, tensor: Tensor, where: str) -> Any:
        if self.shards and is_shard(tensor):
            return {TAG: "tensor", "name": self._keep(tensor.detach(), where)}
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
            raise CheckpointError(
                f"{where} is {with_article(_described(tensor))}, which cannot be saved; "
                "convert it to a plain tensor in state_dict()"
            )
        tensor = tensor.detach()
        if tensor.layout == torch.sparse_coo:
            tensor = tensor.coalesce()
            parts = [
                self._tensor(tensor.indices(), f"{where}.indices"),
                self._tensor(tensor.values(), f"{where}.values"),
            ]
            return {TAG: "sparse_coo", "indices": parts[0], "values": parts[1], "size": list(tensor.shape)}
        if tensor.layout != torch.strided:
            raise CheckpointError(
                f"{where} is a tensor of layout {tensor.layout}, which cannot be saved; use .to_sparse_coo()"
            )
        return {TAG: "tensor", "name": self._keep(tensor, where)}

    def _keep(self, tensor: Tensor, where: str) -> str:
        memory = same_memory(tensor)
        if memory is not None and memory in self._seen:
            return self._seen[memory]
        name = base = where or "value"
        for number in range(2, len(self.tensors) + 3):
            if name not in self.tensors:
                break
            name = f"{base}#{number}"
        self.tensors[name] = tensor
        if memory is not None:
            self._seen[memory] = name
        return name

    def array(self, value: np.ndarray[Any, Any], where: str, depth: int) -> Any:
        if value.dtype.kind not in NUMPY_KINDS:
            raise _refusal(value, where)
        raw = np.frombuffer(value.tobytes(), dtype=np.uint8).copy()
        name = self._keep(torch.from_numpy(raw), where)
        return {TAG: "array", "dtype": value.dtype.str, "shape": list(value.shape), "name": name}


def same_memory(tensor: Tensor) -> Any:
    """A key that two tensors share when they are the same elements in memory; None for an empty one."""
    tensor = local(tensor)
    if not tensor.numel():
        return None
    view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return tensor.device, tensor.data_ptr(), *view


def _inside(where: str, key: Any) -> str:
    return key if not where and isinstance(key, str) and key.isidentifier() else f"{where}[{key!r}]"


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")


def _described(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _refusal(value: Any, where: str) -> CheckpointError:
    shown = _described(value)
    dtype = f" of dtype {value.dtype}" if isinstance(value, (np.ndarray, np.generic)) else ""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        fix = "return value._asdict() instead"
    elif callable(getattr(value, "state_dict", None)):
        fix = "return its state_dict() instead"
    else:
        fix = "return numbers, strings, tensors, and lists, tuples, sets and dicts of them"
    return CheckpointError(
        f"{where or 'the state'} is {with_article(shown)}{dtype}, which cannot be saved in a checkpoint; {fix}"
    )


def _set(name: str) -> Callable[[_Encoder, Any, str, int], Any]:
    def write(encoder: _Encoder, value: Any, where: str, depth: int) -> Any:
        members = [encoder.key(v, where, depth) for v in value]
        return {TAG: name, "v": sorted(members, key=repr)}  # the same set gives the same bytes

    return write


# a type, and how its values are written
_WRITERS: dict[type, Callable[[_Encoder, Any, str, int], Any]] = {
    list: _Encoder.items,
    dict: _Encoder.mapping,
    tuple: lambda e, v, w, d: {TAG: "tuple", "v": e.items(v, w, d)},
    OrderedDict: lambda e, v, w, d: {TAG: "OrderedDict", "v": e.pairs(v, w, d)},
    Counter: lambda e, v, w, d: {TAG: "Counter", "v": e.pairs(v, w, d)},
    defaultdict: _Encoder.default,
    deque: lambda e, v, w, d: {TAG: "deque", "v": e.items(v, w, d), "maxlen": v.maxlen},
    set: _set("set"),
    frozenset: _set("frozenset"),
    bytes: lambda e, v, w, d: {TAG: "bytes", "v": _text(v)},
    complex: lambda e, v, w, d: {TAG: "complex", "v": e.items((v.real, v.imag), w, d)},
    range: lambda e, v, w, d: {TAG: "range", "v": e.items((v.start, v.stop, v.step), w, d)},
    np.ndarray: _Encoder.array,
    torch.Size: lambda e, v, w, d: {TAG: "Size", "v": list(v)},
    torch.dtype: lambda e, v, w, d: {TAG: "dtype", "v": str(v).removeprefix("torch.")},
    torch.device: lambda e, v, w, d: {TAG: "device", "v": str(v)},
}
