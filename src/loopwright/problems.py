"""What cannot work in a run that has been prepared, found before step 0: each problem with its fix and its line."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import OneCycleLR

from loopwright.accumulation import check_unit
from loopwright.conflicts import lost_work, read_too_early
from loopwright.data import Chunks
from loopwright.data.iterated import Iterated
from loopwright.data.named import check_columns, columns_of
from loopwright.errors import DataError, SettingError
from loopwright.events import Callback, hook_name
from loopwright.given import not_callable_with
from loopwright.monitored import output_names, watched_in_vain, watched_the_wrong_way
from loopwright.optim import match_names
from loopwright.overlooked import misnamed, own_functions, saved_in_vain
from loopwright.parallel import syncs_norms
from loopwright.recordable import obstacles
from loopwright.stages import ids_of_parameters, needs_closure
from loopwright.state import Every, Run, Stage
from loopwright.task import StepTask, Supervised, Task
from loopwright.text import rule_name
from loopwright.written import caller, is_ours, where, written_by_user

__all__ = ["Written", "problems_in", "read_again"]

_BEFORE = ("__init__", "configure_optimizers", "phases", "models")  # have been called by now
_CHOOSES = re.compile("requires_grad|add_param_group|freez|set_trainable")  # in names that code uses
_ENDS = re.compile("StopEpoch|end_stage|request_stop")
_READ_ONCE = ("builtins", "itertools", "torch.utils.data.dataloader")  # whose iterators cannot begin again
Found = Iterator[tuple[str, str]]  # a problem, and the file and line in which its cause was written


@dataclass(frozen=True, slots=True)
class Written:
    """Where a run is written down, as file and line: its Trainer, what names its optimizers, the call of ``fit``."""

    trainer: str
    task: str
    call: str

    @staticmethod
    def of(run: Run, trainer: str | None) -> Written:
        """``trainer``: where it was made. Where the task or the Trainer does not tell, the call of ``fit`` is named."""
        call = caller() or ""
        own = written_by_user(getattr(run.task, "configure_optimizers", None))
        return Written(trainer or call, own or getattr(run.task, "_made_at", None) or call, call)

    def stage(self, stage: Stage) -> str:
        """Where ``stage`` was made; the one of a run without stages is the Trainer's."""
        return stage.made_at or self.trainer

    def callback(self, run: Run, callback: Any) -> str:
        """The Trainer or the stage that was given ``callback``."""
        return next((self.stage(s) for s in run.stages if any(c is callback for c in s.callbacks)), self.trainer)

    def by(self, run: Run, cause: Any) -> str:
        """Where ``cause`` was made or given: the task, a stage, a callback; a line is itself."""
        if isinstance(cause, str):
            return cause
        if isinstance(cause, Stage):
            return self.stage(cause)
        return self.task if cause is run.task else self.callback(run, cause)


def problems_in(run: Run, written: Written) -> Found:
    """All that cannot work, as far as it can be known without reading a batch."""
    for check in (
        _parameters, _unused, _signatures, _schedules, _intervals, _watched, _settings, _given_twice, _numbers,
        _compilation, _graphs, _columns,
    ):  # fmt: skip
        yield from check(run, written)
    yield from saved_in_vain(run)
    for callback in run.callbacks:  # one that is no lw.Callback may lack it
        found = getattr(callback, "problems", lambda run: ())(run)
        yield from ((problem, written.callback(run, callback)) for problem in found)
    kept = (*lost_work(run), *read_too_early(run, output_names(run)))
    yield from ((problem, place or written.trainer) for problem, place in kept)


# ----------------------------------------------------------------------------------------- parameters and optimizers


