"""Freezing: weights and running statistics of what is frozen keep every bit, and all is put back at the end."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from anywhere import ends_alike
from tiny import acts, classifier, loader, seed_all, trainer


def net_with_norm() -> nn.Sequential:
    seed_all(5)
    body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
    return nn.Sequential(body, nn.BatchNorm1d(8, affine=False), nn.Linear(8, 3))


def task_of(net: nn.Module) -> lw.Supervised:
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.AdamW(net.parameters(), 0.1))


def changed(before: dict[str, Any], net: nn.Module) -> set[str]:
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


HEAD = {"2.weight", "2.bias"}
NORM_1 = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"train": "module.2.*"}, HEAD),
        ({"freeze": "module.0.*"}, HEAD | NORM_1),
        ({"freeze": ["module.0.*", "module.1.*"]}, HEAD),
        ({"freeze": ["module.0.*", "module.1.running_*"]}, HEAD),  # statistics alone
        ({"train": ["module.2.*", "module.1.*"]}, HEAD | NORM_1),
    ],
)
def test_what_is_frozen_keeps_every_bit_running_statistics_too(choice: Any, expected: set[str]) -> None:
    net = net_with_norm()
    before = copy.deepcopy(net.state_dict())
    trainer().fit(task_of(net), loader(40, batch_size=8), stages=[lw.Stage("one", until="1 epoch", **choice)])
    assert changed(before, net) == expected


def test_frozen_norms_are_in_eval_mode_during_their_stage_only_and_validation_does_not_wake_them() -> None:
    net = net_with_norm()
    net[1].eval()  # the user's own choice
    seen: list[tuple[str, bool, bool, bool]] = []

    def note(run: lw.Run, *_: Any) -> None:
        assert run.stage is not None
        entry = (run.stage.name, net.training, net[0][1].training, net[1].training)
        if entry not in seen:
            seen.append(entry)

    stages = [
        lw.Stage("frozen", until="2 epochs", freeze="module.0.*"),
        lw.Stage("whole", until="1 epoch"),
        lw.Stage("chosen", until="1 epoch", train="*"),
    ]
    trainer(callbacks=[acts(on_backward_end=note)]).fit(
        task_of(net), loader(40, batch_size=8), loader(9, batch_size=4), stages=stages
    )
    assert seen == [("frozen", True, False, False), ("whole", True, True, False), ("chosen", True, True, True)]
    assert [net[0][1].training, net[1].training] == [True, False]
    assert all(p.requires_grad for p in net.parameters())


def test_flags_are_put_back_when_a_step_fails() -> None:
    net = net_with_norm()
    net[0][0].bias.requires_grad_(False)

    def fail(run: lw.Run, *_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer(callbacks=[acts(on_backward_end=fail)]).fit(
            task_of(net), loader(40, batch_size=8), stages=[lw.Stage("one", until="1 epoch", train="module.2.*")]
        )
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["0.0.bias"]
    assert net[0][1].training


LAYERS = ["module.2.*", "module.1.*", "module.0.*"]  # from the head down


def gradual() -> list[lw.Stage]:
    """Gradual unfreezing (Howard & Ruder 2018): the head first, then one layer more in each stage."""
    return [lw.Stage(f"top {n}", until="3 steps", train=LAYERS[:n]) for n in range(1, len(LAYERS) + 1)]


def test_gradual_unfreezing_is_a_list_of_stages() -> None:
    net = net_with_norm()
    before = copy.deepcopy(net.state_dict())
    steps: list[set[str]] = []

    def note(run: lw.Run, stage: lw.Stage) -> None:
        steps.append(changed(before, net))
        before.update(copy.deepcopy(net.state_dict()))

    trainer(callbacks=[acts(on_stage_end=note)]).fit(task_of(net), loader(40, batch_size=8), stages=gradual())
    assert steps == [HEAD, HEAD | NORM_1, set(before)]


def test_a_stage_that_freezes_all_that_it_could_move_is_refused_before_step_0() -> None:
    net = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), lr=0.1))
    stages = [lw.Stage("a", until="1 epoch"), lw.Stage("b", until="1 epoch", freeze=["module.0.*", "module.1.*"])]
    with pytest.raises(lw.PlanError) as caught:
        trainer().fit(task, loader(batch_size=8), stages=stages)
    assert caught.value.problems == [
        "stage 'b' freezes every parameter that it could move; leave some of them out of freeze=['module.0.*', "
        "'module.1.*']"
    ]


def test_resumed_in_any_stage_it_freezes_what_was_frozen(folder: Path) -> None:
    def fit(resume: Any, **settings: Any) -> lw.Run:
        task = task_of(net_with_norm())
        return lw.Trainer(**settings).fit(task, loader(40, batch_size=8, shuffle=True), stages=gradual(), resume=resume)

    assert ends_alike(fit, folder) == 8


def thawed(optimizer: Any, train: Any) -> tuple[lw.Supervised, list[lw.Stage]]:
    """The usual start of transfer learning: a body that came frozen, and a second stage that trains it as well."""
    net = classifier()
    net[0].requires_grad_(False)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer(net))
    return task, [lw.Stage("head", "1 epoch", train="module.2.*"), lw.Stage("all", "1 epoch", train=train)]


@pytest.mark.parametrize("train", ["*", "module.0.*"])
def test_what_a_stage_thaws_and_no_optimizer_holds_is_a_problem_with_its_names(train: str) -> None:
    task, stages = thawed(lambda net: torch.optim.SGD(net[2].parameters(), 0.1), train)
    assert trainer().plan(task, loader(20, batch_size=5), stages=stages).problems == [
        "stage 'all' trains 2 parameters that are in no optimizer (module.0.weight, module.0.bias); give it all of "
        "them, torch.optim.SGD(net.parameters(), ...), as stages freeze what is not to move, or leave them out of "
        f"train={train!r}"
    ]


@pytest.mark.parametrize("train", ["*", "module.0.*"])
@pytest.mark.parametrize("factory", [True, False])
def test_what_a_stage_thaws_moves_in_that_stage(train: str, factory: bool) -> None:
    """A factory is given it too, an optimizer that was made of all parameters has it; no stage before moves it."""
    made = (lambda net: lambda params: torch.optim.SGD(params, 0.1)) if factory else (
        lambda net: torch.optim.SGD(net.parameters(), 0.1)
    )  # fmt: skip
    task, stages = thawed(made, train)
    body, seen = task.module[0].weight, []
    before = body.detach().clone()
    note = acts(on_stage_end=lambda run, stage: seen.append(torch.equal(body, before)))
    trainer(callbacks=[note]).fit(task, loader(20, batch_size=5), stages=stages)
    assert seen == [True, False]
    assert not body.requires_grad


def test_a_stage_that_trains_nothing_its_optimizers_move_is_told_so() -> None:
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    own = torch.optim.SGD(net[2].parameters(), 0.1)
    stages = [lw.Stage("a", "1 epoch"), lw.Stage("b", "1 epoch", train="module.0.*", optimizer={"main": own})]
    assert trainer().plan(task, loader(20, batch_size=5), stages=stages).problems == [
        "stage 'b' trains nothing: its optimizers move none of train='module.0.*'; let it match some of what they "
        "move, or give the stage an optimizer that moves it"
    ]
