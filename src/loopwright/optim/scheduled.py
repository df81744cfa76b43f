"""Schedules attached to the groups of an optimizer: which value goes where, before every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from loopwright.errors import SettingError, choose
from loopwright.progress import Whole
from loopwright.schedules import Schedule, as_schedule, constant, scaled
from loopwright.schedules.base import check_values
from loopwright.state import Stage

__all__ = ["Scheduled", "is_schedule", "scheduled_in"]

_FROM_0 = ("lr", "momentum", "betas", "weight_decay", "eps")  # which torch's optimizers take from 0 only
_OWN = "initial_"  # where a group keeps the value that it came with, as torch's schedulers do for lr
_BEFORE = "initial_stage_"  # where it keeps the value before the open stage; checkpoints hold it with the group
Place = tuple[int, str, str, bool]  # group, name in it, name of what it came with, whether it is the first of two betas


def is_schedule(schedule: Any) -> bool:
    """True for a schedule of ours, or a dict of them; False for torch's, and for what makes one.

    >>> is_schedule({"lr": 0.1}), is_schedule(lambda optimizer: ...)
    (True, False)
    """
    return isinstance(schedule, (Schedule, Mapping, int, float)) and not isinstance(schedule, bool)


class Scheduled:
    """The hyper-parameters of ``optimizer`` that ``schedules`` set, over the stage that is ``whole``.

    ``schedules``: a schedule of the learning rate, or a dict. Its keys name what a group holds (``"lr"``,
    ``"weight_decay"``, ...), for all groups; ``"momentum"`` is the first beta where a group has betas instead; with
    ``"lr/head"`` or ``"lr/0"``, for the groups of that name or number alone, which come before those for all.
    ``"weight_decay"`` leaves alone groups of ``lw.groups(no_decay=True)`` without decay, and those that came with 0
    where others came with more; ``"weight_decay/1"`` sets them. A tuple of schedules sets a tuple, such as
    ``"betas"``. Raises SettingError for a name that no group has.

    >>> import torch
    >>> sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> Scheduled(sgd, {"lr": scaled(lambda fraction: 1 - fraction)}).set(0.25)
    >>> sgd.param_groups[0]["lr"]
    0.75
    """

    def __init__(
        self, optimizer: Optimizer, schedules: Any, whole: Whole | None = None, *, of_stage: bool = False
    ) -> None:
        self.optimizer, self.whole, self.of_stage = optimizer, whole, of_stage
        named = schedules if isinstance(schedules, Mapping) else {"lr": schedules}
        self.schedules = {name: _as_value(one) for name, one in named.items()}
        self._resolved = {name: _map(one, self._within) for name, one in self.schedules.items()}
        self._targets: list[tuple[Callable[[float], Any], bool, list[Place]]] = []
        self._groups = -1
        self.look()
        if whole is not None:
            self._check_values()

    def _check_values(self) -> None:
        """What torch refuses in the constructor of an optimizer is refused of a schedule, before anything runs."""
        for (name, one), (*_, set_at) in zip(self._resolved.items(), self._targets, strict=True):
            key = name.partition("/")[0]
            beta = key == "betas" or any(is_first for *_, is_first in set_at)
            for part in one if isinstance(one, tuple) else (one,):
                if key in _FROM_0:
                    to_1 = beta and not isinstance(part, scaled)  # which gives a factor
                    check_values(part.at, name, 0.0, 1.0 if to_1 else math.inf, below=to_1)
                else:
                    check_values(part.at, name)

    def _within(self, schedule: Schedule) -> Schedule:
        if self.whole is None:
            return schedule
        if not self.whole.is_known and not isinstance(schedule, constant):
            raise SettingError(
                f"{schedule!r} needs to know how long its stage is, which lasts {self.whole}"
                + (" of data whose length is not known" if self.whole.ends else "")
                + "; count in steps, Trainer(steps=1000) or Stage(until='1000 steps'), or say how many batches are an "
                "epoch: lw.data.epoch_length(data, batches)"
            )
        return schedule.within(self.whole.share)

    def within(self, whole: Whole) -> Scheduled:
        """The same in a stage that is ``whole``."""
        return Scheduled(self.optimizer, self.schedules, whole, of_stage=self.of_stage)

    def on(self, optimizer: Optimizer) -> Scheduled:
        """The same for another optimizer."""
        return Scheduled(optimizer, self.schedules, self.whole, of_stage=self.of_stage)

    def set(self, fraction: float) -> None:
        """Set all values to where their schedules stand at ``fraction`` of the stage."""
        groups = self.optimizer.param_groups
        if len(groups) != self._groups:
            self.look()
            self.note()
        for at, factor, places in self._targets:
            value = at(fraction)
            for i, name, own, is_first in places:
                group = groups[i]
                if is_first:  # the first beta, in place of momentum
                    first = value * group[own][0] if factor else value
                    group["betas"] = (first, *group["betas"][1:])
                    continue
                new = value * group[own] if factor else value
                if isinstance(group[name], Tensor):
                    group[name].fill_(new)
                else:
                    group[name] = new

    def note(self) -> None:
        """Let the groups remember what they have now, as the value before the stage that begins."""
        for group, name in self._set_here():
            value = group[name]
            group.setdefault(_BEFORE + name, float(value) if isinstance(value, Tensor) else value)

    def put_back(self) -> None:
        """Give the groups the values back that they had before the stage, such as what a torch scheduler had set."""
        for group, name in self._set_here():
            if (before := group.pop(_BEFORE + name, None)) is None:
                continue
            if isinstance(group[name], Tensor):
                group[name].fill_(before)
            else:
                group[name] = before

    def _set_here(self) -> list[tuple[dict[str, Any], str]]:
        groups = self.optimizer.param_groups
        return [(groups[i], name) for _, _, places in self._targets for i, name, _, _ in places]

    def values(self) -> dict[str, float]:
        """What the scheduled values are now, by their names, but for ``lr``; of the first group that each sets."""
        found: dict[str, float] = {}
        for name, (_, _, places) in zip(self._resolved, self._targets, strict=True):
            if name != "lr" and places:
                i, key, _, is_first = places[0]
                value = self.optimizer.param_groups[i][key]
                many = value[:1] if is_first else value if isinstance(value, (tuple, list)) else [value]
                found |= {name if len(many) == 1 else f"{name}/{n}": float(one) for n, one in enumerate(many)}
        return found

    def plain(self) -> dict[str, Any]:
        """Every schedule as plain data, and how long the whole is."""
        found = {name: _map(one, lambda schedule: schedule.plain()) for name, one in self.schedules.items()}
        return {"class": type(self), "over": str(self.whole), **found}

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}: {one!r}" for name, one in self.schedules.items())
        return f"{{{shown}}} over {self.whole}"

    # ------------------------------------------------------------------------------------------ which groups

    def look(self) -> None:
        """Find the groups of each name, as they are now; each keeps the values that it came with."""
        groups = self.optimizer.param_groups
        taken: set[tuple[int, str]] = set()
        found: dict[str, list[tuple[int, str]]] = {}
        for name in sorted(self._resolved, key=lambda name: "/" not in name):  # those for some groups come first
            key, _, chosen = name.partition("/")
            at = [i for i in range(len(groups)) if not chosen or chosen in (str(i), groups[i].get("name"))]
            if not at:
                names = [group.get("name", str(i)) for i, group in enumerate(groups)]
                raise SettingError(f"schedule {name!r}: no group is called {chosen!r}. {choose(chosen, names)}")
            for i in at:
                self._check(name, key, groups[i])
            if key == "weight_decay" and not chosen:
                at = _with_decay(groups)
            found[name] = [(i, key) for i in at if (i, key) not in taken]
            taken |= set(found[name])
        if any((i, "betas") in taken and "momentum" not in groups[i] for i, key in taken if key == "momentum"):
            raise SettingError("'momentum' and 'betas' both set the first beta here; leave one of them out")
        self._targets = [
            (*_function(one), [self._place(*place) for place in found[name]]) for name, one in self._resolved.items()
        ]
        self._groups = len(groups)

    def _place(self, i: int, key: str) -> Place:
        is_first = key not in self.optimizer.param_groups[i]
        name = "betas" if is_first else key
        return i, name, _OWN + name, is_first

    def _check(self, name: str, key: str, group: dict[str, Any]) -> None:
        held = key if key in group or key != "momentum" else "betas"
        kind = type(self.optimizer).__name__
        if held not in group or key == "params":
            known = [k for k, v in group.items() if _is_value(v) and not k.startswith(_OWN)]
            raise SettingError(f"{kind} has no {key!r} to schedule. {choose(key, known)}")
        value, many = group[held], isinstance(self._resolved[name], tuple)
        if not _is_value(value) or (isinstance(value, (tuple, list)) and held == key) != many:
            raise SettingError(
                f"{key!r} of {kind} is {value!r}, which the schedule {self.schedules[name]!r} cannot set; "
                + ("a tuple of numbers takes a tuple of schedules" if isinstance(value, (tuple, list)) else
                   "a number takes one schedule")
            )  # fmt: skip
        if many and (
            len(self._resolved[name]) != len(value) or any(isinstance(s, scaled) for s in self._resolved[name])
        ):
            raise SettingError(f"{key!r} of {kind} has {len(value)} numbers: give a schedule, not scaled, for each")
        group.setdefault(_OWN + held, float(value) if isinstance(value, Tensor) else value)


def scheduled_in(stage: Stage, found: list[Scheduled]) -> tuple[Scheduled, ...]:
    """What is set before every step of ``stage``: by its own schedule if it has one, else by those ``found``.

    Raises SettingError for what is no schedule of ours, and where two set the same value.

    >>> from loopwright.state import Stage
    >>> stage = Stage("all", until="1 epoch", lr=0.5)
    >>> stage.phases = []  # which ``fit`` fills in
    >>> scheduled_in(stage, [])
    ()
    """
    given = stage.schedule if stage.lr is None else {"lr": stage.lr}
    moved = {id(optimizer): optimizer for phase in stage.phases for optimizer in phase.moved}
    if given is not None:
        if not is_schedule(given):
            raise SettingError(
                f"Stage {stage.name!r}: schedule={given!r}; expected one of lw.schedules, or a dict of them. A torch "
                "scheduler goes with the optimizer of the stage: optimizer=(optimizer, scheduler)"
            )
        found = [Scheduled(optimizer, given, of_stage=True) for optimizer in moved.values()]
    made: dict[int, Scheduled] = {}
    torchs = [s for phase in stage.phases for s in (*phase.step_schedulers, *phase.epoch_schedulers)]
    for one in found:
        kind, same = type(one.optimizer).__name__, made.setdefault(id(one.optimizer), one)
        if same.schedules != one.schedules:
            raise SettingError(
                f"stage {stage.name!r} has two schedules for {kind}, {same.schedules} and {one.schedules}; write one "
                "dict of both"
            )
        clash = next((s.torch for s in torchs if s.torch.optimizer is one.optimizer and "lr" in one.schedules), None)
        if clash is not None:
            raise SettingError(
                f"lr of {kind} is set by a schedule and by {type(clash).__name__}; leave one of them out"
            )
    return tuple(one.within(stage.whole) for one in made.values())


def _with_decay(groups: list[dict[str, Any]]) -> list[int]:
    """Which of them a schedule of the weight decay of all sets: not those that were made to have none."""
    some = any(group[_OWN + "weight_decay"] != 0 for group in groups)
    return [
        i
        for i, group in enumerate(groups)
        if not group.get("no_decay") and (not some or group[_OWN + "weight_decay"] != 0)
    ]


def _is_value(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_is_value(one) and not isinstance(one, (tuple, list)) for one in value)
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or (
        isinstance(value, Tensor) and value.dim() == 0
    )


def _function(schedule: Any) -> tuple[Callable[[float], Any], bool]:
    """What gives the value, and whether that is a factor."""
    if isinstance(schedule, tuple):
        return (lambda fraction: tuple([one.at(fraction) for one in schedule])), False
    return (schedule.part.at, True) if isinstance(schedule, scaled) else (schedule.at, False)


def _as_value(value: Any) -> Any:
    return tuple(map(as_schedule, value)) if isinstance(value, (tuple, list)) else as_schedule(value)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    return tuple(map(function, value)) if isinstance(value, tuple) else function(value)
