from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.callbacks import EarlyStopping
from loopwright.errors import MetricError, SettingError


class Given(nn.Module):
    """Its validation loss in epoch n is the n-th of a list."""

    def __init__(self, losses):
        super().__init__()
        self.losses, self.asked = iter(losses), 0
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.w * x

    def loss(self, output, target):
        return output.sum() * 0 + (0.5 if self.training else next(self.losses))


def fit(losses, stop, **settings):
    net = Given(losses)
    task = lw.Supervised(net, net.loss, torch.optim.SGD(net.parameters(), lr=0.1))
    batch = (torch.ones(2, 1), torch.ones(2, 1))
    given = {"epochs": len(losses), "folder": None, "progress": False, "callbacks": [stop]} | settings
    return lw.Trainer(**given).fit(task, [batch, batch], [batch])


@pytest.mark.capability("IG-10")
def test_it_stops_after_patience_validations_and_a_nan_in_training_stops_at_once():
    """EarlyStopping by validation score ends training and says why; a loss that is NaN ends it by itself."""
    run = fit([1.0, 0.5, 0.6, 0.7, 0.4], EarlyStopping(patience=2))
    assert run.progress.epoch == 4
    assert run.stop_reason == ("valid/loss has not improved in 2 validations: best 0.5 at step 4, last 0.7 at step 8")
    net = nn.Linear(1, 1)
    task = lw.Supervised(net, lambda output, target: output.sum() * math.nan, torch.optim.SGD(net.parameters(), lr=0.1))
    before = net.weight.clone()
    with pytest.raises(lw.NonFiniteError):
        lw.Trainer(epochs=1, folder=None, progress=False).fit(task, [(torch.ones(2, 1), torch.ones(2, 1))])
    assert torch.equal(net.weight, before)


def test_an_improvement_begins_a_new_count():
    run = fit([1.0, 1.1, 0.9, 1.0, 0.8, 0.9], EarlyStopping(patience=2))
    assert (run.progress.epoch, run.stop_reason) == (6, None)


def test_mode_max_turns_the_comparison_around():
    run = fit([0.1, 0.2, 0.3, 0.25, 0.2], EarlyStopping(patience=2, mode="max"))
    assert run.progress.epoch == 5
    assert run.stop_reason.endswith("best 0.3 at step 6, last 0.2 at step 10")


def test_a_gain_of_min_delta_or_less_is_none():
    stop = EarlyStopping(patience=1, min_delta=0.25)
    run = fit([1.0, 0.75, 0.5], stop)
    assert run.progress.epoch == 2
    assert run.stop_reason.startswith("valid/loss has not improved by more than 0.25 in 1 validation: best 1 at")


def test_nan_is_never_an_improvement():
    run = fit([math.nan] * 4, EarlyStopping(patience=3), nonfinite=None)
    assert run.progress.epoch == 3
    assert run.stop_reason == "valid/loss was NaN in all of 3 validations"


def test_the_first_looks_are_left_out():
    stop = EarlyStopping(patience=1, start_from=2)
    run = fit([0.1, 0.2, 0.9, 0.8, 0.85, 0.1], stop)  # 0.1 in the first epoch would have stopped it at once
    assert run.progress.epoch == 5


def test_a_value_of_the_training_is_looked_at_each_epoch():
    run = fit([1.0] * 9, EarlyStopping("train/loss", patience=2))
    assert run.progress.epoch == 3
    assert run.stop_reason.startswith("train/loss has not improved in 2 epochs")


def test_a_name_that_no_validation_has_is_an_error():
    stop = EarlyStopping("valid/accuracy")
    with pytest.raises((MetricError, SettingError), match="valid/accuracy"):
        fit([1.0], stop)
    run = fit([1.0], EarlyStopping())
    with pytest.raises(MetricError) as error:
        stop.on_validation_end(run, {"valid/loss": 1.0, "valid/accuracies": 0.5})
    assert str(error.value) == (
        "EarlyStopping watches 'valid/accuracy'. Known: 'valid/accuracies', 'valid/loss'. "
        "Did you mean 'valid/accuracies'?"
    )


def test_the_count_goes_on_where_state_dict_left_it():
    first = EarlyStopping(patience=3)
    run = fit([0.5, 0.6, 0.7], first)
    second = EarlyStopping(patience=3)
    second.load_state_dict(first.state_dict())
    run.stop_reason = None
    second.on_fit_start(run)  # in the middle of a run: nothing is forgotten
    second.on_validation_end(run, {"valid/loss": 0.8})
    assert run.stop_reason.startswith("valid/loss has not improved in 3 validations: best 0.5 at step 2")


def test_another_run_begins_with_a_new_count():
    stop = EarlyStopping(patience=2)
    fit([0.1, 0.2], stop)
    assert fit([0.5, 0.6], stop).stop_reason is None
    assert stop.best == 0.5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"patience": 0}, "patience=0: expected a whole number of validations from 1"),
        ({"patience": 1.5}, "patience=1.5: expected a whole number of validations from 1"),
        ({"start_from": -1}, "start_from=-1: expected a whole number of validations from 0"),
        ({"min_delta": -0.1}, "min_delta=-0.1: expected 0 or more; mode tells the direction"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments, text):
    with pytest.raises(SettingError) as error:
        EarlyStopping(**arguments)
    assert str(error.value) == text
