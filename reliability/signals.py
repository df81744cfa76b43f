"""Real processes that are sent a real signal in a chosen phase of training, and what must be true of each afterwards.

``signals_x_phases(count)`` goes through all of them: 3 signals in 9 phases, ``count`` times. The test suite takes a
sample. A child says on its standard output that it is in the phase, and stays there until the signal has come.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import loopwright as lw
from loopwright.checkpoint import list_checkpoints, read
from loopwright.loggers import read_jsonl

SIGNALS = {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143, signal.SIGUSR1: 138}  # and how the process leaves
PHASES = ("fetch", "forward", "backward", "step", "callback", "validation", "saving", "resuming", "teardown")
BATCHES, EPOCHS = 4, 3
PLACE = 5  # calls of a phase until the one that waits: in the second epoch, where one has that many


class Place:
    """Where a child waits for its signal."""

    def __init__(self, phase: str) -> None:
        self.phase, self.calls, self.run = phase, 0, None
        self.at = {"fetch": 1, "resuming": 1, "teardown": 1}.get(phase, PLACE)

    def here(self, phase: str) -> None:
        self.calls += phase == self.phase
        if phase != self.phase or self.calls != self.at:
            return
        worker = torch.utils.data.get_worker_info() is not None
        print("ready", flush=True)
        for _ in range(20 if worker else 6000):  # a worker cannot see what its main process knows
            time.sleep(0.01)
            if self.run is not None and self.run.stop_reason and not worker:
                return


class Slow(Dataset[Any]):
    """Where a signal comes while a worker reads."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __len__(self) -> int:
        return BATCHES * 2

    def __getitem__(self, i: int) -> Tensor:
        if i == PLACE:
            self.place.here("fetch")
        return torch.full((3,), float(i)) + torch.rand(3)


