"""Why samples cannot be put together into a batch, and how to mend it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loopwright.data.schema import Leaf, schema_of

__all__ = ["diagnose"]

_STACKED = ("int", "float", "str", "bytes", "bool", "complex")


def diagnose(found: list[Any], indices: Sequence[Any], error: Exception, *, default: bool) -> tuple[str, str]:
    """In words, why ``collate`` raised ``error`` for the samples ``found``, and what to do about it.

    >>> import torch
    >>> problem, fix = diagnose([torch.zeros(3), torch.zeros(5)], [0, 1], ValueError(), default=True)
    >>> problem
    'sample 0 has shape (3), sample 1 has shape (5)'
    """
    nothing = [index for index, one in zip(indices, found, strict=False) if one is None]
    if nothing:
        return _told("is None", nothing), (
            "leave such samples out where the dataset is made, or in the batch: "
            "collate_fn=lambda samples: default_collate([s for s in samples if s is not None])"
        )
    schemas = [_leaves(one) for one in found]
    for at in range(1, len(found)):
        why = _differ(schemas[0], schemas[at], indices[0], indices[at])
        if why is not None:
            return why
    for path, leaf in schemas[0].items():
        if default and leaf.shape is None and leaf.dtype.removeprefix("list of ") not in _STACKED:
            return f"{_at(path)}is {_article(leaf.dtype)}, which has no default way to be stacked", (
                "turn it into a tensor in the dataset (an image: torchvision's pil_to_tensor, or torch.as_tensor("
                "np.asarray(image))), leave it out, or pass a collate_fn that keeps it in a list"
            )
    return f"{type(error).__name__}: {error}", "the samples are alike; see what the collate function makes of them"


def _leaves(sample: Any) -> dict[str, Leaf]:
    """As of a batch of one, whose first dimension is not free."""
    leaves = {}
    for path, leaf in schema_of(sample).leaves.items():
        value = _value(sample, path) if leaf.shape else None
        leaves[path] = leaf if value is None else Leaf(leaf.dtype, tuple(value.shape))
    return leaves


def _value(sample: Any, path: str) -> Any:
    """What stands at a path that ``schema_of`` gave; None where it is one of many."""
    for part in _walk(sample, ""):
        if part[0] == path:
            return part[1]
    return None


def _walk(value: Any, path: str) -> Any:
    yield path, value
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _walk(part, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", None)
        for i, part in enumerate(value):
            yield from _walk(part, f"{path}.{names[i]}" if names else f"{path}[{i}]")


def _differ(first: dict[str, Leaf], other: dict[str, Leaf], a: Any, b: Any) -> tuple[str, str] | None:
    for path in {**first, **other}:
        if path not in first or path not in other:
            with_, without = (a, b) if path in first else (b, a)
            return f"sample {with_} has {path or 'a value'}, and sample {without} does not", (
                "give every sample the same entries, with a default where there is nothing, or pass a collate_fn"
            )
        one, two = first[path], other[path]
        if one.shape != two.shape:
            shapes = (f"of shape {_shape(leaf)}" if path else f"has shape {_shape(leaf)}" for leaf in (one, two))
            return f"sample {a} {'has ' * bool(path)}{_at(path)}{next(shapes)}, sample {b} {next(shapes)}", _mend(
                one, two
            )
        if one.dtype != two.dtype:
            return f"sample {a} has {_at(path)}of type {one.dtype}, sample {b} of type {two.dtype}", (
                "give every sample the same type"
            )
    return None


def _mend(one: Leaf, two: Leaf) -> str:
    a, b = one.shape or (), two.shape or ()
    if len(a) == len(b) == 3:
        return (
            "bring all images to one size, as with torchvision's Resize((height, width)) or a crop of fixed size in "
            "the transform; or keep them in a list, collate_fn=lambda samples: samples, and tell fit how many: "
            "weight=len"
        )
    if len(a) == len(b) and a[1:] == b[1:]:
        return (
            "pad the batch to its longest sample in a collate_fn, with torch.nn.utils.rnn.pad_sequence(..., "
            "batch_first=True), and keep the lengths; or cut or pad all to one length in the dataset"
        )
    return "give all samples one shape in the dataset, or pass a collate_fn that pads them or keeps them in a list"


def _told(what: str, indices: list[Any]) -> str:
    shown = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
    return f"sample{'s' * (len(indices) > 1)} {shown} {what.replace('is', 'are') if len(indices) > 1 else what}"


def _at(path: str) -> str:
    return f"{path} " if path else ""


def _shape(leaf: Leaf) -> str:
    return "none" if leaf.shape is None else f"({', '.join(map(str, leaf.shape))})"


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
