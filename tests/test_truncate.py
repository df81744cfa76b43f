"""Truncated back-propagation through time by one argument: the bits of the loop by hand, wherever it is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from every_step import Experiment, resumed_at_every_step
from loopwright.data import chunked
from tiny import bits, line, pairs, same, seed_all, trainer


class Reader(nn.Module):
    """A recurrent net with a prediction for each step; called as torch's own are."""

    def __init__(self, cell: type[nn.RNNBase], *, dropout: float = 0.0) -> None:
        super().__init__()
        self.cell, self.drop, self.out = cell(2, 4, batch_first=True), nn.Dropout(dropout), nn.Linear(4, 2)

    def forward(self, x: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
        states, carry = self.cell(x, carry)
        return self.out(self.drop(states)), carry


def sequences(steps: int, *, n: int = 7) -> lw.Loader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, steps, 2, generator=generator)
    return lw.Loader((x, x.cumsum(1)), 3, shuffle=True, seed=4)


def reading(cell: type[nn.RNNBase], k: int | None, **settings: Any) -> lw.Supervised:
    seed_all(2)
    net = Reader(cell, **settings)
    return lw.Supervised(net, nn.MSELoss(), torch.optim.Adam(net.parameters(), 0.01), truncate=k)


def by_hand(cell: type[nn.RNNBase], k: int, data: Any, epochs: int) -> list[Any]:
    seed_all(2)
    net = Reader(cell)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for epoch in range(epochs):
        for x, y in data.at(epoch, 0):
            carry = None
            for start in range(0, x.size(1), k):
                optimizer.zero_grad()
                preds, carry = net(x[:, start : start + k], carry)
                nn.functional.mse_loss(preds, y[:, start : start + k]).backward()
                optimizer.step()
                carry = tuple(h.detach() for h in carry) if isinstance(carry, tuple) else carry.detach()
    return bits(net, optimizer)


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize(("steps", "k"), [(100, 10), (23, 10), (5, 8)])
def test_truncation_has_the_bits_of_the_loop_by_hand(cell: type[nn.RNNBase], steps: int, k: int) -> None:
    """100 steps in pieces of 10, a length that 10 does not divide, one that is shorter; one tensor or (h, c)."""
    expected = by_hand(cell, k, sequences(steps), 2)
    task = reading(cell, k)
    run = trainer(epochs=2).fit(task, sequences(steps))
    assert same(bits(task.module, run.optimizers["main"]), expected)
    assert isinstance(run.stages[0].source, lw.data.Chunks)
    assert run.progress.step == 2 * 3 * -(-steps // k)
    assert run.progress.epoch == 2


@pytest.mark.capability("PL-09")
def test_truncated_back_propagation_is_one_argument() -> None:
    """An RNN over 100 steps with k = 10 ends with the bits of a hand loop; so it does with clipping and under bf16."""
    expected = by_hand(nn.RNN, 10, sequences(100), 1)
    task = reading(nn.RNN, 10)
    run = trainer(epochs=1).fit(task, sequences(100))
    assert same(bits(task.module, run.optimizers["main"]), expected)
    whole = reading(nn.RNN, 100)
    trainer(epochs=1).fit(whole, sequences(100))
    assert not same(bits(whole.module), bits(task.module))


@pytest.mark.capability("PL-09")
@pytest.mark.parametrize("settings", [{"clip_norm": 0.1}, {"precision": "bf16"}])
def test_clipping_and_precision_apply_to_each_piece(settings: dict[str, Any]) -> None:
    """Clipping and 16 bits are an argument each, and have the bits of the loop by hand."""
    seed_all(2)
    net = Reader(nn.LSTM)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for x, y in sequences(23).at(0, 0):
        carry = None
        for start in range(0, 23, 10):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled="precision" in settings):
                preds, carry = net(x[:, start : start + 10], carry)
                loss = nn.functional.mse_loss(preds, y[:, start : start + 10])
            loss.backward()
            if "clip_norm" in settings:
                nn.utils.clip_grad_norm_(net.parameters(), settings["clip_norm"])
            optimizer.step()
            carry = tuple(h.detach() for h in carry)
    task = reading(nn.LSTM, 10)
    trainer(epochs=1, **settings).fit(task, sequences(23))
    assert same(bits(task.module, task.optimizer), bits(net, optimizer))


