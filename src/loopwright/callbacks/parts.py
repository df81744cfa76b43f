"""Parts of a batch, taken by key or position, and a batch with other ones in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopwright.errors import DataError, choose
from loopwright.events import describe

__all__ = ["Key", "floats", "part", "with_parts"]

Key = int | str


def part(batch: Any, key: Key, who: str) -> Any:
    """The part of ``batch`` at ``key``. Raises DataError where there is none."""
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError):
        known = list(batch) if isinstance(batch, Mapping) else range(len(batch) if hasattr(batch, "__len__") else 0)
        raise DataError(f"{who} looks for {key!r} in a batch {describe(batch)}. {choose(key, known)}") from None


def floats(batch: Any, key: Key, who: str) -> Tensor:
    """The same, a floating tensor with a dimension for the samples. Raises DataError for anything else."""
    found = part(batch, key, who)
    if not isinstance(found, Tensor) or not found.is_floating_point() or not found.dim():
        raise DataError(
            f"{who} needs floating inputs, a sample in each row; {key!r} of the batch is {describe(found)}. Convert it "
            "in the dataset, or in lw.BatchTransform before"
        )
    return found


def with_parts(batch: Any, parts: Mapping[Key, Any]) -> Any:
    """A shallow copy of ``batch`` that has ``parts``; its kind stays: list, tuple, named tuple, mapping.

    >>> with_parts((1, 2, 3), {-1: "c"})
    (1, 2, 'c')
    """
    kind = type(batch)
    if kind is not list and kind is not tuple and isinstance(batch, Mapping):
        return {**batch, **parts}
    made = list(batch)
    for key, value in parts.items():
        made[key] = value  # type: ignore[index]  # a position: part() has taken it from a sequence
    if isinstance(batch, tuple):
        return kind(*made) if hasattr(batch, "_fields") else tuple(made)
    return made
