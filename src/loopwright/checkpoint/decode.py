"""The way back from JSON data plus tensors to nested Python state.

It makes values of the types listed at the end and of no others, so that reading a file never runs code.
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
from torch import Tensor

from loopwright.checkpoint.encode import DEPTH, FACTORIES, NUMPY_KINDS, TAG
from loopwright.errors import CheckpointError, choose

__all__ = ["decode"]


def decode(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that ``encode`` was given, from its JSON data and its tensors (handed out as they are).

    Raises CheckpointError for an unknown tag, a malformed value, a missing tensor, or data nested deeper than
    ``encode`` writes.

    >>> decode({"@": "tuple", "v": [1, {"@": "float", "v": "nan"}]}, {})
    (1, nan)
    """
    return _decode(plain, dict(tensors), 0)  # a copy, for arrays are taken out of it


def _decode(plain: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > DEPTH + 2:  # a key may be one level deeper than its dict
        raise CheckpointError(
            f"the state of this checkpoint is nested deeper than {DEPTH} levels: it is damaged or forged"
        )
    if isinstance(plain, list):
        return [_decode(v, tensors, depth + 1) for v in plain]
    if not isinstance(plain, dict):
        return plain
    if TAG not in plain:
        return {k: _decode(v, tensors, depth + 1) for k, v in plain.items()}
    tag = plain[TAG]
    read = _READERS.get(tag) if isinstance(tag, str) else None
    if read is None:
        raise CheckpointError(
            f"the state of this checkpoint has a value of the unknown type {tag!r}; it may come from a newer "
            f"version of Loopwright. {choose(tag, _READERS)}"
        )
    try:
        return read(plain, lambda v: _decode(v, tensors, depth + 1), tensors)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the state of this checkpoint has a malformed value of type {tag!r} ({type(error).__name__}: {error})"
        ) from error


Into = Callable[[Any], Any]
_Reader = Callable[[dict[str, Any], Into, dict[str, Tensor]], Any]


def _list(node: dict[str, Any], into: Into) -> list[Any]:
    return [into(v) for v in node["v"]]


def _pairs(node: dict[str, Any], into: Into) -> list[tuple[Any, Any]]:
    return [(into(k), into(v)) for k, v in node["v"]]


def _counter(node: dict[str, Any], into: Into, tensors: dict[str, Tensor]) -> Counter[Any]:
    counter: Counter[Any] = Counter()
    for key, value in _pairs(node, into):
        counter[key] = value
    return counter


def _numpy_dtype(text: str) -> np.dtype[Any]:
    dtype = np.dtype(text)
    if dtype.kind not in NUMPY_KINDS or dtype.str != text:
        raise ValueError(f"numpy dtype {text!r}")
    return dtype


def _numpy_scalar(node: dict[str, Any], into: Into, tensors: dict[str, Tensor]) -> Any:
    raw, dtype = base64.b64decode(node["v"], validate=True), _numpy_dtype(node["dtype"])
    if not dtype.itemsize:  # an empty string has no bytes to read
        return dtype.type()
    return np.frombuffer(raw, dtype=dtype, count=1)[0]


def _array(node: dict[str, Any], into: Into, tensors: dict[str, Tensor]) -> Any:
    dtype, raw = _numpy_dtype(node["dtype"]), _tensor(node, into, tensors).numpy()
    del tensors[node["name"]]  # each array has its bytes to itself: to ask for the same ones again and again is forged
    return np.ndarray(node["shape"], dtype=dtype, buffer=raw)


def _tensor(node: dict[str, Any], into: Into, tensors: dict[str, Tensor]) -> Tensor:
    name = node["name"]
    if name not in tensors:
        raise CheckpointError(f"the tensor {name!r} is not in this checkpoint. {choose(name, tensors)}")
    return tensors[name]


def _sparse(node: dict[str, Any], into: Into, tensors: dict[str, Tensor]) -> Tensor:
    indices, values = into(node["indices"]), into(node["values"])
    return torch.sparse_coo_tensor(indices, values, node["size"], check_invariants=True, is_coalesced=True)


def _dtype(node: dict[str, Any], into: Into, tensors: dict[str, Tensor]) -> torch.dtype:
    dtype = vars(torch).get(node["v"])  # getattr would import what a file names
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch has no dtype {node['v']!r}")
    return dtype


def _deque(node: dict[str, Any], into: Into, tensors: dict[str, Tensor]) -> deque[Any]:
    return deque(_list(node, into), maxlen=node["maxlen"])


def _default(node: dict[str, Any], into: Into, tensors: dict[str, Tensor]) -> defaultdict[Any, Any]:
    factory = None if node["factory"] is None else FACTORIES[node["factory"]]
    return defaultdict(factory, _pairs(node, into))


# a tag, and how its value is read
_READERS: dict[str, _Reader] = {
    "int": lambda n, into, t: int(n["v"], 16),
    "float": lambda n, into, t: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[n["v"]],
    "tuple": lambda n, into, t: tuple(_list(n, into)),
    "dict": lambda n, into, t: dict(_pairs(n, into)),
    "OrderedDict": lambda n, into, t: OrderedDict(_pairs(n, into)),
    "Counter": _counter,
    "defaultdict": _default,
    "deque": _deque,
    "set": lambda n, into, t: set(_list(n, into)),
    "frozenset": lambda n, into, t: frozenset(_list(n, into)),
    "bytes": lambda n, into, t: base64.b64decode(n["v"], validate=True),
    "complex": lambda n, into, t: complex(*_list(n, into)),
    "range": lambda n, into, t: range(*_list(n, into)),
    "array": _array,
    "numpy": _numpy_scalar,
    "path": lambda n, into, t: Path(n["v"]),
    "Size": lambda n, into, t: torch.Size(n["v"]),
    "dtype": _dtype,
    "device": lambda n, into, t: torch.device(n["v"]),
    "tensor": _tensor,
    "sparse_coo": _sparse,
}
