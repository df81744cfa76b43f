"""What a step and an import may cost, counted and not timed: calls, modules. Reads of the device: test_loop.py."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw


def calls_a_step(train: Any) -> float:
    """Python functions entered a step, a resumed generator too, from two lengths of a run."""
    counts = []
    for steps in (20, 20, 120):  # the first warms up
        net = nn.Linear(8, 3)
        sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        samples = TensorDataset(torch.randn(2 * steps, 8), torch.zeros(2 * steps, dtype=torch.long))
        calls: list[str] = []
        sys.setprofile(lambda frame, event, argument, seen=calls.append: seen(event))
        try:
            train(net, sgd, DataLoader(samples, 2, shuffle=True))
        finally:
            sys.setprofile(None)
        counts.append(calls.count("call"))
    return (counts[2] - counts[1]) / 100


def by_hand(net: Any, sgd: Any, loader: Any) -> None:
    loss_of = nn.CrossEntropyLoss()
    for inputs, target in loader:
        sgd.zero_grad()
        loss_of(net(inputs), target).backward()
        sgd.step()


def test_a_step_with_the_defaults_makes_at_most_110_calls(tmp_path: Path) -> None:
    """Bar, records in a file, accuracy, history, checkpoint policy and non-finite check; the loop by hand makes 134."""

    def by_fit(net: Any, sgd: Any, loader: Any) -> None:
        task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, metrics={"accuracy": lw.metrics.Accuracy()})
        bar = lw.ProgressBar(file=io.StringIO(), mode="lines")
        lw.Trainer(epochs=1, folder=tmp_path, progress=bar).fit(task, loader)

    assert calls_a_step(by_fit) <= 110 < calls_a_step(by_hand)


def test_a_callback_that_overrides_nothing_adds_no_call() -> None:
    class Idle(lw.Callback):
        pass

    def train(*callbacks: lw.Callback) -> Any:
        def by_fit(net: Any, sgd: Any, loader: Any) -> None:
            task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd)
            lw.Trainer(epochs=1, folder=None, progress=False, callbacks=callbacks).fit(task, loader)

        return by_fit

    extra = calls_a_step(train(*[Idle() for _ in range(20)])) - calls_a_step(train())
    assert abs(extra) < 3  # one call each would be 20; what Python itself cleans up now and then is less


def test_the_import_loads_one_module_over_torch_and_the_help_not_even_torch() -> None:
    look = "print(json.dumps([*set(sys.modules) - known]))"
    code = f"import json, sys, torch; known = set(sys.modules); import loopwright; {look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["loopwright"]
    command = [sys.executable, "-X", "importtime", "-m", "loopwright", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
    assert "loopwright.cli" in loaded
    assert not {"torch", "numpy", "loopwright.trainer"} & loaded
