"""What is asked for and does nothing in this run, or does something twice: warnings, found before step 0."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from torch import nn

from loopwright.callbacks.averaging import EMA, SWA
from loopwright.callbacks.doctor import Doctor
from loopwright.callbacks.mixing import Mixing
from loopwright.callbacks.throughput import Throughput
from loopwright.conflicts import changed_by
from loopwright.described import described
from loopwright.events import HOOKS, Callback
from loopwright.every import Every
from loopwright.optim import match_names
from loopwright.parallel import norms_in, syncs_norms
from loopwright.progress import Duration
from loopwright.state import Run
from loopwright.unheard import most_of
from loopwright.written import is_ours

__all__ = ["does_nothing"]

Found = Iterator[tuple[str, Any]]  # what is idle, and who says so: a stage, a callback, None for the Trainer


def does_nothing(run: Run) -> Found:
    """All that is idle in ``run``. A rehearsal or a part of the data says nothing of lengths."""
    checks, of_lengths = (_frozen_twice, _twice, _mixed_twice, _never_asked, _not_over_ranks), (
        _long_windows, _never_due, _beyond_the_end, _odd_schedules, _never_there,
    )  # fmt: skip
    for check in checks if run.settings.get("debug") else (*checks, *of_lengths):
        yield from check(run)


def _frozen_twice(run: Run) -> Found:
    """Patterns of ``freeze`` that match nothing that would train in their stage."""
    for stage in run.stages if isinstance(run.task, nn.Module) else ():
        given = stage.freeze or ()
        chosen = {name for name, trains in run.trainable.items() if trains}
        trains = chosen if stage.train is None else match_names(stage.train, run.trainable)
        for pattern in [given] if isinstance(given, str) else given:
            if not match_names(pattern, run.trainable) & trains:
                yield f"stage {stage.name!r}: freeze={pattern!r} matches nothing that would train; leave it out", stage


def _twice(run: Run) -> Found:
    """Two callbacks of ours that watch the same with the same settings."""
    for one, other in combinations([c for c in run.callbacks if _only_watches(c)], 2):
        if one is not other and type(one) is type(other) and described(one) == described(other):
            name = type(one).__name__
            yield f"two {name} have the same settings, and the second one does the same again; leave it out", other


def _only_watches(callback: Any) -> bool:
    kind = type(callback)
    changing = [hook for hook in HOOKS if hook.startswith("map_") or hook == "on_grads_ready"]
    return is_ours(kind) and all(getattr(kind, hook, None) is getattr(Callback, hook) for hook in changing)


def _mixed_twice(run: Run) -> Found:
    """MixUp and CutMix that are sure to meet in a batch."""
    for stage in run.stages:
        others = {id(c) for s in run.stages if s is not stage for c in s.callbacks}
        mixing = [c for c in run.callbacks if isinstance(c, Mixing) and id(c) not in others]
        for one, other in combinations(mixing, 2):
            if one.inputs == other.inputs and one.p + other.p > 1:
                yield (
                    f"{type(one).__name__} and {type(other).__name__} both change a batch: what the first has mixed is "
                    "mixed again. Say how often each is to: p=0.5, or leave one out",
                    other,
                )


def _never_asked(run: Run) -> Found:
    """Callbacks that change a loss from which nothing is computed, since the step does all the work."""
    if not any(phase.moved for stage in run.stages for phase in stage.phases):
        for callback in run.callbacks:
            if type(callback).map_loss is not Callback.map_loss and "loss" in changed_by(callback):
                name = f"{type(callback).__name__}.map_loss"
                yield (
                    f"{name} is never called, since no phase moves an optimizer by itself; do it in the step",
                    callback,
                )


def _not_over_ranks(run: Run) -> Found:
    """Batch norm that is to measure over ranks, and is not there or cannot."""
    if not syncs_norms(run.settings.get("strategy")):
        return
    joined, others = norms_in(run.models.values())
    if others:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in others}))
        yield (
            f"sync_batch_norm=True leaves out {len(others)} batch norms that are lazy, or have a forward or a "
            f"process_group of their own ({kinds}): each rank measures its part of a batch there",
            None,
        )
    elif not joined:
        yield "sync_batch_norm=True does nothing, since the model has no batch norm; leave it out", None


def _long_windows(run: Run) -> Found:
    """More batches to a step than an epoch has."""
    for stage in run.stages:
        most, n = stage.source.batches, stage.accumulate
        if most and isinstance(n, int) and n > most and stage.loop is None:
            yield (
                f"accumulate={n} is more than the {_count(most, 'batches')} of an epoch, and a step takes no batch of "
                f"the next one; write accumulate={most}",
                None if n == run.settings.get("accumulate") else stage,
            )


def _never_due(run: Run) -> Found:
    """Phases that the run is too short for."""
    if all(phase.every == 1 for stage in run.stages for phase in stage.phases):
        return
    steps = most_of(run)["steps"]
    for stage in run.stages:
        for phase in stage.phases:
            if isinstance(phase.every, int) and phase.every > steps:
                yield (
                    f"phase {phase.name!r}: every={phase.every} is never due in this run, which has "
                    f"{_count(steps, 'steps')}; take a smaller one, or leave the phase out",
                    stage,
                )


def _odd_schedules(run: Run) -> Found:
    """Schedules of torch that a quick look never comes to, and those for epochs that go by the steps."""
    for stage in run.stages:
        each = stage.epoch_steps
        epochs = min((end.value for end in stage.until if end.unit == "epochs"), default=None)
        stepped = any(phase.epoch_schedulers or phase.step_schedulers for phase in stage.phases)
        if not stepped or epochs is None or each is None or len(run.stages) > 1:
            continue
        steps = most_of(run)["steps"]
        for phase in stage.phases:
            for one in (s.torch for s in phase.epoch_schedulers if steps < each and not s.plateau):
                yield (
                    f"{type(one).__name__} is stepped once an epoch, and never is in this run, which ends inside of "
                    "its first",
                    run.task,
                )
            for one in (s.torch for s in phase.step_schedulers if getattr(s.torch, "T_max", None) == epochs < steps):
                yield (
                    f"{type(one).__name__} was made for T_max={one.T_max}, the epochs of this run, but is stepped with "
                    f"the optimizers, {steps:g} times: the rate rises again. Leave lw.per_step out, or make it with "
                    f"T_max={steps:g}",
                    run.task,
                )


def _never_there(run: Run) -> Found:
    """Schedules of torch that change nothing before the end of the run, or next to nothing."""
    for phase in run.stages[0].phases if len(run.stages) == 1 else ():
        every = phase.every if isinstance(phase.every, int) else 0
        for one in (*phase.epoch_schedulers, *phase.step_schedulers) if every else ():
            whole = most_of(run)
            times = whole["epochs"] if one.every == "epoch" else whole["steps"] // every
            for setting, value, short in _lengths_of(one.torch):
                first = min(value) if isinstance(value, list) else value
                if 1 < times < math.inf and (one.torch.last_epoch + times) * short < first:
                    when, way = "with the optimizers", ""
                    if one.every == "epoch":
                        when, way = "once an epoch", ", or step it with the optimizers: lw.per_step(scheduler)"
                    yield (
                        f"{type(one.torch).__name__} was made for {setting}={value}, and is stepped {when}, {times:g} "
                        f"times in this run, where it changes {'nothing' if short == 1 else 'little'}. Give "
                        f"{f'less than {times:g}' if short == 1 else f'{setting}={times:g}'}{way}",
                        run.task,
                    )


def _lengths_of(scheduler: Any) -> Iterator[tuple[str, int | list[int], int]]:
    """Settings of a torch scheduler that count its steps, their values, and how far short of these a run is told of.

    Before the first two nothing changes; a run may mean to see only the begin of the others.
    """
    for setting, short in (("milestones", 1), ("step_size", 1), ("T_max", 10), ("T_0", 10), ("total_iters", 10)):
        if value := getattr(scheduler, setting, None):
            yield setting, value if isinstance(value, int) else sorted(value), short


def _beyond_the_end(run: Run) -> Found:
    """Single moments after the end of the run, checkpoints never written, and what only looks now and then."""
    whole = most_of(run)
    asked: list[tuple[str, Every, Any]] = [("log_every", run.log_every, None)]
    for stage in (stage for stage in run.stages if stage.valid):
        every, of_all = stage.validate_every, Every(run.settings.get("validate_every", "1 epoch"))
        asked.append(("validate_every", every, None if str(every) == str(of_all) else stage))
    asked += [(type(s).__name__, Every(s.every), s) for s in run.savers if hasattr(s, "every")]
    for callback in run.callbacks:
        kept = getattr(callback, "__dict__", {}).values()
        asked += [(type(callback).__name__, every, callback) for every in kept if isinstance(every, Every)]
        asked += [("SWA", Every(callback.start), callback)] if isinstance(callback, SWA) else []
        asked += [("Doctor", Every(callback.every), callback)] if isinstance(callback, Doctor) else []
    for who, every, cause in asked:
        never = getattr(cause, "at_end", True) is False and getattr(cause, "monitor", None) is None
        never = never or isinstance(cause, (EMA, SWA, Doctor, Throughput))  # at no other time they do anything
        missed = every.missed(whole, moments=("every", "at", "after") if never else ("at", "after"))
        if missed is not None:
            end = _count(whole[missed.unit], missed.unit)
            yield f"{who}: '{every}' comes after the end of this run, which has {end}", cause


def _count(n: float, unit: str) -> str:
    return str(Duration(n, unit))
