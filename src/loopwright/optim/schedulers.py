"""Torch's learning-rate schedulers, unchanged, stepped at the right moment; and what else ``schedule=`` may be."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from loopwright.errors import SettingError, choose
from loopwright.given import not_callable_with
from loopwright.optim.scheduled import Scheduled, is_schedule

__all__ = ["Scheduler", "as_schedulers", "default_monitor", "per_step", "settings_of"]


class Scheduler:
    """A torch scheduler and when to step it: ``every`` "epoch" or "step"; ``monitor`` is what a plateau looks at.

    Without ``every``, OneCycleLR and CyclicLR are stepped at each optimizer step and all others once an epoch, as
    torch documents them. ReduceLROnPlateau is stepped at the end of an epoch, after validation, with
    ``run.metrics[monitor]``; by default ``valid/loss`` in stages with validation, else ``train/loss``.
    Raises SettingError for a wrong ``every`` and for ``monitor`` where nothing is monitored.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> Scheduler(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)).every
    'epoch'
    """

    def __init__(self, scheduler: Any, *, every: str | None = None, monitor: str | None = None) -> None:
        if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
            raise SettingError(f"expected a scheduler of torch.optim.lr_scheduler; got {scheduler!r}")
        if every not in (None, "step", "epoch"):
            raise SettingError(f"every={every!r}: a scheduler is stepped every 'step' or every 'epoch'")
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        if monitor is not None and not plateau:
            raise SettingError(f"{type(scheduler).__name__} monitors nothing; leave monitor={monitor!r} out")
        if plateau and every == "step":
            raise SettingError("ReduceLROnPlateau is stepped every 'epoch', after its metric is known")
        self.torch: Any = scheduler
        self.every = every or ("step" if isinstance(scheduler, (OneCycleLR, CyclicLR)) else "epoch")
        self.monitor = monitor
        self.plateau = plateau
        self.default_monitor = "train/loss"  # that of the open stage
        self._seen = -1  # the validation that was looked at last, by its step

    def step(self, metrics: Mapping[str, float], validated_at: int = -1) -> None:
        """One step. A plateau reads its monitored value; SettingError says when there is none.

        ``validated_at``: the step of the latest validation; one that a plateau has seen does not count twice.
        """
        if not self.plateau:
            self.torch.step()
            return
        name = self.monitor or self.default_monitor
        if name.startswith("valid/") and validated_at == self._seen:
            return
        if name not in metrics:
            raise SettingError(
                f"ReduceLROnPlateau monitors {name!r}, which nothing has produced. {choose(name, metrics)}"
            )
        self._seen = validated_at
        self.torch.step(metrics[name])

    def state_dict(self) -> dict[str, Any]:
        return {"torch": dict(self.torch.state_dict()), "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.torch.load_state_dict(dict(state["torch"]))
        self._seen = state["seen"]


def default_monitor(valid: Iterable[str]) -> str:
    """What a plateau looks at in a stage that validates on the data sets called ``valid``: the first one.

    >>> default_monitor([]), default_monitor([""]), default_monitor(["seen", "new"])
    ('train/loss', 'valid/loss', 'valid/seen/loss')
    """
    name = next(iter(valid), None)
    return "train/loss" if name is None else "/".join(["valid", *filter(None, [name]), "loss"])


def settings_of(scheduler: Scheduler, valid: Iterable[str] = ()) -> dict[str, Any]:
    """When it is stepped, what it looks at, and what it was made with, as far as torch keeps that.

    ``valid``: the names of the data to validate on in its stage.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> settings_of(Scheduler(torch.optim.lr_scheduler.StepLR(optimizer, 2)))
    {'class': <class 'torch.optim.lr_scheduler.StepLR'>, 'every': 'epoch', 'step_size': 2, 'gamma': 0.1}
    """
    looks = {"monitor": scheduler.monitor or default_monitor(valid)} if scheduler.plateau else {}
    return {"class": type(scheduler.torch), "every": scheduler.every, **looks, **_made_with(scheduler.torch)}


def _made_with(scheduler: Any) -> dict[str, Any]:
    """Arguments by name: an attribute of that name, of its plural, or a value that was put into the optimizer."""
    found: dict[str, Any] = {}
    held = {**scheduler.optimizer.param_groups[0], **vars(scheduler)}
    for name in inspect.signature(type(scheduler)).parameters:
        kept = next((key for key in (name, f"_{name}", f"{name}s") if key in held), None)
        if kept is not None and name not in ("optimizer", "last_epoch"):
            value = held[kept]
            nested = isinstance(value, (list, tuple)) and any(isinstance(one, LRScheduler) for one in value)
            found[name] = [{"class": type(one), **_made_with(one)} for one in value] if nested else value
    return found


def per_step(scheduler: Any) -> Scheduler:
    """The same torch scheduler, stepped after each optimizer step instead of once an epoch.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> per_step(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)).every
    'step'
    """
    return Scheduler(scheduler, every="step")


def as_schedulers(schedule: Any, optimizers: tuple[Optimizer, ...]) -> tuple[Scheduler | Scheduled, ...]:
    """Schedulers from None, a schedule of ours or a dict of them (for each optimizer), a torch scheduler, a Scheduler,
    a factory ``optimizer -> scheduler``, or a list of these.

    Raises SettingError when a scheduler belongs to another optimizer than those given.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> (made,) = as_schedulers(lambda sgd: torch.optim.lr_scheduler.ExponentialLR(sgd, 0.9), (optimizer,))
    >>> made.every
    'epoch'
    """
    if schedule is None:
        return ()
    if isinstance(schedule, (list, tuple)):
        return tuple(s for one in schedule for s in as_schedulers(one, optimizers))
    if isinstance(schedule, Scheduled):
        return (schedule,) if any(schedule.optimizer is optimizer for optimizer in optimizers) else ()
    if is_schedule(schedule):
        return tuple(Scheduled(optimizer, schedule) for optimizer in optimizers)
    if not isinstance(schedule, (Scheduler, LRScheduler, ReduceLROnPlateau)):
        if not callable(schedule):
            raise SettingError(
                f"schedule={schedule!r}: expected one of lw.schedules, a dict such as "
                '{"lr": lw.schedules.cosine(1e-3, 0.0)}, a torch scheduler, or a factory such as '
                "schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)"
            )
        if (why := not_callable_with(schedule, "optimizer")) is not None:
            name = getattr(schedule, "__name__", type(schedule).__name__)
            way = f"lambda optimizer: {name}(optimizer, ...)"
            if str(getattr(schedule, "__module__", "")).startswith("loopwright."):
                way = f"lw.schedules.{name}(...)"
            raise SettingError(f"schedule={name}{why}. Write: schedule={way}")
        made = [(optimizer, _called(schedule, optimizer)) for optimizer in optimizers]
        if any(one is None for _, one in made):
            raise SettingError("the factory schedule=... returned None; it must return what it makes of the optimizer")
        return tuple(s for optimizer, one in made for s in as_schedulers(one, (optimizer,)))
    scheduler = schedule if isinstance(schedule, Scheduler) else Scheduler(schedule)
    if not any(scheduler.torch.optimizer is optimizer for optimizer in optimizers):
        raise SettingError(
            f"{type(scheduler.torch).__name__} was made for another optimizer than the one it shall schedule; "
            "make it from the optimizer that you pass, or pass a factory: schedule=lambda optimizer: ..."
        )
    return (scheduler,)


def _called(factory: Any, optimizer: Optimizer) -> Any:
    """What ``factory`` makes of ``optimizer``; one that has counted with it was meant for numbers."""
    try:
        return factory(optimizer)
    except TypeError as error:
        kind = type(optimizer).__name__
        if kind not in str(error):
            raise
        raise SettingError(
            f"the function schedule=... is called with the optimizer, {kind}, to make a scheduler of it, and failed: "
            f'{error}. A function of the part of the stage that is done goes into a dict: schedule={{"lr": function}}'
        ) from error
