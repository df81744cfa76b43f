"""What a metric computed as the numbers of a record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopwright.errors import MetricError
from loopwright.events import describe

__all__ = ["flat"]

MOST = 1000  # numbers of one matrix in a record


def flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in what a metric computed, by name.

    >>> dict(flat("m", {"a": 1, "b": torch.tensor([2.0, 3.0])}))
    {'m/a': 1.0, 'm/b/0': 2.0, 'm/b/1': 3.0}
    """
    if isinstance(value, (np.ndarray, np.generic)):
        value = torch.as_tensor(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(f"{name}/{key}", item)
    elif (
        isinstance(value, Tensor)
        and value.ndim <= 3
        and not value.is_complex()
        and (value.ndim < 2 or value.numel() <= MOST)
    ):
        if value.ndim == 0:
            yield name, float(value)
        elif value.ndim == 1:
            yield from ((f"{name}/{i}", float(item)) for i, item in enumerate(value.tolist()))
        else:
            for i, row in enumerate(value):
                yield from flat(f"{name}/{i}", row)
    elif isinstance(value, (int, float)):
        yield name, float(value)
    else:
        raise MetricError(
            f"metric {name!r} computed {describe(value)}; a record holds numbers: expected a number, a vector, or a "
            "dict of them. Look at other values in a callback, or reduce them in a metric of your own"
        )
