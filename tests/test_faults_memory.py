"""Memory that runs out in a step is said with what fills it and what to do; the error stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from tiny import acts, samples, trainer

DATA = [samples(8) for _ in range(3)]


class Greedy(nn.Module):
    """Asks for more than any machine has, at its second forward."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__()
        self.body, self.head, self.ask, self.calls = nn.Linear(5, 100), nn.Linear(100, 3), ask, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            self.ask()
        return self.head(self.body(x))  # type: ignore[no-any-return]


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def failed(ask: Callable[[], Any], data: Any = DATA, valid: Any = None, **settings: Any) -> BaseException:
    net = Greedy(ask)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - which one is looked at by the caller
        trainer(epochs=1, **settings).fit(task, data, valid)
    return caught.value


def memory_notes(error: BaseException) -> list[str]:
    return [note for note in error.__notes__ if "memory ran out" in note]


NOTE = """\
[loopwright] memory ran out. Held: parameters 3.61 kB, optimizer states 7.24 kB; most of it by body 7.21 kB, head \
3.64 kB; batch: (float32[8, 5], int64[8])
Make it smaller, in this order: half the batch_size with Trainer(accumulate=2), which trains by the same gradients \
(batch norm sees the smaller batches); Trainer(precision="bf16"), which halves what forwards keep and changes \
bits; lw.checkpoint_activations(model, "blocks.*") on the largest blocks, which computes them twice"""


def test_a_real_allocation_that_fails_keeps_its_error_and_says_what_to_do() -> None:
    error = failed(lambda: torch.empty(2**60))
    assert type(error) is RuntimeError
    assert "DefaultCPUAllocator" in str(error)
    assert memory_notes(error) == [NOTE]


def test_the_error_of_an_accelerator_is_known_as_well() -> None:
    error = failed(out_of_memory, accumulate=2)
    assert type(error) is torch.OutOfMemoryError
    (note,) = memory_notes(error)
    assert "Trainer(accumulate=4)" in note
    assert "gradients 3.61 kB" in note


def test_numpy_running_out_is_known_as_well() -> None:
    numpy = pytest.importorskip("numpy")
    assert memory_notes(failed(lambda: numpy.empty(2**50))) == [NOTE]


def test_memory_that_runs_out_in_an_optimizer_or_a_validation_is_explained_once() -> None:
    class Large(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise torch.OutOfMemoryError("no more")

    net = nn.Linear(5, 3)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer(epochs=1).fit(lw.Supervised(net, nn.CrossEntropyLoss(), Large(net.parameters(), 0.1)), DATA)
    assert len(memory_notes(caught.value)) == 1
    assert len(memory_notes(failed(out_of_memory, DATA[:1], DATA))) == 1


@pytest.mark.parametrize("hook", ["map_output", "on_grads_ready"])
def test_memory_that_runs_out_in_a_hook_is_explained_once(hook: str) -> None:
    error = failed(lambda: None, callbacks=[acts(**{hook: lambda run, *args: torch.empty(2**60)})])
    assert len(memory_notes(error)) == 1


def test_other_errors_gain_no_such_note() -> None:
    error = failed(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))
    assert not memory_notes(error)
