"""Loopwright: a training framework for PyTorch with one readable loop.

Public names are resolved when they are first used, so that importing costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopwright import data, loggers, losses, metrics, optim, report, schedules
    from loopwright.activations import checkpoint_activations
    from loopwright.callbacks import (
        EMA,
        SAM,
        SWA,
        Anneal,
        Audit,
        BatchTransform,
        Capsule,
        Changes,
        Checkpoint,
        CutMix,
        Doctor,
        EarlyStopping,
        KeepBest,
        MixUp,
        Penalty,
        Plateau,
        Predictions,
        Profiler,
        ProgressBar,
        RandomErasing,
        Requeue,
        Resources,
        Throughput,
        TorchProfiler,
        Watch,
    )
    from loopwright.checkpoint.weights import load_weights
    from loopwright.data import DataModule, Loader
    from loopwright.debug import Debug
    from loopwright.errors import (
        CheckpointError,
        DataError,
        HookError,
        LoopwrightError,
        LoopwrightWarning,
        MetricError,
        NonFiniteError,
        PlanError,
        SettingError,
        SkipBatch,
        SkipStep,
        StepOutputError,
        StopEpoch,
    )
    from loopwright.events import Callback
    from loopwright.finders import batch_size_find, lr_find
    from loopwright.fine_tuning import fine_tune
    from loopwright.handlers import Event
    from loopwright.history import History
    from loopwright.loggers import CSVLogger, JSONLLogger, TableLogger
    from loopwright.model_summary import ModelSummary, summary
    from loopwright.optim import Scheduler, groups, per_step
    from loopwright.parallel.ddp import DDP
    from loopwright.parallel.fsdp import FSDP
    from loopwright.parallel.launch import launch
    from loopwright.replaying import Replay, replay
    from loopwright.report import Report
    from loopwright.resume import Resume
    from loopwright.state import Duration, Phase, Progress, Run, Stage, StepResult
    from loopwright.task import Supervised, Task
    from loopwright.trainer import Trainer
    from loopwright.verifying import Verified, verify_resume

__version__ = "0.1.0"

_HOMES = {
    "activations": ["checkpoint_activations"],
    "callbacks": [
        "Anneal", "Audit", "BatchTransform", "Capsule", "Changes", "Checkpoint", "CutMix", "Doctor", "EMA",
        "EarlyStopping", "KeepBest", "MixUp", "Penalty", "Plateau", "Predictions", "Profiler", "ProgressBar",
        "RandomErasing", "Requeue", "Resources", "SAM", "SWA", "Throughput", "TorchProfiler", "Watch",
    ],
    "checkpoint.weights": ["load_weights"],
    "data": ["DataModule", "Loader"],
    "debug": ["Debug"],
    "errors": [
        "CheckpointError", "DataError", "HookError", "LoopwrightError", "LoopwrightWarning", "MetricError",
        "NonFiniteError", "PlanError", "SettingError", "SkipBatch", "SkipStep", "StepOutputError", "StopEpoch",
    ],
    "events": ["Callback"],
    "finders": ["batch_size_find", "lr_find"],
    "fine_tuning": ["fine_tune"],
    "handlers": ["Event"],
    "history": ["History"],
    "loggers": ["CSVLogger", "JSONLLogger", "TableLogger"],
    "optim": ["Scheduler", "groups", "per_step"],
    "model_summary": ["ModelSummary", "summary"],
    "parallel.ddp": ["DDP"],
    "parallel.fsdp": ["FSDP"],
    "parallel.launch": ["launch"],
    "replaying": ["Replay", "replay"],
    "report": ["Report"],
    "resume": ["Resume"],
    "state": ["Duration", "Phase", "Progress", "Run", "Stage", "StepResult"],
    "task": ["Supervised", "Task"],
    "trainer": ["Trainer"],
    "verifying": ["Verified", "verify_resume"],
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Anneal",
    "Audit",
    "BatchTransform",
    "CSVLogger",
    "Callback",
    "Capsule",
    "Changes",
    "Checkpoint",
    "CheckpointError",
    "CutMix",
    "DDP",
    "DataError",
    "DataModule",
    "Debug",
    "Doctor",
    "Duration",
    "EMA",
    "EarlyStopping",
    "Event",
    "FSDP",
    "History",
    "HookError",
    "JSONLLogger",
    "KeepBest",
    "Loader",
    "LoopwrightError",
    "LoopwrightWarning",
    "MetricError",
    "MixUp",
    "ModelSummary",
    "NonFiniteError",
    "Penalty",
    "Phase",
    "PlanError",
    "Plateau",
    "Predictions",
    "Profiler",
    "Progress",
    "ProgressBar",
    "RandomErasing",
    "Replay",
    "Report",
    "Requeue",
    "Resources",
    "Resume",
    "Run",
    "SAM",
    "SWA",
    "Scheduler",
    "SettingError",
    "SkipBatch",
    "SkipStep",
    "Stage",
    "StepOutputError",
    "StepResult",
    "StopEpoch",
    "Supervised",
    "TableLogger",
    "Task",
    "Throughput",
    "TorchProfiler",
    "Trainer",
    "Verified",
    "Watch",
    "batch_size_find",
    "checkpoint_activations",
    "data",
    "fine_tune",
    "groups",
    "launch",
    "load_weights",
    "loggers",
    "losses",
    "lr_find",
    "metrics",
    "optim",
    "per_step",
    "replay",
    "report",
    "schedules",
    "summary",
    "verify_resume",
]


def __getattr__(name: str) -> Any:
    if name in ("data", "loggers", "losses", "metrics", "optim", "report", "schedules"):
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        from loopwright.renamed import old_name

        return old_name(__name__, name)
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
