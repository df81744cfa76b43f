"""Entering and leaving a stage, and changes asked for by ``run.replace``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from math import ceil, inf
from typing import Any

from torch import nn
from torch.optim import Optimizer

from loopwright.accumulation import check_unit
from loopwright.data import Chunks, as_source, as_sources
from loopwright.data.ahead import copy_ahead
from loopwright.errors import SettingError
from loopwright.optim import set_trainable
from loopwright.optim.schedulers import default_monitor
from loopwright.progress import Duration
from loopwright.state import Progress, Run, Stage
from loopwright.written import warn

__all__ = [
    "admit_callbacks", "apply_changes", "begin_stage", "chooses_parameters", "end_in", "end_stage", "ids_of_parameters",
    "inexact", "is_over", "needs_closure", "nothing_left", "reopen",
]  # fmt: skip


def begin_stage(run: Run, stage: Stage) -> bool:
    """Make ``stage`` the open one: its end, intervals and trainable parameters. False if it was open before."""
    p, start = run.progress, run.stage_start
    run.stage_end = _end_of(run, stage)
    others = [c for other in run.stages for c in other.callbacks]
    if others:
        run.hooks.exchange(others, stage.callbacks)
    if any(other.loss is not None for other in run.stages):
        loss = run.own_loss if stage.loss is None else stage.loss
        run.task.replace("loss", loss.to(run.device) if isinstance(loss, nn.Module) else loss)
    run.log_every.begin(run)
    for handler in run.handlers:
        handler.start_stage(run)
    run.validates_within = bool(stage.valid) and stage.validate_every.inside
    if stage.valid:
        stage.validate_every.begin(run)
    if chooses_parameters(run):
        set_trainable(run.task, run.trainable, train=stage.train, freeze=stage.freeze)
    if run.team is not None:
        run.team.begin_stage(run, stage)
    copy_ahead(stage.source, run.device, run.precision.holds)
    for phase in stage.phases:
        for scheduler in phase.epoch_schedulers:
            scheduler.default_monitor = default_monitor(stage.valid)
    for scheduled in stage.scheduled:
        scheduled.look()
    fresh = p.stage_step == p.batch == 0 and p.epoch == start.epoch
    if fresh:
        for scheduled in (one for each in run.stages[: p.stage + 1] for one in each.scheduled):
            scheduled.put_back()
        for scheduled in stage.scheduled:
            scheduled.note()
    return fresh


def admit_callbacks(run: Run) -> None:
    """Make the callbacks of all stages known to ``run``; each is called in its own stage only."""
    mine = {id(c): c for stage in run.stages for c in stage.callbacks}
    twice = next((c for c in run.callbacks if id(c) in mine), None)
    if twice is not None:
        raise SettingError(
            f"one {type(twice).__name__} is among the callbacks of the Trainer and of a stage; leave it out of one"
        )
    run.callbacks.extend(mine.values())
    run.hooks.admit(mine.values())
    if any(stage.loss is not None for stage in run.stages):
        run.own_loss = run.task.loss


def _end_of(run: Run, stage: Stage) -> Progress:
    """Where a stage ends that has begun at ``run.stage_start``: infinity for what it does not count."""
    start, batches = run.stage_start, stage.source.batches
    end = {"epochs": inf, "steps": inf, "samples": inf, "seconds": inf}
    for until in stage.until:
        unit, value = until.unit, until.value
        if unit == "epochs" and value % 1:  # part of an epoch: so many steps
            if (in_epoch := stage.epoch_steps) is None:
                needs = "data with a known number of batches" if batches is None else "to know the steps of an epoch"
                raise SettingError(f"'{until}' needs {needs}; count steps instead")
            unit, value = "steps", max(1, round(value * in_epoch))
        end[unit] = min(end[unit], until.position(start) + value if unit == until.unit else start.step + value)
    if run.stage_ended_at is not None:
        end["steps"] = min(end["steps"], run.stage_ended_at)
    steps, samples = end["steps"], end["samples"]
    return Progress(epoch=end["epochs"], step=steps, samples=samples, seconds=end["seconds"])  # type: ignore[arg-type]


def end_in(stage: Stage, part: tuple[Duration, ...]) -> Duration:
    """What a stage can count of its own end: durations that are all to be over, and batches, as steps."""
    if len(part) == 1 and part[0].unit == "tokens":
        check_unit("tokens", counts_samples=stage.counts_samples, who=f"until '{part[0]}'")
        return Duration(part[0].value, "samples")
    if len(part) == 1 and part[0].unit not in ("batches", "percent"):
        return part[0]
    return Duration(max(_steps(one, stage) for one in part), "steps")


def _steps(end: Duration, stage: Stage) -> float:
    """The steps in which a stage gets to ``end``. Raises SettingError where that is not known before."""
    batches: int | None = stage.source.batches
    each = stage.epoch_steps
    if end.unit == "steps":
        return end.value
    if end.unit == "epochs" and each is not None:
        return max(1, round(end.value * each))
    if end.unit == "batches" and batches and each is not None and isinstance(stage.accumulate, int):
        epochs, rest = divmod(end.value, batches)
        return epochs * each + ceil(rest / stage.accumulate)
    raise SettingError(
        f"stage {stage.name!r}: how many steps '{end}' of it are is not known before; let it end with one duration, in "
        "steps, epochs, samples or time, or by run.end_stage() in a callback"
    )


def reopen(run: Run) -> None:
    """After the last stage: open it again, for it may have been given a later end."""
    p, last = run.progress, len(run.stages) - 1
    if p.stage > last:
        run.progress = p._replace(stage=last, stage_step=p.step - run.stage_start.step)


def nothing_left(run: Run) -> bool:
    """True when ``run`` stands at the end of its last stage."""
    if run.progress.stage + 1 < len(run.stages):
        return False
    run.stage_end = _end_of(run, run.stages[-1])
    return is_over(run)


def chooses_parameters(run: Run) -> bool:
    """True if a stage says which parameters train; otherwise requires_grad is the user's alone."""
    return any(stage.train is not None or stage.freeze is not None for stage in run.stages)


