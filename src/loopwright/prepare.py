"""From friendly arguments to a Run: sources, optimizers, phases and stages, resolved and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopwright.accumulation import parse_accumulate
from loopwright.data import Chunks, DataModule, as_source, as_sources, data_of, opened, samples
from loopwright.errors import DataError, SettingError, choose
from loopwright.events import Callback, check_callback
from loopwright.every import Every
from loopwright.given import named, not_callable_with
from loopwright.metrics import Meters, check_metrics
from loopwright.optim import Scheduled, as_schedulers, match_names, scheduled_in, trainable_flags
from loopwright.parallel import is_shard
from loopwright.progress import Duration, Ends, Whole
from loopwright.recorded import rules_of
from loopwright.stages import end_in, needs_closure
from loopwright.state import Comm, Phase, Run, Stage
from loopwright.text import rule_name, with_article
from loopwright.written import is_ours, placed, written_by_user

__all__ = ["Parts", "assemble", "measured_by", "number_of", "sample_count"]


@dataclass(slots=True)
class Parts:
    """What a task and its data come to: the pieces that a Run is made of."""

    models: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    stages: list[Stage]
    metrics: dict[str, Any]
    shared: dict[str, Optimizer] = field(default_factory=dict)  # those that no stage brought with it
    kept: Mapping[str, Optimizer] = field(default_factory=dict)  # all those of the run before
    found: list[tuple[Optimizer, list[dict[str, Any]]]] = field(default_factory=list)
    label: str = ""  # what the folder of the run is called
    undo_shards: Callable[[], None] = lambda: None  # of models that were shared out over ranks

    def note(self, optimizer: Optimizer) -> None:
        """Remember the settings of ``optimizer`` before a schedule is made for it, which may set learning rates."""
        settings = [
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        self.found.append((optimizer, settings))

    @contextmanager
    def undone_unless_begun(self, run: Run) -> Iterator[None]:
        """A run that cannot begin leaves the optimizers as they were."""
        try:
            yield
        except BaseException:
            if run.status == "created":
                self.undo()
            raise

    def undo(self) -> None:
        """Give the optimizers the settings back that they came with, for a run that does not take place.

        Models are whole again.
        """
        self.undo_shards()
        for optimizer, groups in reversed(self.found):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                for added in group.keys() - settings.keys() - {"params"}:
                    del group[added]
                group.update(settings)


def assemble(
    task: Any,
    train: Any,
    valid: Any,
    stages: list[Stage] | None,
    *,
    until: list[Duration],
    accumulate: Any,
    clip_norm: float | None,
    validate_every: str | int | Duration,
    weight: Callable[[Any], float] | None,
    key: int,
    comm: Comm,
    holds: torch.dtype | None,
    previous: Run | None,
    run: Run,
) -> Parts:
    """Resolve all that training needs for ``run``, whose models are on their device.

    A task goes on with the optimizers and schedulers of its ``previous`` run.
    """
    if isinstance(train, DataModule):
        module, train = train, opened(train, "train", comm)
        if isinstance(task, nn.Module):  # a function has no validation of its own
            valid = data_of(module, "valid") if valid is None else valid
    models = run.models
    converted = move_task(task, models, run.device, holds)
    if run.team is not None:
        run.team.shard(run, previous.optimizers.values() if previous is not None else ())
    with placed("the metrics", written_by_user(task.configure_metrics) or getattr(task, "_made_at", None)):
        metrics = check_metrics(task.configure_metrics())
    at = written_by_user(task.configure_optimizers) or getattr(task, "_made_at", None)
    with placed(type(task).__name__, at):
        run.recorded = rules_of(task)
    old = previous.stages if previous is not None else []
    if previous is None:
        with placed("the optimizer", at):
            method = task.configure_optimizers
            if not is_ours(method) and (why := not_callable_with(method)) is not None:
                name = f"{type(task).__name__}.configure_optimizers"
                raise SettingError(f"{name}{why}. Write: def configure_optimizers(self): ...")
            given = _named(task.configure_optimizers())
    else:
        own = tuple(f"{stage.name}." for stage in old)  # those of a stage come with it
        given = {name: (o, None) for name, o in previous.optimizers.items() if not (own and name.startswith(own))}
    parts = Parts(models, {}, [], metrics, kept=previous.optimizers if previous is not None else {})
    schedules: dict[str, Any] = {}
    later = [one for stage in stages or [] if stage.train is not None for one in _listed(stage.train)]
    for name, (optimizer, schedule) in given.items():
        with placed(f"the optimizer {name!r}", at):
            parts.optimizers[name] = parts.shared[name] = _optimizer(optimizer, task, name, later=later)
        schedules[name] = schedule
    # where there are stages, this one is never trained: each has its own end
    base = Stage("main", "1 step" if stages else until, train, valid, None, accumulate, weight, validate_every)
    base.made_at = None  # what it says was said to the Trainer
    _unique("stage", [stage.name for stage in stages or []])
    for i, stage in enumerate(stages or [base]):
        before = old[i].phases if i < len(old) else []
        inherited = [s for one in (*old[i : i + 1], *old) for s in one.scheduled if not s.of_stage]
        with placed(f"stage {stage.name!r}", stage.made_at):
            parts.stages.append(_stage(stage, base, task, parts, schedules, clip_norm, key, before, inherited))
    for optimizer in parts.optimizers.values():
        _move_state(optimizer, converted=converted)
    return parts


def _move_state(optimizer: Optimizer, *, converted: bool) -> None:
    """Let what an optimizer keeps of a parameter follow it to its device; step counts stay where they are.

    Where the parameters have just been converted, what it keeps of a floating one is converted as well.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items() if isinstance(parameter, torch.Tensor) else ():
            if not isinstance(value, torch.Tensor) or not value.dim():
                continue
            if converted and value.is_floating_point() and parameter.is_floating_point():
                state[name] = value = value.to(parameter.dtype)
            if value.device != parameter.device:
                state[name] = value.to(parameter.device)


