"""Callbacks: what happens beside the loop, one file a concern."""

from loopwright.callbacks.batch_transform import BatchTransform
from loopwright.callbacks.capsule import Capsule
from loopwright.callbacks.checkpoint import Checkpoint
from loopwright.callbacks.cutmix import CutMix
from loopwright.callbacks.displays import display_mode
from loopwright.callbacks.early_stopping import EarlyStopping
from loopwright.callbacks.erasing import RandomErasing
from loopwright.callbacks.mixup import MixUp
from loopwright.callbacks.penalty import Penalty
from loopwright.callbacks.predictions import Predictions
from loopwright.callbacks.progress import ProgressBar
from loopwright.callbacks.requeue import Requeue
from loopwright.callbacks.resources import Resources
from loopwright.callbacks.throughput import Throughput

__all__ = [
    "BatchTransform",
    "Capsule",
    "Checkpoint",
    "CutMix",
    "EarlyStopping",
    "MixUp",
    "Penalty",
    "Predictions",
    "ProgressBar",
    "RandomErasing",
    "Requeue",
    "Resources",
    "Throughput",
    "display_mode",
]
