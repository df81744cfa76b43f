"""The state of a stage: where its data stands, its schedulers, what the metrics of an open epoch have seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loopwright.checkpoint.objects import kind_of, state_of
from loopwright.state import Run, Stage, has_state

__all__ = ["load_resting", "load_stage", "resting_states", "stage_state"]


def stage_state(run: Run, stage: Stage) -> dict[str, Any]:
    """Of a stage: where its data stands, its schedulers, what the metrics of an open epoch have seen."""
    phases = {}
    for phase in stage.phases or ():
        meters = phase.meters.state_dict() if phase.meters is not None and run.progress.batch else {}
        schedulers = [s.state_dict() for s in (*phase.step_schedulers, *phase.epoch_schedulers)]
        phases[phase.name] = {"schedulers": schedulers, "meters": meters}
    return {"name": stage.name, "source": state_of(stage.source), "phases": phases}


def load_stage(run: Run, stage: Stage, saved: Mapping[str, Any]) -> None:
    """Put back what ``stage_state`` gave."""
    for phase in stage.phases or ():
        mine = saved["phases"][phase.name]
        schedulers = (*phase.step_schedulers, *phase.epoch_schedulers)
        for scheduler, values in zip(schedulers, mine["schedulers"], strict=True):
            scheduler.load_state_dict(values)
        if phase.meters is not None and run.progress.batch:
            phase.meters.load_state_dict(mine["meters"])
    if has_state(stage.source) and saved["source"] is not None:
        stage.source.load_state_dict(saved["source"])


def resting_states(run: Run, at: int) -> dict[str, dict[str, Any]]:
    """Of the schedulers that rest, by the first stage that steps them."""
    states: dict[str, dict[str, Any]] = {}
    for stage, path, scheduler in _resting(run, at):
        states.setdefault(stage, {})[path] = {"kind": kind_of(scheduler.torch), "state": scheduler.state_dict()}
    return states


def load_resting(run: Run, state: Mapping[str, Any]) -> None:
    """Put back what ``resting_states`` gave.

    Older checkpoints have none of them; a stage that has not begun may have got another kind.
    """
    for stage, path, scheduler in _resting(run, state["stage"].get("index", 0)):
        saved = state.get("schedulers", {}).get(stage, {}).get(path)
        if saved is not None and saved["kind"] == kind_of(scheduler.torch):
            scheduler.load_state_dict(saved["state"])


def _resting(run: Run, at: int) -> Iterator[tuple[str, str, Any]]:
    """The schedulers that the stage ``at`` does not step and others do, such as that of the task; each once."""
    seen = {id(s) for stage in run.stages[at : at + 1] for _, s in _schedulers(stage)}
    for stage in run.stages:
        for path, scheduler in _schedulers(stage):
            if id(scheduler) not in seen:
                seen.add(id(scheduler))
                yield stage.name, path, scheduler


def _schedulers(stage: Stage) -> Iterator[tuple[str, Any]]:
    for phase in stage.phases or ():
        for i, scheduler in enumerate((*phase.step_schedulers, *phase.epoch_schedulers)):
            yield f"{phase.name}/{i}", scheduler
