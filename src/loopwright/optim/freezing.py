"""Which parameters train: chosen by name patterns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from loopwright.errors import SettingError, choose

__all__ = ["match_names", "set_trainable"]


def match_names(patterns: str | Sequence[str], names: Iterable[str], *, what: str = "parameter") -> set[str]:
    """The names that a shell-style pattern matches; ``"head.*"`` takes all below ``head``.

    Raises SettingError for a pattern that matches nothing.

    >>> sorted(match_names("head.*", ["body.weight", "head.bias", "head.weight"]))
    ['head.bias', 'head.weight']
    """
    names, found = list(names), set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise SettingError(f"the pattern {pattern!r} matches no {what}. {choose(pattern, names)}")
        found |= hits
    return found


def set_trainable(
    module: nn.Module,
    original: Mapping[str, bool],
    *,
    train: str | Sequence[str] | None = None,
    freeze: str | Sequence[str] | None = None,
) -> None:
    """Set ``requires_grad``: as in ``original``, but only what ``train`` matches, and nothing that ``freeze`` matches.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> flags = {n: p.requires_grad for n, p in net.named_parameters()}
    >>> set_trainable(net, flags, train="1.*")
    >>> [p.requires_grad for p in net.parameters()]
    [False, False, True, True]
    """
    chosen = None if train is None else match_names(train, original)
    frozen = set() if freeze is None else match_names(freeze, original)
    for name, parameter in module.named_parameters():
        wanted = original.get(name, parameter.requires_grad) if chosen is None else name in chosen
        parameter.requires_grad_(wanted and name not in frozen)