def test_a_resume_inside_of_a_sequence_is_exact(tmp_path: Path) -> None:
    """The rest of the open batch and the carried (h, c) are in each checkpoint: every step is a place to go on from."""

    def make() -> Experiment:
        task = reading(nn.LSTM, 4, dropout=0.2)
        seed_all(torch.initial_seed() + 1)
        return Experiment(task, sequences(11, n=5), sequences(11), settings={"epochs": 2, "validate_every": 5})

    assert resumed_at_every_step(make, tmp_path).progress.step == 2 * 2 * 3


def test_a_users_own_loader_goes_on_inside_of_a_sequence_too(tmp_path: Path) -> None:
    def make() -> Experiment:
        task = reading(nn.GRU, 4)
        data = sequences(9, n=5).data
        return Experiment(task, loader_of(data), settings={"epochs": 2})

    resumed_at_every_step(make, tmp_path)


def loader_of(data: Any) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 2, shuffle=True)


def test_fit_again_goes_on_inside_of_a_sequence() -> None:
    whole = reading(nn.LSTM, 4)
    trainer(epochs=1).fit(whole, sequences(11))
    task = reading(nn.LSTM, 4)
    for steps in (2, 5, 9):
        trainer(steps=steps).fit(task, sequences(11) if steps == 2 else task._run.data)
    assert same(bits(task.module, task.optimizer), bits(whole.module, whole.optimizer))


def test_validation_and_prediction_see_whole_sequences_and_carry_nothing() -> None:
    lengths: list[int] = []

    class Noting(Reader):
        def forward(self, x: Tensor, carry: Any = None) -> tuple[Tensor, Any]:
            if not self.training:
                assert carry is None
                lengths.append(x.size(1))
            return super().forward(x, carry)

    def fitted(valid: Any) -> list[Any]:
        seed_all(2)
        net = Noting(nn.RNN)
        task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1), truncate=4)
        user = trainer(epochs=1, **({"validate_every": 1} if valid is not None else {}))
        user.fit(task, sequences(10), valid)
        assert user.predict(task, sequences(10).data[0]).shape == (7, 10, 2)
        return bits(net)

    assert same(fitted(sequences(10)), fitted(None))
    assert set(lengths) == {10}


class Own(lw.Task):
    """A task of one's own, time first, with two phases that carry something each."""

    truncate = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.RNN(1, 2), nn.RNN(1, 2)
        self.seen: list[Any] = []

    def chunks(self, batch: Tensor) -> Any:
        return batch.split(3)

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase(name, getattr(self, f"step_{name}"), optimizers=name) for name in "ab"]

    def step_a(self, batch: Tensor, carry: Any = None) -> dict[str, Any]:
        self.seen.append((len(batch), carry is None))
        out, h = self.a(batch, None if carry is None else carry["h"])
        return {"loss": out.mean(), "carry": {"h": h, "n": 1 if carry is None else carry["n"] + 1}}

    def step_b(self, batch: Tensor, carry: Any = None) -> dict[str, Any]:
        out, h = self.b(batch, carry)
        return {"loss": out.square().mean(), "carry": h}

    def configure_optimizers(self) -> Any:
        return {name: torch.optim.SGD(getattr(self, name).parameters(), 0.1) for name in "ab"}


def test_a_task_of_ones_own_says_how_its_data_is_cut_and_each_phase_carries_its_own() -> None:
    task = Own()
    trainer(epochs=1).fit(task, [torch.ones(7, 2, 1), torch.ones(3, 2, 1)])
    assert task.seen == [(3, True), (3, False), (1, False), (3, True)]


