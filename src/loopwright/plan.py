"""What can be checked before step 0, and what a run will do."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.lr_scheduler import OneCycleLR

from loopwright.accumulation import check_unit
from loopwright.data import Chunks
from loopwright.errors import PlanError, SettingError, choose
from loopwright.metrics import check_metrics, keys_of
from loopwright.optim import match_names
from loopwright.state import Duration, Run, Stage
from loopwright.task import Supervised, Task

__all__ = ["Plan", "make_plan"]


@dataclass(slots=True)
class Plan:
    """The outcome of ``trainer.plan``: ``problems`` that would stop the run, and ``facts`` about it.

    ``print(plan)`` shows both; ``plan.check()`` raises PlanError if there is a problem.
    """

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise PlanError with every problem, if there is any."""
        if self.problems:
            raise PlanError(self.problems)

    def __str__(self) -> str:
        bad = [f"problem: {p}" for p in self.problems]
        return "\n".join([*self.facts, *(bad or ["no problem found"])])

    def _repr_html_(self) -> str:
        facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in self.facts)
        bad = "".join(f'<li><b style="color:#c0182b">problem:</b> {html.escape(one)}</li>' for one in self.problems)
        return f"<ul>{facts}{bad or '<li>no problem found</li>'}</ul>"


def make_plan(run: Run) -> Plan:
    """Look at a prepared run, without reading a batch."""
    plan = Plan()
    for check in (_parameters, _schedules, _intervals, _monitors, _settings, _numbers, _compilation, _callbacks):
        plan.problems += check(run)
    for stage in run.stages:
        plan.facts.append(_describe(stage))
        plan.facts += [f"  {type(s.optimizer).__name__}: {s!r}" for s in stage.scheduled]
    count = sum(_size(p) for model in run.models.values() for p in model.parameters())
    moved = {id(p): p for s in run.stages for ph in s.phases for p in ph.parameters() if p.requires_grad}
    plan.facts.append(f"parameters: {count:,}, of which {sum(map(_size, moved.values())):,} are trained")
    plan.facts.append(f"device: {run.device}, precision: {run.precision.name}")
    if run.compiler is not None:
        plan.facts.append(f"steps are compiled: {run.compiler.name}")
    reasons = run.exact if isinstance(run.exact, list) else []
    plan.facts.append(f"exact resume: no, since {'; '.join(reasons)}" if reasons else "exact resume: yes")
    return plan


def _size(parameter: Tensor) -> int:
    return 0 if is_lazy(parameter) else parameter.numel()


def _describe(stage: Stage) -> str:
    batches = stage.source.batches
    size = "an unknown number of batches" if batches is None else f"{batches} batches"
    steps = "" if stage.epoch_steps is None else f", {stage.epoch_steps} steps"
    until = " or ".join(stage.ends)
    return (
        f"stage {stage.name!r}: until {until}; an epoch is {size}{steps}; phases: "
        f"{', '.join(p.name for p in stage.phases)}"
    )


def _parameters(run: Run) -> Iterator[str]:
    """Every trainable parameter in one optimizer, and every optimizer with parameters of the task."""
    if not isinstance(run.task, nn.Module):
        return
    own = {id(p): name for name, p in run.task.named_parameters()}
    saved = {id(p) for model in run.models.values() for p in model.parameters()}
    unsaved = [name for i, name in own.items() if i not in saved]
    if unsaved:
        yield (
            f"{type(run.task).__name__}.models() leaves out {len(unsaved)} parameters ({', '.join(unsaved[:4])}), "
            "which no checkpoint would hold; add their module to the dict that models() returns"
        )
    lazy = [name for name, p in run.task.named_parameters() if is_lazy(p)]
    if lazy:
        yield (
            f"{', '.join(lazy[:4])}{', ...' if len(lazy) > 4 else ''} of a lazy module has no shape yet; call the "
            "module once with a batch before its optimizer is made"
        )
    seen: set[int] = set()
    for name, optimizer in run.optimizers.items():
        ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
        if not any(i in own for i in ids):
            yield (
                f"the optimizer {name!r} moves no parameter of the task; make it from the task's own: "
                f"{type(optimizer).__name__}(net.parameters(), ...), where net is the very module that is trained"
            )
    for stage in run.stages:
        owner: dict[int, str] = {}
        for optimizer in {id(o): o for phase in stage.phases for o in phase.moved}.values():
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if id(parameter) in owner:
                    name = own.get(id(parameter), "a parameter")
                    yield (
                        f"{name} is moved by two optimizers in stage {stage.name!r}; give each parameter to one of them"
                    )
                    return
                owner[id(parameter)] = ""
        seen |= set(owner)
    manual = any(not phase.moved for stage in run.stages for phase in stage.phases)
    frozen = [_frozen(stage, run.trainable) for stage in run.stages]
    frozen_always = set.intersection(*frozen) if frozen else set()
    missing = [
        name
        for name, p in run.task.named_parameters()
        if p.requires_grad and id(p) not in seen and name not in frozen_always
    ]
    if missing and not manual and seen & set(own):
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        yield (
            f"{len(missing)} trainable parameters are in no optimizer ({shown}); add them to one, or say that they are "
            "not to be trained: parameter.requires_grad_(False)"
        )