def sample_count(batch: Any) -> int:
    """Samples of a batch where it has any tensor, else 1: for steps that take any kind of batch."""
    try:
        return samples(batch)
    except ValueError:
        return 1


def number_of(weight: Callable[[Any], Any]) -> Callable[[Any], float]:
    """``weight`` with a number as its result, also where it returns a tensor; DataError for what weighs nothing.

    Raises SettingError for what cannot be called.
    """
    if not callable(weight):
        raise SettingError(
            f"weight={weight!r} cannot be called; pass a function of the batch that returns how many samples or tokens "
            "it has"
        )
    if (why := not_callable_with(weight, "batch")) is not None:
        raise SettingError(f"weight={rule_name(weight)}{why}. Write: weight=lambda batch: ...")

    @wraps(weight)
    def number(batch: Any) -> float:
        found = weight(batch)
        try:
            value = float(found)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value < math.inf:
            raise DataError(
                f"weight(batch) returned {found!r}; return how many samples or tokens the batch has: a number from 0"
            )
        return value

    return number


def measured_by(metrics: Mapping[str, Any]) -> Meters | None:
    """Fresh meters for a validation or a test; None where there is no metric."""
    return Meters(metrics, training=False) if metrics else None


def _named(found: Any) -> dict[str, tuple[Any, Any]]:
    """``configure_optimizers`` may return an optimizer, ``(optimizer, schedule)``, or a dict of name to either."""
    if isinstance(found, (list, tuple)) and len(found) > 1 and all(isinstance(one, Optimizer) for one in found):
        raise SettingError(
            f"configure_optimizers returned {len(found)} optimizers without names; return a dict, such as "
            '{"gen": optimizer, "disc": optimizer}, and name them in phases: lw.Phase("gen", step, optimizers="gen")'
        )
    pairs = found if isinstance(found, Mapping) else {"main": found}
    for name, pair in pairs.items():
        if not isinstance(name, str) or (isinstance(pair, tuple) and len(pair) != 2):
            got = f"a tuple of {len(pair)}" if isinstance(name, str) else f"the name {name!r}"
            raise SettingError(
                f"configure_optimizers returned {got}; return an optimizer, (optimizer, schedule), or a dict of a name "
                'to either, such as {"body": optimizer, "head": (optimizer, schedule)}'
            )
    return {name: pair if isinstance(pair, tuple) else (pair, None) for name, pair in pairs.items()}


