"""Processor and memory that a run takes."""

from __future__ import annotations

import time
from typing import Any

import torch

from loopwright.errors import SettingError
from loopwright.events import Callback
from loopwright.progress import Duration
from loopwright.state import Run, StepResult

__all__ = ["Resources", "gpu_memory"]

_MB = 1e6


class Resources(Callback):
    """Logs what this process takes, at most once each ``every`` of wall time, between two steps.

    ``train/cpu_percent`` (of one core, so up to 100 times their number), ``train/memory_mb`` (resident),
    ``train/machine_memory_percent`` (of all processes), and on CUDA ``train/gpu_memory_mb`` and
    ``train/gpu_memory_peak_mb`` (held by tensors now, and at most until now). A record has the mean since the last one,
    over all ranks. Workers of a DataLoader are processes of their own and not counted. Nothing waits for a device.

    Reads: the process. Changes: nothing. Stops: no. Needs psutil: ``pip install "loopwright[system]"``. Raises
    SettingError for an interval that is not a time.

    >>> Resources("30 s").every
    '30 s'
    """

    def __init__(self, every: str = "10 s") -> None:
        duration = Duration.parse(every)
        if duration.unit != "seconds":
            raise SettingError(f"Resources(every={every!r}): expected a time, such as '10 s'")
        self.every, self._seconds = every, duration.value
        self._process: Any = None
        self._next = 0.0

    def on_fit_start(self, run: Run) -> None:
        try:
            import psutil
        except ImportError as error:
            raise ImportError('lw.Resources needs psutil: pip install "loopwright[system]"') from error
        self._machine, self._process = psutil.virtual_memory, psutil.Process()
        self._process.cpu_percent()  # the first call begins to measure
        self._next = time.perf_counter() + self._seconds

    def on_step_end(self, run: Run, result: StepResult) -> None:
        now = time.perf_counter()
        if now < self._next:
            return
        self._next = now + self._seconds
        values = {
            "cpu_percent": self._process.cpu_percent(),
            "memory_mb": self._process.memory_info().rss / _MB,
            "machine_memory_percent": self._machine().percent,
        }
        if run.device.type == "cuda":
            values |= gpu_memory(run.device)
        run.log(values)


def gpu_memory(device: torch.device) -> dict[str, float]:
    """What tensors hold on a CUDA device, now and at most until now."""
    held, most = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return {"gpu_memory_mb": held / _MB, "gpu_memory_peak_mb": most / _MB}
