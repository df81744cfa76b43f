"""The optimizer's step is torch's own, without the profiler's range where no profiler looks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile

from loopwright._compat import take_step
from tiny import same

RANGE = "Optimizer.step#{}.step"
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "fused sgd": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}


class Counting(torch.optim.SGD):
    """A step of one's own around that of torch."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return super().step(closure)


def trained(make: Callable[[Any], torch.optim.Optimizer], step: Callable[[Any], Any]) -> tuple[Any, Any]:
    torch.manual_seed(3)
    net = nn.Linear(4, 3)
    optimizer = make(net.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().mean().backward()
        step(optimizer)
    return net.state_dict(), optimizer.state_dict()


@contextmanager
def ranges(kind: str) -> Iterator[list[int]]:
    """How often the profiler's range around a step of this class was opened; torch's own observers count it."""
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        yield found
    found.append(sum(event.name == RANGE.format(kind) for event in seen.events() or ()))


@pytest.mark.parametrize("make", [*OPTIMIZERS.values(), lambda params: Counting(params, lr=0.1)])
def test_the_weights_and_the_state_are_those_of_step_itself(make: Any) -> None:
    assert same(trained(make, take_step), trained(make, lambda optimizer: optimizer.step()))


def test_the_range_is_left_out_unless_a_profiler_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = torch.autograd.profiler.record_function
    monkeypatch.setattr(torch.autograd.profiler, "record_function", lambda name: opened.append(name) or real(name))
    trained(OPTIMIZERS["sgd"], take_step)
    assert opened.count(RANGE.format("SGD")) == 0
    with ranges("SGD") as counted:
        trained(OPTIMIZERS["sgd"], take_step)
    assert counted == [3]


def test_hooks_of_the_optimizer_and_of_all_optimizers_are_called() -> None:
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    for register, name in (("register_step_pre_hook", "before"), ("register_step_post_hook", "after")):

        def hooked(params: Any, register: str = register, name: str = name) -> torch.optim.Optimizer:
            optimizer = OPTIMIZERS["sgd"](params)
            getattr(optimizer, register)(note(name))
            return optimizer

        trained(hooked, take_step)
    assert called == ["before"] * 3 + ["after"] * 3
    for register_for_all in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook):
        called.clear()
        handle = register_for_all(note("all"))
        trained(OPTIMIZERS["sgd"], take_step)
        handle.remove()
        assert called == ["all"] * 3


def test_a_step_put_in_the_place_of_torchs_own_is_called() -> None:
    called: list[str] = []

    def around(step: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(step)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return step(*args, **kwargs)

        return wrapped

    def on_instance(params: Any) -> torch.optim.Optimizer:
        optimizer = OPTIMIZERS["sgd"](params)
        optimizer.step = around(optimizer.step, "instance")  # type: ignore[method-assign]
        return optimizer

    trained(on_instance, take_step)

    class Wrapped(torch.optim.SGD):
        pass

    Wrapped(nn.Linear(1, 1).parameters())  # torch wraps it at the first instance
    Wrapped.step = around(Wrapped.step, "class")  # type: ignore[method-assign]
    trained(lambda params: Wrapped(params, lr=0.1), take_step)
    assert called == ["instance"] * 3 + ["class"] * 3


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_recorded_afterwards_as_before_also_after_an_error(enabled: bool) -> None:
    class Odd(torch.optim.SGD):
        def _init_group(self, *args: Any) -> bool:
            assert not torch.is_grad_enabled()
            raise ValueError("no group")

    torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    for make in (Odd, torch.optim.SGD):
        net = nn.Linear(1, 1)
        net(torch.ones(1, 1)).sum().backward()
        optimizer = make(net.parameters(), lr=0.1)
        with torch.set_grad_enabled(enabled):
            with pytest.raises(ValueError, match="no group") if make is Odd else contextlib.nullcontext():
                take_step(optimizer)
            assert torch.is_grad_enabled() is enabled


def test_a_differentiable_step_records_gradients() -> None:
    start = torch.ones(2, requires_grad=True)
    moved = start.clone()
    moved.grad = 3 * start
    take_step(torch.optim.SGD([moved], lr=0.5, differentiable=True))
    moved.sum().backward()
    assert start.grad is not None
    assert torch.equal(start.grad, torch.full((2,), 1 - 0.5 * 3))


def test_a_scheduler_sees_the_steps() -> None:
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    net(torch.ones(1, 1)).sum().backward()
    take_step(optimizer)
    scheduler.step()  # warns if it saw no step of the optimizer before
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