def _optimizer(optimizer: Any, task: Any, name: str, patterns: Any = None, later: Sequence[str] = ()) -> Optimizer:
    """An instance as it is; a factory is called with the trainable parameters of the task.

    ``later``: patterns of what stages train, which may be frozen as yet.
    """
    if isinstance(optimizer, Optimizer):
        _check_moved(optimizer, task, name)
        return optimizer
    if not callable(optimizer):
        raise SettingError(
            f"the optimizer {name!r} is {_short(optimizer)}; pass a torch optimizer such as "
            f"torch.optim.AdamW(net.parameters(), "
            "lr=1e-3), or a factory: lambda params: torch.optim.AdamW(params, lr=1e-3)"
        )
    named = dict(task.named_parameters())
    trained = {n for n, p in named.items() if p.requires_grad or any(fnmatchcase(n, one) for one in later)}
    if not trained and patterns is None:
        raise SettingError(
            f"the factory of optimizer {name!r} has nothing to move: no parameter of {type(task).__name__} is "
            "trainable. Add the module that is to be trained to the task, or set requires_grad_(True) on its parameters"
        )
    chosen = trained if patterns is None else match_names(patterns, named)
    made = optimizer([p for n, p in named.items() if n in chosen])
    if not isinstance(made, Optimizer):
        raise SettingError(
            f"the factory of optimizer {name!r} returned {type(made).__name__}; it must return a torch optimizer"
        )
    return made


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else with_article(type(value).__name__)


def _check_moved(optimizer: Optimizer, task: Any, name: str) -> None:
    """Refuse an optimizer that was made before the parameters were shared out: it would move what nobody uses."""
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    models = task.models().values() if grouped else ()
    if not any(is_shard(p) for model in models for p in model.parameters()):
        return
    if any(is_shard(p) for group in optimizer.param_groups for p in group["params"]):
        return
    kind = type(optimizer).__name__
    raise SettingError(
        f"the optimizer {name!r} was made before FSDP shared out the parameters. Give a function that makes it: "
        f"optimizer=lambda params: torch.optim.{kind}(params, lr={optimizer.defaults.get('lr')}), or make it in "
        "configure_optimizers of an lw.Task"
    )


