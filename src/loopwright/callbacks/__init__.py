"""Callbacks: what happens beside the loop, one file a concern."""

from loopwright.callbacks.anneal import Anneal
from loopwright.callbacks.averaging import EMA, SWA
from loopwright.callbacks.capsule import Capsule
from loopwright.callbacks.checkpoint import Checkpoint
from loopwright.callbacks.displays import display_mode
from loopwright.callbacks.early_stopping import EarlyStopping
from loopwright.callbacks.progress import ProgressBar
from loopwright.callbacks.requeue import Requeue
from loopwright.callbacks.sharpness import SAM
from loopwright.callbacks.stage_ends import KeepBest, Plateau

__all__ = [
    "Anneal",
    "Capsule",
    "Checkpoint",
    "EMA",
    "EarlyStopping",
    "KeepBest",
    "Plateau",
    "ProgressBar",
    "Requeue",
    "SAM",
    "SWA",
    "display_mode",
]
