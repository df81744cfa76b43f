"""Every optimizer and every scheduler of torch goes on, after a checkpoint, with the bits it would have had."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

from loopwright.checkpoint import check, read, write

OPTIMIZERS = sorted(
    (
        o
        for o in vars(optim).values()
        if inspect.isclass(o) and issubclass(o, optim.Optimizer) and o is not optim.Optimizer
    ),
    key=lambda o: o.__name__,
)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "Adam": [{}, {"amsgrad": True}, {"fused": True}, {"foreach": True}, {"lr": torch.tensor(0.1)}],
    "AdamW": [{}, {"amsgrad": True, "maximize": True}],
    "SGD": [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "ASGD": [{"t0": 2}],
    "LBFGS": [{"lr": 0.1, "max_iter": 3, "history_size": 4, "line_search_fn": "strong_wolfe"}],
}
CASES = [(kind, settings) for kind in OPTIMIZERS for settings in SETTINGS.get(kind.__name__, [{}])]


def make_net(kind: type[optim.Optimizer]) -> nn.Module:
    if kind is optim.SparseAdam:
        return nn.Embedding(7, 3, sparse=True)
    if kind.__name__ == "Muon":  # takes matrices only
        return nn.Linear(4, 3, bias=False)
    conv = nn.Conv2d(2, 3, 2)
    if kind is not optim.LBFGS:  # which takes row by row only
        conv = conv.to(memory_format=torch.channels_last)
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(3, 4), nn.Linear(4, 2))


def step(net: nn.Module, optimizer: optim.Optimizer, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    if isinstance(net, nn.Embedding):
        x = torch.randint(0, 7, (5,), generator=generator)
    elif isinstance(net, nn.Linear):
        x = torch.randn(5, 4, generator=generator)
    else:
        x = torch.randn(5, 2, 2, 2, generator=generator)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    if isinstance(optimizer, optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda x: x.__name__ if inspect.isclass(x) else str(list(x)))
@pytest.mark.parametrize("steps", [0, 3])
def test_every_optimizer_goes_on_with_the_same_bits(kind: type[Any], settings: dict[str, Any], steps: int) -> None:
    torch.manual_seed(1)
    net = make_net(kind)
    optimizer = kind(net.parameters(), **settings)
    for n in range(steps):
        step(net, optimizer, n)
    check(optimizer.state_dict(), "optimizers['optimizer']")
    path = write(Path("checkpoints/a"), {"model": net.state_dict()}, {"optimizers": {"o": optimizer.state_dict()}}, {})
    for n in range(steps, steps + 3):
        step(net, optimizer, n)

    torch.manual_seed(2)
    again = make_net(kind)
    resumed = kind(again.parameters(), **settings)
    data = read(path)
    again.load_state_dict(data.files["model"])
    resumed.load_state_dict(data.state["optimizers"]["o"])
    for n in range(steps, steps + 3):
        step(again, resumed, n)
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    assert str(resumed.state_dict()["param_groups"]) == str(optimizer.state_dict()["param_groups"])


def test_the_order_in_memory_of_an_optimizer_state_is_kept() -> None:
    net = make_net(optim.Adam)
    optimizer = optim.Adam(net.parameters())
    step(net, optimizer, 0)
    moments = optimizer.state_dict()["state"][0]["exp_avg"]
    assert not moments.is_contiguous()
    path = write(Path("checkpoints/a"), {}, {"optimizers": optimizer.state_dict()}, {})
    assert read(path).state["optimizers"]["state"][0]["exp_avg"].stride() == moments.stride()


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=20, three_phase=True),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2)]
    ),
}


def test_every_scheduler_of_torch_is_in_this_test() -> None:
    there = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert there - {"LRScheduler"} == set(SCHEDULERS)


def rates(optimizer: optim.Optimizer, scheduler: Any, steps: range) -> list[tuple[float, Any]]:
    found = []
    for n in steps:
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0 + n % 3)
        else:
            scheduler.step()
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0].get("momentum")))
    return found


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("steps", [0, 4])
def test_every_scheduler_goes_on_with_the_same_rates(name: str, steps: int) -> None:
    def make() -> tuple[optim.Optimizer, Any]:
        optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        return optimizer, SCHEDULERS[name](optimizer)

    optimizer, scheduler = make()
    rates(optimizer, scheduler, range(steps))
    state = {"optimizers": {"o": optimizer.state_dict()}, "s": scheduler.state_dict()}
    path = write(Path("checkpoints/a"), {}, state, {})
    expected = rates(optimizer, scheduler, range(steps, steps + 6))

    optimizer, scheduler = make()
    data = read(path)
    optimizer.load_state_dict(data.state["optimizers"]["o"])
    scheduler.load_state_dict(data.state["s"])
    assert rates(optimizer, scheduler, range(steps, steps + 6)) == expected
