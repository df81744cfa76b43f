"""Optimizers made of step functions, schedules, and which parameters an optimizer moves."""

from loopwright.optim.bunch import Bunch
from loopwright.optim.freezing import match_names, set_trainable
from loopwright.optim.schedulers import Scheduler, as_schedulers, per_step, settings_of
from loopwright.optim.steps import adam, decay, lamb, lookahead, radam, sgd
from loopwright.optim.stepwise import Stepwise

__all__ = [
    "Bunch", "Scheduler", "Stepwise", "adam", "as_schedulers", "decay", "lamb", "lookahead", "match_names", "per_step",
    "radam", "set_trainable", "settings_of", "sgd",
]  # fmt: skip
