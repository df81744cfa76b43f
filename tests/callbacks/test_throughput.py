"""Samples, tokens and operations a second: of training steps only, and without a trace in the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopwright as lw
from loopwright.callbacks import throughput
from tiny import acts, bits, classifier, line, loader, pairs, same, seed_all, sgd_task, trainer


class Clock:
    """Stands in for the time module: goes on when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(throughput, "time", made)
    return made


def taking(clock: Clock, net: nn.Module, *, step: float, look: float) -> Any:
    def loss(preds: Tensor, target: Tensor) -> Tensor:
        clock.now += step if net.training else look
        return preds.mean()

    return sgd_task(net, loss=loss)


@pytest.mark.parametrize("saver", [False, lw.Checkpoint("1 step")], ids=["", "saving"])
def test_the_time_is_that_of_training_steps_alone(clock: Clock, folder: Any, saver: Any) -> None:
    """Batches of 2, 2 and 4 samples at 0.5 s a step; all else takes minutes."""

    def wait(*args: Any) -> None:
        clock.now += 60.0

    others = acts(on_checkpoint=wait, on_epoch_end=wait, on_stage_start=wait, on_validation_start=wait)
    user = trainer(
        epochs=2, folder=folder, validate_every="1 step", checkpoint=saver,
        callbacks=[others, lw.Throughput("1 step")],
    )  # fmt: skip
    task = taking(clock, line(), step=0.5, look=30.0)
    run = user.fit(task, pairs([1, 1], [1, 1], [1, 1, 1, 1]), pairs([1]))
    assert run.history["train/samples_per_second"] == [(4 + 4 + 8) / 3] * 2


def test_a_record_has_the_rate_of_the_steps_since_the_one_before(clock: Clock) -> None:
    user = trainer(epochs=1, callbacks=[lw.Throughput("2 steps", tokens=lambda batch: 10 * len(batch[0]))])
    run = user.fit(taking(clock, line(), step=0.5, look=0), pairs([1], [1, 1, 1], [1], [1]))
    assert run.history["train/samples_per_second"] == [(4 / 1.0 + 2 / 1.0) / 2]
    assert run.history["train/tokens_per_second"] == [30.0]


def test_weights_of_the_run_are_called_so(clock: Clock) -> None:
    user = trainer(epochs=1, callbacks=[lw.Throughput("1 step")])
    run = user.fit(taking(clock, line(), step=0.5, look=0), pairs([1]), weight=lambda batch: 7)
    assert run.history["train/weight_per_second"] == [14.0]


def test_operations_are_those_of_the_first_step_forward_and_backward(clock: Clock) -> None:
    """A 5 x 3 layer on 4 samples: 2 * 4 * 5 * 3 operations forward, as many for the gradient of the weight."""
    net = nn.Linear(5, 3)
    batch = (torch.randn(4, 5), torch.randn(4, 3))
    user = trainer(epochs=1, accumulate=2, callbacks=[lw.Throughput("1 step", flops=True)])
    run = user.fit(taking(clock, net, step=0.25, look=0), [batch] * 6)
    assert run.history["train/flops_per_second"] == [2 * (2 * 4 * 5 * 3) / 0.25]
    assert len(run.history.losses["loss"]) == 3


