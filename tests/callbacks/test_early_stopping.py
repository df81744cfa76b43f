from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.callbacks import EarlyStopping
from loopwright.errors import MetricError, SettingError
from tiny import acts


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


class Gains(lw.Supervised):
    def validation_step(self, batch):
        output = self.training_step(batch)
        return {**output, "gain": output["loss"]}


def fit(losses, stop, **settings):
    net = Given(losses)
    task = Gains(net, net.loss, torch.optim.SGD(net.parameters(), lr=0.1))
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
    run = fit([0.1, 0.2, 0.3, 0.25, 0.2], EarlyStopping("valid/gain", patience=2, mode="max"))
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


def test_a_relative_gain_is_a_share_of_the_best():
    run = fit([100.0, 92.0, 84.0, 84.0], EarlyStopping(patience=1, min_delta=0.05, relative=True))
    assert run.progress.epoch == 4
    run = fit([100.0, 96.0, 84.0, 84.0], EarlyStopping(patience=1, min_delta=0.05, relative=True))
    assert run.progress.epoch == 2
    assert run.stop_reason.startswith("valid/loss has not improved by more than 5.000% in 1 validation: best 100 at")


def test_a_value_that_is_reached_stops_at_once():
    run = fit([0.9, 0.5, 0.4, 0.3], EarlyStopping(stop_at=0.5, start_from=3))
    assert run.progress.epoch == 2
    assert run.stop_reason == "valid/loss has reached 0.5 at step 4; asked for was 0.5"
    assert fit([0.9, 0.51, 0.52], EarlyStopping(stop_at=0.5)).stop_reason is None
    assert fit([0.1, 0.7, 0.8], EarlyStopping("valid/gain", stop_at=0.6, mode="max")).progress.epoch == 2


def test_a_value_that_has_diverged_stops_at_once():
    run = fit([0.9, 5.0, 5.1], EarlyStopping(diverged_at=5.0))
    assert run.stop_reason == "valid/loss is 5.1 at step 6, worse than 5"
    assert fit([0.9, math.nan, 0.8], EarlyStopping(diverged_at=5.0), nonfinite=None).progress.epoch == 2


class Moves(Given):
    """Its weight is the number of steps, its validation loss in epoch n the n-th of a list."""

    def loss(self, output, target):
        return -output.mean() if self.training else super().loss(output, target)


def moves(losses, stop, **settings):
    net = Moves(losses)
    task = lw.Supervised(net, net.loss, torch.optim.SGD(net.parameters(), lr=1.0))
    batch = (torch.ones(2, 1), torch.ones(2, 1))
    given = {"epochs": 9, "folder": None, "progress": False, "callbacks": [stop]} | settings
    return lw.Trainer(**given).fit(task, [batch, batch], [batch])


def test_the_best_weights_are_put_back():
    losses = [1.0, 0.5, 0.6, 0.7, 0.8]
    run = moves(losses, EarlyStopping(patience=2))
    assert run.models["model"].w.item() == 8.0  # asked for by name, never by default
    run = moves(losses, EarlyStopping(patience=2, restore="best"))
    assert run.models["model"].w.item() == 4.0
    assert run.optimizers["main"].param_groups[0]["params"][0] is run.models["model"].w
    run = moves([1.0, 0.5, 0.6], EarlyStopping(patience=9, restore="best"), epochs=3)
    assert run.models["model"].w.item() == 4.0  # also where the run ends by itself


def test_the_best_weights_of_a_run_that_was_resumed_are_put_back(folder):
    class Killed(Exception):  # noqa: N818
        pass

    def once(losses, at=None, **how):
        def kill(run, result):
            if run.progress.step == at:
                raise Killed

        net = Moves(losses)
        task = lw.Supervised(net, net.loss, torch.optim.SGD(net.parameters(), lr=1.0))
        batch = (torch.ones(2, 1), torch.ones(2, 1))
        stop = EarlyStopping(patience=3, restore="best")
        settings = {"epochs": 9, "name": "a", "progress": False, "checkpoint": lw.Checkpoint("1 step")}
        user = lw.Trainer(**settings, callbacks=[stop, acts(on_step_end=kill)])
        return user.fit(task, [batch, batch], [batch], **how)

    with pytest.raises(Killed):
        once([1.0, 0.5, 0.6], at=7)  # the best were those of step 4
    run = once([0.6, 0.7, 0.8], resume="auto")  # the validation at the end of the open epoch is made again
    assert run.models["model"].w.item() == 4.0
    assert run.progress.step == 10
    again = once([], resume="auto")  # there is nothing left to do
    assert again.models["model"].w.item() == 4.0
    assert (again.status, again.progress.step) == ("stopped", 10)


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
        ({"relative": True}, "relative=True says what min_delta is a share of; give one, such as min_delta=0.01"),
        ({"restore": "last"}, "restore='last': expected None or 'best'"),
        (
            {"stop_at": 2.0, "diverged_at": 1.0},
            "stop_at=2 is no better than diverged_at=1: one of them is wrong",
        ),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(arguments, text):
    with pytest.raises(SettingError) as error:
        EarlyStopping(**arguments)
    assert str(error.value) == text
