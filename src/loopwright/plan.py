"""What can be checked before step 0, and what a run will do."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from loopwright.conflicts import odd_work, set_twice
from loopwright.errors import PlanError
from loopwright.idle import does_nothing
from loopwright.monitored import watched_oddly
from loopwright.overlooked import passed_over
from loopwright.parallel import norms_in, syncs_norms
from loopwright.problems import Written, problems_in, read_again
from loopwright.state import Run, Stage
from loopwright.unheard import unheard

__all__ = ["Plan", "facts_of", "make_plan"]


@dataclass(slots=True)
class Plan:
    """What a plan found: ``problems`` that would stop the run, ``warnings``, ``facts`` about it, and its ``cost``.

    ``places``: for problems and warnings, the file and line in which their cause was written, as far as it can be told.
    ``print(plan)`` shows all; ``plan.check()`` raises PlanError if there is a problem. ``cost`` is None unless it was
    to be measured, and where there is a problem.
    """

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    cost: Any = None

    def check(self) -> None:
        """Raise PlanError with every problem, if there is any."""
        if self.problems:
            raise PlanError(self.problems, self.places)

    def add(self, problems: Iterable[tuple[str, str | None]]) -> None:
        """Add problems, each with the place in which its cause was written."""
        for problem, place in problems:
            self.problems.append(problem)
            if place:
                self.places[problem] = place

    def with_place(self, told: str) -> str:
        """A problem or a warning, followed by where its cause was written."""
        return f"{told} (at {self.places[told]})" if told in self.places else told

    def __str__(self) -> str:
        odd = [f"warning: {self.with_place(one)}" for one in self.warnings]
        bad = [f"problem: {self.with_place(one)}" for one in self.problems]
        return "\n".join([*self.facts, *odd, *(bad or ["no problem found"])])

    def _repr_html_(self) -> str:
        facts = "".join(f"<li>{html.escape(fact)}</li>" for fact in self.facts)
        odd = "".join(f"<li><b>warning:</b> {html.escape(one)}</li>" for one in self.warnings)
        bad = "".join(f'<li><b style="color:#c0182b">problem:</b> {html.escape(one)}</li>' for one in self.problems)
        return f"<ul>{facts}{odd}{bad or '<li>no problem found</li>'}</ul>"


def make_plan(run: Run, *, made_at: str | None = None, resumes: bool = False) -> Plan:
    """Look for problems in a prepared run, without reading a batch. ``made_at``: where its Trainer was made."""
    plan, written = Plan(), Written.of(run, made_at)
    plan.add(problems_in(run, written))
    plan.add(() if resumes else read_again(run, written))
    odd = [*set_twice(run), *unheard(run)]
    if not plan.problems:
        odd += [*does_nothing(run), *watched_oddly(run), *odd_work(run), *passed_over(run)]
    for told, cause in odd:
        if told not in plan.places:  # several stages may say the same
            plan.warnings.append(told)
            plan.places[told] = written.by(run, cause)
    return plan


def facts_of(run: Run) -> Iterator[str]:
    """What a prepared run will do."""
    for stage in run.stages:
        yield _describe(stage)
        yield from (f"  {type(s.optimizer).__name__}: {s!r}" for s in stage.scheduled)
    count = sum(_size(p) for model in run.models.values() for p in model.parameters())
    moved = {id(p): p for s in run.stages for ph in s.phases for p in ph.parameters() if p.requires_grad}
    yield f"parameters: {count:,}, of which {sum(map(_size, moved.values())):,} are trained"
    yield f"device: {run.device}, precision: {run.precision.name}"
    if run.compiler is not None:
        yield f"steps are compiled: {run.compiler.name}"
    if run.graphs is not None:
        yield "steps are CUDA graphs, recorded for each kind of window"
    if syncs_norms(run.settings.get("strategy")) and (found := norms_in(run.models.values())[0]):
        over = "in one process, as ever" if run.team is None else f"over {run.team.size} ranks"
        yield f"batch norm measures the whole batch, {over}: {len(found)} layer{'s'[: len(found) > 1]}"
    reasons = run.exact if isinstance(run.exact, list) else []
    yield f"exact resume: no, since {'; '.join(reasons)}" if reasons else "exact resume: yes"


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