def _parameters(run: Run, written: Written) -> Found:
    """Every trainable parameter in one optimizer, and every optimizer with parameters of the task."""
    if not isinstance(run.task, nn.Module):
        return
    named = dict(run.task.named_parameters())  # once: a large model has many
    own = {id(p): name for name, p in named.items()}
    saved = ids_of_parameters(run.models.values())
    unsaved = [name for name, p in named.items() if id(p) not in saved and p.requires_grad]  # others come as they came
    if unsaved:
        yield (
            f"{type(run.task).__name__}.models() leaves out {len(unsaved)} parameters ({', '.join(unsaved[:4])}), "
            "which no checkpoint would hold; add their module to the dict that models() returns",
            where(run.task.models),
        )
    lazy = [name for name, p in named.items() if is_lazy(p)]
    if lazy:
        yield (
            f"{', '.join(lazy[:4])}{', ...' if len(lazy) > 4 else ''} of a lazy module has no shape yet; call the "
            "module once with a batch before its optimizer is made",
            written.task,
        )
    for name, optimizer in run.optimizers.items():
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        if not moved and not _chooses_itself(run):  # else it may be given some in time
            yield (
                f"the optimizer {name!r} holds no parameter; make it from the task's own: "
                f"{type(optimizer).__name__}(net.parameters(), ...)",
                _made_by(run, name, written),
            )
        if not any(id(p) in own for p in moved) and any(isinstance(p, nn.Parameter) for p in moved):
            yield (
                f"the optimizer {name!r} moves no parameter of the task; make it from the task's own: "
                f"{type(optimizer).__name__}(net.parameters(), ...), where net is the very module that is trained",
                _made_by(run, name, written),
            )
    yield from _moved_once(run, named, own, written)


def _moved_once(run: Run, named: dict[str, nn.Parameter], own: dict[int, str], written: Written) -> Found:
    """Parameters that two optimizers of a stage move, and trainable ones that none moves. ``own``: names by id."""
    seen: set[int] = set()
    for stage in run.stages:
        owner: set[int] = set()
        by_rule = {id(o) for phase in stage.phases if callable(phase.every) for o in phase.moved}  # they may take turns
        for optimizer in {id(o): o for phase in stage.phases for o in phase.moved}.values():
            moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
            seen |= moved
            if id(optimizer) in by_rule:
                continue
            if twice := owner & moved:
                name = next((own[i] for i in own if i in twice), "a parameter")
                instead = ""
                if stage.optimizer is not None and optimizer in _given_to(run, stage):
                    instead = (
                        f", or let the one of the stage take another's place by its name: optimizer={{"
                        f"{next(iter(run.optimizers))!r}: ...}}"
                    )
                yield (
                    f"{name} is moved by two optimizers in stage {stage.name!r}; give each parameter to one of "
                    f"them{instead}",
                    written.task if stage.optimizer is None else written.stage(stage),
                )
                return
            owner |= moved
    frozen = [_frozen(stage, run.trainable) for stage in run.stages]
    frozen_always = set.intersection(*frozen) if frozen else set()
    missing = [name for name, p in named.items() if p.requires_grad and id(p) not in seen and name not in frozen_always]
    if missing and seen & set(own) and not _moves_itself(run):
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        yield (
            f"{len(missing)} trainable parameters are in no optimizer ({shown}); add them to one, or say that they are "
            "not to be trained: parameter.requires_grad_(False)",
            written.task,
        )
    for stage in run.stages:
        if (lost := _thawed_in_vain(run, stage)) and not _moves_itself(run):
            kind = next((type(o).__name__ for phase in stage.phases for o in phase.moved), "SGD")
            yield (
                f"stage {stage.name!r} trains {len(lost)} parameters that are in no optimizer ({', '.join(lost[:4])}"
                f"{', ...' if len(lost) > 4 else ''}); give it all of them, torch.optim.{kind}(net.parameters(), ...), "
                f"as stages freeze what is not to move, or leave them out of train={stage.train!r}",
                written.task if stage.optimizer is None else written.stage(stage),
            )


def _moves_itself(run: Run) -> bool:
    """True where the user's own code may move parameters, or say which ones are moved."""
    return any(not phase.moved for stage in run.stages for phase in stage.phases) or _chooses_itself(run)


def _thawed_in_vain(run: Run, stage: Stage) -> list[str]:
    """Parameters that came frozen, that ``stage`` says are trained, and that no optimizer holds."""
    if stage.train is None:
        return []
    held = {id(p) for one in run.optimizers.values() for group in one.param_groups for p in group["params"]}
    frozen = _frozen(stage, run.trainable)
    named = run.task.named_parameters()
    return [n for n, p in named if n not in frozen and not run.trainable.get(n, True) and id(p) not in held]


