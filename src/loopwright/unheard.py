"""What cannot come to anything in a run: handlers that are never called, settings in whose place there are others.

Only what is certain before step 0 is told; where lengths are not known, nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from loopwright.accumulation import parse_accumulate
from loopwright.every import Every
from loopwright.handlers import Handler
from loopwright.progress import Progress
from loopwright.state import Run, Stage
from loopwright.text import rule_name
from loopwright.written import is_ours

__all__ = ["most_of", "unheard"]


def unheard(run: Run) -> Iterator[tuple[str, str | None]]:
    """What comes to nothing in ``run``, and the line of a handler; None: the Trainer's. A rehearsal tells nothing."""
    if run.settings.get("debug"):
        return
    most = most_of(run) if run.handlers else {}
    for handler in run.handlers:
        reasons = {hook: _why_never(hook, handler, run, most) for hook in handler.tests}
        if all(reasons.values()):
            why = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason))
            yield f"the handler {handler.name} at {handler.event} is never called: {why}", handler.made_at
    yield from ((told, None) for told in _replaced(run))


def _why_never(hook: str, handler: Handler, run: Run, most: Mapping[str, float]) -> str | None:
    """Why a handler is never called at ``hook``; None where it may be."""
    if hook in ("on_validation_start", "on_validation_end") and not any(stage.valid for stage in run.stages):
        return "there is no validation data, pass fit(..., valid=loader)"
    if hook == "on_checkpoint" and not run.savers:
        return "no checkpoint is written, give the Trainer a folder= and checkpoint=True"
    if hook == "on_backward_end" and not _moves(run):
        return "no phase moves an optimizer by itself"
    needs = dict(handler.event.needs[hook])
    count = needs.pop("", 0)
    if math.isinf(count):
        return "no occurrence is all that is asked for"
    unit = {"step": "steps", "epoch": "epochs", "stage": "stages"}.get(hook.split("_")[1])
    if unit is not None:
        needs[unit] = max(needs.get(unit, 0), count)
    for name, value in needs.items():
        if value > most.get(name, math.inf):
            return f"this run has {most[name]:g} {name}, and it asks for {value:g}"
    return None


def _moves(run: Run) -> bool:
    return any(phase.moved for stage in run.stages for phase in stage.phases)


def most_of(run: Run) -> dict[str, float]:
    """How many steps, epochs and stages there will be at most; infinity where that is not known."""
    begin = run.stage_start if run.progress.step else Progress()
    most = {"steps": float(begin.step), "epochs": float(begin.epoch), "stages": float(len(run.stages))}
    for stage in run.stages[run.progress.stage :]:
        for unit, value in _length(stage).items():
            most[unit] += value
    return most


def _length(stage: Stage) -> dict[str, float]:
    """Steps and epochs of a stage, at most."""
    most = {"steps": math.inf, "epochs": math.inf}
    for end in stage.until:
        if end.unit in most:
            most[end.unit] = min(most[end.unit], end.value)
    if each := stage.epoch_steps:
        steps, epochs = most["steps"], most["epochs"]
        most = {"steps": min(steps, epochs * each), "epochs": min(epochs, steps / each)}
    return {unit: math.ceil(value) if value < math.inf else value for unit, value in most.items()}


def _replaced(run: Run) -> Iterator[str]:
    """Settings of the Trainer and of the task in whose place each stage, or each phase, has another of its own."""
    accumulate, every, clip_norm = map(run.settings.get, ("accumulate", "validate_every", "clip_norm"))
    if accumulate not in (None, 1):
        own = {stage.name: rule_name(stage.accumulate) for stage in run.stages}
        yield from _nowhere("accumulate", accumulate, rule_name(parse_accumulate(accumulate)), own)
    if every not in (None, "1 epoch"):
        own = {stage.name: str(stage.validate_every) for stage in run.stages if stage.valid}
        yield from _nowhere("validate_every", every, str(Every(every)), own)
    if clip_norm is not None:
        phases = [(stage, phase) for stage in run.stages for phase in stage.phases if phase.moved]
        own = {f"{stage.name}/{phase.name}": phase.clip_norm for stage, phase in phases}
        yield from _nowhere("clip_norm", clip_norm, clip_norm, own)
    supervised = any(is_ours(kind) and kind.__name__ == "Supervised" for kind in type(run.task).__mro__)
    replaced = all(stage.schedule is not None or stage.lr is not None for stage in run.stages)
    if supervised and replaced and run.task.schedule is not None:
        listed = ", ".join(stage.name for stage in run.stages)
        yield f"the task's schedule= applies nowhere, since each stage has its own ({listed}); leave it out"


def _nowhere(name: str, given: Any, meant: Any, own: Mapping[str, Any]) -> Iterator[str]:
    if own and meant not in own.values():
        each = ", ".join(f"{where}: {value!r}" for where, value in own.items())
        yield f"Trainer({name}={given!r}) applies nowhere, since each has its own ({each}); leave it out"
