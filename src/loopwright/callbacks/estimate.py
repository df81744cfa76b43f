"""How much of a run is done and how long the rest takes, from its progress and the length of its stages."""

from __future__ import annotations

import math
from collections.abc import Iterable

from loopwright.state import Duration, Progress, Run, Stage

__all__ = ["part_done", "planned", "time_left"]


def planned(run: Run, unit: str) -> int | None:
    """Epochs or steps (``unit``) of the run when its last stage ends; None if it is not counted in them."""
    total = float(getattr(run.stage_start, unit))
    for stage in run.stages[run.progress.stage :]:
        values = [d.value for d in stage.until if d.unit == unit + "s"]
        if not values:
            return None
        total += math.ceil(min(values))
    return int(total)


def part_done(run: Run) -> float | None:
    """How much of the open stage is done, from 0 to 1; None while it cannot be known."""
    stage = run.stage
    if stage is None:
        return 1.0
    parts = [_passed(d, stage, run.stage_start, run.progress) / d.value for d in stage.until]
    return min(1.0, max(parts)) if any(parts) else None


def time_left(run: Run) -> float | None:
    """Seconds to the end of the last stage at the speed of the open one so far; None while unknown.

    Validation is in that speed as soon as there was one. Stages that are counted in epochs of unknown
    length have no estimate before their first epoch is over.
    """
    stage, at, start = run.stage, run.progress, run.stage_start
    spent = at.seconds - start.seconds
    if stage is None or spent < 1.0 or at.step == start.step:  # the first second is spent on warming up
        return None
    left = _shortest(_rest(d, stage, start, at, spent) for d in stage.until)
    for later in run.stages[at.stage + 1 :]:
        whole = _shortest(_whole(d, later, start, at, spent) for d in later.until)
        if left is None or whole is None:
            return None
        left += whole
    return left


def _passed(d: Duration, stage: Stage, start: Progress, at: Progress) -> float:
    batches = stage.source.batches
    return d.position(at, batches) - d.position(start, batches)


def _rest(d: Duration, stage: Stage, start: Progress, at: Progress, spent: float) -> float | None:
    """Seconds until an open stage reaches ``d``."""
    passed = _passed(d, stage, start, at)
    return max(0.0, d.value - passed) * spent / passed if passed > 0 else None


def _whole(d: Duration, stage: Stage, start: Progress, at: Progress, spent: float) -> float | None:
    """Seconds that a stage of length ``d`` takes if its steps take as long as those of the open one."""
    a_step = spent / (at.step - start.step)
    if d.unit == "seconds":
        return d.value
    if d.unit == "steps":
        return d.value * a_step
    if d.unit == "samples":
        return d.value * spent / (at.samples - start.samples) if at.samples > start.samples else None
    return d.value * stage.epoch_steps * a_step if stage.epoch_steps else None


def _shortest(estimates: Iterable[float | None]) -> float | None:
    return min((e for e in estimates if e is not None), default=None)
