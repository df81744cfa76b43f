"""Schedules, and which parameters an optimizer moves."""

from loopwright.optim.freezing import match_names, set_trainable
from loopwright.optim.schedulers import Scheduler, as_schedulers, per_step, settings_of

__all__ = ["Scheduler", "as_schedulers", "match_names", "per_step", "set_trainable", "settings_of"]
