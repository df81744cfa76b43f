"""Ctrl-C and SIGTERM during a fit: a flag that the loop sees at its next boundary."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from loopwright.state import Run

__all__ = ["leave_if_interrupted", "watch_signals"]


@contextmanager
def watch_signals(run: Run) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a stop request, in the main thread only; the old handlers come back afterwards.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if run.stop_reason == name == "SIGINT":
            raise KeyboardInterrupt
        run.stop_reason = name

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def leave_if_interrupted(run: Run) -> None:
    """Raise what the signal stands for, now that the run is saved and closed."""
    if run.stop_reason == "SIGINT":
        where = f"; its folder is {run.folder}" if run.folder is not None else ""
        raise KeyboardInterrupt(f"stopped after step {run.progress.step}{where}")
    if run.stop_reason == "SIGTERM":
        raise SystemExit(143)
