"""The backward of a step: torch's own, by a shorter way where nobody could tell."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import graph
from torch.overrides import TorchFunctionMode

from loopwright._compat import backward


def loss_of(net: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = torch.linspace(-1, 1, 12, dtype=dtype).view(4, 3)
    return nn.functional.cross_entropy(net.to(dtype)(inputs), torch.tensor([0, 1, 1, 0]))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def ways(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Losses that went through ``torch.autograd.backward``."""
    seen: list[Tensor] = []
    real = torch.autograd.backward

    def noted(tensors: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(tensors)
        real(tensors, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "backward", noted)
    return seen


@pytest.mark.parametrize("gradient", [None, 0.25], ids=["alone", "with a gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_gradients_are_those_of_loss_backward_and_add_up(dtype: torch.dtype, gradient: float | None) -> None:
    ours, torchs = network(), network()
    for _ in range(2):
        given = None if gradient is None else torch.tensor(gradient, dtype=dtype)
        backward(loss_of(ours, dtype), given)
        loss_of(torchs, dtype).backward(given)
    assert gradients(ours)
    assert all(map(torch.equal, gradients(ours), gradients(torchs)))


def test_a_hook_that_writes_into_the_gradient_of_a_loss_changes_no_other_backward() -> None:
    changed, plain, doubled = network(), network(), network()
    loss = loss_of(changed)
    loss.register_hook(lambda grad: grad.mul_(2) and None)
    backward(loss)
    backward(loss_of(plain))
    (2 * loss_of(doubled)).backward()
    assert all(torch.equal(2 * a, b) for a, b in zip(gradients(plain), gradients(changed), strict=True))
    assert all(map(torch.allclose, gradients(changed), gradients(doubled)))


def test_the_gradient_that_a_leaf_gets_is_its_own() -> None:
    leaf = torch.tensor(3.0, requires_grad=True)
    backward(leaf)
    assert leaf.grad is not None
    leaf.grad.zero_()
    other = torch.tensor(3.0, requires_grad=True)
    backward(other)
    assert other.grad == 1.0


def test_what_was_put_in_the_place_of_torch_s_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ways(monkeypatch)
    loss = loss_of(network())
    backward(loss)
    assert seen[0] is loss


def test_a_subclass_and_a_mode_see_their_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noted(Tensor):
        pass

    seen = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watching():
        backward(loss_of(network()))
    assert Tensor.backward in seen

    called = []
    monkeypatch.setattr(Noted, "backward", lambda self, gradient: called.append(self))
    loss = loss_of(network()).as_subclass(Noted)
    backward(loss)
    assert called[0] is loss


def test_the_log_of_the_graph_is_written_when_somebody_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger=graph.log.name):
        backward(loss_of(network()))
    assert "Executing" in caplog.text


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, requires_grad=True) * 2,
        lambda: torch.tensor(1.0),
        lambda: torch.tensor(1),
        lambda: torch.tensor(1j, requires_grad=True) * 2,
    ],
    ids=["no scalar", "no graph", "an integer", "complex"],
)
def test_an_error_is_the_one_of_torch(make: Any) -> None:
    with pytest.raises(RuntimeError) as torchs:
        make().backward()
    with pytest.raises(RuntimeError) as ours:
        backward(make())
    assert str(ours.value) == str(torchs.value)
