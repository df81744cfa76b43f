"""Records: what is sent to the loggers and kept in the history, and when."""

from __future__ import annotations

from functools import partial

from loopwright.delivery import log_values
from loopwright.errors import choose
from loopwright.recorded import at, unmet
from loopwright.state import Run, Stage
from loopwright.written import warn

__all__ = ["learning_rates", "log_epoch", "log_late", "log_train"]


def log_train(run: Run) -> None:
    """The means of all steps since the last record, as ``train/<name>``, running metrics, and the learning rates."""
    if run.team is not None:
        if run.team.recorded == run.progress.step and not run.team.asks:
            return  # nobody has logged anything since
        run.team.recorded = run.progress.step
    means = run.series.take_record(run.team and partial(run.team.joined_sums, run))
    if means:
        for phase in run.stages[min(run.progress.stage, len(run.stages) - 1)].phases:
            if phase.meters is not None:
                told = phase.meters.each_record(run.team and run.team.comm.gather)
                means |= {f"{phase.prefix}{name}": value for name, value in told.items()}
        values = {f"train/{name}": value for name, value in means.items()}
        if run.recorded:
            values = at(run.recorded, values, "step")
        log_values(run, {**values, **learning_rates(run)}, "train")
        last = run.history[-1] if len(run.history) else {}
        if last.get("step") == run.progress.step:  # what is left over of an epoch does not hide the mean over it
            run.metrics.update({name: value for name, value in last.items() if "/" in name})


def log_epoch(run: Run, stage: Stage) -> None:
    """The record of an epoch: means over its steps, training metrics, the latest validation, learning rates."""
    measured = [(phase.prefix, phase.meters) for phase in stage.phases if phase.meters is not None]
    meters = [meters for _, meters in measured]
    means = run.series.take_epoch(run.team and partial(run.team.joined_epoch, run, stage, meters))
    values = {f"train/{name}": value for name, value in means.items()}
    for prefix, one in measured:
        values |= {f"train/{prefix}{name}": value for name, value in one.compute().items()}
    if not len(run.history) and not stage.valid:
        _check_fed(run, stage)
    for one in meters:
        one.reset()
    if run.recorded:
        _check_recorded(run, values)
        values = at(run.recorded, values, "epoch")
    if run.validated_at == run.progress.step:
        values |= {name: value for name, value in run.metrics.items() if name.startswith("valid/")}
    values |= learning_rates(run)
    p = run.progress
    record = {"epoch": p.epoch, "step": p.step, "samples": p.samples, "seconds": p.seconds, **values}
    run.history.append(record if len(run.stages) == 1 else {**record, "stage": run.stages[p.stage].name})
    log_values(run, values, "epoch")


def log_late(run: Run) -> None:
    """What the hooks at the end of an epoch have logged belongs to its record, too; loggers have it by the next one.

    A name that the record has already keeps the mean that it has there.
    """
    means = run.series.take_epoch(run.team and partial(run.team.end_epoch, run))
    values = {f"train/{name}": value for name, value in means.items()}
    if run.recorded:
        values = at(run.recorded, values, "epoch")
    values = {name: value for name, value in values.items() if name not in run.history[-1]}
    run.history[-1].update(values)
    run.metrics.update(values)


def _check_fed(run: Run, stage: Stage) -> None:
    """After a first epoch without validation, say which metrics no phase has fed; one that has yet to run may."""
    phases = [phase for phase in stage.phases if phase.meters is not None]
    unfed = [phase.meters.unfed() for phase in phases]
    if any(phase.name not in run.progress.phase_steps for phase in phases if phase.moved):
        return
    for name in (one for one in (unfed[0] if unfed else ()) if all(one in found for found in unfed)):
        listed, among = " and ".join(map(repr, unfed[0][name])), " or ".join(repr(phase.name) for phase in phases)
        warn(
            f"metric {name!r} measures nothing: it reads {listed}, which no step of phase {among} returned, and "
            "there is no validation data. Return it with the loss, or pass fit(..., valid=loader)"
        )


def _check_recorded(run: Run, values: dict[str, float]) -> None:
    """After the first epoch, say which names of ``Task.recorded`` nothing has."""
    names = {*values, *run.metrics}
    for name in unmet(run.recorded, names) if not len(run.history) else ():
        kind = type(run.task).__name__
        warn(
            f"{kind}.recorded says where {name!r} is to be seen, and no step has returned it. "
            f"{choose(name, [n.partition('/')[2] for n in names if '/' in n])}"
        )


def learning_rates(run: Run) -> dict[str, float]:
    """``lr`` of each optimizer's first group, and what else is scheduled; ``lr/<name>`` where a run has several."""
    rates = {name: float(o.param_groups[0]["lr"]) for name, o in run.optimizers.items() if "lr" in o.param_groups[0]}
    named = {"lr": next(iter(rates.values()))} if len(rates) == 1 else {f"lr/{n}": lr for n, lr in rates.items()}
    for scheduled in run.stages[min(run.progress.stage, len(run.stages) - 1)].scheduled if run.stages else ():
        of = next((f"/{name}" for name, o in run.optimizers.items() if o is scheduled.optimizer), "")
        for name, value in scheduled.values().items():
            key, _, rest = name.partition("/")
            named[f"{key}{of if len(run.optimizers) > 1 else ''}{f'/{rest}' if rest else ''}"] = value
    return named