def _stage(
    stage: Stage, base: Stage, task: Any, parts: Parts, schedules: dict[str, Any], clip_norm: float | None, key: int,
    before: list[Phase], inherited: list[Scheduled],
) -> Stage:  # fmt: skip
    """A resolved copy of ``stage``; what it leaves out comes from ``fit``."""
    made = copy(stage)
    ends = [one for one in _listed(stage.until) if isinstance(one, Callback)]
    with named("until", stage.until):
        until = [Ends.parse(one, unit="epochs") for one in _listed(stage.until) if one not in ends]
    made.callbacks, made.ends = [*stage.callbacks, *ends], [str(one) for one in (*until, *ends)]
    _check_stage(stage, task, made.callbacks)
    made.source = as_source(base.source if stage.source is None else stage.source, train=True, key=key)
    try:
        made.valid = as_sources(base.valid if stage.valid is None else stage.valid, key)
    except DataError as error:
        raise DataError(f"the validation data: {error}") from error
    made.accumulate = parse_accumulate(base.accumulate if stage.accumulate is None else stage.accumulate)
    made.weight = base.weight if stage.weight is None else stage.weight
    made.counts_samples = made.weight is None
    made.weight = (
        number_of(made.weight) if made.weight is not None else samples if isinstance(task, nn.Module) else sample_count
    )
    asked = base.validate_every if stage.validate_every is None else stage.validate_every
    with named("validate_every", asked):
        made.validate_every = Every(asked)
    optimizers = dict(parts.shared)
    if stage.optimizer is not None:
        schedules = {}
        for name, (optimizer, schedule) in _named(stage.optimizer).items():
            full = f"{stage.name}.{name}"
            optimizers[name] = (
                parts.kept[full] if full in parts.kept else _optimizer(optimizer, task, name, stage.train)
            )
            parts.optimizers[full] = optimizers[name]
            schedules[name] = schedule
    given_phases = task.phases() if stage.phases is None else stage.phases
    if not isinstance(given_phases, (list, tuple)) or not all(isinstance(one, Phase) for one in given_phases):
        who = f"{type(task).__name__}.phases() returned " if stage.phases is None else f"stage {stage.name!r}: phases="
        raise SettingError(f"{who}{_short(given_phases)}: expected a list of phases: [lw.Phase('main', step), ...]")
    phases = [copy(phase) for phase in given_phases]
    if not phases:
        raise SettingError(f"stage {stage.name!r} has no phase to train; return at least one from phases()")
    known = {phase.name: (*phase.step_schedulers, *phase.epoch_schedulers) for phase in before}
    _unique("phase", [phase.name for phase in phases])
    found: list[Scheduled] = []
    if stage.schedule is not None or stage.lr is not None:  # in place of all others
        schedules, known, inherited = {}, {}, []
        phases = [replace(phase, schedule=None) for phase in phases]
    said = any(one is not None for one in (stage.phases, stage.optimizer, stage.schedule, stage.lr))
    own = stage.made_at if said else written_by_user(task.phases) or getattr(task, "_made_at", None)
    for phase in phases:
        with placed(f"phase {phase.name!r}", own):
            found += _phase(phase, optimizers, schedules, parts, clip_norm, known, inherited, alone=len(phases) == 1)
    stepped: set[int] = set()
    for phase in reversed(phases):  # a scheduler that several phases share is stepped once, by the last of them
        phase.step_schedulers = tuple(s for s in phase.step_schedulers if id(s) not in stepped)
        phase.epoch_schedulers = tuple(s for s in phase.epoch_schedulers if id(s) not in stepped)
        stepped |= {id(s) for s in (*phase.step_schedulers, *phase.epoch_schedulers)}
    made.phases = phases
    if (k := getattr(task, "truncate", None)) is not None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise SettingError(
                f"{type(task).__name__}.truncate is {k!r}; it cuts sequences into pieces of so many steps: give a "
                "whole number from 1, or None, and call an attribute of your own otherwise"
            )
        made.source = Chunks(made.source, task.chunks)
        for phase in phases:
            phase.step = made.source.carrying(phase.name, phase.step)
    made.until = [end_in(made, part) for end in until for part in end.parts]
    made.whole = Whole(tuple(made.until), made.epoch_steps, made.source.batches)
    own_schedule = stage.schedule is not None or stage.lr is not None or stage.optimizer is not None
    said_at = written_by_user(task.configure_optimizers) or getattr(task, "_made_at", None)
    with placed("the schedule", stage.made_at if own_schedule else said_at):
        made.scheduled = scheduled_in(made, found)
    return made


def _check_stage(stage: Stage, task: Any, callbacks: list[Any]) -> None:
    """Raise for a callback that is none or a Trainer's, a pattern that matches nothing, a loss without a place."""
    for callback in callbacks:
        if hasattr(callback, "due"):
            raise SettingError(f"stage {stage.name!r}: a {type(callback).__name__} belongs to Trainer(checkpoint=...)")
        check_callback(callback)
    for patterns in (stage.train, stage.freeze):
        if patterns is not None and isinstance(task, nn.Module):
            match_names(patterns, trainable_flags(task))
    if stage.loss is None:
        return
    if not hasattr(task, "loss"):
        raise SettingError(
            f"stage {stage.name!r} has a loss, and {type(task).__name__} has none whose place it could take; "
            "give the stage phases instead: phases=[lw.Phase('main', step)]"
        )
    if isinstance(stage.loss, nn.Module) and any(True for _ in stage.loss.parameters()):
        raise SettingError(
            f"the loss of stage {stage.name!r} has parameters, which no checkpoint would hold; make it part of the task"
        )


