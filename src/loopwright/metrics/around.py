"""What stands around a metric and passes on to it: ``On``, and the modes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopwright.metrics.algebra import Algebra
from loopwright.metrics.memory import remember, restore

__all__ = ["Around"]


class Around(Algebra):
    """The value and the memory of ``metric``; subclasses say which ``inputs`` reach it, and when."""

    metric: Any

    def compute(self) -> Any:
        """The metric's value."""
        return self.metric.compute()

    def reset(self) -> None:
        """Forget all that was taken in."""
        self.metric.reset()

    def merge(self, other: Any) -> None:
        """Add what ``other`` has taken in, where the metric can."""
        self.metric.merge(other.metric)

    def state_dict(self) -> dict[str, Any]:
        """What the metric has taken in, as plain data and tensors; torchmetrics' states too. Empty if it has no way."""
        return remember(self.metric) or {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        restore(self.metric, state)
