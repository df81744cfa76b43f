"""Callbacks: what happens beside the loop, one file a concern."""

from loopwright.callbacks.audit import Audit
from loopwright.callbacks.capsule import Capsule
from loopwright.callbacks.checkpoint import Checkpoint
from loopwright.callbacks.displays import display_mode
from loopwright.callbacks.doctor import Doctor
from loopwright.callbacks.early_stopping import EarlyStopping
from loopwright.callbacks.profiler import Profiler
from loopwright.callbacks.progress import ProgressBar
from loopwright.callbacks.requeue import Requeue
from loopwright.callbacks.torch_profiler import TorchProfiler

__all__ = [
    "Audit", "Capsule", "Checkpoint", "Doctor", "EarlyStopping", "Profiler", "ProgressBar", "Requeue", "TorchProfiler",
    "display_mode",
]  # fmt: skip
