"""Random numbers for metrics that draw them, without a trace in the generators that training draws from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from loopwright import rng

__all__ = ["OwnDraws"]


class OwnDraws:
    """A stream that starts where the global generators stand at the first call; ``state`` is None until one drew.

    >>> import torch
    >>> before, draws = rng.get(), OwnDraws()
    >>> draws.call(torch.rand, 2), draws.call(torch.rand, 2)
    (None, None)
    >>> _same(rng.get(), before)
    True
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state

    def call(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function`` with this stream in place of the global one."""
        outside = rng.get()
        if self.state is not None:
            rng.set(self.state)
        try:
            function(*args)
        finally:
            inside = rng.get()
            if self.state is not None or not _same(inside, outside):
                self.state = inside
                rng.set(outside)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, (Tensor, np.ndarray)):
        return bool((a == b).all())
    return bool(a == b)
