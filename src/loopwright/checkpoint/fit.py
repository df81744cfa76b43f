"""Does a checkpoint fit? Names, shapes and dtypes, compared before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from loopwright.errors import choose
from loopwright.events import describe

__all__ = ["differs", "misfits", "problems_of", "some"]

_SHOWN = 8


def misfits(own: Mapping[str, Mapping[str, Any]], saved: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """How the state_dicts of models (by group) differ from those of a checkpoint; empty if they fit."""
    problems = [f"it has no {group!r}. {choose(group, saved)}" for group in own if group not in saved]
    problems += [f"this run has no {group!r}. {choose(group, own)}" for group in saved if group not in own]
    for group in own.keys() & saved.keys():
        mine = {k: v for k, v in own[group].items() if isinstance(v, Tensor) and not v.is_sparse}
        theirs = saved[group]
        missing, unexpected = [k for k in mine if k not in theirs], [k for k in theirs if k not in mine]
        other = [
            f"{key} is {describe(theirs[key])} there and {describe(value.cpu())} here"
            for key, value in mine.items()
            if key in theirs and differs(value, theirs[key])
        ]
        for text, names in (("missing there", missing), ("unexpected", unexpected), ("different", other)):
            if names:
                problems.append(f"{group}, {text}: {some(names)}")
    return problems


def differs(mine: Tensor, theirs: Tensor, *, dtype: bool = True) -> bool:
    """True unless ``theirs`` can take the place of ``mine``."""
    if isinstance(mine, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return False  # a lazy module takes any shape
    return mine.shape != theirs.shape or (dtype and mine.dtype != theirs.dtype)


def problems_of(
    optimizers: Mapping[str, Optimizer], saved: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str]
) -> list[str]:
    """How optimizers differ from those of a checkpoint in name, class, and number of parameters in each group."""
    problems = [f"it has no optimizer {name!r}. {choose(name, saved)}" for name in optimizers if name not in saved]
    problems += [f"this run has no optimizer {n!r}. {choose(n, optimizers)}" for n in saved if n not in optimizers]
    for name in optimizers.keys() & saved.keys():
        optimizer = optimizers[name]
        if (kind := type(optimizer).__qualname__) != kinds[name]:
            problems.append(f"optimizer {name!r} is {kinds[name]} there and {kind} here")
        mine = [len(group["params"]) for group in optimizer.param_groups]
        theirs = [len(group["params"]) for group in saved[name]["param_groups"]]
        if mine != theirs:
            problems.append(f"optimizer {name!r} has groups of {theirs} parameters there and of {mine} here")
    return problems


def some(names: Iterable[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
