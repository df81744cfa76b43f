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


@pytest.mark.capability("B-30")
def test_other_sizes_may_be_meant_and_are_told() -> None:
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer(epochs=1).fit(task, (torch.zeros(8, 1, 9), torch.zeros(8, dtype=torch.int64)))
    with pytest.warns(LoopwrightWarning, match=r"has shape \(any, 1, 12\), and the model was trained on \(any, 1, 9\)"):
        assert trainer().predict(task, torch.zeros(3, 1, 12)).shape == (3, 2)


class Fails(nn.Module):
    """Fails with what is longer than in training, in a way of its own."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(1, 2), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.size(1) > 9:
            raise self.error
        return self.layer(x.mean(1, keepdim=True))  # type: ignore[no-any-return]


def failing(error: BaseException, sizes: tuple[int, ...] = (9,)) -> lw.Supervised:
    net = Fails(error)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    trainer(epochs=1).fit(task, [(torch.zeros(2, n), torch.zeros(2, dtype=torch.int64)) for n in sizes])
    return task


def test_the_error_of_a_later_batch_of_another_size_names_it() -> None:
    error = IndexError("too long\nby far")
    with pytest.raises(DataError) as caught:
        trainer().predict(failing(error), [torch.zeros(2, 9), torch.zeros(2, 12)])
    assert str(caught.value) == (
        "predict batch has shape (any, 12), and the model was trained on (any, 9); IndexError: too long. Make this "
        "data as the training data was made, or train on data like this"
    )
    assert caught.value.__cause__ is error
    assert caught.value.__notes__[0].startswith("[loopwright] in predict, batch 2; batch: ")


def test_an_error_that_has_nothing_to_do_with_sizes_stays_what_it_is() -> None:
    """Sizes that varied in training are free; memory that runs out, and what the user interrupts, is something else."""
    with pytest.raises(IndexError, match=r"^too long\n\[loopwright\] in predict, batch 1; batch: float32\[2, 12\]$"):
        trainer().predict(failing(IndexError("too long"), (9, 8)), torch.zeros(2, 12))
    for error in (torch.OutOfMemoryError("no memory"), KeyboardInterrupt()):
        with pytest.warns(LoopwrightWarning, match="has shape"), pytest.raises(type(error)):
            trainer().predict(failing(error), torch.zeros(2, 12))


def test_data_of_another_size_to_validate_on_is_named_in_a_fit() -> None:
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    with (
        pytest.warns(LoopwrightWarning, match="has shape"),
        pytest.raises(
            DataError, match=r"^valid batch\[0\] has shape \(any, 6\), and the model was trained on \(any, 5\)"
        ),
    ):
        trainer(epochs=1).fit(task, (X, Y), (torch.zeros(4, 6), Y[:4]))


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