class Backward(torch.autograd.Function):
    """Waits in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Place) -> Tensor:
        ctx.place = place
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.place.here("backward")
        return grad, None


class Waits(lw.Task):
    """A task with dropout and batch norm that waits in its steps."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.__dict__["place"] = place

    def training_step(self, batch: Tensor) -> Tensor:
        self.place.run = self._run
        self.place.here("forward")
        return Backward.apply(self.net(batch).pow(2).mean(), self.place)  # type: ignore[no-any-return]

    def validation_step(self, batch: Tensor) -> Tensor:
        self.place.here("validation")
        return self.net(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        place = self.place

        class Waiting(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                place.here("step")
                return super().step(closure)

        return Waiting(self.parameters(), lr=0.05, momentum=0.9)


class Looks(lw.Callback):
    """Waits in a hook, and while its state is saved or put back."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def on_fit_start(self, run: lw.Run) -> None:
        self.place.run = run

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        self.place.here("callback")

    def state_dict(self) -> dict[str, Any]:
        self.place.here("saving")
        return {"seen": 1}

    def load_state_dict(self, state: Any) -> None:
        self.place.here("resuming")


class Closes(lw.JSONLLogger):
    """Waits while it is closed."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def close(self, status: str) -> None:
        super().close(status)
        if status == "done":
            self.place.here("teardown")


def go(folder: Path, phase: str, *, workers: int, resume: str | None = None) -> lw.Run:
    """Train to the end, or until a signal comes in ``phase``."""
    place = Place(phase)
    train = DataLoader(Slow(place), batch_size=2, shuffle=True, num_workers=workers)
    trainer = lw.Trainer(
        epochs=EPOCHS, folder=folder, name="x", progress=False, callbacks=[Looks(place)], loggers=[Closes(place)],
        checkpoint=lw.Checkpoint("2 steps"), log_every=3, seed=3, validate_every="2 steps",
    )  # fmt: skip
    return trainer.fit(Waits(place), train, [torch.ones(2, 3)] * 3, resume=resume)


@dataclass
class Outcome:
    """What came of one signal; ``problems`` is empty if all was as it must be."""

    signal: str
    phase: str
    seconds: float
    problems: list[str] = field(default_factory=list)


def run(*, quick: bool) -> dict[str, Any]:
    """The row F1 of the reliability table: all signals in all phases five times, or once."""
    outcomes = list(signals_x_phases(1 if quick else 5))
    failures = {f"{o.signal} in {o.phase}, number {i}": o.problems for i, o in enumerate(outcomes, 1) if o.problems}
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    shown = {"signal": slowest.signal, "phase": slowest.phase, "seconds": round(slowest.seconds, 2)}
    return {"count": len(outcomes), "failures": failures, "slowest": shown}


def signals_x_phases(count: int = 5) -> Iterator[Outcome]:
    """Every signal in every phase, ``count`` times: 27 x ``count`` outcomes, one after the other."""
    for _ in range(count):
        for number in SIGNALS:
            for phase in PHASES:
                with tempfile.TemporaryDirectory() as folder:
                    yield signalled(number, phase, Path(folder))


def signalled(number: signal.Signals, phase: str, folder: Path) -> Outcome:
    """Send ``number`` to a new process while it is in ``phase``, and look at what it leaves in ``folder``.

    The signal goes to the whole process group, as from a terminal. What must be true: the exit status is that of the
    signal; the newest checkpoint is whole and stands where the run stopped, at most one step later; a fit that goes on
    from it ends with the weights, the losses and the records of a run that was left alone.
    """
    if phase == "resuming":
        child(signal.SIGTERM, "callback", folder)
    code, seconds, err = child(number, phase, folder)
    outcome = Outcome(signal.Signals(number).name, phase, seconds)
    problems = outcome.problems
    if code != SIGNALS[number]:
        problems.append(f"left with {code}, not {SIGNALS[number]}: {err[-1500:]}")
    (record,) = (json.loads(file.read_text()) for file in folder.glob("x/*/run.json"))
    expected = "done" if phase == "teardown" else "interrupted"
    if record["status"] != expected:
        problems.append(f"status {record['status']!r}, not {expected!r}")
    (run_folder,) = folder.glob("x/*")
    checkpoints, stopped = list_checkpoints(run_folder / "checkpoints"), record["progress"]["step"]
    saved = read(checkpoints[-1]).info["step"] if checkpoints else None
    if saved != stopped:
        problems.append(f"the newest checkpoint is of step {saved}, and the run stopped after step {stopped}")
    if problems:
        return outcome
    workers = _workers(phase)
    run, alone = go(folder, "none", workers=workers, resume="auto"), _alone(workers)
    if not all(torch.equal(a, b) for a, b in zip(_bits(run), alone[0], strict=True)):
        problems.append("gone on, it ends with other weights or losses than a run that was left alone")
    if (found := _records(run_folder)) != alone[1]:
        problems.append(f"gone on, it has other records: {found} instead of {alone[1]}")
    return outcome


def child(number: signal.Signals, phase: str, folder: Path) -> tuple[int, float, str]:
    """Exit status, seconds from the signal to the end, and standard error of a process signalled in ``phase``."""
    resume = "auto" if phase == "resuming" else ""
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), phase, resume], start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    told = process.stdout.readline()
    sent = time.monotonic()
    if told == "ready\n":
        os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    return process.returncode, time.monotonic() - sent, err if told else f"never came to {phase}: {err}"


def _workers(phase: str) -> int:
    return 1 if phase == "fetch" else 0  # a signal to the group reaches the worker as well


@cache
def _alone(workers: int) -> tuple[list[Tensor], list[Any]]:
    """Bits and records of a run that nothing disturbs."""
    with tempfile.TemporaryDirectory() as name:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            run = go(Path(name), "none", workers=workers)
            return _bits(run), _records(next(Path(name).glob("x/*")))
        finally:
            torch.set_num_threads(threads)


def _bits(run: lw.Run) -> list[Tensor]:
    losses = torch.tensor(list(run.history.losses["loss"]), dtype=torch.float64)
    return [*(value.clone() for value in run.models["model"].state_dict().values()), losses]


def _records(folder: Path) -> list[Any]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_jsonl(folder / "metrics.jsonl")]


if __name__ == "__main__":
    folder, phase, resume = sys.argv[1:]
    go(Path(folder), phase, workers=_workers(phase), resume=resume or None)
