"""Parameter groups: by name patterns, without decay of biases and norms, each layer at its own learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loopwright.errors import SettingError
from loopwright.optim.freezing import match_names

__all__ = ["groups"]

_NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
)  # fmt: skip
_MANY_BIASES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)  # theirs are called bias_ih_l0, in_proj_bias, ...
Patterns = str | tuple[str, ...]


def groups(
    module: nn.Module,
    patterns: Mapping[Patterns, Mapping[str, Any]] | Sequence[Patterns] | None = None,
    *,
    lr: tuple[float, float] | None = None,
    no_decay: bool = False,
    norms: tuple[type[nn.Module], ...] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters of ``module`` in groups, each exactly once: what any torch optimizer takes.

    ``patterns`` maps shell-style patterns of names (or tuples of these) to settings of the group, such as ``{"lr":
    1e-3}``; a list gives none. ``"*"`` is what no other pattern takes. ``lr=(first, last)`` gives the groups learning
    rates from the first to the last, each larger than the one before by the same factor (Howard & Ruder 2018,
    arXiv:1801.06146, section 3.1). ``no_decay`` splits each group: biases, and all that norms hold (torch's, and those
    of the classes ``norms``), get a weight decay of 0, which a schedule of ``"weight_decay"`` leaves alone. A group is
    called by its pattern, ``group["name"]``, which schedules may choose: ``"lr/head.*"``.

    Raises SettingError that names parameters which no pattern or more than one takes, and a pattern that takes none.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    >>> [(g["name"], g["lr"], len(g["params"])) for g in groups(net, ["*", "2.*"], lr=(1e-4, 1e-2))]
    [('*', 0.0001, 4), ('2.*', 0.01, 2)]
    >>> [(g.get("weight_decay"), len(g["params"])) for g in groups(net, no_decay=True)]
    [(None, 2), (0.0, 4)]
    """
    if isinstance(patterns, str):
        raise SettingError(f"patterns={patterns!r}: expected a list of them, or a dict of their settings")
    settings = dict(patterns if isinstance(patterns, Mapping) else {one: {} for one in patterns or ("*",)})
    for pattern, given in settings.items():
        if not isinstance(given, Mapping) or "params" in given:
            raise SettingError(
                f"{pattern!r}: {given!r} are no settings of a group; write a dict such as {{'lr': 1e-3}}"
            )
    names = _names(module)
    taken = _taken(settings, names)
    made: list[dict[str, Any]] = []
    for pattern, rate in zip(settings, _rates(lr, len(settings), settings), strict=True):
        mine = [name for name in names if taken[name] == pattern]
        group = {"name": pattern if isinstance(pattern, str) else ", ".join(pattern), **rate, **settings[pattern]}
        free = _without_decay(module, norms) if no_decay else set()
        weights, others = [n for n in mine if id(names[n]) not in free], [n for n in mine if id(names[n]) in free]
        made += [{"params": [names[n] for n in weights], **group}] if weights else []
        made += (
            [{"params": [names[n] for n in others], **group, "weight_decay": 0.0, "no_decay": True}] if others else []
        )
    return made


def _names(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, each under its first name."""
    found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not found:
        raise SettingError(f"{type(module).__name__} has no trainable parameter")
    return found


def _taken(settings: Mapping[Patterns, Any], names: Mapping[str, nn.Parameter]) -> dict[str, Patterns]:
    """Which pattern takes each parameter."""
    taken: dict[str, Patterns] = {}
    twice: list[str] = []
    for pattern in sorted(settings, key=lambda one: one == "*"):  # the rest, at the end
        if pattern == "*":
            mine = names.keys() - taken.keys()
            if not mine:
                raise SettingError("the pattern '*' is left nothing by the others; leave it out")
        else:
            mine = match_names(pattern, names, what="trainable parameter")
        twice += [f"{name} (by {taken[name]!r} and {pattern!r})" for name in names if name in mine and name in taken]
        taken |= dict.fromkeys(mine, pattern)
    if twice:
        raise SettingError(f"taken by two patterns: {_some(twice)}; make them narrower")
    left = [name for name in names if name not in taken]
    if left:
        raise SettingError(f"left over by all patterns: {_some(left)}; add one, or '*' for the rest")
    return taken


def _rates(lr: Any, n: int, settings: Mapping[Patterns, Any]) -> list[dict[str, float]]:
    """Of each group: a geometric series between the two of ``lr``."""
    if lr is None:
        return [{} for _ in range(n)]
    if not isinstance(lr, (tuple, list)) or len(lr) != 2 or not all(isinstance(x, (int, float)) and x > 0 for x in lr):
        raise SettingError(f"lr={lr!r}: expected two positive numbers, those of the first and the last group")
    own = [pattern for pattern, given in settings.items() if "lr" in given]
    if own:
        raise SettingError(f"lr={lr!r} sets the rate of every group, and {own[0]!r} has one of its own; leave one out")
    first, last = lr
    if n == 1:
        return [{"lr": float(last)}]
    return [{"lr": float(last) if i == n - 1 else first * (last / first) ** (i / (n - 1))} for i in range(n)]


def _without_decay(module: nn.Module, norms: tuple[type[nn.Module], ...]) -> set[int]:
    """Biases, and all parameters of norms: told by the type of the module that holds them."""
    for kind in norms:
        if not isinstance(kind, type):
            raise SettingError(f"norms={norms!r}: expected classes of modules, such as (MyNorm,)")
    return {
        id(p)
        for owner in module.modules()
        for name, p in owner.named_parameters(recurse=False)
        if isinstance(owner, (*_NORMS, *norms))
        or name == "bias"
        or (isinstance(owner, _MANY_BIASES) and "bias" in name)
    }


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
