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
[loopwright] memory ran out. Held: parameters 3.61 kB, optimizer states 7.24 kB; batch: (float32[8, 5], int64[8])
Peak by module, for this batch: body 9.61 kB, head 8.06 kB (activations 3.2 kB), loss 100 bytes (activations 100 \
bytes); in all 17.8 kB (activations 3.3 kB)
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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).tanh())  # type: ignore[no-any-return]


class Deep(nn.Module):
    """Three blocks, of which the last asks for more than there is, in every forward."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__()
        self.blocks, self.head, self.ask = nn.ModuleList(Block() for _ in range(3)), nn.Linear(5, 3), ask
        self.register_buffer("mask", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        self.ask()
        return self.head(x * self.mask)  # type: ignore[no-any-return]


def deep_note(ask: Callable[[], Any], **settings: Any) -> str:
    net = Deep(ask)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(RuntimeError) as caught:
        trainer(epochs=1, **settings).fit(task, DATA)
    (note,) = memory_notes(caught.value)
    return note


def test_blocks_that_are_alike_stand_together_and_the_advice_names_them() -> None:
    note = deep_note(lambda: torch.empty(2**60))
    # a block has 225 numbers, twice with their gradients; it keeps 8 x 20 of the tanh and 8 x 5 that it was given,
    # the first one not: that is the batch
    assert note.splitlines()[:2] == [
        "[loopwright] memory ran out. Held: parameters 2.77 kB, buffers 20 bytes; batch: (float32[8, 5], int64[8])",
        "Peak by module, for this batch: blocks.1 and 1 like it, each 2.6 kB (activations 800 bytes), "
        "blocks.0 2.44 kB (activations 640 bytes), head 304 bytes (activations 160 bytes), "
        "loss 100 bytes (activations 100 bytes), model 20 bytes; in all 8.06 kB (activations 2.5 kB)",
    ]
    assert note.endswith('lw.checkpoint_activations(model, "blocks.*"), which computes twice what is kept there now, '
                         '2.24 kB')  # fmt: skip


def test_blocks_that_are_checkpointed_are_not_advised_again() -> None:
    net = Deep(lambda: torch.empty(2**60))
    with lw.checkpoint_activations(net, "blocks.*"), pytest.raises(RuntimeError) as caught:
        trainer(epochs=1).fit(lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1)), DATA)
    (note,) = memory_notes(caught.value)
    assert "blocks.1 and 1 like it, each 1.96 kB (activations 160 bytes)" in note
    assert "what is kept there now" not in note


HELD = "; most of it by blocks.0 900 bytes, blocks.1 900 bytes, blocks.2 900 bytes, head 72 bytes, model 20 bytes; "


def reads() -> None:
    if torch.ones(3).sum().item() == 3:
        raise torch.OutOfMemoryError("no more")


@torch.compiler.disable
def asks() -> None:
    torch.empty(2**60)


@pytest.mark.parametrize(("ask", "settings"), [(reads, {}), (asks, {"compile": {"backend": "eager"}})])
def test_where_activations_cannot_be_told_nothing_is_said_of_them(ask: Any, settings: dict[str, Any]) -> None:
    """A step reads a value; or it is compiled, and what is kept is the compiler's choice."""
    note = deep_note(ask, **settings)
    assert HELD in note
    assert "activations " not in note


class Two(lw.Task):
    """Two nets with an objective each; memory runs out in the second's."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 50), nn.Tanh(), nn.Linear(50, 3))
        self.said: list[Tensor] = []

    def models(self) -> dict[str, nn.Module]:
        return {"small": self.small, "large": self.large}

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase("a", self.a, optimizers="a"), lw.Phase("b", self.b, optimizers="b")]

    def configure_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"a": torch.optim.SGD(self.small.parameters(), 0.1), "b": torch.optim.SGD(self.large.parameters(), 0.1)}

    def a(self, batch: Any) -> Tensor:
        return self.small(batch[0]).exp().mean()  # type: ignore[no-any-return]

    def b(self, batch: Any) -> Tensor:
        self.said.append(self.large(batch[0]).exp().mean())
        torch.empty(2**60)
        return self.said[-1]


def test_of_several_phases_the_one_that_keeps_most_is_told_and_models_have_their_names() -> None:
    task = Two()
    with pytest.raises(RuntimeError) as caught:
        trainer(epochs=1).fit(task, DATA)
    (note,) = memory_notes(caught.value)
    assert (
        "Peak by module, for this batch: large.0 2.4 kB, large.1 1.6 kB (activations 1.6 kB), large.2 1.22 kB, "
        "small 144 bytes, outside of modules 96 bytes (activations 96 bytes); in all 5.46 kB (activations 1.7 kB)"
    ) in note
    assert len(task.said) == 1  # the step that failed
    assert type(task.said[0]) is Tensor


def test_what_is_carried_through_a_sequence_stays_what_it_was() -> None:
    class Carries(lw.Task):
        truncate = 4

        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls, self.carries = nn.GRU(5, 3, batch_first=True), 0, []

        def training_step(self, batch: Any, carry: Any = None) -> dict[str, Any]:
            self.calls += 1
            self.carries.append(carry)
            out, carry = self.net(batch[0], carry)
            if self.calls == 2:
                raise torch.OutOfMemoryError("no more")
            return {"loss": out.exp().mean(), "carry": carry}

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Sees(lw.Callback):
        def on_exception(self, run: lw.Run, error: BaseException) -> None:
            found.extend(run.stages[0].source.carried.values())

    found: list[Any] = []
    task = Carries()
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer(epochs=1, callbacks=[Sees()]).fit(task, [(torch.ones(2, 12, 5), torch.zeros(2, 12, 3))])
    (note,) = memory_notes(caught.value)
    assert "in all at least " in note
    assert task.calls == len(task.carries) == 2
    assert found[0] is task.carries[1]  # of the first piece


def test_other_errors_gain_no_such_note() -> None:
    error = failed(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))
    assert not memory_notes(error)
