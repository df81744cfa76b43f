"""Optimizers made of step functions, schedules, and which parameters an optimizer moves."""

from typing import TYPE_CHECKING, Any

from loopwright.optim.bunch import Bunch
from loopwright.optim.freezing import match_names, set_trainable, trainable_flags
from loopwright.optim.groups import groups
from loopwright.optim.scheduled import Scheduled, is_schedule, scheduled_in
from loopwright.optim.schedulers import Scheduler, as_schedulers, per_step, settings_of
from loopwright.optim.steps import adam, decay, lamb, lookahead, radam, sgd
from loopwright.optim.stepwise import Stepwise

__all__ = [
    "Bunch", "Scheduled", "Scheduler", "Stepwise", "adam", "as_schedulers", "decay", "groups", "is_schedule", "lamb",
    "lookahead", "match_names", "per_step", "radam", "scheduled_in", "set_trainable", "settings_of", "sgd",
    "trainable_flags",
]  # fmt: skip

if not TYPE_CHECKING:  # to a type checker an old name is an error

    def __getattr__(name: str) -> Any:
        from loopwright.renamed import old_name

        return old_name(__name__, name)