def is_over(run: Run) -> bool:
    """True when the open stage has reached one of its ends."""
    p, end = run.progress, run.stage_end
    return p.step >= end.step or p.epoch >= end.epoch or p.samples >= end.samples or p.seconds >= end.seconds


def end_stage(run: Run) -> None:
    """Count the stage. The next one begins a new epoch, also where this one ended inside of an epoch."""
    p, last = run.progress, run.progress.stage + 1 == len(run.stages)
    inside = p.batch > 0 and not last
    if inside:
        run.series.take_epoch()  # the epoch that is left has no record of its own
    run.progress = p._replace(stage=p.stage + 1, stage_step=0, epoch=p.epoch + inside, batch=0 if inside else p.batch)
    if not last:  # the last stage may be opened again
        run.stage_start, run.stage_ended_at = run.progress, None


def apply_changes(run: Run) -> None:
    """Carry out what ``run.replace`` asked for, between two steps."""
    before = _moved(run)
    for name, obj in run.changes:
        kind, _, key = name.partition(".")
        if kind == "optimizer":
            _replace_optimizer(run, key, obj)
        elif kind in ("train", "valid"):
            _replace_data(run, kind, obj)
        else:
            _replace_model(run, kind, key, obj)
    run.changes.clear()
    if run.team is not None and run.stage is not None:
        run.team.begin(run)
        run.team.begin_stage(run, run.stage)
    known = {id(p) for model in run.models.values() for p in model.parameters()}
    for optimizer_name, optimizer in run.optimizers.items():
        if known and not any(id(p) in known for group in optimizer.param_groups for p in group["params"]):
            raise SettingError(
                f"after {run.replaced[-1]}, the optimizer {optimizer_name!r} moves no parameter of the model any "
                f"more; replace "
                f"it as well: run.replace('optimizer', {type(optimizer).__name__}(new_model.parameters(), ...))"
            )
    lost, named = before - _moved(run), [one for model in run.models.values() for one in model.named_parameters()]
    if left := [name for name, p in named if id(p) in lost and p.requires_grad]:
        warn(
            f"after {run.replaced[-1]}, {len(left)} parameters that were trained are in no optimizer any more "
            f"({', '.join(left[:4])}{', ...' if len(left) > 4 else ''}) and stay as they are; give them to the new one "
            "as well, or say that they are not to be trained: parameter.requires_grad_(False)"
        )


