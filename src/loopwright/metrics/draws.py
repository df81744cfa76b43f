"""Random numbers for metrics that draw them, without a trace in the generators that training draws from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loopwright import rng

__all__ = ["OwnDraws"]


class OwnDraws:
    """A stream that starts where the global generators stand at the first call; ``state`` is None until one drew.

    >>> import torch
    >>> before, draws = rng.get(), OwnDraws()
    >>> draws.call(torch.rand, 2), draws.call(torch.rand, 2)
    (None, None)
    >>> rng.same(rng.get(), before)
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
            if self.state is not None or not rng.same(inside, outside):
                self.state = inside
                rng.set(outside)
