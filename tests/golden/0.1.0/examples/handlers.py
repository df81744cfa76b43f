"""Handlers: look at a run, and steer it, without writing a class.

``@trainer.on(event)`` registers a function; calling the event chooses among its occurrences. Functions read the run;
``run.log`` and ``run.request_stop`` are how they take part. Real data: the 150 irises of Fisher.
Run: python examples/handlers.py [--epochs 60]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from sklearn.datasets import load_iris
from sklearn.model_selection import train_test_split
from torch import nn

import loopwright as lw
from loopwright import Event


def main(epochs: int = 60) -> list[str]:
    """Train on irises and return the lines that the handlers wrote."""
    X, y = load_iris(return_X_y=True)
    X_train, X_valid, y_train, y_valid = train_test_split(
        X.astype("float32"), y, test_size=0.3, stratify=y, random_state=0
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))
    task = lw.Supervised(
        net,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(net.parameters(), lr=0.01),
        metrics={"accuracy": lw.metrics.Accuracy()},
    )
    trainer = lw.Trainer(epochs=epochs, seed=0, name="handlers", progress=False)
    lines: list[str] = []

    def say(text: str) -> None:
        print(text)
        lines.append(text)

    @trainer.on(Event.STEP_END(once=1))
    def greet(run: lw.Run, result: lw.StepResult) -> None:  # asked for by name, `result` is passed as well
        say(f"the first step is done; its loss was {float(result.values['loss']):.3f}")

    @trainer.on(Event.GRADS_READY(every=50))
    def measure(run: lw.Run) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
        run.log({"grad_norm": norm})  # joins the next record, as train/grad_norm

    @trainer.on(Event.EPOCH_END(every=10) | Event.FIT_END, "after")  # extra arguments are handed on
    def report(run: lw.Run, word: str) -> None:
        last = run.history[-1]
        say(f"{word} epoch {last['epoch']:2}: loss {last['train/loss']:.3f}, valid {last['valid/accuracy']:.1%}")

    @trainer.on(Event.VALIDATION_END(after=5) & Event.VALIDATION_END(when=lambda run: run.lr > 2e-3))
    def slow_down(run: lw.Run, values: Mapping[str, float]) -> None:
        if values["valid/accuracy"] > 0.95:
            run.optimizers["main"].param_groups[0]["lr"] = 2e-3
            say(f"above 95 %: lr is {run.lr} from step {run.progress.step} on")

    @trainer.on(Event.VALIDATION_END(when=lambda run: run.metrics["valid/loss"] < 0.2))
    def enough(run: lw.Run) -> None:
        run.request_stop("valid/loss is below 0.2")

    run = trainer.fit(task, lw.Loader((X_train, y_train), 16, shuffle=True), lw.Loader((X_valid, y_valid), 64))
    say(f"{run.status}: {run.stop_reason or 'all epochs are done'}")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    main(**vars(parser.parse_args()))