class Recurrent(nn.Module):
    """An LSTM, attention over its steps by torch's kernel, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(x)[0].unsqueeze(1)
        return self.last(nn.functional.scaled_dot_product_attention(x, x, x)[:, 0, -1])


def test_operations_of_recurrent_layers_and_of_attention_are_counted_forward_and_backward(clock: Clock) -> None:
    lstm, attends, last = 2 * 4 * 5 * 4 * 16 * (8 + 16), 2 * 2 * 4 * 5 * 5 * 16, 2 * 4 * 16 * 3
    batch = (torch.randn(4, 5, 8), torch.randn(4, 3))
    user = trainer(epochs=1, callbacks=[lw.Throughput("1 step", flops=True)])
    run = user.fit(taking(clock, Recurrent(), step=0.25, look=0), [batch] * 3)
    backward = 2 * lstm + 2.5 * attends + 2 * last  # the attention makes its scores anew
    assert run.history["train/flops_per_second"] == [(lstm + attends + last + backward) / 0.25]


def test_operations_that_cannot_be_counted_are_told(clock: Clock) -> None:
    net = nn.Sequential(nn.Linear(5, 3), acts_as(nn.Bilinear(3, 3, 3)))
    user = trainer(epochs=1, callbacks=[lw.Throughput("1 step", flops=True)])
    with pytest.warns(lw.LoopwrightWarning, match=r"leaves out what it cannot count: aten\._trilinear$"):
        user.fit(taking(clock, net, step=0.25, look=0), [(torch.randn(4, 5), torch.randn(4, 3))] * 3)


def acts_as(bilinear: nn.Bilinear) -> nn.Module:
    """A module of one input that goes into both."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bilinear = bilinear

        def forward(self, x: Tensor) -> Tensor:
            return self.bilinear(x, x)

    return Both()


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(8)
        self.attends, self.drop = nn.MultiheadAttention(8, 2, batch_first=True), nn.Dropout(0.2)
        self.convolves, self.last = nn.Conv1d(1, 2, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x))).unsqueeze(1)
        x = x + self.drop(self.attends(x, x, x)[0])
        return self.last(self.convolves(x).flatten(1))


def test_counting_operations_changes_no_bit() -> None:
    def trained(*callbacks: lw.Callback) -> list[Any]:
        seed_all()
        net = Attends()
        adam = torch.optim.AdamW(net.parameters(), lr=0.01)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), adam)
        trainer(epochs=2, callbacks=callbacks).fit(task, loader(batch_size=8, shuffle=True), loader(9, batch_size=4))
        return bits(net, adam)

    assert same(trained(), trained(lw.Throughput(1, flops=True, tokens=lambda batch: 1.0)))


@pytest.mark.parametrize("hook", ["map_loss", "on_grads_ready"])
def test_a_step_that_fails_or_is_dropped_leaves_no_counter_behind(hook: str) -> None:
    def end(error: type[Exception]) -> lw.Callback:
        def act(run: lw.Run, *args: Any) -> Any:
            if run.progress.batch == 0:
                raise error
            return args[0]

        def ready(run: lw.Run, *args: Any) -> None:
            act(run, *args)

        return acts(**{hook: act if hook == "map_loss" else ready})

    count = lw.Throughput(1, flops=True)
    with pytest.raises(ZeroDivisionError):
        trainer(epochs=1, callbacks=[count, end(ZeroDivisionError)]).fit(sgd_task(line()), pairs([1], [2]))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    run = trainer(epochs=1, callbacks=[count, end(lw.SkipStep)]).fit(sgd_task(line()), pairs([1], [2], [3]))
    assert run.progress.step == 2
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert "train/flops_per_second" in run.metrics


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(lw.SettingError, match=r"flops=True\) cannot count the operations under compile=True"):
        trainer(epochs=1, compile={"backend": "eager"}, callbacks=[lw.Throughput(1, flops=True)]).fit(
            sgd_task(classifier(), loss=nn.CrossEntropyLoss()), loader(batch_size=8)
        )
    with pytest.raises(lw.SettingError, match=r"Throughput\(tokens=5\) cannot be called"):
        lw.Throughput(tokens=5)  # type: ignore[arg-type]


def test_of_a_later_stage_it_logs_when_its_interval_is_due_there() -> None:
    """Five steps an epoch: nothing is due at step 6."""
    speed, logged = lw.Throughput("4 steps"), list[int]()

    class Log:
        def log(self, progress: Any, values: Any, kind: str) -> None:
            logged.extend([progress.step] * ("train/samples_per_second" in values))

    stages = [lw.Stage("a", "1 epoch"), lw.Stage("b", "2 epochs", callbacks=[speed])]
    user = trainer(log_every="1 step", loggers=[Log()])
    user.fit(sgd_task(line(), lr=0.1), pairs(*([float(i)] for i in range(5))), stages=stages)
    assert logged == [9, 10, 13, 15]  # after the steps 8 and 12, and in the records of both epochs
