"""Epochs in which nothing is trained, steps that move their optimizers themselves, metrics that nothing feeds."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.errors import DataError, LoopwrightWarning, NonFiniteError
from tiny import acts, classifier, samples, trainer

X, Y = samples(24)
DATA = lw.Loader((X, Y), 8)


def task_of(**more: Any) -> lw.Supervised:
    net = classifier()
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), **more)


def skip(error: type[Exception]) -> Any:
    def raised(*_: Any) -> None:
        raise error

    return raised


LEFT_OUT: dict[str, dict[str, Any]] = {
    "SkipBatch": {"callbacks": [acts(on_batch_start=lambda run, batch: skip(lw.SkipBatch)())]},
    "SkipStep": {"callbacks": [acts(on_step_start=lambda run: skip(lw.SkipStep)())]},
    "StopEpoch": {"callbacks": [acts(on_step_start=lambda run: skip(lw.StopEpoch)())]},
    "weight": {"weight": lambda batch: 0},
}


@pytest.mark.parametrize("ends", [{"steps": 3}, {"epochs": 50}, {"time": "1 h"}])
@pytest.mark.parametrize("by", LEFT_OUT)
def test_a_run_in_which_nothing_is_ever_stepped_ends_with_the_reason(by: str, ends: dict[str, Any]) -> None:
    given = dict(LEFT_OUT[by])
    fitted = {"weight": given.pop("weight")} if "weight" in given else {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(DataError) as caught:
            trainer(**ends, **given).fit(task_of(), DATA, **fitted)
    said = [str(one.message) for one in told if "without an optimizer step" in str(one.message)]
    assert len(said) == (by != "StopEpoch")
    begins = "epoch 1 went by without an optimizer step in stage 'main': every batch was left out by "
    assert all(one.startswith(begins) for one in said)
    assert str(caught.value).startswith("10 epochs in a row went by without an optimizer step")


def test_an_epoch_in_between_that_is_left_out_is_told_and_begins_to_count_anew() -> None:
    def some(run: lw.Run, batch: Any) -> None:
        if run.progress.epoch % 6:
            raise lw.SkipBatch

    with pytest.warns(LoopwrightWarning, match="epoch . went by without") as told:
        run = trainer(epochs=13, callbacks=[acts(on_batch_start=some)]).fit(task_of(), DATA)
    assert len(told) == 2
    assert run.progress.step == 9  # of epochs 1, 7 and 13


# ------------------------------------------------------------------------------------- steps that do all the work


@pytest.mark.parametrize("loss", [math.nan, torch.tensor(math.inf), {"loss": torch.tensor(math.nan), "other": 1.0}])
def test_a_loss_that_is_not_finite_ends_a_run_of_a_function_too(loss: Any) -> None:
    for given in ({}, {"nonfinite": "raise"}):
        with pytest.raises(NonFiniteError, match=r"loss of (nan|inf) at step 1\. Its step moves its optimizers itself"):
            trainer(epochs=1, **given).run(lambda run, batch: loss, DATA, state={})
    assert trainer(epochs=1, nonfinite=None).run(lambda run, batch: loss, DATA, state={}).progress.step == 3


class Doubles(lw.Callback):
    def map_loss(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: Any) -> Any:
        return 2 * loss


def test_a_callback_that_changes_a_loss_that_nobody_asks_it_for_is_told() -> None:
    says = r"Doubles\.map_loss is never called, since no phase moves an optimizer by itself; do it in the step"
    with pytest.warns(LoopwrightWarning, match=says):
        trainer(epochs=1, callbacks=[Doubles()]).run(lambda run, batch: 1.0, DATA, state={})


def test_a_handler_that_a_function_never_calls_is_told() -> None:
    watching = trainer(epochs=1)
    watching.on(lw.Event.BACKWARD_END)(lambda run: None)
    with pytest.warns(LoopwrightWarning, match="is never called: no phase moves an optimizer by itself"):
        watching.run(lambda run, batch: 1.0, DATA, state={})


# ----------------------------------------------------------------------------------------- metrics without inputs


class OnlyLoss(lw.Task):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def training_step(self, batch: Any) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def configure_metrics(self) -> Any:
        return {"accuracy": lw.metrics.Accuracy(), "mean": lw.metrics.On(lw.metrics.Mean(), "loss")}


def test_a_metric_that_no_step_feeds_is_told_after_the_first_epoch() -> None:
    with pytest.warns(LoopwrightWarning) as told:
        run = trainer(epochs=3).fit(OnlyLoss(), DATA)
    (one,) = [str(warned.message) for warned in told]
    assert one == (
        "metric 'accuracy' measures nothing: it reads 'preds' and 'target', which no step of phase 'main' returned, "
        "and there is no validation data. Return it with the loss, or pass fit(..., valid=loader)"
    )
    assert "train/mean" in run.metrics


class SecondPhase(OnlyLoss):
    """The first phase returns what the metric reads, the second a loss alone."""

    fed = True

    def phases(self) -> list[lw.Phase]:
        return [lw.Phase("cls", self.classify), lw.Phase("rec", self.training_step)]

    def classify(self, batch: Any) -> Any:
        preds = self.net(batch[0])
        loss = nn.functional.cross_entropy(preds, batch[1])
        return {"loss": loss, "preds": preds, "target": batch[1]} if self.fed else loss


def test_a_metric_that_one_of_several_phases_feeds_is_not_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = trainer(epochs=2).fit(SecondPhase(), DATA)
    assert "train/cls/accuracy" in run.metrics
    task = SecondPhase()
    task.fed = False
    with pytest.warns(LoopwrightWarning, match="no step of phase 'cls' or 'rec' returned") as told:
        trainer(epochs=2).fit(task, DATA)
    assert len(told) == 1


def test_a_history_says_which_names_it_has() -> None:
    run = trainer(epochs=2).fit(task_of(), DATA)
    assert "train/loss" in run.history
    assert run.history[0] in run.history
    assert "valid/loss" not in run.history
