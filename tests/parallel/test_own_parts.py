"""Every part of training can be another's: process group, strategy, precision, backward, optimizer, scheduler."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import loopwright as lw

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "parallel.md"
X = torch.randn(70, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
did: dict[str, int] = {}


def strategy_of_the_page() -> Any:
    """``OneMessage``, as docs/parallel.md prints it."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "class OneMessage" in block]
    code = code.partition("\n\ndef weights")[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 50
    scope: dict[str, Any] = {"torch": torch}
    exec(code, scope)
    send = scope["Joined"].send

    def counted(self: Any) -> None:
        did["message"] = did.get("message", 0) + 1
        send(self)

    scope["Joined"].send = counted
    return scope["OneMessage"]()


class Half:
    """Precision: autocast to bfloat16, counted."""

    name, plain, holds, scaler = "half", False, None, None

    @contextmanager
    def autocast(self, device: torch.device) -> Iterator[None]:
        did["autocast"] = did.get("autocast", 0) + 1
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield


class Own(Tensor):
    """A loss that keeps its graph, so that gradients of gradients can be taken."""

    def backward(self, gradient: Any = None, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        did["backward"] = did.get("backward", 0) + 1
        self.as_subclass(Tensor).backward(gradient, retain_graph=True)


class OwnBackward(lw.Callback):
    def map_loss(self, run: lw.Run, loss: Any, *args: Any) -> Any:
        return loss.as_subclass(Own)


class Signs(torch.optim.Optimizer):
    """Steps by the signs of the gradients."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        did["step"] = did.get("step", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


class Halving(torch.optim.lr_scheduler.LRScheduler):
    """Halves the rate once an epoch."""

    def get_lr(self) -> list[Any]:
        did["schedule"] = did.get("schedule", 0) + 1
        return [lr / 2**self.last_epoch for lr in self.base_lrs]


def fit(own: bool) -> Any:
    torch.manual_seed(1)
    did.clear()
    if own:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=77))
    mine = distributed.distributed_c10d._get_default_group() if own else None
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    if own:
        signs = Signs(net.parameters(), 0.01)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), signs, schedule=Halving(signs))
    else:
        task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    settings: dict[str, Any] = {"accumulate": 3, "clip_norm": 0.5, "epochs": 2, "folder": None, "progress": False}
    if own:
        settings |= {"strategy": strategy_of_the_page(), "precision": Half(), "callbacks": [OwnBackward()]}
    run = lw.Trainer(**settings).fit(task, lw.Loader((X, Y), 23))
    kept = mine is distributed.distributed_c10d._get_default_group() if own else True
    return [p.detach().clone() for p in net.parameters()], dict(did), run.lr, kept, run.progress.step


@pytest.mark.capability("PL-15")
def test_group_strategy_precision_backward_optimizer_and_scheduler_may_all_be_ones_own_at_once() -> None:
    """Process group, exchange of gradients, autocast, backward, optimizer and scheduler are objects of the user."""
    (first, calls, lr, kept, steps), (second, others, *_) = lw.launch(fit, 2, True)
    assert all(map(torch.equal, first, second))
    assert kept
    assert steps == calls["message"] == others["message"] == 4
    assert lr == 0.01 / 4
    assert calls["schedule"] == 1 + 2  # when it is made, and after each epoch
    assert calls["step"] == others["step"] == 4
    # windows of (23, 23, 23) and (1): the last sample has one rank
    assert sorted([calls["backward"], others["backward"]]) == [6, 8]
    assert sorted([calls["autocast"], others["autocast"]]) == [6, 8]


@pytest.mark.capability("CA-05")
def test_an_adapter_of_less_than_50_lines_gives_the_numbers_of_one_process() -> None:
    """A strategy of the user's own, in fewer than 50 lines, with accumulation, clipping and a rank without samples."""

    def adapted() -> Any:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
        strategy = strategy_of_the_page()
        trainer = lw.Trainer(2, strategy=strategy, accumulate=3, clip_norm=0.5, folder=None, progress=False)
        trainer.fit(task, lw.Loader((X, Y), 23))
        return [p.detach().clone() for p in net.parameters()], did["message"]

    ((first, messages), (second, _)), alone = lw.launch(adapted, 2), fit(own=False)[0]
    assert messages == 4
    assert all(map(torch.equal, first, second))
    for mine, one in zip(first, alone, strict=True):
        torch.testing.assert_close(mine, one, atol=1e-6, rtol=0)
