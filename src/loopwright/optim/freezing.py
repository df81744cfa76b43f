"""Which parameters train, and whose running statistics: chosen by name patterns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from loopwright.errors import SettingError, choose

__all__ = ["match_names", "set_trainable", "trainable_flags"]


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
            raise SettingError(f"the pattern {pattern!r} matches no {what}. {_meant(pattern, names)}")
        found |= hits
    return found


def _meant(pattern: str, names: Sequence[str]) -> str:
    """End of the sentence about a pattern that matches nothing: the patterns of that depth that would, or the names."""
    stem, star, rest = pattern.partition("*")
    stem = stem.rstrip(".")
    parts = (name.split(".") for name in names)
    paths = sorted({".".join(part[:n]) for part in parts for n in range(1, len(part))}) if star else []
    near = [one for one in paths if one.endswith(f".{stem}")] or difflib.get_close_matches(stem, paths, n=1)
    if not near:
        return choose(pattern, names)
    depth = near[0].count(".")
    return choose(f"{near[0]}.*{rest}", [f"{path}.*{rest}" for path in paths if path.count(".") == depth])


def trainable_flags(module: nn.Module) -> dict[str, bool]:
    """What trains as it stands: ``requires_grad`` of each parameter, and of each batch norm whether it is in train
    mode, under the name of its ``running_mean``.

    >>> trainable_flags(nn.Sequential(nn.BatchNorm1d(2, affine=False).eval()))
    {'0.running_mean': False}
    """
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    return flags | {name: norm.training for name, norm in _with_statistics(module)}


def set_trainable(
    module: nn.Module,
    original: Mapping[str, bool],
    *,
    train: str | Sequence[str] | None = None,
    freeze: str | Sequence[str] | None = None,
) -> None:
    """Let train what does in ``original``, but only what ``train`` matches, and nothing that ``freeze`` matches.

    A batch norm whose ``running_mean`` is not to train is in eval mode: it uses its statistics, and keeps them.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> flags = trainable_flags(net)
    >>> set_trainable(net, flags, train="2.*")
    >>> [p.requires_grad for p in net.parameters()], net[1].training
    ([False, False, False, False, True, True], False)
    """
    chosen = None if train is None else match_names(train, original)
    frozen = set() if freeze is None else match_names(freeze, original)

    def trains(name: str, now: bool) -> bool:
        wanted = original.get(name, now) if chosen is None else name in chosen
        return wanted and name not in frozen

    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trains(name, parameter.requires_grad))
    for name, norm in _with_statistics(module):
        norm.train(trains(name, norm.training))


def _with_statistics(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Norms that keep running statistics, each under the name of its ``running_mean``."""
    return [
        (f"{path}.running_mean" if path else "running_mean", norm)
        for path, norm in module.named_modules()
        if any(name == "running_mean" for name, _ in norm.named_buffers(recurse=False))
    ]
