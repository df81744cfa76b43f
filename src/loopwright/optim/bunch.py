"""What the step functions of ``Stepwise`` work on: lists of tensors, and what is kept of each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Bunch"]

Tensors = list[Tensor] | tuple[Tensor, ...]


class Bunch:
    """What a step function works on: parameters of one group that have a gradient, all of one device and dtype.

    ``params`` and ``grads`` are lists of equal length, to be changed by ``torch._foreach_...`` functions or by the
    methods here; ``grads`` may be replaced by another list for the functions that follow.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> weight.grad = torch.tensor([1.0, -3.0])
    >>> bunch = Bunch([weight], {weight: {}}, in_graph=False, on_device=False)
    >>> bunch.average("mean", 0.5)
    [tensor([ 0.5000, -1.5000])]
    """

    __slots__ = ("_in_graph", "_on_device", "_states", "_steps", "grads", "params")

    def __init__(self, params: list[Tensor], state: Any, *, in_graph: bool, on_device: bool) -> None:
        self.params = params
        self.grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]  # those without are left out
        self._states: list[dict[str, Any]] = [state[p] for p in params]
        self._steps: list[Any] | None = None
        self._in_graph, self._on_device = in_graph, on_device

    def kept(self, name: str, start: list[Tensor] | None = None) -> list[Tensor]:
        """What is kept of each parameter as ``name``, in checkpoints too: zeros at first, or a copy of ``start``."""
        for i, state in enumerate(self._states):
            if name not in state:
                state[name] = torch.zeros_like(self.params[i]) if start is None else start[i].clone()
        return [state[name] for state in self._states]

    @property
    def steps(self) -> list[Any]:
        """The number of this step for each parameter, from 1: floats, or 0-dimensional tensors in a graph.

        Steps are counted by optimizers that have a function which asks for them.
        """
        if self._steps is None:
            for parameter, state in zip(self.params, self._states, strict=True):
                if "step" not in state:
                    device = parameter.device if self._on_device else "cpu"
                    state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            counts = [state["step"] for state in self._states]
            if self._in_graph:
                torch._foreach_add_(counts, 1)
                self._steps = counts
            else:
                torch._foreach_add_(counts, torch.tensor(1.0))  # a number would be made a tensor once for each
                self._steps = [count.item() for count in counts]
        return self._steps

    def average(self, name: str, beta: float) -> list[Tensor]:
        """Exponential moving average of the gradients, kept as ``name``: ``beta * average + (1 - beta) * grad``."""
        average = self.kept(name)
        torch._foreach_lerp_(average, self.grads, 1 - beta)
        return average

    def average_square(self, name: str, beta: float) -> list[Tensor]:
        """Exponential moving average of the squared gradients, kept as ``name``."""
        average = self.kept(name)
        torch._foreach_mul_(average, beta)
        torch._foreach_addcmul_(average, self.grads, self.grads, 1 - beta)
        return average

    def missing(self, beta: float) -> list[Any]:
        """``1 - beta ** step`` of each parameter: what an average that began with zeros is to be divided by."""
        if not self._in_graph:
            return [1 - beta**step for step in self.steps]
        parts = torch._foreach_pow(beta, self.steps)
        torch._foreach_neg_(parts)
        torch._foreach_add_(parts, 1)
        return list(parts)

    def root(self, average: list[Tensor], eps: float, beta: float | None = None) -> list[Tensor]:
        """New tensors: the root of an average of squares, plus ``eps``; free of its bias if ``beta`` is given."""
        roots = torch._foreach_sqrt(average)
        if beta is not None:
            torch._foreach_div_(roots, [one**0.5 for one in self.missing(beta)])
        torch._foreach_add_(roots, eps)
        return list(roots)

    def descend(self, updates: Tensors, lr: Any, *, over: Tensors | None = None, beta: float | None = None) -> None:
        """Subtract ``lr * updates / over`` from the parameters; ``lr`` may be a list with one number for each.

        With ``beta``, ``updates`` are an average that began with zeros, and are freed of its bias.
        """
        rates: Any = [-one for one in lr] if isinstance(lr, list) else -lr
        if beta is not None:
            many = rates if isinstance(lr, list) else [rates] * len(self.params)
            rates = [one / part for one, part in zip(many, self.missing(beta), strict=True)]
        if isinstance(rates, Tensor) or (isinstance(rates, list) and isinstance(rates[0], Tensor)):
            updates, rates = torch._foreach_mul(updates, rates), 1
        if over is not None:
            torch._foreach_addcdiv_(self.params, updates, over, rates)
        elif isinstance(rates, list):
            torch._foreach_add_(self.params, torch._foreach_mul(updates, rates))
        else:
            torch._foreach_add_(self.params, updates, alpha=rates)