def _moved(run: Run) -> set[int]:
    return {id(p) for one in run.optimizers.values() for group in one.param_groups for p in group["params"]}


def needs_closure(optimizer: Optimizer) -> bool:
    """True for optimizers such as LBFGS, whose ``step`` cannot be called without a closure."""
    kind: Any = type(optimizer)
    return _needs_closure(kind)


@cache
def _needs_closure(kind: Any) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _replace_optimizer(run: Run, key: str, new: Any) -> None:
    if not isinstance(new, Optimizer):
        raise SettingError(f"run.replace('optimizer', {new!r}): expected a torch optimizer")
    old = run.optimizers[key]
    for phase in (phase for stage in run.stages for phase in stage.phases if old in phase.moved):
        scheduled = [s for s in (*phase.step_schedulers, *phase.epoch_schedulers) if s.torch.optimizer is old]
        if scheduled or needs_closure(new) != phase.closure:
            why = (
                f"{type(scheduled[0].torch).__name__} would go on with the old one"
                if scheduled
                else ("one of them calls the step back and the other does not")
            )
            raise SettingError(
                f"{type(new).__name__} cannot take the place of {type(old).__name__} in phase {phase.name!r}: {why}. "
                "Begin a stage with it instead: lw.Stage(..., optimizer=new)"
            )
    run.optimizers[key] = new
    for stage in run.stages:
        stage.scheduled = tuple(s.on(new) if s.optimizer is old else s for s in stage.scheduled)
        for scheduled in stage.scheduled if stage is run.stage else ():
            scheduled.note()
        for phase in stage.phases:
            phase.moved = tuple(new if o is old else o for o in phase.moved)


def _replace_data(run: Run, kind: str, new: Any) -> None:
    stage = run.stage
    if stage is not None:
        if kind == "train":
            stage.source = as_source(new, train=True, key=run.settings.get("key", 0))
            copy_ahead(stage.source, run.device, run.precision.holds)
        else:
            stage.valid = as_sources(new, run.settings.get("key", 0))


def _replace_model(run: Run, kind: str, key: str, new: Any) -> None:
    if not hasattr(run.task, "replace"):
        raise SettingError(
            f"run.replace({kind!r}) needs a Task or Supervised; a plain step function owns its models itself"
        )
    run.task.replace(key or kind, new.to(run.device) if isinstance(new, nn.Module) else new)
    run.models.update(run.task.models())
    steps = {phase.name: phase.step for phase in run.task.phases()}
    for stage in run.stages:
        for phase in stage.phases:
            step = steps.get(phase.name, phase.step)
            if phase.name in steps and isinstance(stage.source, Chunks):
                step = stage.source.carrying(phase.name, step)
            phase.step = step if run.compiler is None else run.compiler(step)


def ids_of_parameters(models: Iterable[nn.Module]) -> set[int]:
    """Which parameters lie in ``models``; a fit of one step asks twice, and torch's own walk costs twice as much."""
    return {id(p) for model in models for part in model.modules() for p in part._parameters.values()}


def inexact(run: Run) -> list[str]:
    """Reasons why a resume of this run could not give the same bits, as far as is known by now."""
    reasons = [reason for stage in run.stages for reason in stage.source.exact]
    reasons += [why for stage in run.stages for phase in stage.phases if phase.meters for why in phase.meters.exact]
    reasons += getattr(run.task, "inexact", [])
    if any(until.unit == "seconds" for stage in run.stages for until in stage.until):
        reasons.append("its length is bounded by time")
    if run.device.type != "cpu" and not run.settings.get("deterministic"):
        reasons.append(f"{run.device.type} without deterministic=True")
    stage, at = run.stage, run.progress.batch
    if stage is not None and stage.loop is not None and stage.source.state_dict().get("batch", at) != at:
        reasons.append(f"the loop of stage {stage.name!r} has not done with a batch that its data has given")
    held = ids_of_parameters(run.models.values())
    for name, optimizer in run.optimizers.items() if isinstance(run.task, nn.Module) else ():
        if lost := sum(id(p) not in held for group in optimizer.param_groups for p in group["params"]):
            reasons.append(f"the optimizer {name!r} moves {lost} tensors that are no parameters of the task's models")
    if run.replaced:
        reasons.append(f"objects were replaced: {', '.join(run.replaced)}")
    return list(dict.fromkeys(reasons))
