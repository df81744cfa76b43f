"""What a prediction returns: the outputs of all batches, joined, and what to write where a task says none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loopwright.errors import LoopwrightError, StepOutputError
from loopwright.events import describe
from loopwright.task import Task

__all__ = ["asking_for_predict_step", "joined"]


def joined(outputs: list[Any], path: str = "") -> Any:
    """Predictions of many batches as one nested value, joined along dimension 0.

    Raises StepOutputError, with the number of the batch, where one has other parts or sizes than the first.

    >>> joined([{"y": torch.zeros(2, 1)}, {"y": torch.zeros(1, 1)}])["y"].shape
    torch.Size([3, 1])
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        _check_alike(outputs, lambda one: tuple(one.shape[1:]) if isinstance(one, Tensor) else None, path)
        return torch.cat([o if o.dim() else o.reshape(1) for o in outputs])
    if isinstance(first, Mapping):
        _check_alike(outputs, lambda one: set(one) if isinstance(one, Mapping) else None, path)
        return {key: joined([o[key] for o in outputs], f"{path}[{key!r}]") for key in first}
    if isinstance(first, (list, tuple)):
        _check_alike(outputs, lambda one: len(one) if isinstance(one, (list, tuple)) else None, path)
        parts = [joined([o[i] for o in outputs], f"{path}[{i}]") for i in range(len(first))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return outputs


def _check_alike(outputs: list[Any], form: Callable[[Any], Any], path: str) -> None:
    wanted = form(outputs[0])
    for number, one in enumerate(outputs, 1):
        if form(one) != wanted:
            raise StepOutputError(
                f"predict_step returned {describe(one)}{path and f' as {path}'} for batch {number}, and "
                f"{describe(outputs[0])} for batch 1: they cannot be joined along dimension 0. Write "
                "predict_step(self, batch) so that it returns the same parts for every batch, padded to one size; "
                "NumPy arrays, preds.numpy(force=True), come as a list with one for each batch"
            )


@contextmanager
def asking_for_predict_step(task: Any) -> Iterator[None]:
    """Where the default ``predict_step`` cannot take a batch, note on the error how to write one."""
    try:
        yield
    except (TypeError, NotImplementedError, AttributeError) as error:
        own = type(task).predict_step
        if own is Task.predict_step and not isinstance(error, LoopwrightError):
            kind, lacks = type(task).__name__, type(task).forward is nn.Module.forward
            error.add_note(
                f"[loopwright] {kind}.predict_step is the default one, which calls forward(batch)"
                f"{f', and {kind} has no forward' if lacks else ''}. Write your own, and return what is to be kept: "
                "def predict_step(self, batch): x, y = batch; return self.net(x)"
            )
        raise