def _frozen(stage: Stage, names: Iterable[str]) -> set[str]:
    """Parameters that ``stage`` says are not trained."""
    names = set(names)
    frozen = set() if stage.freeze is None else match_names(stage.freeze, names)
    return frozen if stage.train is None else frozen | (names - match_names(stage.train, names))


def _schedules(run: Run) -> Iterator[str]:
    """A schedule made for another number of steps than this run takes."""
    for stage in run.stages:
        epochs = [u.value for u in stage.until if u.unit == "epochs"]
        steps = [int(u.value) for u in stage.until if u.unit == "steps"]
        if stage.epoch_steps is not None and epochs:
            steps.append(round(min(epochs) * stage.epoch_steps))
        for phase in stage.phases:
            if callable(phase.every):
                continue  # who knows how often it runs
            every = phase.every
            for scheduler in phase.step_schedulers:
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


def _once_an_epoch(scheduler: Any, steps: int, every: int, stage: Stage, epochs: list[float]) -> Iterator[str]:
    """A schedule by epochs that was made for steps, or in a run that ends before its first epoch does."""
    name = type(scheduler.torch).__name__
    for setting in ("T_max", "total_iters"):
        length = getattr(scheduler.torch, setting, None)
        if epochs and length == steps // every and length > min(epochs):
            yield (
                f"{name} was made for {setting}={length}, the steps of this run, but is stepped once an epoch; wrap "
                f"it, lw.per_step(scheduler), or make it with {setting}={min(epochs):g}"
            )
    if stage.epoch_steps is not None and steps < stage.epoch_steps:
        change = "" if scheduler.plateau else " Wrap it: lw.per_step(scheduler), or"
        yield (
            f"{name} is stepped once an epoch, but this run ends after {steps} steps, inside of its first epoch."
            f"{change or ' Plan to'} train for at least one epoch"
        )


def _intervals(run: Run) -> Iterator[str]:
    """Parts of an epoch where nobody knows how long an epoch is."""
    for stage in run.stages:
        if stage.source.batches is not None:
            continue
        asked = [("until", until) for until in stage.until] + [("log_every", run.log_every.duration)]
        asked += [("validate_every", stage.validate_every.duration)] if stage.valid else []
        asked += [(type(s).__name__, Duration.parse(s.every)) for s in run.savers if hasattr(s, "every")]
        asked += [(f"handler {h.name}", interval.duration) for h in run.handlers for interval in h.intervals]
        for who, duration in asked:
            if duration.is_part:
                yield f"{who}: '{duration}' needs data with a known number of batches; count steps instead"


def _monitors(run: Run) -> Iterator[str]:
    """A monitored name that nothing produces; only what is certain is reported."""
    has_valid = any(stage.valid for stage in run.stages)
    names: dict[str, list[str] | None] = {"loss": ["loss"]}  # with the keys that each is logged under, where known
    names |= {term: [term] for term in getattr(getattr(run.task, "loss", None), "terms", ())}
    names |= {name: keys_of(name, metric) for name, metric in check_metrics(run.task.configure_metrics()).items()}
    known = [key for name, keys in names.items() for key in keys or [name]]
    closed = _closed_kinds(run)
    schedulers = [s for stage in run.stages for phase in stage.phases for s in phase.epoch_schedulers]
    for item in [*run.callbacks, *run.savers, *schedulers]:
        monitor = getattr(item, "monitor", None)
        if not isinstance(monitor, str):
            continue
        kind, _, name = monitor.partition("/")
        who = f"{type(getattr(item, 'torch', item)).__name__} monitors {monitor!r}"
        if kind == "valid" and not has_valid:
            yield f"{who}, but there is no validation; pass fit(..., valid=loader) or monitor 'train/{name}'"
        elif kind not in ("train", "valid", "lr"):
            produced = [f"{k}/{n}" for k in (("train", "valid") if has_valid else ("train",)) for n in known]
            likely = f"{'valid' if has_valid else 'train'}/{monitor}"
            yield f"{who}, which is not logged. {choose(likely, produced)}"
        elif kind in closed:
            keys = names.get(name.partition("/")[0], [])
            if keys is not None and name not in keys:
                yield f"{who}, which nothing produces. {choose(monitor, [f'{kind}/{n}' for n in known])}"


