"""Which records a value of the steps goes into, and whether the progress bar shows it: what ``Task.recorded`` says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loopwright.errors import SettingError

__all__ = ["Rules", "at", "rule", "rules_of", "unmet"]

Rules = Mapping[str, frozenset[str]]  # by name, those of "step", "epoch" and "bar" where it is to be seen


def rules_of(task: Any) -> Rules:
    """What ``task.recorded`` says. Raises SettingError for what it cannot mean.

    >>> class VAE:
    ...     recorded = {"kl": "epoch bar"}
    >>> sorted(rules_of(VAE())["kl"])
    ['bar', 'epoch']
    """
    given, kind = getattr(task, "recorded", {}), type(task).__name__
    example = "such as recorded = {'kl': 'epoch', 'noise': 'step bar'}"
    if not isinstance(given, Mapping):
        raise SettingError(f"{kind}.recorded is {given!r}; it says in which records values are, {example}")
    rules = {name: frozenset(words.split() if isinstance(words, str) else ()) for name, words in given.items()}
    for name, words in rules.items():
        if not words & {"step", "epoch"} or not words <= {"step", "epoch", "bar"}:
            raise SettingError(
                f"{kind}.recorded[{name!r}] is {given[name]!r}; expected 'step', 'epoch' or both, with 'bar' to show "
                f"it in the progress bar, {example}"
            )
    return rules


def rule(rules: Rules, name: str) -> frozenset[str] | None:
    """What is said of a logged name: of itself, or of the value that it is of a phase or a loader.

    >>> rule({"kl": frozenset({"epoch"})}, "train/generator/kl")
    frozenset({'epoch'})
    """
    return next((places for said, places in rules.items() if name == said or name.endswith(f"/{said}")), None)


def at(rules: Rules, values: Mapping[str, float], place: str) -> dict[str, float]:
    """Those of ``values`` that are to be seen at ``place``: all of which nothing else is said."""
    return {name: value for name, value in values.items() if place in (rule(rules, name) or (place,))}


def unmet(rules: Rules, names: Iterable[str]) -> list[str]:
    """Names of which something is said, and that are not among ``names``."""
    known = list(names)
    return [said for said in rules if not any(rule({said: rules[said]}, name) for name in known)]
