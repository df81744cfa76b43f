"""Audit: who changes what it may not is named, with hook, step and tensor; honest callbacks are left alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from tiny import acts, bits, classifier, loader, same, samples, seed_all, trainer

EVERY = [
    "on_stage_start", "on_epoch_start", "on_step_start", "on_batch_start", "on_backward_end", "on_grads_ready",
    "on_step_end", "on_validation_start", "on_eval_batch_end", "on_validation_end", "on_epoch_end", "on_stage_end",
    "on_fit_end",
]  # fmt: skip
MAPS = ["map_batch", "map_output", "map_loss"]
VALIDATION = ["on_validation_start", "on_eval_batch_end", "on_validation_end"]


def nothing(value: Any) -> None:
    """What an observer returns."""


def audited(*callbacks: lw.Callback, audit: lw.Audit | None = None, handlers: Any = (), **settings: Any) -> lw.Run:
    net = classifier(dropout=0.5, batch_norm=True)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
    user = trainer(epochs=1, callbacks=[audit or lw.Audit(), *callbacks], **settings)
    for event, handler in handlers:
        user.on(event)(handler)
    return user.fit(task, loader(12, batch_size=5), loader(4, batch_size=4))


def weight(run: lw.Run) -> nn.Parameter:
    (net,) = run.models.values()
    assert isinstance(net, nn.Sequential)
    found = net[0].weight
    assert isinstance(found, nn.Parameter)
    return found


def in_place(run: lw.Run) -> None:
    with torch.no_grad():
        weight(run).mul_(0.5)


def behind(run: lw.Run) -> None:
    weight(run).data[0, 0] += 1.0  # leaves the version as it is


def another(run: lw.Run) -> None:
    (net,) = run.models.values()
    net[0].weight = nn.Parameter(torch.zeros(8, 5))  # type: ignore[index,union-attr]


def hidden(run: lw.Run) -> None:
    weight(run).data = torch.zeros(8, 5)


def said(hook: str, act: Any) -> str:
    with pytest.raises(lw.HookError) as caught:
        audited(acts(**{hook: lambda run, *args: act(run) or (args[0] if hook.startswith("map_") else None)}))
    return str(caught.value)


@pytest.mark.parametrize("hook", [*EVERY, *MAPS])
@pytest.mark.parametrize("act", [in_place, behind, another, hidden])
def test_a_hook_that_changes_weights_is_named(hook: str, act: Any) -> None:
    step = 0 if hook in ("on_stage_start", "on_epoch_start", "on_step_start", "on_batch_start", *MAPS) else None
    step = 0 if hook in ("on_backward_end", "on_grads_ready") else 1 if hook == "on_step_end" else step
    step = 3 if step is None else step
    assert said(hook, act) == (
        f"Acts.{hook} changed the weights 0.weight after step {step}. Weights move in the step of an optimizer only: "
        "call run.replace('model', new); or let the callback say that it is meant: changes = ('weights',)"
    )


@pytest.mark.parametrize("hook", [h for h in EVERY if h not in VALIDATION])
def test_a_buffer_that_an_observer_moves_is_named(hook: str) -> None:
    def act(run: lw.Run) -> None:
        (net,) = run.models.values()
        net[1].running_mean.add_(1)  # type: ignore[index,union-attr,operator]

    assert f"Acts.{hook} changed the weights 1.running_mean after step" in said(hook, act)


def test_gradients_may_be_edited_where_they_are_ready_and_nowhere_else() -> None:
    def halve(run: lw.Run) -> None:
        for parameter in run.task.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)

    audited(acts(on_grads_ready=lambda run, *_: halve(run)))
    for hook in ("on_backward_end", "on_step_end", "on_validation_end", "on_epoch_end"):
        assert f"Acts.{hook} changed the gradients of 0.weight, 0.bias, 1.weight, 1.bias, ... after step" in said(
            hook, halve
        )

    def forget(run: lw.Run) -> None:
        weight(run).grad = None

    assert "Acts.on_step_end changed the gradients of 0.weight after step 1. Gradients may be edited in on_grads_" in (
        said("on_step_end", forget)
    )


def test_an_observer_that_changes_what_it_is_passed_is_named() -> None:
    def told(**hooks: Any) -> str:
        with pytest.raises(lw.HookError) as caught:
            audited(acts(**hooks))
        return str(caught.value).partition(" after step")[0]

    assert told(on_batch_start=lambda run, batch: nothing(batch[0].mul_(2))) == ("Acts.on_batch_start changed batch[0]")
    assert told(on_batch_start=lambda run, batch: batch.__setitem__(1, batch[1].clone())) == (
        "Acts.on_batch_start changed batch[1]"
    )
    assert told(on_backward_end=lambda run, loss, *_: nothing(loss.data.zero_())) == (
        "Acts.on_backward_end changed loss, output['loss']"
    )
    assert told(on_backward_end=lambda run, loss, output, *_: nothing(output.pop("preds"))) == (
        "Acts.on_backward_end changed output['preds']"
    )
    assert told(on_step_end=lambda run, result: result.values.update(more=1)) == (
        "Acts.on_step_end changed result.values['more']"
    )
    assert told(on_validation_end=lambda run, values: values.update({"valid/loss": 0.0})) == (
        "Acts.on_validation_end changed values['valid/loss']"
    )
    assert told(on_eval_batch_end=lambda run, output, batch: nothing(output["preds"].zero_())) == (
        "Acts.on_eval_batch_end changed output['preds']"
    )


DRAWS = {
    "torch's global generator": lambda run: nothing(torch.rand(1)),
    "Python's global generator": lambda run: nothing(random.random()),
    "NumPy's global generator": lambda run: nothing(np.random.rand()),
}


@pytest.mark.parametrize("which", DRAWS)
def test_an_observer_that_draws_is_named_but_within_a_validation(which: str) -> None:
    for hook in set(EVERY) - set(VALIDATION):
        assert f"Acts.{hook} drew from {which} after step" in said(hook, DRAWS[which])
    for hook in VALIDATION:
        audited(acts(**{hook: lambda run, *_: DRAWS[which](run)}))
    for hook in MAPS:
        audited(acts(**{hook: lambda run, value, *_: DRAWS[which](run) or value}))


def test_flags_that_a_hook_turns_are_named() -> None:
    assert said("on_step_end", lambda run: nothing(run.task.module[1].eval())).startswith(
        "Acts.on_step_end changed the flags of 1 after step 1. Flags are the user's"
    )
    assert "changed the flags of 0.weight after step 1" in said(
        "on_step_end", lambda run: nothing(weight(run).requires_grad_(False))
    )


def slower(run: lw.Run) -> None:
    run.optimizers["main"].param_groups[0]["lr"] *= 0.5


@pytest.mark.parametrize("hook", [*EVERY, *MAPS])
def test_a_hook_that_changes_rates_is_named(hook: str) -> None:
    assert f"Acts.{hook} changed main.param_groups[0]['lr'] after step" in said(hook, slower)


def test_every_number_of_a_group_is_looked_at_and_the_remedy_is_told() -> None:
    def heavier(run: lw.Run) -> None:
        run.optimizers["main"].param_groups[0].update(momentum=0.9, weight_decay=0.1)

    assert said("on_epoch_end", heavier) == (
        "Acts.on_epoch_end changed main.param_groups[0]['momentum'], main.param_groups[0]['weight_decay'] after step "
        "3. Rates follow the schedule: make it a part of schedule=; or let the callback say that it is meant: changes "
        "= ('rates',)"
    )


def test_rates_may_be_changed_by_who_says_so_and_by_schedules() -> None:
    class Slower(lw.Callback):
        changes = ("rates",)

        def on_epoch_end(self, run: lw.Run) -> None:
            slower(run)

    run = audited(Slower())
    assert run.lr == 0.05
    for schedule in (
        lw.schedules.one_cycle(0.1),
        lambda sgd: lw.per_step(torch.optim.lr_scheduler.StepLR(sgd, 1)),
        lambda sgd: torch.optim.lr_scheduler.StepLR(sgd, 1),
        lambda sgd: torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, patience=0, threshold=10.0),
    ):
        net = classifier()
        sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.5)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=schedule)
        run = trainer(
            epochs=3, callbacks=[lw.Audit(), acts(on_epoch_end=lambda run: None, on_step_end=lambda *_: None)]
        ).fit(task, loader(12, batch_size=5), loader(4, batch_size=4))
        assert run.lr != 0.1


def test_handlers_are_audited_as_well_and_named_with_their_event() -> None:
    def meddle(run: lw.Run) -> None:
        behind(run)

    with pytest.raises(lw.HookError, match=r"meddle, at STEP_END\(every=2\) changed the weights 0.weight after step 2"):
        audited(handlers=[(lw.Event.STEP_END(every=2), meddle)])


def test_all_findings_are_collected_and_the_run_goes_on() -> None:
    audit = lw.Audit(stop=False)
    bad = [acts(on_step_end=lambda run, result: in_place(run)), acts(on_epoch_end=lambda run: nothing(torch.rand(1)))]
    with pytest.warns(lw.LoopwrightWarning, match="Audit found 2 in this run:\n  - Acts.on_step_end changed the weigh"):
        run = audited(*bad, audit=audit)
    assert run.progress.step == 3
    assert [one.partition(" after")[0] for one in audit.found] == [
        "Acts.on_step_end changed the weights 0.weight",  # once, not at each step
        "Acts.on_epoch_end drew from torch's global generator",
    ]


def test_what_a_callback_says_that_it_changes_is_allowed() -> None:
    class Swap(lw.Callback):
        changes = ("weights",)

        def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
            in_place(run)

    class More(Swap):
        def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
            in_place(run)
            torch.rand(1)

    audited(Swap())
    with pytest.raises(lw.HookError, match=r"More\.on_step_end drew from torch's global generator"):
        audited(More())


def test_a_model_that_was_replaced_is_the_one_that_is_looked_at() -> None:
    def swap(run: lw.Run, result: lw.StepResult) -> None:
        if run.progress.step == 1:
            net = classifier(seed=9)
            run.replace("model", net)
            run.replace("optimizer", torch.optim.SGD(net.parameters(), 0.1))
        if run.progress.step == 2:
            behind(run)

    with pytest.raises(lw.HookError, match=r"changed the weights 0\.weight after step 2"):
        audited(acts(on_step_end=swap))


def test_what_ships_is_honest_and_an_audit_changes_no_bit(folder: Path) -> None:
    """Every callback and logger that ships, with metrics, two phases' worth of hooks and checkpoints: no finding."""

    def fitted(*more: lw.Callback) -> list[Any]:
        net = classifier(dropout=0.5, batch_norm=True)
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        seed_all(3)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), optimizer, metrics={"accuracy": lw.metrics.Accuracy()})
        user = lw.Trainer(
            epochs=2, callbacks=[*more, lw.EarlyStopping(), lw.Requeue(), lw.Capsule()], folder=folder, progress=True,
            checkpoint=lw.Checkpoint("2 steps"), loggers=[lw.CSVLogger(), lw.JSONLLogger(), lw.TableLogger()],
        )  # fmt: skip
        train = DataLoader(TensorDataset(*samples(23)), 7, shuffle=True)
        user.fit(task, train, loader(9, batch_size=4, noisy=True))
        return bits(net, optimizer)

    assert same(fitted(lw.Audit()), fitted())


def test_what_is_no_answer_is_refused() -> None:
    with pytest.raises(lw.SettingError, match=r"stop='no': expected True \(raise at the first finding\) or False"):
        lw.Audit(stop="no")  # type: ignore[arg-type]
