"""What any metric has taken in, as plain data and tensors: ours, those of torchmetrics, and others that can say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from loopwright.errors import CheckpointError, choose

__all__ = ["remember", "restore"]


def remember(metric: Any) -> dict[str, Any] | None:
    """The state of ``metric``, with tensors of its own; None if the metric has no way to give it."""
    parts = _parts(metric)
    if parts:
        return {path: _values(part) for path, part in parts.items()}
    if callable(getattr(metric, "state_dict", None)) and callable(getattr(metric, "load_state_dict", None)):
        return _copied(metric.state_dict())  # type: ignore[no-any-return]
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
            f"{choose(odd, parts)} Resume with the metrics that the run was started with"
        )
    metric.reset()
    for path, part in parts.items():
        _set(part, state[path])


def _parts(metric: Any) -> dict[str, nn.Module]:
    """The torchmetrics metrics in ``metric`` by path: itself, the members of a collection, what a wrapper wraps.

    Their states are plain attributes that ``state_dict`` leaves out; ``_defaults`` has their names.
    """
    if not isinstance(metric, nn.Module):
        return {}
    return {
        path: part
        for path, part in metric.named_modules()
        if isinstance(getattr(part, "_defaults", None), dict)
    }


def _values(part: nn.Module) -> dict[str, Any]:
    """States, other tensors, counts such as ``_update_count``, and settings that may have been found in the data."""
    return {
        name: _copied(value)
        for name, value in vars(part).items()
        if name != "_computed"
        and (isinstance(value, (Tensor, bool, int, float, str)) or name in part._defaults)  # type: ignore[operator]
    }


def _set(part: nn.Module, values: Mapping[str, Any]) -> None:
    own, defaults = vars(part), part._defaults
    missing = sorted(set(defaults) - set(values))  # type: ignore[arg-type]
    if missing:
        raise CheckpointError(
            f"the saved state has no {missing[0]!r}, which {type(part).__name__} needs. {choose(missing[0], values)}"
        )
    for name, value in values.items():
        default = defaults.get(name)  # type: ignore[union-attr,operator]
        # a setting stays what it is in the code, unless the first batch was to find it out
        if default is not None or isinstance(value, Tensor) or name[0] == "_" or own.get(name, 0) is None:
            own[name] = _copied(value)
        if isinstance(default, Tensor) and default.shape != value.shape and default.numel() == 1:
            defaults[name] = default.expand(value.shape).clone()  # type: ignore[index,operator]
    own["_computed"] = None


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
