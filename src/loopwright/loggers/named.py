"""Loggers by name: ``Trainer(loggers="tensorboard")``, those of this package and those that others install."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from loopwright.errors import SettingError, choose

__all__ = ["GROUP", "logger_named", "usual_loggers"]

GROUP = "loopwright.loggers"  # of entry points: name = "package.module:Class"
USUAL = "LOOPWRIGHT_LOGGERS"  # the environment variable
_OURS = {
    "csv": "csv:CSVLogger", "jsonl": "jsonl:JSONLLogger", "mlflow": "mlflow:MLflowLogger", "table": "table:TableLogger",
    "tensorboard": "tensorboard:TensorBoardLogger", "wandb": "wandb:WandbLogger",
}  # fmt: skip


def logger_named(name: str) -> Any:
    """The logger that a name means; what follows a colon is its first argument: ``"mlflow:http://server:5000"``.

    Names are those of this package and of entry points in the group ``loopwright.loggers``. Raises SettingError for an
    unknown one, ImportError that tells what to install where its package is missing.

    >>> logger_named("csv:table.csv").path
    'table.csv'
    """
    try:
        return _made(name)
    except (SettingError, ImportError) as error:
        if name in usual_loggers():
            error.add_note(f"[loopwright] {USUAL}={os.environ[USUAL]!r} asks for it; Trainer(loggers=[]) does without")
        raise


def _made(name: str) -> Any:
    kind, colon, argument = name.partition(":")
    if kind in _OURS:
        module, _, attribute = _OURS[kind].partition(":")
        make = getattr(import_module(f"loopwright.loggers.{module}"), attribute)
    else:
        found = {point.name: point for point in entry_points(group=GROUP)}
        if kind not in found:
            raise SettingError(
                f"there is no logger named {kind!r}. {choose(kind, {*_OURS, *found})} Another one is an object with "
                "log(progress, values, kind), or a plug-in: examples/trackers has those of Comet, Neptune, Polyaxon "
                "and Visdom, which docs/loggers.md tells how to add"
            )
        make = found[kind].load()
    return make(argument) if colon else make()


def usual_loggers() -> list[str]:
    """The names in the environment variable ``LOOPWRIGHT_LOGGERS``, "tensorboard, mlflow:http://server:5000": what a
    Trainer that has a folder and is told nothing logs to.
    """
    return [name.strip() for name in os.environ.get(USUAL, "").split(",") if name.strip()]
