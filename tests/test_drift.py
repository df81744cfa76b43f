"""Data that is not what a model was trained on is named: when a run goes on, and when it predicts."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.errors import DataError, LoopwrightWarning
from tiny import acts, classifier, samples, trainer

X, Y = samples(20)
FORMS = {
    "tensors": lambda x, y: (x, y),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "dict": lambda x, y: {"x": x, "y": y},
    "loader": lambda x, y: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4),
    "list": lambda x, y: list(zip(x.split(4), y.split(4), strict=True)),
    "generator": lambda x, y: lambda: zip(x.split(4), y.split(4), strict=True),
}


def fitted(form: str, **settings: Any) -> lw.Supervised:
    net = classifier()
    keys = {"inputs": "x", "targets": "y"} if form == "dict" else {}
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), **keys)
    trainer(epochs=2, **settings).fit(task, FORMS[form](X, Y))
    return task


@pytest.mark.parametrize("form", FORMS)
def test_what_the_model_was_trained_on_can_be_predicted_and_tested(form: str) -> None:
    task = fitted(form)
    assert trainer().predict(task, FORMS[form](X, Y)).shape == (20, 3)
    assert "test/loss" in trainer().test(task, FORMS[form](X[:7], Y[:7]))


@pytest.mark.parametrize("form", FORMS)
def test_another_dtype_is_named_before_anything_is_predicted(form: str) -> None:
    task = fitted(form)
    with pytest.raises(
        DataError, match=r"predict batch\S* has dtype torch.float64, and the model was trained on torch.flo"
    ):
        trainer().predict(task, FORMS[form](X.double(), Y))


def test_inputs_alone_are_compared_with_those_of_training() -> None:
    task = fitted("tensors")
    assert trainer().predict(task, X).shape == (20, 3)
    with pytest.raises(DataError, match=r"has dtype torch.float64"):
        trainer().predict(task, np.zeros((4, 5)))
    with pytest.raises(
        DataError, match=r"predict batch has shape \(any, 1, 5\), and the model was trained on \(any, 5\)"
    ):
        trainer().predict(task, X[:, None])


def test_other_sizes_may_be_meant_and_are_told() -> None:
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer(epochs=1).fit(task, (torch.zeros(8, 1, 9), torch.zeros(8, dtype=torch.int64)))
    with pytest.warns(LoopwrightWarning, match=r"has shape \(any, 1, 12\), and the model was trained on \(any, 1, 9\)"):
        assert trainer().predict(task, torch.zeros(3, 1, 12)).shape == (3, 2)


def test_sizes_that_varied_in_training_are_free() -> None:
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    data = [(torch.zeros(2, 1, n), torch.zeros(2, dtype=torch.int64)) for n in (9, 7, 8)]
    trainer(epochs=1).fit(task, data)
    assert trainer().predict(task, torch.zeros(3, 1, 12)).shape == (3, 2)


def test_a_resumed_run_still_knows_what_it_was_trained_on() -> None:
    def task() -> lw.Supervised:
        net = classifier()
        return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))

    user = lw.Trainer(epochs=1, progress=False, name="drift")
    user.fit(task(), (X, Y))
    again = task()
    user.fit(again, (X, Y), resume="auto")
    with pytest.raises(DataError, match=r"has dtype torch.float64"):
        user.predict(again, X.double())


@pytest.mark.nightly
def test_looking_at_batches_holds_none_of_them() -> None:
    held: list[int] = []

    class Batch(torch.Tensor):
        pass

    def batches() -> Any:
        for _ in range(12):
            yield (torch.ones(2, 5).as_subclass(Batch), torch.zeros(2, dtype=torch.int64))
            gc.collect()
            held.append(sum(type(o) is Batch for o in gc.get_objects()))

    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer(epochs=1, callbacks=[acts()]).fit(task, batches)
    assert max(held[:8]) <= max(held[8:])  # while they are looked at, no more than later