def test_an_error_inside_of_a_sequence_leaves_nothing_of_it_to_the_next_fit() -> None:
    task, fails = Own(), [True]
    user = trainer(epochs=2)

    @user.on(lw.Event.GRADS_READY)
    def fail(run: lw.Run) -> None:
        if run.progress.step == 1 and fails:
            fails.clear()
            raise OverflowError

    data = [torch.ones(7, 2, 1)]
    with pytest.raises(OverflowError):
        user.fit(task, data)
    with pytest.warns(UserWarning, match="ended inside a step"):
        user.fit(task, data)
    assert task.seen == [(3, True), (3, False), (3, True), (3, False), (1, False)]


def test_a_capsule_says_that_what_was_carried_is_not_in_it(folder: Path) -> None:
    user = lw.Trainer(epochs=1, folder=folder, progress=False)
    user.on(lw.Event.GRADS_READY(once=2))(lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        user.fit(reading(nn.RNN, 4), sequences(10))
    (path,) = folder.rglob("capsules/*")
    assert any("begins with None" in limit for limit in lw.replay(path, reading(nn.RNN, 4)).limits)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"accumulate": 2}, "accumulate=2 cannot apply with truncate=4"),
        ({"compile": True}, "compile=True cannot apply"),
    ],
)
def test_what_cannot_be_together_is_refused_at_the_start(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(lw.PlanError, match=says):
        trainer(epochs=1, **settings).fit(reading(nn.RNN, 4), sequences(10))


def test_closures_are_refused_with_truncation() -> None:
    net = Reader(nn.RNN)
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.LBFGS(net.parameters()), truncate=4)
    with pytest.raises(lw.PlanError, match="an optimizer that calls the step back cannot apply with truncate=4"):
        trainer(epochs=1).fit(task, sequences(10))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: fit_without_carry(0), lw.SettingError, "Supervised.truncate is 0; it cuts sequences into pieces"),
        (lambda: fit_without_carry(True), lw.SettingError, "Supervised.truncate is True"),
        (lambda: fit_without_carry(), lw.StepOutputError, "returned float32\\[1, 1\\]"),
        (lambda: list(chunked([torch.ones(3)], 2)), lw.DataError, "no tensor with two dimensions"),
    ],
)
def test_what_has_no_time_or_no_carry_is_told(make: Callable[[], Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def fit_without_carry(truncate: int = 1) -> None:
    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = line()

        def forward(self, x: Tensor, carry: Any = None) -> Tensor:
            return self.net(x)

    net = Forgets()
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), 1.0), truncate=truncate)
    trainer(epochs=1).fit(task, pairs([1.0]))


def uneven(loss: Callable[..., Tensor], target: Tensor) -> Any:
    net = Reader(nn.RNN)
    task = lw.Supervised(net, loss, torch.optim.SGD(net.parameters(), 0.1), truncate=10)
    return trainer(epochs=1).fit(task, [(torch.randn(3, 105, 2), target)])


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (lambda preds, y: (preds - y).square().mean(), torch.zeros(3, 95, 2)),
        (lambda preds, y: nn.functional.cross_entropy(preds.transpose(1, 2), y), torch.zeros(3, 95).long()),
        (lambda preds, y: nn.functional.cross_entropy(preds.flatten(0, 1), y.flatten()), torch.zeros(3, 95).long()),
    ],
)
def test_sequences_of_two_lengths_in_a_batch_are_told_with_both(loss: Any, target: Tensor) -> None:
    with pytest.raises(lw.DataError) as caught:
        uneven(loss, target)
    assert str(caught.value).startswith(
        "truncate= cuts what has 105 steps along dimension 1, as the first tensor of the batch has; another one has "
        "95, goes into each piece whole, and the step failed: "
    )
    assert str(caught.value).endswith(". Give both the same number of steps")


def test_what_has_another_meaning_than_steps_goes_in_whole_and_other_errors_stay() -> None:
    run = uneven(lambda preds, y: (preds.mean(1) - y[:, :2]).square().mean(), torch.zeros(3, 95))
    assert run.progress.step == 11

    def fails(preds: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("something else, 7")

    with pytest.raises(RuntimeError, match="something else, 7") as caught:
        uneven(fails, torch.zeros(3, 95))
    assert not isinstance(caught.value, lw.DataError)
