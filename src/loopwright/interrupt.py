"""Ctrl-C, SIGTERM and SIGUSR1 during a fit: a flag that the loop sees at its next boundary."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loopwright.state import SIGNALS, Run

__all__ = ["leave_if_interrupted", "watch_signals"]

_ONE_PRESS_S = 0.3


@contextmanager
def watch_signals(run: Run) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a stop request, in the main thread only; the old handlers come back.

    The first signal is the one that counts. A second Ctrl-C raises KeyboardInterrupt at once. It must come a moment
    after the first: ``timeout``, ``srun`` and other launchers pass on what the terminal has sent to the whole group
    already. Signals that the process ignores stay ignored, as a shell has it for what runs in the background; a SIGUSR1
    that has a handler already keeps it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed_at: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed_at
        name = signal.Signals(number).name
        if name == "SIGINT":
            before, pressed_at = pressed_at, time.monotonic()
            if before is not None and pressed_at - before >= _ONE_PRESS_S:
                raise KeyboardInterrupt
        if name == "SIGTERM":  # of the step that is open, while its weights have not moved
            run.hooks.on_grads_ready, run.at_sigterm = (*run.at_sigterm, *run.hooks.on_grads_ready), ()
        # a SIGTERM at the limit of a job does not undo the SIGUSR1 that asks to requeue it
        if run.team is not None:
            run.request_stop(name)  # all ranks stop after the same step
        elif not run.interrupted:
            run.stop_reason = name

    old = dict(_free())
    for number in old:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _free() -> Iterator[tuple[signal.Signals, Any]]:
    """The signals to watch, with their handlers: not those that are ignored, nor a SIGUSR1 that the user handles."""
    for name in SIGNALS:
        number: signal.Signals | None = getattr(signal, name, None)
        handler = signal.SIG_IGN if number is None else signal.getsignal(number)
        if number is not None and handler is not signal.SIG_IGN and (name != "SIGUSR1" or handler is signal.SIG_DFL):
            yield number, handler


def leave_if_interrupted(run: Run) -> None:
    """Raise what the signal stands for, now that the run is saved and closed.

    KeyboardInterrupt for Ctrl-C; SystemExit with 128 and the number for others, as a shell counts: 143 for SIGTERM.
    """
    if run.stop_reason == "SIGINT":
        where = f"; its folder is {run.folder}" if run.folder is not None else ""
        if run.folder is not None and run.savers:
            where += ". To go on, start it again with fit(..., resume='auto')"
        raise KeyboardInterrupt(f"stopped after step {run.progress.step}{where}")
    if run.interrupted:
        raise SystemExit(128 + signal.Signals[str(run.stop_reason)])
