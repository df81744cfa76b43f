"""Runs that end in the middle of a save, and what a new start finds. ``python tests/checkpoint/crash.py --help``

``prefixes`` ends a run after each single operation on its checkpoints, half of a write included; ``kills`` ends it with
SIGKILL at random moments of its saves. Children are forked, so call them in a process that has no other threads.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loopwright as lw
from loopwright.checkpoint import list_checkpoints, newest, read, sweep

STEPS = 4


def train(root: Path, *, keep: int, background: bool, width: int, said: int) -> None:
    """A few steps with a checkpoint after each; says each step that begins, and each checkpoint that is on disk."""
    torch.manual_seed(0)
    net = nn.Linear(width, width)
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    saver = lw.Checkpoint("1 steps", keep=keep, async_save=background)
    trainer = lw.Trainer(steps=STEPS, folder=root, progress=False, checkpoint=saver, loggers=[])
    trainer.on(lw.Event.STEP_END)(lambda run: os.write(said, struct.pack("i", run.progress.step)) and None)
    trainer.on(lw.Event.CHECKPOINT)(lambda run, path: os.write(said, struct.pack("i", -_number(path))) and None)
    run = trainer.fit(task, [(torch.ones(2, width), torch.zeros(2, width))] * STEPS)
    saver.finish(run)


def _number(path: Any) -> int:
    return int(path.name.removeprefix("step-"))


def child(work: Callable[[int], None], *, kill_after: float | None = None) -> tuple[list[int], int]:
    """What a forked process said before it ended, and how it ended; killed ``kill_after`` its first checkpoint."""
    out, into = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(out)
            work(into)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    os.close(into)
    said: list[int] = []
    with open(out, "rb", buffering=0) as heard:
        while data := heard.read(4):
            said.append(struct.unpack("i", data)[0])
            if kill_after is not None and said[-1] < 0:
                time.sleep(kill_after)
                os.kill(process, signal.SIGKILL)
                kill_after = None
    return said, os.waitpid(process, 0)[1]


def damage(root: Path, said: list[int], *, background: bool) -> list[str]:
    """What a new start would not find as it should be."""
    folders = list(root.glob("*/*/checkpoints"))
    done = max((-n for n in said if n < 0), default=0)  # known to be on disk
    if not folders:
        return [f"checkpoint {done} is gone"] if done else []
    found: list[str] = []
    before = newest(folders[0])  # what a resume takes, swept or not
    sweep(folders[0])
    left = list_checkpoints(folders[0])
    if before is not None and before.name.removeprefix(".")[:13] != (left or [Path("none")])[-1].name:
        found.append(f"the newest was {before.name}, and is {left} after sweeping")
    found += [
        f"{path.name} is left over" for path in folders[0].iterdir() if path not in left and path.name != "index.json"
    ]
    try:
        last = max((_number(path) for path in left), default=0)
        for path in left:
            data = read(path)
            if data.state["progress"]["step"] != _number(path):
                found.append(f"{path.name} holds step {data.state['progress']['step']}")
    except lw.CheckpointError as error:
        return [*found, str(error)]
    if last < done:
        found.append(f"checkpoint {done} was on disk, and {last} is the newest")
    trained = max((n for n in said if n > 0), default=0)
    if trained - last > 1 + background:  # the step in which it ended, and the one whose checkpoint was being written
        found.append(f"{trained} steps were trained, and {last} is the newest")
    return found


class Countdown:
    """Ends the process in front of the n-th operation on a checkpoint; a write is half done by then."""

    def __init__(self, left: int) -> None:
        self.left, self.seen, self._lock = left, 0, threading.Lock()
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, self._counted(getattr(os, name)))
        os.fsync = self._counted(os.fsync)
        self._open, io.open = io.open, self.open  # type: ignore[assignment]

    def tick(self, before: Callable[[], object] = lambda: None) -> None:
        with self._lock:
            self.seen += 1
            if self.seen == self.left:
                before()
                os._exit(9)

    def _counted(self, genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return genuine(*args, **kwargs)

        return call

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "checkpoints" not in str(file) or "r" in mode:
            return self._open(file, mode, *args, **kwargs)
        self.tick()
        out = self._open(file, mode, *args, **kwargs)
        if "b" in mode:
            out = Torn(out, self)
        return out


class Torn:
    """A file whose writes are counted."""

    def __init__(self, file: Any, countdown: Countdown) -> None:
        self._file, self._countdown = file, countdown
        self.flush, self.fileno, self.close = file.flush, file.fileno, file.close

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._countdown.tick(half)
        written: int = self._file.write(data)
        return written

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def prefixes(place: Path, *, keep: int, background: bool, stride: int = 1) -> dict[str, Any]:
    """End a run in front of each operation of its saves: ``{"count": ..., "failures": {operation: what is wrong}}``.

    With ``stride``, of every so many-th.
    """
    failures, count = dict[int, list[str]](), 0
    for number in range(1, 10_000, stride):
        root = place / str(number)

        def work(said: int, root: Path = root, number: int = number) -> None:
            Countdown(number)
            train(root, keep=keep, background=background, width=2, said=said)

        said, status = child(work)
        if odd := damage(root, said, background=background):
            failures[number] = odd
        shutil.rmtree(root, ignore_errors=True)
        if status == 0:
            break
        count += 1
        if os.waitstatus_to_exitcode(status) != 9:
            failures[number] = [*failures.get(number, []), f"the run ended with {os.waitstatus_to_exitcode(status)}"]
    return {"count": count, "failures": failures}


def kills(place: Path, count: int, *, keep: int, background: bool, width: int = 700, seed: int = 0) -> dict[str, Any]:
    """SIGKILL ``count`` runs at moments drawn from the time that their saves take: ``count``, ``failures``, ``hit``.

    ``hit`` says how many ended with a save unfinished.
    """
    draws, failures, hit = random.Random(seed), dict[int, list[str]](), 0

    def work(said: int) -> None:
        train(root, keep=keep, background=background, width=width, said=said)

    root = place / "whole"
    began = time.perf_counter()
    child(work)
    span = time.perf_counter() - began
    for number in range(count):
        root = place / str(number)
        said, _ = child(work, kill_after=draws.uniform(0, span))
        hit += any(path.name.startswith(".") for path in root.glob("*/*/checkpoints/.*"))
        if odd := damage(root, said, background=background):
            failures[number] = odd
        shutil.rmtree(root, ignore_errors=True)
    return {"count": count, "hit": hit, "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["prefixes", "kills"])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--keep", type=int, default=1)
    parser.add_argument("--background", action="store_true")
    given = parser.parse_args()
    settings = {"keep": given.keep, "background": given.background}
    with tempfile.TemporaryDirectory() as place, open(os.devnull, "wb") as nowhere:
        train(Path(place) / "first", keep=1, background=False, width=2, said=nowhere.fileno())  # what imports late
        found = (
            prefixes(Path(place), stride=given.stride, **settings)
            if given.what == "prefixes"
            else kills(Path(place), given.count, **settings)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
