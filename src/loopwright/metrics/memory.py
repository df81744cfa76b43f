"""What any metric has taken in, as plain data and tensors: ours, those of torchmetrics, any that can say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from loopwright.errors import CheckpointError, choose
from loopwright.state import has_state

__all__ = ["remember", "restore"]


def remember(metric: Any) -> dict[str, Any] | None:
    """The state of ``metric``, with tensors of its own; None if the metric has no way to give it."""
    parts = _parts(metric)
    if parts:
        return {path: _values(part) for path, part in parts.items()}
    if has_state(metric):
        return dict(_copied(metric.state_dict()))
    return None


def restore(metric: Any, state: Mapping[str, Any]) -> None:
    """Let ``metric`` go on from what ``remember`` gave. Raises CheckpointError if it is another metric's."""
    parts = _parts(metric)
    if not parts:
        metric.load_state_dict(state)
        return
    if parts.keys() != state.keys():
        odd = sorted(parts.keys() ^ state.keys())[0]
        raise CheckpointError(
            f"the saved state is not one of this {type(metric).__name__}: only one of them has the part {odd!r}. "
            "Resume with the metrics that the run was started with"
        )
    metric.reset()
    for path, part in parts.items():
        _set(part, state[path])


def _parts(metric: Any) -> dict[str, Any]:
    """The torchmetrics metrics in ``metric`` by path: itself, members of a collection, what a wrapper wraps.

    Their states are plain attributes that ``state_dict`` leaves out; ``_defaults`` has their names.
    """
    modules = metric.named_modules() if isinstance(metric, nn.Module) else ()
    return {path: part for path, part in modules if isinstance(getattr(part, "_defaults", None), dict)}


def _values(part: Any) -> dict[str, Any]:
    """States, other tensors, counts such as ``_update_count``; settings are what the code says, not a checkpoint."""
    return {
        name: _copied(value)
        for name, value in vars(part).items()
        if name in part._defaults
        or (name != "_computed" and isinstance(value, Tensor))
        or (name[0] == "_" and isinstance(value, (bool, int, float, str)))
    }


def _set(part: Any, values: Mapping[str, Any]) -> None:
    own = vars(part)
    missing = sorted(name for name in part._defaults if name in own and name not in values)
    if missing:  # names that are not its own belong to the metric that it wraps
        raise CheckpointError(
            f"the saved state has no {missing[0]!r}, which {type(part).__name__} needs. "
            f"{choose(missing[0], values)} Resume with the metrics that the run was started with"
        )
    own.update({name: _copied(value) for name, value in values.items() if name in own})


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
