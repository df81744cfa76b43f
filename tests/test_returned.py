"""What a step can return is told by its source, or not at all: a name is never ruled out that could come."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import loopwright as lw
from loopwright.returned import names_returned
from loopwright.steps import as_output


class Losses(TypedDict):
    loss: Tensor
    kl: Tensor


def helper(batch: Any) -> Any:
    return {"loss": batch.mean(), "helped": 1.0}


def opaque(batch: Any) -> Any:
    return batch["anything"]


def noisy(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def wrapper(*args: Any) -> Any:
        return {**step(*args), "noise": 0.0}

    return wrapper


class Steps(lw.Task):
    """Each method is a step, with the names that it can return in its docstring; ``?`` where nobody can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = nn.Linear(1, 1), nn.MSELoss()

    @property
    def asked(self) -> Any:
        raise AssertionError("a property was asked")

    def literal(self, batch: Any) -> Any:
        """kl loss"""
        return {"loss": self.net(batch).mean(), "kl": 0.0}

    def a_loss(self, batch: Any) -> Any:
        """loss"""
        loss = functional.mse_loss(self.net(batch), batch)
        loss += 0.5 * loss
        return loss

    def a_criterion(self, batch: Any) -> Any:
        """loss"""
        return self.criterion(self.net(batch), batch)

    def an_expression(self, batch: Any) -> Any:
        """loss"""
        return (self.net(batch) - batch).pow(2).mean() / 2

    def built_up(self, batch: Any) -> Any:
        """a b c d loss"""
        out = {"loss": self.net(batch).mean()}
        out["a"] = 1.0
        out.update(b=2.0)
        out.update({"c": 3.0})
        out |= {"d": 4.0}
        print(sorted(out), "loss" in out)
        return out

    def by_another(self, batch: Any) -> Any:
        """kl loss more"""
        return {**self.literal(batch), "more": 1.0}

    def of_branches(self, batch: Any) -> Any:
        """loss one two"""
        if len(batch) > 1:
            return {"loss": batch.mean(), "one": 1.0}
        return dict(loss=batch.mean(), two=2.0)

    def by_a_function(self, batch: Any) -> Any:
        """helped loss"""
        return helper(batch)

    @torch.no_grad()
    def without_gradients(self, batch: Any) -> Any:
        """kl loss"""
        return self.literal(batch)

    @noisy
    def wrapped(self, batch: Any) -> Any:
        """loss noise"""
        return {"loss": batch.mean()}

    def nothing(self, batch: Any) -> Any:
        """"""
        self.criterion(batch, batch)

    def said(self, batch: Any) -> Losses:
        """kl loss"""
        return opaque(batch)

    def said_a_tensor(self, batch: Any) -> Tensor:
        """loss"""
        return opaque(batch)

    def said_wrongly(self, batch: Any) -> Tensor:
        """kl loss"""
        return {"loss": batch.mean(), "kl": 0.0}  # type: ignore[return-value]

    def of_a_loop(self, batch: Any) -> Any:
        """?"""
        out = {"loss": batch.mean()}
        for name in ("a", "b"):
            out[name] = 1.0
        return out

    def of_a_part(self, batch: Any) -> Any:
        """?"""
        return batch.loss

    def of_a_tuple(self, batch: Any) -> Any:
        """?"""
        _, out = opaque(batch)
        return out

    def put_anew(self, batch: Any) -> Any:
        """?"""
        out = {"loss": batch.mean()}
        if len(batch) > 9:
            out, _ = opaque(batch)
        return out

    def handed_on(self, batch: Any) -> Any:
        """?"""
        out = {"loss": batch.mean()}
        self.adds(out)
        return out

    def handed_on_by_another_name(self, batch: Any) -> Any:
        """?"""
        out = {"loss": batch.mean()}
        other = out
        other["more"] = 1.0
        return out

    def changed_within(self, batch: Any) -> Any:
        """?"""
        out = {"loss": batch.mean()}

        def add() -> None:
            out["more"] = 1.0

        add()
        return out

    def adds(self, out: Any) -> Any:
        """?"""
        out = {**out, "more": 1.0}
        print(len(out))
        return out

    def of_itself(self, batch: Any) -> Any:
        """?"""
        return self.of_itself(batch)

    def of_a_property(self, batch: Any) -> Any:
        """?"""
        return self.asked(batch)

    def of_what_is_unknown(self, batch: Any) -> Any:
        """?"""
        return self.net.missing.step(batch)


STEPS = [name for name, one in vars(Steps).items() if callable(one) and one.__doc__ is not None and name[0] != "_"]


@pytest.mark.parametrize("name", STEPS)
def test_what_a_step_can_return_is_read_off_its_source(name: str) -> None:
    step = getattr(Steps(), name)
    found = names_returned(step)
    assert ("?" if found is None else " ".join(sorted(found))) == step.__doc__


@pytest.mark.parametrize("name", [name for name in STEPS if not name.startswith("said")])
def test_nothing_comes_that_was_ruled_out(name: str) -> None:
    step = getattr(Steps(), name)
    found = names_returned(step)
    if found is not None:
        assert as_output(step(torch.ones(2, 1)), None).keys() <= found


def test_what_is_inherited_and_what_is_said_by_super_is_followed() -> None:
    class More(Steps):
        def literal(self, batch: Any) -> Any:
            return {**super().literal(batch), "extra": 1.0}

        def training_step(self, batch: Any) -> Any:
            return self.literal(batch)

    assert names_returned(More().validation_step) == {"loss", "kl", "extra"}


def test_a_function_without_a_source_tells_nothing() -> None:
    scope: dict[str, Any] = {}
    exec("def step(batch): return {'loss': batch}", scope)
    assert names_returned(scope["step"]) is None
    assert names_returned(len) is None
    assert names_returned(functools.partial(helper)) is None
    assert names_returned(nn.MSELoss()) == {"loss"}
