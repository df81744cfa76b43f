"""Records: what is sent to the loggers and kept in the history, and when."""

from __future__ import annotations

from collections.abc import Mapping

from loopwright.state import Run, Stage

__all__ = ["learning_rates", "log_epoch", "log_train", "log_values"]


def log_values(run: Run, values: Mapping[str, float], kind: str) -> None:
    """Make ``values`` the latest ones of the run and hand them to every logger."""
    run.metrics.update(values)
    for logger in run.loggers:
        logger.log(run.progress, values, kind)


def log_train(run: Run) -> None:
    """The means of all steps since the last record, as ``train/<name>``, with the learning rates."""
    means = run.series.take_record()
    if means:
        log_values(run, {**{f"train/{name}": value for name, value in means.items()}, **learning_rates(run)}, "train")
        last = run.history[-1] if len(run.history) else {}
        if last.get("step") == run.progress.step:  # what is left over of an epoch does not hide the mean over it
            run.metrics.update({name: value for name, value in last.items() if "/" in name})


def log_epoch(run: Run, stage: Stage) -> None:
    """The record of an epoch: means over its steps, training metrics, the latest validation, learning rates."""
    values = {f"train/{name}": value for name, value in run.series.take_epoch().items()}
    for phase in stage.phases:
        if phase.meters is not None:
            values |= {f"train/{phase.prefix}{name}": value for name, value in phase.meters.compute().items()}
            phase.meters.reset()
    if run.validated_at == run.progress.step:
        values |= {name: value for name, value in run.metrics.items() if name.startswith("valid/")}
    values |= learning_rates(run)
    p = run.progress
    record = {"epoch": p.epoch, "step": p.step, "samples": p.samples, "seconds": p.seconds, **values}
    run.history.append(record if len(run.stages) == 1 else {**record, "stage": run.stages[p.stage].name})
    log_values(run, values, "epoch")


def learning_rates(run: Run) -> dict[str, float]:
    """``lr`` of the first group of each optimizer; ``lr/<name>`` where a run has several."""
    rates = {name: float(o.param_groups[0]["lr"]) for name, o in run.optimizers.items() if "lr" in o.param_groups[0]}
    return {"lr": next(iter(rates.values()))} if len(rates) == 1 else {f"lr/{name}": lr for name, lr in rates.items()}