def _given_to(run: Run, stage: Stage) -> list[Any]:
    """The optimizers that a stage has brought with it."""
    return [optimizer for name, optimizer in run.optimizers.items() if name.startswith(f"{stage.name}.")]


def _chooses_itself(run: Run) -> bool:
    """True where the user's own code says while training goes on which parameters train, or gives an optimizer more."""
    return _uses(run, _CHOOSES)


def _uses(run: Run, names: re.Pattern[str]) -> bool:
    """True where the user's own code, as far as it has not been called by now, uses one of ``names``."""
    methods = (method for name, method in own_functions(run) if name not in _BEFORE)
    codes = (getattr(getattr(m, "__func__", m), "__code__", None) for m in methods)
    return any(names.search(" ".join(code.co_names)) for code in codes if code is not None)


def _made_by(run: Run, name: str, written: Written) -> str:
    """Where the optimizer called ``name`` was given: to a stage, whose name it begins with, or to the task."""
    given = (written.stage(s) for s in run.stages if s.optimizer is not None and name.startswith(f"{s.name}."))
    return next(given, written.task)


def _unused(run: Run, written: Written) -> Found:
    """An optimizer that is named, and that no phase moves."""
    phases = [phase for stage in run.stages for phase in stage.phases]
    moved = {id(optimizer) for phase in phases for optimizer in phase.moved}
    if all(phase.moved for phase in phases) and all(stage.optimizer is None for stage in run.stages):
        for name, optimizer in run.optimizers.items():
            if id(optimizer) not in moved:
                yield (
                    f"the optimizer {name!r} is moved by no phase; name it in Phase(optimizers=...), or leave it out",
                    written.task,
                )


def _frozen(stage: Stage, names: Iterable[str]) -> set[str]:
    """Parameters that ``stage`` says are not trained."""
    names = set(names)
    frozen = set() if stage.freeze is None else match_names(stage.freeze, names)
    return frozen if stage.train is None else frozen | (names - match_names(stage.train, names))


def _trains_nothing(run: Run, stage: Stage) -> bool:
    """True if ``stage`` freezes all that its phases move. One phase may be idle: it can be there for what it logs."""
    names = _frozen(stage, run.trainable)
    if not names or not isinstance(run.task, nn.Module):
        return False
    shut = {id(p) for name, p in run.task.named_parameters() if name in names}
    moved = {id(p) for phase in stage.phases for p in phase.parameters()}
    return bool(moved) and moved <= shut


# ------------------------------------------------------------------------------------------- schedules and intervals


def _schedules(run: Run, written: Written) -> Found:
    """A schedule made for another number of steps than this run takes."""
    for stage in run.stages:
        at = written.task if stage.schedule is None and stage.lr is None else written.stage(stage)
        yield from ((problem, at) for problem in _schedules_of(stage))
    yield from ((problem, written.task) for problem in _over_all_stages(run))


