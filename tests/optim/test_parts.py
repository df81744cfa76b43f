"""The parts below groups, freezing and schedules, each by itself: what a front end of another kind would call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from loopwright.errors import SettingError
from tiny import classifier, sgd_task, trainer

SGD = torch.optim.SGD


def test_names_are_matched_by_patterns_and_one_that_matches_nothing_is_refused() -> None:
    names = ["body.0.weight", "body.0.bias", "head.weight"]
    assert lw.optim.match_names(["body.*", "head.weight"], names) == set(names)
    assert lw.optim.match_names("*.bias", names) == {"body.0.bias"}
    with pytest.raises(SettingError, match=r"^the pattern 'haed\.\*' matches no parameter\. Known: "):
        lw.optim.match_names("haed.*", names)


def test_what_trains_is_noted_and_put_back() -> None:
    net = classifier(batch_norm=True)
    net[0].weight.requires_grad_(False)
    before = lw.optim.trainable_flags(net)
    assert (before["0.weight"], before["0.bias"], before["1.running_mean"]) == (False, True, True)
    lw.optim.set_trainable(net, before, freeze="1.*")
    frozen = lw.optim.trainable_flags(net)
    assert {name for name in before if frozen[name] != before[name]} == {"1.weight", "1.bias", "1.running_mean"}
    assert not net[1].training
    lw.optim.set_trainable(net, before)
    assert lw.optim.trainable_flags(net) == before


def test_schedules_of_ours_are_told_from_those_of_torch() -> None:
    sgd = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.StepLR(sgd, 3)
    for mine in (0.1, {"lr": 0.1}, lw.schedules.cosine(1.0, 0.0)):
        assert lw.optim.is_schedule(mine)
    for other in (True, theirs, lambda optimizer: theirs):
        assert not lw.optim.is_schedule(other)
    made = lw.optim.as_schedulers([lw.schedules.cosine(1.0, 0.0), theirs, None], (sgd,))
    assert [type(one) for one in made] == [lw.optim.Scheduled, lw.optim.Scheduler]
    assert lw.optim.settings_of(made[1]) == {
        "class": torch.optim.lr_scheduler.StepLR, "every": "epoch", "step_size": 3, "gamma": 0.1,
    }  # fmt: skip
    with pytest.raises(SettingError, match="another optimizer"):
        lw.optim.as_schedulers(theirs, (SGD([torch.zeros(1, requires_grad=True)], lr=1.0),))


def test_the_schedule_of_a_stage_goes_before_those_of_the_task() -> None:
    seen: list[Any] = []

    class Looks(lw.Callback):
        def on_step_start(self, run: lw.Run) -> None:
            stage = run.stage
            assert stage is not None
            (one,) = lw.optim.scheduled_in(stage, [lw.optim.Scheduled(*run.optimizers.values(), 7.0)])
            seen.append((one.of_stage, run.lr))

    net = nn.Linear(1, 1)
    task = sgd_task(net, schedule=lw.schedules.constant(0.25))
    stages = [lw.Stage("own", until="1 step", lr=0.5), lw.Stage("the task's", until="1 step")]
    trainer(callbacks=[Looks()]).fit(task, [(torch.ones(2, 1), torch.ones(2, 1))], stages=stages)
    assert seen == [(True, 0.5), (False, 0.25)]


def test_a_step_function_is_given_a_bunch() -> None:
    seen: list[Any] = []
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    lw.optim.Stepwise([weight], [seen.append, lw.optim.sgd], lr=1.0).step()
    assert isinstance(seen[0], lw.optim.Bunch)
    assert weight.tolist() == [-1.0, -1.0]
