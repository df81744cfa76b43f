"""What a logger must offer, how what a run measures reaches it, and what happens when it fails."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopwright.errors import HookError, SettingError, choose
from loopwright.rng import forked
from loopwright.written import warn

if TYPE_CHECKING:
    from loopwright.state import Run

__all__ = [
    "check_logger", "close_loggers", "hand_over", "log_values", "logger_states", "restore_logger", "start_loggers",
    "takes",
]  # fmt: skip

# everything that a logger may have, and what it is given; only log is required
METHODS = {
    "log": ("progress", "values", "kind"), "start": ("run",), "log_config": ("config",),
    "log_figure": ("progress", "name", "figure"), "log_text": ("progress", "name", "text"),
    "log_artifact": ("progress", "name", "path"), "flush": (), "close": ("status",),
}  # fmt: skip
_OPTIONAL = (*METHODS, "state_dict", "load_state_dict")
_NEAR = 0.75  # log_fig is as near to log_figure, on_close to close


def check_logger(logger: Any) -> None:
    """Raise SettingError for what is no logger, HookError for one whose methods do not take what they are given."""
    if isinstance(logger, type) or not callable(getattr(logger, "log", None)):
        raise SettingError(
            f"loggers=[{logger!r}]: expected objects with log(), such as lw.CSVLogger(), or names, such as 'csv'"
        )
    for method, given in METHODS.items():
        try:
            signature = inspect.signature(getattr(logger, method))
        except (AttributeError, TypeError, ValueError):  # what is built in tells no signature
            continue
        try:
            signature.bind(*given)
        except TypeError:
            raise HookError(
                f"{type(logger).__name__}.{method}{signature} has the wrong parameters; write: "
                f"def {method}({', '.join(('self', *given))})"
            ) from None
    _tell_misspelt(logger)


def _tell_misspelt(logger: Any) -> None:
    """Warn of a method that nothing calls, where the one that it is nearly named as is missing."""
    missing = [name for name in _OPTIONAL if not hasattr(logger, name)]
    for name in dir(type(logger)):
        if name[0] == "_" or name in _OPTIONAL or not callable(getattr(type(logger), name, None)):
            continue
        if difflib.get_close_matches(name, missing, n=1, cutoff=_NEAR):
            warn(
                f"{type(logger).__name__}.{name} is no method of loggers, and nothing calls it. "
                f"{choose(name, _OPTIONAL)} A helper of your own is passed over if its name begins with _"
            )


@dataclass(slots=True)
class Lost:
    """What a logger has lost: ``records`` in all; it rests for ``rest`` records before it is asked again."""

    records: int = 0
    failures: int = 0
    rest: int = 0
    started: bool = True
    config: Mapping[str, Any] | None = None  # to be logged once it has started


def start_loggers(run: Run, config: Mapping[str, Any] | None = None) -> None:
    """Let every logger begin. One that cannot is asked again at later records; a wrong setting is an error."""
    for logger in run.loggers:
        try:
            _start(run, logger, config)
        except SettingError:
            raise
        except Exception as error:
            lost = _rest(run, logger, "start", error)
            lost.started, lost.config = False, config


def _start(run: Run, logger: Any, config: Mapping[str, Any] | None) -> None:
    with forked():  # some clients draw the name of a run
        _call(logger, "start", run)
        if config is not None:
            _call(logger, "log_config", config)


def log_values(run: Run, values: Mapping[str, float], kind: str) -> None:
    """Make ``values`` the latest ones of the run and hand them to every logger."""
    run.metrics.update(values)
    for logger in run.loggers:
        if run.lost and not _is_back(run, logger):
            continue
        try:
            logger.log(run.progress, values, kind)
        except Exception as error:
            _rest(run, logger, "log", error).records += 1


def takes(thing: Any) -> str | None:
    """The method that is given ``thing`` if it is no scalar: a text, a figure with ``savefig``, a Path; else None.

    >>> takes("a note"), takes(Path("model.onnx")), takes(0.5)
    ('log_text', 'log_artifact', None)
    """
    if isinstance(thing, (str, Path)):
        return "log_text" if isinstance(thing, str) else "log_artifact"
    return "log_figure" if callable(getattr(thing, "savefig", None)) else None


def hand_over(run: Run, name: str, thing: Any) -> None:
    """Give a text, figure or file to every logger that takes it, at once. Only rank 0 does, as it has the loggers.

    Raises SettingError if there is no file to give, or if no logger of this run takes it.
    """
    method = takes(thing)
    assert method is not None
    if isinstance(thing, Path) and not thing.exists():
        raise SettingError(f"run.log({{{name!r}: ...}}): there is no file {thing}")
    if run.comm.rank:
        return
    takers = [logger for logger in run.loggers if hasattr(logger, method)]
    if not takers:
        raise SettingError(
            f"run.log({{{name!r}: ...}}): no logger of this run has {method}(). Give the Trainer a folder, which keeps "
            "it, or a logger that takes it, such as loggers=['tensorboard']"
        )
    for logger in takers:
        try:
            getattr(logger, method)(run.progress, name, thing)
        except SettingError:
            raise
        except Exception as error:  # it may be the figure that cannot be drawn: records go on
            warn(f"{name!r} is lost: {type(logger).__name__}.{method} failed after step {run.progress.step}: {error!r}")


def logger_states(run: Run) -> list[tuple[Any, dict[str, Any]]]:
    """Every logger with what it remembers, once it has written what it holds back; a failing one remembers nothing."""
    states = []
    for logger in run.loggers:
        state: dict[str, Any] = {}
        try:
            _call(logger, "flush")
            if hasattr(logger, "state_dict") and hasattr(logger, "load_state_dict"):
                state = logger.state_dict()
        except Exception as error:
            _rest(run, logger, "flush", error)
        states.append((logger, state))
    return states


def restore_logger(run: Run, logger: Any, state: Mapping[str, Any]) -> None:
    """Tell a logger how far its records went, before it starts."""
    try:
        logger.load_state_dict(state)
    except Exception as error:
        _rest(run, logger, "load_state_dict", error)


def close_loggers(run: Run) -> None:
    """Let every logger end, and say how many records were lost."""
    for logger in run.loggers:
        try:
            _call(logger, "close", run.status)
        except Exception as error:
            _rest(run, logger, "close", error)
        lost = run.lost.get(id(logger))
        if lost is not None and lost.records:
            warn(f"{lost.records} records were lost by {type(logger).__name__}, which failed {lost.failures} times")


def _is_back(run: Run, logger: Any) -> bool:
    """False while a logger that has failed rests, or cannot be started; the record is counted as lost."""
    lost = run.lost.get(id(logger))
    if lost is None:
        return True
    if not lost.rest and not lost.started:
        try:
            _start(run, logger, lost.config)
            lost.started = True
        except Exception as error:
            _rest(run, logger, "start", error)
    if lost.rest:
        lost.rest -= 1
        lost.records += 1
        return False
    return True


def _rest(run: Run, logger: Any, method: str, error: Exception) -> Lost:
    """A backend that is down must not hold up training: it rests for 1, 3, 7, ... records, at most 63."""
    lost: Lost = run.lost.setdefault(id(logger), Lost())
    lost.failures += 1
    lost.rest = 2 ** min(lost.failures, 6) - 1
    if lost.failures == 1:
        warn(
            f"{type(logger).__name__}.{method} failed after step {run.progress.step}: {error!r}. Training goes on, and "
            "it is asked again at later records; how many were lost is said at the end. Mend what it writes to, or "
            "leave it out of Trainer(loggers=[...])"
        )
    return lost


def _call(logger: Any, method: str, *arguments: Any) -> None:
    if hasattr(logger, method):
        getattr(logger, method)(*arguments)
