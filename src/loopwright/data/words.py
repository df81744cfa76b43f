"""Values in a few words: types, shapes and ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["count", "is_like_a_sample", "parts_of"]


def count(number: int, what: str) -> str:
    """A number of things.

    >>> count(1, "batch"), count(1200, "batch")
    ('1 batch', '1,200 batches')
    """
    plural = what if number == 1 else f"{what}es" if what.endswith("ch") else f"{what}s"
    return f"{number:,} {plural}"


def parts_of(value: Any) -> dict[str, str]:
    """Type, shape and range of each part of a nested value by its path; of the first 40.

    >>> parts_of((np.array([[0.5, 2.0]]), 7))
    {'[0]': 'float64 (1, 2), 0.5 to 2', '[1]': 'int 7'}
    """
    return dict(islice(_described(value, ""), 40))


def is_like_a_sample(value: Any) -> bool:
    """True for what has a single number in it, or is a text: batches have one for each of their samples.

    >>> is_like_a_sample({"x": np.ones(3), "label": 1}), is_like_a_sample((np.ones((4, 3)), np.ones(4)))
    (True, False)
    """
    if isinstance(value, (list, tuple, Mapping)):
        parts = list(value.values()) if isinstance(value, Mapping) else value
        plain = isinstance(value, list) and all(isinstance(part, (str, int, float)) for part in parts)  # a column
        return not plain and any(map(is_like_a_sample, parts))
    return isinstance(value, (str, int, float)) or getattr(value, "ndim", 1) == 0


def _described(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _described(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)) and value and not all(isinstance(part, (str, int, float)) for part in value):
        for i, part in enumerate(value[:8]):
            yield from _described(part, f"{path}[{i}]")
        if len(value) > 8:
            yield f"{path}[...]", f"{len(value)} in all"
    else:
        yield path, _words(value)


def _words(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        kind = str(value.dtype).removeprefix("torch.")
        shape = f" ({', '.join(map(str, value.shape))})" if value.ndim else ""
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            return f"{str(value.layout).removeprefix('torch.').replace('_', ' ')} {kind}{shape}"
        return f"{kind}{shape}{_range(value)}"
    if hasattr(value, "mode") and hasattr(value, "size") and hasattr(value, "getbands"):
        return f"{value.mode} image of {value.size[0]} x {value.size[1]} pixels"
    text = repr(value)
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{type(value).__name__} {shown}" if " object at 0x" not in text else type(value).__name__


def _range(value: Any) -> str:
    flat = value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        flat = (value.float() if value.is_floating_point() and value.dtype.itemsize < 4 else value).numpy()
    if flat.size == 0 or flat.dtype.kind not in "biuf":
        return ", empty" if flat.size == 0 else ""
    if flat.dtype.kind == "b":
        return f", {int(flat.sum()):,} of {flat.size:,} true"
    finite = flat[np.isfinite(flat)] if flat.dtype.kind == "f" else flat
    bad = f", {flat.size - finite.size:,} not finite" if finite.size < flat.size else ""
    if not finite.size:
        return bad
    low, high = finite.min(), finite.max()
    if low == high:
        return f", {'all ' if flat.size > 1 else ''}{low:.4g}{bad}"
    return f", {low:.4g} to {high:.4g}{bad}"