def _closed_kinds(run: Run) -> set[str]:
    """Of which records all names are known: the steps are those of Supervised, and nobody else adds a name."""
    kind = type(run.task)
    if not isinstance(run.task, Supervised) or kind.training_step is not Supervised.training_step:
        return set()
    several = any(len(stage.phases) > 1 for stage in run.stages)
    named = any(len(stage.valid) > 1 or "" not in stage.valid for stage in run.stages if stage.valid)
    others = run.handlers or any(type(c).__module__.partition(".")[0] != "loopwright" for c in run.callbacks)
    own = kind.validation_step is Supervised.validation_step
    return ({"valid"} if own and not named else set()) | (set() if several or others else {"train"})


def _numbers(run: Run) -> Iterator[str]:
    """A gradient scaler under which torch refuses to work."""
    if run.precision.scaler is not None:
        half = [n for model in run.models.values() for n, p in model.named_parameters() if p.dtype == torch.float16]
        if half:
            yield (
                f"precision={run.precision.name!r} computes in float16 and keeps the weights in float32, but "
                f"{', '.join(half[:4])}{', ...' if len(half) > 4 else ''} of the model came in float16; call "
                "net.float() before the optimizer is made"
            )


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


def _callbacks(run: Run) -> Iterator[str]:
    """What callbacks themselves say that they cannot do here."""
    for callback in run.callbacks:
        yield from getattr(callback, "problems", lambda run: ())(run)  # one that is no lw.Callback may lack it


def _compilation(run: Run) -> Iterator[str]:
    """Steps that cannot be compiled here, or at all."""
    if run.compiler is None:
        return
    if not isinstance(run.task, nn.Module):
        yield "compile=True cannot apply to a step that does all the work; call torch.compile on what it calls itself"
    elif (problem := run.compiler.problem(run.device)) is not None:
        yield problem


def _settings(run: Run) -> Iterator[str]:
    """Settings that cannot apply to this run."""
    if not any(phase.moved for stage in run.stages for phase in stage.phases):
        for name, harmless in (
            ("clip_norm", (None,)), ("nonfinite", (None, "raise")), ("accumulate", (1,)), ("precision", ("fp32",)),
        ):  # fmt: skip
            if run.settings.get(name, harmless[0]) not in harmless:
                yield (
                    f"{name}={run.settings[name]!r} cannot apply, since no phase moves an optimizer by itself; "
                    "do it in the step"
                )
    for stage in run.stages:
        if run.settings.get("validate_every", "1 epoch") != "1 epoch" and not stage.valid:
            yield (
                f"validate_every={run.settings['validate_every']!r}, but there is no validation data; pass fit(..., "
                f"valid=loader)"
            )
        yield from _truncation(run, stage)
        yield from _accumulation(run, stage)
        closures = [phase for phase in stage.phases if phase.closure]
        for phase in closures:
            name = type(phase.moved[0]).__name__
            for setting, given in (
                (f"accumulate={stage.accumulate}", stage.accumulate != 1),
                (f"clip_norm={phase.clip_norm}", phase.clip_norm is not None),
                ("nonfinite='skip'", run.nonfinite == "skip"),
                (f"precision={run.precision.name!r}", not run.precision.plain),
                ("on_grads_ready", bool(run.hooks.on_grads_ready)),
                ("a second optimizer in the same phase", len(phase.moved) > 1),
            ):
                if given:
                    yield (
                        f"{setting} cannot apply to {name}, which calls the step back as often as it needs; leave it "
                        f"out"
                    )
        if stage.valid and isinstance(run.task, Task) and not isinstance(run.task, Supervised):
            kind = type(run.task)
            if kind.training_step is Task.training_step and kind.validation_step is Task.validation_step:
                yield (
                    f"{kind.__name__} has neither validation_step nor training_step, but validation data was given; "
                    f"write one"
                )
        if isinstance(run.task, Task) and all(not ph.moved and ph.optimizers != () for ph in stage.phases):
            yield f"no phase of stage {stage.name!r} moves an optimizer; return one from configure_optimizers"
        for phase in stage.phases:
            frozen = phase.moved and not any(p.requires_grad for p in phase.parameters())
            if frozen and stage.train is None:
                yield (
                    f"every parameter of phase {phase.name!r} is frozen; set requires_grad_(True) on what shall be "
                    f"trained"
                )
