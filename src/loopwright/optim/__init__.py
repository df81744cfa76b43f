"""Schedules, and which parameters an optimizer moves."""

from loopwright.optim.freezing import match_names, set_trainable, trainable_flags
from loopwright.optim.groups import groups
from loopwright.optim.scheduled import Scheduled, is_ours, scheduled_in
from loopwright.optim.schedulers import Scheduler, as_schedulers, per_step, settings_of

__all__ = [
    "Scheduled",
    "Scheduler",
    "as_schedulers",
    "groups",
    "is_ours",
    "match_names",
    "per_step",
    "scheduled_in",
    "set_trainable",
    "settings_of",
    "trainable_flags",
]
