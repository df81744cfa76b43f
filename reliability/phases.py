"""A run that comes to a chosen phase of training, says so, and stays there until a signal has come."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import loopwright as lw
from reliability.server import say
from reliability.trial import NAME, digests, observe, seed_all

PHASES = ("fetch", "forward", "backward", "step", "callback", "validation", "saving", "resuming", "teardown")
BATCHES, EPOCHS = 4, 3


class Place:
    """Where a run waits for its signal: at its call ``nth`` of a phase; in "fetch" while sample ``nth`` is read."""

    def __init__(self, phase: str, nth: int) -> None:
        # not kept as phase: a resume would find that an argument of model and data is another one
        self.waits_in, self.calls, self.run = phase, 0, None
        self.sample, self.at = nth, 1 if phase in ("fetch", "resuming", "teardown") else nth

    def here(self, phase: str) -> None:
        self.calls += phase == self.waits_in
        if phase != self.waits_in or self.calls != self.at:
            return
        worker = torch.utils.data.get_worker_info() is not None
        say(1)
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
        if i == self.place.sample:
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
    """Waits in a hook, and while its state is saved or put back; notes when steps end."""

    def __init__(self, place: Place) -> None:
        self.place, self.ended = place, list[float]()

    def on_fit_start(self, run: lw.Run) -> None:
        self.place.run = run

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        self.ended.append(time.monotonic())
        self.place.here("callback")

    def state_dict(self) -> dict[str, Any]:
        self.place.here("saving")
        return {"seen": 1}

    def load_state_dict(self, state: Any) -> None:
        self.place.here("resuming")


class Noted(lw.Checkpoint):
    """Notes when saves began that wrote something."""

    def __init__(self, every: str) -> None:
        super().__init__(every)
        self.begun = list[float]()

    def save(self, run: lw.Run) -> Any:
        began, before = time.monotonic(), self.last
        path = super().save(run)
        self.begun += [began] if path != before else []
        return path


class Closes(lw.JSONLLogger):
    """Waits while it is closed."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def close(self, status: str) -> None:
        super().close(status)
        if status == "done":
            self.place.here("teardown")


def waits(folder: str, phase: str, nth: int, workers: int, result: str, resume: str | None = None) -> None:
    """Train to the end, or until a signal comes; what it has come to, and when it did what, is in ``result``.

    The process leads a group of its own, as a command in a terminal does.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a harness in the background has it ignored
    seed_all(7)
    place = Place(phase, nth)
    looks, saver, found = Looks(place), Noted("2 steps"), dict[str, Any]()
    train = DataLoader(Slow(place), batch_size=2, shuffle=True, num_workers=workers)
    trainer = lw.Trainer(
        epochs=EPOCHS, folder=folder, name=NAME, progress=False, callbacks=[looks], loggers=[Closes(place)],
        checkpoint=saver, log_every=3, seed=3, validate_every="2 steps",
    )  # fmt: skip
    try:
        run = trainer.fit(Waits(place), train, [torch.ones(2, 3)] * 3, resume=resume)
        found["digests"] = digests(observe(run))
    finally:
        found |= {"left": time.monotonic(), "steps ended": looks.ended, "saves begun": saver.begun}
        Path(result).write_text(json.dumps(found))