def _over_all_stages(run: Run) -> Iterator[str]:
    """A schedule that goes on through several stages, and is at its end before they are."""
    takes: dict[int, list[int]] = {}
    made: dict[int, Any] = {}
    for stage in run.stages:
        if len(stage.ends) != len(stage.until):
            continue  # a plateau may end it before
        for phase in (phase for phase in stage.phases if isinstance(phase.every, int)):
            for one in (s.torch for s in phase.step_schedulers if isinstance(s.torch, OneCycleLR)):
                if known := _steps_in(stage):
                    made[id(one)] = one
                    takes.setdefault(id(one), []).append(min(known) // phase.every)
    for key, steps in takes.items():
        have, need = made[key].total_steps, sum(steps)
        if max(steps) <= have < need:
            yield (
                f"OneCycleLR was made for {have} steps, and goes through {len(steps)} stages that take {need}; make it "
                f"with total_steps={need}"
            )


def _steps_in(stage: Stage) -> list[int]:
    """The steps of a stage by each of its ends that tells."""
    steps = [int(u.value) for u in stage.until if u.unit == "steps"]
    epochs = [u.value for u in stage.until if u.unit == "epochs"]
    return steps if stage.epoch_steps is None or not epochs else [*steps, round(min(epochs) * stage.epoch_steps)]


def _schedules_of(stage: Stage) -> Iterator[str]:
    epochs, steps = [u.value for u in stage.until if u.unit == "epochs"], _steps_in(stage)
    for phase in stage.phases:
        if callable(phase.every):
            continue  # who knows how often it runs
        every = phase.every
        for scheduler in phase.step_schedulers:
            if steps and epochs:
                yield from _made_for_batches(scheduler.torch, min(steps) // every, min(epochs), stage)
            if isinstance(scheduler.torch, OneCycleLR) and steps:
                need, have = min(steps) // every, scheduler.torch.total_steps
                if need > have:
                    yield (
                        f"OneCycleLR was made for {have} steps, but phase {phase.name!r} takes {need}; "
                        f"make it with total_steps={need}"
                    )
        for scheduler in phase.epoch_schedulers:
            if isinstance(scheduler.torch, OneCycleLR) and not epochs:
                yield (
                    "OneCycleLR is stepped once an epoch here, but the run counts steps; wrap it: "
                    "lw.per_step(scheduler)"
                )
            elif steps:
                yield from _once_an_epoch(scheduler, min(steps), every, stage, epochs)


def _made_for_batches(scheduler: Any, steps: int, epochs: float, stage: Stage) -> Iterator[str]:
    """A schedule that is stepped with the optimizers, and was made for each batch where a step takes several."""
    if not isinstance(stage.accumulate, int) or stage.accumulate == 1 or stage.source.batches is None:
        return
    for setting in ("total_steps", "T_max"):
        length = getattr(scheduler, setting, None)
        if length == round(epochs * stage.source.batches) and length > steps:
            yield (
                f"{type(scheduler).__name__} was made for {setting}={length}, the batches of this run, but is stepped "
                f"with the optimizers: {steps} times with accumulate={stage.accumulate}. Make it with {setting}={steps}"
            )


def _once_an_epoch(scheduler: Any, steps: int, every: int, stage: Stage, epochs: list[float]) -> Iterator[str]:
    """A schedule by epochs that was made for steps, or in a run that ends before its first epoch does."""
    name = type(scheduler.torch).__name__
    parts = getattr(scheduler.torch, "_milestones", None)
    last = getattr(scheduler.torch, "_schedulers", [None])[-1]
    for setting in ("T_max", "total_iters"):
        length = getattr(last if parts else scheduler.torch, setting, None)
        if parts and length is not None:
            length += parts[-1]
            if epochs and length == steps // every and length > min(epochs):
                yield (
                    f"{name} was made for {length} in all, the steps of this run, but is stepped once an epoch; wrap "
                    f"it, lw.per_step(scheduler), or make it for {min(epochs):g}"
                )
        elif epochs and length == steps // every and length > min(epochs):
            yield (
                f"{name} was made for {setting}={length}, the steps of this run, but is stepped once an epoch; wrap "
                f"it, lw.per_step(scheduler), or make it with {setting}={min(epochs):g}"
            )
    if stage.epoch_steps is not None and steps < stage.epoch_steps and not epochs:  # else it is a quick look
        change = "" if scheduler.plateau else " Wrap it: lw.per_step(scheduler), or"
        yield (
            f"{name} is stepped once an epoch, but this run ends after {steps} steps, inside of its first epoch."
            f"{change or ' Plan to'} train for at least one epoch"
        )


def _intervals(run: Run, written: Written) -> Found:
    """Intervals that cannot be known: parts of an epoch or stage whose length nobody knows, tokens not counted."""
    asked = [("log_every", run.log_every, written.trainer)]
    asked += [(type(s).__name__, Every(s.every), written.trainer) for s in run.savers if hasattr(s, "every")]
    asked += [(f"handler {h.name}", i, h.made_at or written.trainer) for h in run.handlers for i in h.intervals]
    for stage in run.stages:
        at = written.stage(stage)
        for until in stage.until if stage.source.batches is None else ():
            if until.is_part:
                yield f"until: '{until}' needs data with a known number of batches; count steps instead", at
        for who, every, place in asked:
            yield from ((f"{who}: {problem}", place) for problem in every.problems(stage))
        if stage.valid:
            problems = stage.validate_every.problems(stage, at_steps=True)
            yield from ((f"validate_every: {problem}", at) for problem in problems)


def _columns(run: Run, written: Written) -> Found:
    """Tables to validate on with other columns than those to train on."""
    for stage in run.stages:
        trained_on = columns_of(stage.source) if stage.valid else {}
        for name, source in stage.valid.items() if trained_on else ():
            try:
                check_columns(trained_on, source, f"valid/{name}" if name else "valid")
            except DataError as error:
                yield str(error), stage.made_at or written.call or written.trainer


def _watched(run: Run, written: Written) -> Found:
    """Names to monitor that nothing produces, or that are watched the wrong way."""
    for problem, cause in (*watched_in_vain(run), *watched_the_wrong_way(run)):
        yield problem, written.by(run, cause)


# ----------------------------------------------------------------------------------------- settings that cannot apply


def _settings(run: Run, written: Written) -> Found:
    """Settings that cannot apply to this run."""
    if not any(phase.moved for stage in run.stages for phase in stage.phases):
        for name, harmless in (
            ("clip_norm", (None,)), ("nonfinite", (None, "raise")), ("accumulate", (1,)), ("precision", ("fp32",)),
        ):  # fmt: skip
            if run.settings.get(name, harmless[0]) not in harmless:
                yield (
                    f"{name}={run.settings[name]!r} cannot apply, since no phase moves an optimizer by itself; "
                    "do it in the step",
                    written.trainer,
                )
        if syncs_norms(run.settings.get("strategy")):
            yield (
                "sync_batch_norm=True cannot apply, since no phase moves an optimizer by itself; call "
                "nn.SyncBatchNorm.convert_sync_batchnorm on the model, which works on accelerators",
                written.trainer,
            )
    asked = run.settings.get("validate_every", "1 epoch")
    if asked != "1 epoch" and not any(stage.valid for stage in run.stages):
        way = "pass fit(..., valid=loader)"
        if isinstance(run.task, StepTask):
            way = "Trainer.run has no validation of its own: leave it out, and call trainer.validate(...) in a handler"
        yield f"validate_every={asked!r}, but there is no validation data; {way}", written.trainer
    for stage in run.stages:
        at = written.stage(stage)
        own = stage.made_at is not None and not stage.valid
        if own and str(stage.validate_every) != str(Every(asked)):
            yield (
                f"stage {stage.name!r}: validate_every='{stage.validate_every}', but there is no validation data; pass "
                "fit(..., valid=loader)",
                at,
            )
        for check in (_truncation, _accumulation, _closures):
            yield from ((problem, at) for problem in check(run, stage))
        yield from ((problem, written.task) for problem in _steps(run, stage))
        if _trains_nothing(run, stage) and stage.freeze is None:
            if not _thawed_in_vain(run, stage):
                yield (
                    f"stage {stage.name!r} trains nothing: its optimizers move none of train={stage.train!r}; let it "
                    "match some of what they move, or give the stage an optimizer that moves it",
                    at,
                )
        elif _trains_nothing(run, stage):
            yield (
                f"stage {stage.name!r} freezes every parameter that it could move; leave some of them out of "
                f"freeze={stage.freeze!r}",
                at,
            )


def _given_twice(run: Run, written: Written) -> Found:
    """One callback or saver that is in the list twice: each of its hooks would be called twice."""
    for listed in (run.callbacks, run.savers):
        for one in {id(one): one for i, one in enumerate(listed) if any(one is other for other in listed[:i])}.values():
            yield f"one {type(one).__name__} is given twice; leave it out once", written.callback(run, one)


def _steps(run: Run, stage: Stage) -> Iterator[str]:
    """Steps that a task lacks, and phases that move nothing."""
    kind = type(run.task)
    own = isinstance(run.task, Task) and not isinstance(run.task, Supervised)
    none = own and (kind.training_step, kind.validation_step) == (Task.training_step, Task.validation_step)
    if any(getattr(inspect.unwrap(ph.step), "__func__", None) is Task.training_step for ph in stage.phases):
        meant = misnamed(run, "training_step")
        instead = f", in the place of {meant}" if meant else ""
        yield f"{kind.__name__} has no training_step; write: def training_step(self, batch): ... return loss{instead}"
    elif stage.valid and none:
        yield f"{kind.__name__} has neither validation_step nor training_step, but validation data was given; write one"
    if isinstance(run.task, Task) and all(not ph.moved and ph.optimizers != () for ph in stage.phases):
        yield f"no phase of stage {stage.name!r} moves an optimizer; return one from configure_optimizers"
    if isinstance(stage.source, Chunks):
        yield from _carrying(run.task)
    for phase in stage.phases:
        frozen = phase.parameters() and not any(p.requires_grad for p in phase.parameters())
        if frozen and stage.train is None and not _chooses_itself(run):
            yield (
                f"every parameter of phase {phase.name!r} is frozen; set requires_grad_(True) on what shall be trained"
            )


def _signatures(run: Run, written: Written) -> Found:
    """Steps that do not take a batch, and nothing else."""
    steps = [phase.step for s in run.stages if not isinstance(s.source, Chunks) for phase in s.phases]
    if any(stage.valid for stage in run.stages):
        steps.append(run.task.validation_step)
    told: set[str] = set()
    for step in steps if run.compiler is None else map(inspect.unwrap, steps):
        if is_ours(step):
            continue
        why, name = not_callable_with(step, "batch"), str(rule_name(step))
        if why is not None and name not in told:
            told.add(name)
            yield (
                f"{name}{why}. Write: def {name.rpartition('.')[2]}(self, batch): ...; run.progress.batch counts the "
                "batches",
                where(step),
            )


def _carrying(task: Any) -> Iterator[str]:
    """A module or a step that cannot be passed what ``truncate`` carries from one piece of a sequence to the next."""
    kind = type(task)
    if kind.training_step is Supervised.training_step:
        if task.inputs is None and _positions(task.module.forward) < 2:
            yield (
                f"truncate={task.truncate} calls {type(task.module).__name__} as module(input, carry), and its forward "
                "takes one argument; train what carries something on, as nn.LSTM does, or leave truncate out"
            )
    elif kind.phases is Task.phases and _positions(task.training_step) < 2:
        yield (
            f"truncate={task.truncate} calls {kind.__name__}.training_step with a carry as well; write: "
            'def training_step(self, batch, carry=None): ... return {"loss": loss, "carry": h}, or leave truncate out'
        )


def _positions(function: Any) -> float:
    """How many arguments by position a function can be called with."""
    kinds = [p.kind for p in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return math.inf
    return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)


def _closures(run: Run, stage: Stage) -> Iterator[str]:
    """What cannot be together with an optimizer that calls the step back, as LBFGS does."""
    for phase in (phase for phase in stage.phases if phase.closure):
        name = next(type(one).__name__ for one in phase.moved if needs_closure(one))
        for setting, given in (
            (f"accumulate={stage.accumulate}", stage.accumulate != 1),
            (f"clip_norm={phase.clip_norm}", phase.clip_norm is not None),
            ("nonfinite='skip'", run.nonfinite == "skip"),
            (f"precision={run.precision.name!r}", not run.precision.plain),
            (", ".join(hook_name(hook, run) for hook in run.hooks.on_grads_ready), bool(run.hooks.on_grads_ready)),
            ("a second optimizer in the same phase", len(phase.moved) > 1),
        ):
            if given:
                yield f"{setting} cannot apply to {name}, which calls the step back as often as it needs; leave it out"


def _truncation(run: Run, stage: Stage) -> Iterator[str]:
    """What cannot be together with truncated back-propagation through time."""
    if not isinstance(stage.source, Chunks):
        return
    for setting, given in (
        (f"accumulate={stage.accumulate}", stage.accumulate != 1),
        ("several processes", run.team is not None),
        ("an optimizer that calls the step back", any(phase.closure for phase in stage.phases)),
        ("compile=True", run.compiler is not None),
    ):
        if given:
            yield (
                f"{setting} cannot apply with truncate={run.task.truncate}, where each piece of a sequence is a step "
                "that begins with what the one before has left; leave one of the two out"
            )


def _accumulation(run: Run, stage: Stage) -> Iterator[str]:
    """What a loop of the user's own does not do; a rule whose unit nobody counts, or that this run cannot follow."""
    if stage.loop is not None:
        for setting, given in (
            (f"accumulate={stage.accumulate}", stage.accumulate != 1),
            ("several processes", run.team is not None),
        ):
            if given:
                yield f"{setting} cannot apply to stage {stage.name!r}, whose loop is your own: do it there"
    if isinstance(stage.accumulate, int):
        return
    if run.team is not None:
        yield f"accumulate={stage.accumulate} cannot apply to several processes; give a number of batches"
    for unit in stage.accumulate.units:
        try:
            check_unit(unit, counts_samples=stage.counts_samples)
        except SettingError as error:
            yield str(error)


def read_again(run: Run, written: Written) -> Found:
    """Iterators that give their batches once, in a run that is sure to read them again; none in one that goes on."""
    sources = (source for stage in run.stages for source in (stage.source, *stage.valid.values()))
    if not any(_is_read_once(source) for source in sources) or run.progress.step or _may_end_early(run):
        return
    reads: dict[int, float] = {}
    for stage in run.stages:
        done = _lengths(stage)
        endless = any(end.unit != "epochs" for end in stage.until)  # its data may be meant to have no end
        found = [(stage.source, 0.0 if endless else done.get("epochs", 0.0), "training")]
        found += [(one, stage.validate_every.times(done), "validation") for one in stage.valid.values()]
        for source, times, what in found:
            if not _is_read_once(source):
                continue
            data = source.data
            before = reads.get(id(data), 0.0)
            reads[id(data)] = before + times
            if before <= 1 < reads[id(data)]:
                yield (
                    f"the {what} data is an iterator ({type(data).__name__}), which can be read once, and this run "
                    "reads it again; pass a list, a DataLoader, or a generator function: batches, not batches()",
                    written.call,
                )


def _is_read_once(source: Any) -> TypeGuard[Iterated]:
    data = source.data if isinstance(source, Iterated) else None
    return isinstance(data, Iterator) and type(data).__module__ in _READ_ONCE


def _lengths(stage: Stage) -> dict[str, float]:
    """Steps and epochs of a stage, where it is sure to last so long; those that are not known are left out."""
    epochs, steps = [u.value for u in stage.until if u.unit == "epochs"], _steps_in(stage)
    if len(stage.ends) != sum(end.unit in ("epochs", "steps") for end in stage.until):
        return {}  # a time, or a plateau
    known = {"steps": min(steps, default=0.0), "epochs": min(epochs, default=0.0)}
    return {unit: float(value) for unit, value in known.items() if value}


def _may_end_early(run: Run) -> bool:
    """True where code that a run calls may end an epoch, a stage or the run."""
    kinds = {kind for one in run.callbacks for kind in type(one).__mro__ if kind is not Callback}
    codes = (getattr(method, "__code__", None) for kind in kinds for method in vars(kind).values())
    return _uses(run, _ENDS) or any(_ENDS.search(" ".join(code.co_names)) for code in codes if code is not None)


def _numbers(run: Run, written: Written) -> Found:
    """A gradient scaler under which torch refuses to work."""
    if run.precision.scaler is not None:
        half = [n for model in run.models.values() for n, p in model.named_parameters() if p.dtype == torch.float16]
        if half:
            yield (
                f"precision={run.precision.name!r} computes in float16 and keeps the weights in float32, but "
                f"{', '.join(half[:4])}{', ...' if len(half) > 4 else ''} of the model came in float16; call "
                "net.float() before the optimizer is made",
                written.trainer,
            )


def _graphs(run: Run, written: Written) -> Found:
    """Steps that cannot be recorded as CUDA graphs."""
    if run.graphs is not None:
        yield from ((problem, written.trainer) for problem in obstacles(run))


def _compilation(run: Run, written: Written) -> Found:
    """Steps that cannot be compiled here, or at all."""
    if run.compiler is None:
        return
    if not isinstance(run.task, nn.Module):
        yield (
            "compile=True cannot apply to a step that does all the work; call torch.compile on what it calls itself",
            written.trainer,
        )
    elif (problem := run.compiler.problem(run.device)) is not None:
        yield problem, written.trainer
    elif run.team is not None and run.team.norms is not None and run.compiler.options.get("fullgraph"):
        yield (
            "compile={'fullgraph': True} cannot apply with sync_batch_norm=True: what ranks tell one another stands "
            "between graphs; leave one of the two out",
            written.trainer,
        )
