"""What a batch is made of, and which data it came from: plain data that a checkpoint keeps and a later run compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from loopwright.errors import DataError

__all__ = ["AS_TRAINED", "Leaf", "Schema", "other_sizes", "schema_of"]

AS_TRAINED = "Make this data as the training data was made, or train on data like this"

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SHOWN = 5  # differences that one error lists


@dataclass(frozen=True, slots=True)
class Leaf:
    """One part of a batch. ``shape``: None in it is any number; None as a whole is no array, or any shape."""

    dtype: str
    shape: tuple[int | None, ...] | None = None
    always: bool = True  # False: some batches of training did not have it

    def __str__(self) -> str:
        return self.dtype if self.shape is None else f"{self.dtype} {_shown(self.shape)}"

    def including(self, other: Leaf) -> Leaf:
        """What fits both."""
        a, b = self.shape, other.shape
        same_dim = a is not None and b is not None and len(a) == len(b)
        shape = tuple(x if x == y else None for x, y in zip(a, b, strict=True)) if a and b and same_dim else None
        return Leaf(
            self.dtype if self.dtype == other.dtype else "any", a if a == b else shape, self.always and other.always
        )


@dataclass(frozen=True, slots=True)
class Schema:
    """Names, dtypes and shapes of a batch; the first dimension, which counts the samples, is free.

    ``leaves`` maps the path of each part, such as ``"['image']"`` or ``"[0]"``, to its ``Leaf``. Tuples and lists are
    the same. A list of numbers or texts is one leaf of any length; so are three or more arrays alike but in shape,
    as an own collate function gives for images of several sizes.

    >>> import torch
    >>> schema = schema_of({"image": torch.zeros(8, 3, 32, 32), "label": torch.zeros(8, dtype=torch.int64)})
    >>> print(schema)
    batch['image']: torch.float32 (any, 3, 32, 32)
    batch['label']: torch.int64 (any)
    >>> schema.differences({"image": torch.zeros(2, 3, 32, 32).double(), "label": torch.zeros(2, dtype=torch.int64)})
    ["batch['image'] has dtype torch.float64, and the model was trained on torch.float32"]
    """

    leaves: Mapping[str, Leaf] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            path: {"dtype": leaf.dtype, "shape": None if leaf.shape is None else list(leaf.shape)}
            | ({} if leaf.always else {"always": False})
            for path, leaf in self.leaves.items()
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Schema:
        """The schema that ``as_dict`` described."""
        return cls(
            {
                path: Leaf(one["dtype"], None if one["shape"] is None else tuple(one["shape"]), one.get("always", True))
                for path, one in saved.items()
            }
        )

    def including(self, batch: Any) -> Schema:
        """This schema, with all free that differs in ``batch``: for batches whose lengths vary.

        >>> import torch
        >>> print(schema_of(torch.zeros(4, 7)).including(torch.zeros(4, 9)))
        batch: torch.float32 (any, any)
        """
        other = schema_of(batch).leaves
        if other == self.leaves:
            return self
        merged = {}
        for path in {**self.leaves, **other}:
            known = [leaves[path] for leaves in (self.leaves, other) if path in leaves]
            merged[path] = known[0].including(known[1]) if len(known) == 2 else replace(known[0], always=False)
        return Schema(merged)

    def differences(self, batch: Any, where: str = "batch", *, partial: bool = False) -> list[str]:
        """In words, what of ``batch`` does not fit; empty if all does. ``where`` is what the batch is called.

        ``partial``: only what both have is compared, and the batch may be the first part alone: for prediction, where
        targets are left out.
        """
        found = schema_of(batch).leaves
        if found == self.leaves:
            return []
        pairs = _pairs(found, self.leaves, partial)
        own = {path: self.leaves.get(name) for path, name in pairs.items()}
        told = [
            f"{where}{p} {_differs(found[p], leaf)}" for p, leaf in own.items() if leaf and _differs(found[p], leaf)
        ]
        if partial and any(own.values()):
            return told
        told += [
            f"{where}{path} is missing; the model was trained on {leaf}"
            for path, leaf in self.leaves.items()
            if path not in pairs.values() and leaf.always
        ]
        told += [
            f"{where}{path} ({found[path]}) is new; it was not there when the model was trained"
            for path, leaf in own.items()
            if leaf is None
        ]
        return told

    def check(self, batch: Any, where: str = "batch", *, partial: bool = False) -> None:
        """Raise DataError with the ``differences``, if there are any."""
        told = self.differences(batch, where, partial=partial)
        if told:
            more = f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
            raise DataError(f"{'; '.join(told[:_SHOWN])}{more}. {AS_TRAINED}")

    def loose(self) -> Schema:
        """This schema with every size free: dtypes, names and numbers of dimensions are left."""
        free = {p: replace(leaf, shape=leaf.shape and (None,) * len(leaf.shape)) for p, leaf in self.leaves.items()}
        return Schema(free)

    def __str__(self) -> str:
        return "\n".join(
            f"batch{path}: {leaf}{'' if leaf.always else ', not in every batch'}" for path, leaf in self.leaves.items()
        )


def schema_of(batch: Any) -> Schema:
    """Names, dtypes and shapes of ``batch``: no value is read, so that nothing waits for a device.

    Raises no error: what is no tensor and no array counts by the name of its type.
    """
    return Schema(dict(_leaves(batch, "")))


def other_sizes(schema: Schema, batch: Any, where: str = "batch") -> list[str]:
    """In words, which sizes of ``batch`` are others than those of ``schema``, whatever its dtypes; it may be a part.

    >>> import torch
    >>> other_sizes(schema_of(torch.zeros(8, 3)), torch.zeros(2, 4).double())
    ['batch has shape (any, 4), and the model was trained on (any, 3)']
    """
    found = schema_of(batch).leaves
    own = {path: schema.leaves.get(name) for path, name in _pairs(found, schema.leaves, partial=True).items()}
    told = {path: leaf and _differs(found[path], replace(leaf, dtype="any")) for path, leaf in own.items()}
    return [f"{where}{path} {one}" for path, one in told.items() if one]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Leaf]]:
    if isinstance(value, Tensor) or (hasattr(value, "dtype") and hasattr(value, "shape")):
        yield path, _array(value)
    elif isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{path}[{key!r}]")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name, part in zip(value._fields, value, strict=True):
            yield from _leaves(part, f"{path}.{name}")
    elif isinstance(value, (list, tuple)) and value:
        yield from _sequence(value, path)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            yield from _leaves(getattr(value, one.name), f"{path}.{one.name}")
    else:
        yield path, Leaf(type(value).__name__)


def _array(value: Any) -> Leaf:
    kind = str(value.dtype)
    try:
        sizes = tuple(n if isinstance(n, int) else None for n in value.shape)  # a nested tensor has no number there
    except RuntimeError:
        return Leaf(kind)
    return Leaf(kind if isinstance(value, Tensor) else f"numpy.{kind}", (None, *sizes[1:]) if sizes else ())


def _sequence(value: Any, path: str) -> Iterator[tuple[str, Leaf]]:
    kinds = {type(part) for part in value}
    if len(kinds) == 1 and kinds <= set(_PLAIN):
        yield path, Leaf(f"list of {kinds.pop().__name__}")
        return
    if len(value) > 2 and _is_ragged(value):
        one = _array(value[0])
        for part in value[1:]:
            one = one.including(_array(part))
        yield f"{path}[*]", one
        return
    for i, part in enumerate(value):
        yield from _leaves(part, f"{path}[{i}]")


def _is_ragged(parts: Any) -> bool:
    """Samples that could not be stacked, and not columns: columns of a batch have the same first dimension."""
    if not all(isinstance(part, Tensor) and not part.is_nested for part in parts):
        return False
    alike = len({(part.dtype, part.dim()) for part in parts}) == 1 and parts[0].dim() > 0
    return alike and (parts[0].dim() == 3 or len({part.size(0) for part in parts}) > 1)


def _pairs(found: Mapping[str, Leaf], own: Mapping[str, Leaf], partial: bool) -> dict[str, str]:
    """By the path of each part of a batch, its path in the schema, where there may be none."""
    take, put = _step(found, own) if partial else ("", "")
    return {path: (path.removeprefix(take) if take else put + path) for path in found}


def _step(found: Mapping[str, Leaf], own: Mapping[str, Leaf]) -> tuple[str, str]:
    """What to take from, and to put before, the paths of a batch so that they meet those of the schema."""
    if found.keys() & own.keys():
        return "", ""
    if any("[0]" + path in own for path in found):
        return "", "[0]"
    return ("[0]", "") if any(path.removeprefix("[0]") in own for path in found) else ("", "")


def _differs(found: Leaf, own: Leaf) -> str:
    if own.dtype not in ("any", found.dtype):
        kind = "dtype " if found.shape is not None and own.shape is not None else ""
        return f"has {kind or 'type '}{found.dtype}, and the model was trained on {own.dtype}"
    if own.shape is None or found.shape is None or _fits(found.shape, own.shape):
        return ""
    return f"has shape {_shown(found.shape)}, and the model was trained on {_shown(own.shape)}"


def _fits(found: tuple[int | None, ...], own: tuple[int | None, ...]) -> bool:
    return len(found) == len(own) and all(None in pair or pair[0] == pair[1] for pair in zip(found, own, strict=True))


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if n is None else str(n) for n in shape)})"
