"""Callbacks: what happens beside the loop, one file a concern."""

from loopwright.callbacks.anneal import Anneal
from loopwright.callbacks.audit import Audit
from loopwright.callbacks.averaging import EMA, SWA
from loopwright.callbacks.batch_transform import BatchTransform
from loopwright.callbacks.capsule import Capsule
from loopwright.callbacks.changes import Changes
from loopwright.callbacks.checkpoint import Checkpoint
from loopwright.callbacks.cutmix import CutMix
from loopwright.callbacks.displays import display_mode
from loopwright.callbacks.doctor import Doctor
from loopwright.callbacks.early_stopping import EarlyStopping
from loopwright.callbacks.erasing import RandomErasing
from loopwright.callbacks.mixup import MixUp
from loopwright.callbacks.penalty import Penalty
from loopwright.callbacks.predictions import Predictions
from loopwright.callbacks.profiler import Profiler
from loopwright.callbacks.progress import ProgressBar
from loopwright.callbacks.requeue import Requeue
from loopwright.callbacks.resources import Resources
from loopwright.callbacks.sharpness import SAM
from loopwright.callbacks.stage_ends import KeepBest, Plateau
from loopwright.callbacks.throughput import Throughput
from loopwright.callbacks.torch_profiler import TorchProfiler
from loopwright.callbacks.watch import Watch

__all__ = [
    "Anneal", "Audit", "BatchTransform", "Capsule", "Changes", "Checkpoint", "CutMix", "Doctor", "EMA",
    "EarlyStopping", "KeepBest", "MixUp", "Penalty", "Plateau", "Predictions", "Profiler", "ProgressBar",
    "RandomErasing", "Requeue", "Resources", "SAM", "SWA", "Throughput", "TorchProfiler", "Watch",
    "display_mode",
]  # fmt: skip
