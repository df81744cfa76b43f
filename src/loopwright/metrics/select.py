"""A metric fed from other names of a step's output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loopwright.errors import SettingError
from loopwright.metrics.memory import remember, restore

__all__ = ["On"]


class On:
    """``metric``, fed from the ``names`` of a step's output, in their order.

    It is any object with ``update``, ``compute`` and ``reset``, and stays as it is. Raises SettingError without a name.

    >>> from loopwright.metrics import Accuracy
    >>> On(Accuracy(), "logits", "y").inputs
    ('logits', 'y')
    """

    def __init__(self, metric: Any, *names: str) -> None:
        if not names or not all(isinstance(name, str) for name in names):
            raise SettingError(
                f"On({type(metric).__name__}, ...) needs the names of what to pass to its update, such as "
                f'On(metric, "preds", "target"); got {", ".join(map(repr, names)) or "none"}'
            )
        self.metric: Any = metric.metric if isinstance(metric, On) else metric
        self.inputs = names

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in one batch."""
        self.metric.update(*args, **kwargs)

    def compute(self) -> Any:
        """The metric's value."""
        return self.metric.compute()

    def reset(self) -> None:
        """Forget all that was taken in."""
        self.metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """What the metric has taken in, as plain data and tensors; torchmetrics' states too. Empty if it has no way."""
        return remember(self.metric) or {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""
        restore(self.metric, state)
