"""Records: what is sent to the loggers and kept in the history, and when."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loopwright.errors import HookError, LoopwrightWarning, SettingError
from loopwright.state import Run, Stage

__all__ = ["check_logger", "close_loggers", "learning_rates", "log_epoch", "log_train", "log_values", "start_loggers"]


def log_values(run: Run, values: Mapping[str, float], kind: str) -> None:
    """Make ``values`` the latest ones of the run and hand them to every logger."""
    run.metrics.update(values)
    for logger in run.loggers:
        if run.lost and not _is_back(run, logger):
            continue
        try:
            logger.log(run.progress, values, kind)
        except Exception as error:
            _note(run, logger, "log", error).records += 1


def check_logger(logger: Any) -> None:
    """Raise SettingError for what is no logger, HookError for one whose methods do not take what they are given."""
    if isinstance(logger, type) or not callable(getattr(logger, "log", None)):
        raise SettingError(f"loggers=[{logger!r}]: expected objects with log(), such as lw.CSVLogger()")
    for method, given in (("log", ("progress", "values", "kind")), ("start", ("run",)), ("close", ("status",))):
        try:
            signature = inspect.signature(getattr(logger, method))
        except (AttributeError, TypeError, ValueError):  # only log is required; what is built in tells no signature
            continue
        try:
            signature.bind(*given)
        except TypeError:
            raise HookError(
                f"{type(logger).__name__}.{method}{signature} has the wrong parameters; write: "
                f"def {method}(self, {', '.join(given)})"
            ) from None


@dataclass(slots=True)
class Lost:
    """What a logger has lost: ``records`` in all; it rests for ``rest`` records before it is asked again."""

    records: int = 0
    failures: int = 0
    rest: int = 0
    started: bool = True


def start_loggers(run: Run) -> None:
    """Let every logger begin. One that cannot is asked again at later records; a wrong setting is an error."""
    for logger in run.loggers:
        try:
            _call(logger, "start", run)
        except SettingError:
            raise
        except Exception as error:
            _note(run, logger, "start", error).started = False


def close_loggers(run: Run) -> None:
    """Let every logger end, and say how many records were lost."""
    for logger in run.loggers:
        try:
            _call(logger, "close", run.status)
        except Exception as error:
            _note(run, logger, "close", error)
        lost = run.lost.get(id(logger))
        if lost is not None and lost.records:
            _warn(f"{lost.records} records were lost by {type(logger).__name__}, which failed {lost.failures} times")


def _is_back(run: Run, logger: Any) -> bool:
    """False while a logger that has failed rests, or cannot be started; the record is counted as lost."""
    lost = run.lost.get(id(logger))
    if lost is None:
        return True
    if not lost.rest and not lost.started:
        try:
            _call(logger, "start", run)
            lost.started = True
        except Exception as error:
            _note(run, logger, "start", error)
    if lost.rest:
        lost.rest -= 1
        lost.records += 1
        return False
    return True


def _note(run: Run, logger: Any, method: str, error: Exception) -> Lost:
    """A backend that is down must not hold up training: it rests for 1, 3, 7, ... records, at most 63."""
    lost: Lost = run.lost.setdefault(id(logger), Lost())
    lost.failures += 1
    lost.rest = 2 ** min(lost.failures, 6) - 1
    if lost.failures == 1:
        _warn(
            f"{type(logger).__name__}.{method} failed after step {run.progress.step}: {error!r}. Training goes on, and "
            "it is asked again at later records; how many were lost is said at the end. Mend what it writes to, or "
            "leave it out of Trainer(loggers=[...])"
        )
    return lost


def _call(logger: Any, method: str, argument: Any) -> None:
    if hasattr(logger, method):
        getattr(logger, method)(argument)


def _warn(text: str) -> None:
    warnings.warn(text, LoopwrightWarning, stacklevel=2)


def log_train(run: Run) -> None:
    """The means of all steps since the last record, as ``train/<name>``, running metrics, and the learning rates."""
    means = run.series.take_record(run.team and run.team.joined_sums)
    if means:
        for phase in run.stages[min(run.progress.stage, len(run.stages) - 1)].phases:
            if phase.meters is not None:
                told = phase.meters.each_record(run.team and run.team.comm.gather)
                means |= {f"{phase.prefix}{name}": value for name, value in told.items()}
        log_values(run, {**{f"train/{name}": value for name, value in means.items()}, **learning_rates(run)}, "train")
        last = run.history[-1] if len(run.history) else {}
        if last.get("step") == run.progress.step:  # what is left over of an epoch does not hide the mean over it
            run.metrics.update({name: value for name, value in last.items() if "/" in name})


def log_epoch(run: Run, stage: Stage) -> None:
    """The record of an epoch: means over its steps, training metrics, the latest validation, learning rates."""
    means = run.series.take_epoch(run.team and run.team.joined_sums)
    values = {f"train/{name}": value for name, value in means.items()}
    for phase in stage.phases:
        if phase.meters is not None:
            if run.team is not None:
                phase.meters.join(run.team.comm.gather(phase.meters.cut()))
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
    """``lr`` of each optimizer's first group, and what else is scheduled; ``lr/<name>`` where a run has several."""
    rates = {name: float(o.param_groups[0]["lr"]) for name, o in run.optimizers.items() if "lr" in o.param_groups[0]}
    named = {"lr": next(iter(rates.values()))} if len(rates) == 1 else {f"lr/{n}": lr for n, lr in rates.items()}
    for scheduled in run.stages[min(run.progress.stage, len(run.stages) - 1)].scheduled if run.stages else ():
        of = next((f"/{name}" for name, o in run.optimizers.items() if o is scheduled.optimizer), "")
        for name, value in scheduled.values().items():
            key, _, rest = name.partition("/")
            named[f"{key}{of if len(run.optimizers) > 1 else ''}{f'/{rest}' if rest else ''}"] = value
    return named