def _unique(kind: str, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingError(f"two {kind}s are named {twice!r}; give each {kind} a name of its own")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _phase(
    phase: Phase, optimizers: Mapping[str, Optimizer], schedules: dict[str, Any], parts: Parts,
    clip_norm: float | None, known: Mapping[str, tuple[Any, ...]], inherited: list[Scheduled], *, alone: bool,
) -> list[Scheduled]:  # fmt: skip
    wanted = list(optimizers) if phase.optimizers is None else phase.optimizers
    moved: list[Optimizer] = []
    named = schedules if phase.schedule is None else {}
    schedulers: list[Any] = []
    for one in [wanted] if isinstance(wanted, (str, Optimizer)) else wanted:
        if isinstance(one, str) and one not in optimizers:
            raise SettingError(
                f"phase {phase.name!r} moves the optimizer {one!r}, which does not exist. {choose(one, optimizers)}"
            )
        optimizer = optimizers[one] if isinstance(one, str) else one
        if not any(optimizer is known_one for known_one in parts.optimizers.values()):  # given to the phase itself
            parts.optimizers[phase.name if phase.name not in parts.optimizers else f"{phase.name}.{len(moved)}"] = (
                optimizer
            )
        moved.append(optimizer)
        parts.note(optimizer)
        if phase.name not in known and isinstance(one, str) and named.get(one) is not None:
            named[one] = as_schedulers(named[one], (optimizer,))  # made once, for all stages: making it sets lr
            schedulers += named[one]
    schedulers += known[phase.name] if phase.name in known else as_schedulers(phase.schedule, tuple(moved))
    ours = [s for s in schedulers if isinstance(s, Scheduled)]
    for optimizer in moved:
        if not any(s.optimizer is optimizer for s in ours):
            ours += [s for s in inherited if s.optimizer is optimizer][:1]
    schedulers = [s for s in schedulers if not isinstance(s, Scheduled)]
    phase.moved = tuple(moved)
    phase.clip_norm = clip_norm if phase.clip_norm is None and moved else phase.clip_norm
    phase.step_schedulers = tuple(s for s in schedulers if s.every == "step")
    phase.epoch_schedulers = tuple(s for s in schedulers if s.every == "epoch")
    phase.prefix = "" if alone else f"{phase.name}/"
    phase.meters = Meters(parts.metrics, training=True) if parts.metrics else None
    phase.closure = any(needs_closure(optimizer) for optimizer in moved)
    return ours


def move_task(
    task: Any, models: Mapping[str, nn.Module], device: torch.device, holds: torch.dtype | None = None
) -> bool:
    """Put the modules of a task on ``device``, those that are not there yet; True if one was converted to ``holds``.

    Both are done in place, and stay so after the fit. Raises SettingError for complex parameters, which no floating
    dtype can hold.
    """
    converted = False
    inside = [*task.modules()] if isinstance(task, nn.Module) else []
    apart = [model for model in models.values() if model not in inside]
    for module, parts in (*([(task, inside)] if inside else []), *((model, [*model.modules()]) for model in apart)):
        kept = [(*part._parameters.values(), *part._buffers.values()) for part in parts]
        tensors = [tensor for of_part in kept for tensor in of_part if tensor is not None]
        if any(tensor.device != device for tensor in tensors):
            module.to(device)
        if holds is not None and any(tensor.is_complex() for tensor in tensors):
            raise SettingError(
                f"the model has complex parameters or buffers, which {holds} cannot hold; leave precision out"
            )
        if holds is not None and any(t.is_floating_point() and t.dtype != holds for t in tensors):
            module.to(holds)
            converted = True
    return converted
