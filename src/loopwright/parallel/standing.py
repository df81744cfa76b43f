"""Where a thread stands, whether it has moved, and whether a process lives: seen from beside, at no cost to it."""

from __future__ import annotations

import linecache
import os
import platform
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

import torch

__all__ = ["Line", "Process", "Stand", "Still", "place_at", "place_of", "stand", "state_of", "this_process"]

_OURS = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)
_STDLIB = str(Path(os.__file__).parent)
# of torch, where a thread that does not run waits for other ranks; its checkpoints wait for files
_WAITS = tuple(os.path.join(_TORCH, *part) for part in (("distributed",), ("autograd",), ("nn", "parallel")))
_WRITES = os.path.join(_TORCH, "distributed", "checkpoint")
_BACKWARD = os.path.join(_OURS, "_compat.py"), "backward"  # which calls autograd's engine as torch's own does

_SHOWN = 12  # lines of a stack


class Line(NamedTuple):
    """A line of code that is being run, and the function that it is in."""

    file: str
    number: int
    name: str


class Stand(NamedTuple):
    """Where a thread stands.

    ``place`` is for people. ``waits`` names the call that waits for other ranks, such as ``all_reduce`` or
    ``backward``; "" if it does something else. ``path`` is equal on two ranks that stand in the same line and came
    there by the same lines. ``stack`` are these lines, the last one called at the end.
    """

    place: str
    waits: str
    path: int
    stack: tuple[str, ...]


class Process(NamedTuple):
    """A process, in words that another one on the same machine can check."""

    machine: str  # start of the kernel and namespace of the process numbers; "" where that cannot be known
    name: str
    pid: int
    began: str


class Still:
    """For how long a thread has not run at all, told by its CPU clock. Made in that thread, read in any other.

    A thread that waits in gloo, in a lock or in a read does not run; one that waits for a GPU does, for it polls.
    Where threads have no such clock (macOS), nothing is ever still.
    """

    def __init__(self) -> None:
        clock = getattr(time, "pthread_getcpuclockid", None)
        self._clock = clock(threading.get_ident()) if clock is not None else None
        self._ran, self.seconds = -1, 0.0

    def look(self, elapsed: float) -> float:
        """The seconds for which it has been seen to stand still, ``elapsed`` after the last look."""
        if self._clock is not None:
            ran = time.clock_gettime_ns(self._clock)
            self.seconds = self.seconds + elapsed if ran == self._ran else 0.0
            self._ran = ran
        return self.seconds


def stand(thread: int) -> Stand:
    """Where the thread of that ``threading.get_ident()`` stands now; frames of torch and Python are left out.

    >>> stand(threading.get_ident()).waits
    ''
    """
    frame = sys._current_frames().get(thread)
    lines = list(_lines(frame))
    ours = [i for i, line in enumerate(lines) if _kind(line.file) == "ours"]
    # below the line that calls our outermost function, ranks may have been started in different ways
    walked = [
        line for line in (lines[: ours[-1] + 2] if ours else lines) if _kind(line.file) not in ("torch", "python")
    ]
    path = 0
    for file, number, _ in walked:
        path = zlib.crc32(f"{os.path.basename(file)}:{number}".encode(), path)
    return Stand(place_at(lines), _waits(lines), path, tuple(map(_at, walked[_SHOWN - 1 :: -1])))


def place_of(error: BaseException) -> str:
    """Where ``error`` was raised, as far in as the user's code or ours goes.

    >>> try:
    ...     raise ValueError
    ... except ValueError as error:
    ...     place_of(error).split(":")[1]
    '2 in <module>'
    """
    trace, lines = error.__traceback__, []
    while trace is not None:
        lines.append(_line(trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return place_at(lines[::-1])


def _lines(frame: FrameType | None) -> Iterator[Line]:
    """From the innermost frame outwards."""
    while frame is not None:
        yield _line(frame, frame.f_lineno or 0)
        frame = frame.f_back


def _line(frame: FrameType, number: int) -> Line:
    return Line(frame.f_code.co_filename, number, frame.f_code.co_name)


def place_at(lines: Iterable[Line]) -> str:
    """``train.py:41 in main``, of a stack from the innermost frame outwards.

    Code of a package is followed by the line of the user's that called it.

    >>> place_at([Line(os.path.join(_TORCH, "nn", "module.py"), 7, "call"), Line("/code/train.py", 41, "main")])
    '/code/train.py:41 in main'
    """
    shown = ""
    for line in lines:
        kind = _kind(line.file)
        if kind == "user":
            return f"{shown}, called from {_at(line)}" if shown else _at(line)
        if kind in ("ours", "package") and not shown:
            shown = _at(line)
    return shown or "an unknown place"


def _at(line: Line) -> str:
    path = Path(line.file)
    shown = str(path) if _kind(line.file) == "user" else "/".join(path.parts[-2:])
    return f"{shown.removeprefix(os.path.join(_cwd(), ''))}:{line.number} in {line.name}"


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return os.sep


def _waits(lines: list[Line]) -> str:
    if not lines:
        return ""
    (name, number, called), *_ = lines
    if (name, called) == _BACKWARD:
        return called
    if not name.startswith(_TORCH):  # a call of C stands in the line that makes it; Python's own have frames
        return "wait" if ".wait(" in linecache.getline(name, number) else ""
    if not name.startswith(_WAITS) or name.startswith(_WRITES):
        return ""
    for file, _, function in lines:  # the outermost of them is what was called
        if not file.startswith(_TORCH):
            break
        if file.startswith(_WAITS) and function != "wrapper" and not function.startswith("_"):
            called = function
    return called


@cache
def _kind(name: str) -> Literal["ours", "torch", "python", "package", "user"]:
    if name.startswith(_OURS + os.sep):
        return "ours"
    if name.startswith(_TORCH + os.sep):
        return "torch"
    if "site-packages" in name or "dist-packages" in name:  # before Python's: they may lie inside of it
        return "package"
    return "python" if name.startswith((_STDLIB, "<frozen")) else "user"


def this_process() -> Process:
    """The calling process."""
    began = _stat(os.getpid())[1] if _machine() else ""
    return Process(_machine(), platform.node(), os.getpid(), began)


@cache
def _machine() -> str:
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return ""


def state_of(process: Process) -> Literal["runs", "stopped", "traced", "gone", "unknown"]:
    """What the kernel says of a process: stopped by a signal, or held by a debugger; "unknown" for another machine."""
    if not process.machine or process.machine != _machine():
        return "unknown"
    try:
        state, began = _stat(process.pid)
    except (OSError, IndexError):
        return "gone"
    if began != process.began or state in "ZX":  # its number was given away, or only its status is left
        return "gone"
    return "stopped" if state == "T" else "traced" if state == "t" else "runs"


def _stat(pid: int) -> tuple[str, str]:
    """State and start time of a process; its name, in parentheses, may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
