"""What a step and an import may cost, counted and not timed: calls, modules. Reads of the device: test_loop.py."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def calls_a_step(train: Any) -> float:
    """Python functions entered a step, a resumed generator too, from two lengths of a run."""
    counts = []
    for steps in (20, 20, 20, 120):  # two warm up: the second one still fills caches that the first has found empty
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
    return (counts[3] - counts[2]) / 100


def by_hand(net: Any, sgd: Any, loader: Any) -> None:
    loss_of = nn.CrossEntropyLoss()
    for inputs, target in loader:
        sgd.zero_grad()
        loss_of(net(inputs), target).backward()
        sgd.step()


@pytest.mark.capability("B-23", "FA-28", "PL-30")
def test_a_step_with_the_defaults_makes_at_most_110_calls(tmp_path: Path) -> None:
    """Bar, records in a file, accuracy, history, checkpoint policy and non-finite check; the loop by hand makes 134."""

    def by_fit(net: Any, sgd: Any, loader: Any) -> None:
        task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, metrics={"accuracy": lw.metrics.Accuracy()})
        bar = lw.ProgressBar(file=io.StringIO(), mode="lines")
        lw.Trainer(epochs=1, folder=tmp_path, progress=bar).fit(task, loader)

    assert calls_a_step(by_fit) <= 110 < calls_a_step(by_hand)


@pytest.mark.capability("B-23")
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


@pytest.mark.capability("B-23")
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


@pytest.mark.capability("B-23", "FA-28", "PL-30")
def test_the_published_table_keeps_what_it_promises() -> None:
    """No row of docs/benchmarks.md misses its goal; what it costs over the loop by hand, and the import, have one."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text(encoding="utf-8").splitlines()]
    goals = {
        row[0]: (float(row[1].split()[0]), float(row[2][3:])) for row in rows if len(row) > 3 and row[2][:2] == "<="
    }
    for promised, most in {
        "ours over the same step by hand, nothing enabled": 25,
        "`import loopwright` over `import torch`": 50,
        "bar, JSONL, accuracy, history, checkpoint policy / hand-written loop": 0.55,
    }.items():
        assert goals[promised][0] <= most, promised
    assert {what: both for what, both in goals.items() if both[0] > both[1]} == {}


@pytest.mark.slow
@pytest.mark.capability("B-23")
def test_with_nothing_enabled_a_step_is_one_compiled_graph() -> None:
    """Forward, backward and the move of the weights in one graph of torch.compile; the loop adds a copy of the loss."""
    data = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(6)]

    def net_and_step() -> tuple[nn.Module, Any]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        held = dict(net.named_parameters())

        def step(x: Tensor, y: Tensor) -> Tensor:
            def loss_of(parameters: Any) -> Tensor:
                return nn.functional.cross_entropy(functional_call(net, parameters, (x,)), y)

            grads, loss = torch.func.grad_and_value(loss_of)(held)
            with torch.no_grad():
                for name, parameter in held.items():
                    parameter.sub_(grads[name], alpha=0.1)
            return loss.detach()

        return net, step

    class Operations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.found.append(str(func))
            return func(*args, **(kwargs or {}))

    net, step = net_and_step()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, outside, losses = torch.compile(step, backend=counter, fullgraph=True), Operations(), []

    def counted(run: lw.Run, batch: Any) -> Any:
        outside.__exit__(None, None, None)
        losses.append(compiled(*batch))
        outside.__enter__()
        return {"loss": losses[-1]}

    trainer = lw.Trainer(epochs=2, folder=None, progress=False, loggers=(), checkpoint=False, nonfinite=None)
    with outside:
        trainer.run(counted, data, state={"net": net})
    by_hand_net, by_hand_step = net_and_step()
    by_hand_losses = [by_hand_step(*batch) for _ in range(2) for batch in data]
    assert counter.frame_count == 1
    torch.testing.assert_close(losses, by_hand_losses)
    torch.testing.assert_close(dict(net.named_parameters()), dict(by_hand_net.named_parameters()))
    per_step = {name: count / len(losses) for name, count in Counter(outside.found).items()}
    # the loss of a step is kept until its record, and read there
    assert per_step == {"aten.detach.default": 1, "aten.clone.default": 1, "aten._local_scalar_dense.default": 1}
