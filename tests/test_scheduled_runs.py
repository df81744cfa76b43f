"""Schedules in runs: which value each step sees, for which groups, in which stage, and after a resume."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import loopwright as lw
from anywhere import ends_alike
from loopwright.schedules import concat, constant, cosine, linear, one_cycle, scaled, warmup
from tiny import acts, classifier, line, loader, pairs, samples, seed_all, sgd_task, trainer

BATCHES = pairs([1.0], [2.0], [3.0], [4.0])


def watch(seen: list[Any], *keys: str, group: int = 0) -> lw.Callback:
    """Notes hyper-parameters of the first optimizer at the moment at which it moves."""

    def note(run: lw.Run, phase: lw.Phase, norm: Any) -> None:
        values = [phase.moved[0].param_groups[group][key] for key in keys]
        seen.append(values[0] if len(values) == 1 else tuple(values))

    return acts(on_grads_ready=note)


def rates(schedule: Any, until: Any, *, data: Any = BATCHES, accumulate: int = 1, **settings: Any) -> list[float]:
    """The learning rates of all steps of a stage."""
    seen: list[float] = []
    stage = lw.Stage("only", until=until, accumulate=accumulate)
    task = sgd_task(line(), schedule=schedule)
    trainer(callbacks=[watch(seen, "lr")], **settings).fit(task, data, stages=[stage])
    return seen


@pytest.mark.parametrize(
    ("until", "accumulate", "total"),
    [("2 epochs", 1, 8), ("2 epochs", 3, 4), ("7 steps", 1, 7), ("0.5 epochs", 1, 2), ("6 samples", 1, 6),
     (["2 epochs", "5 steps"], 1, 5)],
)  # fmt: skip
def test_step_k_of_total_sees_the_schedule_at_k_by_total(until: Any, accumulate: int, total: int) -> None:
    schedule = cosine(1.0, 0.0)
    assert rates(schedule, until, accumulate=accumulate) == [schedule(k / total) for k in range(total)]


def test_a_stage_bounded_by_time_goes_from_the_start_to_the_end_of_its_schedule() -> None:
    seen = rates(linear(0.0, 1.0), "0.3 s")
    assert seen[0] == 0.0
    assert seen == sorted(seen)
    assert len(seen) > 20
    assert 0.5 < seen[-1] <= 1.0


def test_a_step_that_is_dropped_counts_as_done_where_epochs_are_counted() -> None:
    turns = itertools.cycle([False, True])

    def every_other(run: lw.Run, *_: Any) -> None:
        if next(turns):
            raise lw.SkipStep

    skip = acts(on_backward_end=every_other)
    seen: list[float] = []
    run = trainer(epochs=2, callbacks=[skip, watch(seen, "lr")]).fit(sgd_task(line(), schedule=linear(0, 8)), BATCHES)
    assert run.progress.step == 4
    assert seen == [0.0, 2.0, 4.0, 6.0]


def by_hand(values: list[dict[str, Any]], batches: list[Any], make: Any) -> nn.Module:
    net = classifier()
    optimizer = make(net)
    for value, (x, y) in zip(values, batches, strict=True):
        for group in optimizer.param_groups:
            group.update(value)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "lr, momentum, weight decay": (
        lambda net: torch.optim.SGD(net.parameters(), 9.0, momentum=0.1, weight_decay=0.3),
        {"lr": warmup(cosine(0.5, 0.0), 0.25), "momentum": linear(0.95, 0.85), "weight_decay": linear(0, 0.1)},
        lambda f: {
            "lr": warmup(cosine(0.5, 0.0), 0.25)(f), "momentum": linear(0.95, 0.85)(f), "weight_decay": 0.1 * f,
        },
    ),
    "the first beta of Adam": (
        lambda net: torch.optim.AdamW(net.parameters(), 9.0),
        one_cycle(0.1),
        lambda f: {"lr": one_cycle(0.1)["lr"](f), "betas": (one_cycle(0.1)["momentum"](f), 0.999)},
    ),
    "both betas": (
        lambda net: torch.optim.Adam(net.parameters(), 0.1),
        {"betas": (linear(0.95, 0.8), linear(0.9, 0.99)), "eps": 1e-6},
        lambda f: {"betas": (linear(0.95, 0.8)(f), linear(0.9, 0.99)(f)), "eps": 1e-6},
    ),
    "a function": (
        lambda net: torch.optim.RMSprop(net.parameters(), 0.1),
        {"lr": lambda f: 0.1 * (1 - f) ** 2, "alpha": 0.9},
        lambda f: {"lr": 0.1 * (1 - f) ** 2, "alpha": 0.9},
    ),
    "lr as a tensor": (
        lambda net: torch.optim.Adam(net.parameters(), torch.tensor(0.3), foreach=False),
        {"lr": scaled(linear(1.0, 0.5))},
        lambda f: {"lr": torch.tensor(float(torch.tensor(0.3)) * linear(1.0, 0.5)(f))},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.capability("IG-11")
def test_any_hyper_parameter_of_any_optimizer_equals_the_loop_by_hand_bit_for_bit(case: str) -> None:
    make, schedule, values = CASES[case]
    batches = list(loader(40, batch_size=5))
    net = classifier()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), make(net), schedule=schedule)
    trainer(epochs=2).fit(task, batches)
    assert equal(net, by_hand([values(k / 16) for k in range(16)], batches * 2, make))


def test_chosen_groups_by_name_or_number_come_before_those_for_all() -> None:
    net = classifier()
    groups = [{"params": net[0].parameters(), "name": "body"}, {"params": net[2].parameters(), "lr": 4.0}]
    sgd = torch.optim.SGD(groups, lr=1.0)
    schedule = {"lr/body": linear(0.5, 0.1), "lr": scaled(linear(1.0, 0.0)), "weight_decay/1": 0.25}
    task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=schedule)
    first: list[Any] = []
    second: list[Any] = []
    watchers = [watch(first, "lr", "weight_decay"), watch(second, "lr", "weight_decay", group=1)]
    run = trainer(steps=4, callbacks=watchers).fit(task, loader(40, batch_size=5))
    assert first == [(linear(0.5, 0.1)(k / 4), 0) for k in range(4)]
    assert second == [(4.0 * (1 - k / 4), 0.25) for k in range(4)]
    assert run.metrics["lr/body"] == first[-1][0]
    assert run.metrics["weight_decay/1"] == 0.25


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_schedule_of_the_weight_decay_leaves_groups_without_decay_alone(decay: float, by_hand: bool) -> None:
    """Those of ``lw.groups`` always; those made by hand where another group has some. Their number still sets them."""

    def seen(schedule: dict[str, Any]) -> list[float]:
        net = classifier()
        groups = lw.groups(net, no_decay=True)
        if by_hand:
            groups = [{"params": group["params"], "weight_decay": (decay, 0.0)[i]} for i, group in enumerate(groups)]
        sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.5, weight_decay=decay)
        sgd.param_groups[1]["lr"] = sgd.param_groups[1]["momentum"] = 0.0
        task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=schedule)
        trainer(steps=2).fit(task, loader(40, batch_size=5))
        assert [group["momentum"] for group in sgd.param_groups] == [0.25, 0.25]
        assert [group["lr"] for group in sgd.param_groups] == [0.25, 0.25]  # of which 0 is nothing special
        return [group["weight_decay"] for group in sgd.param_groups]

    rest = {"momentum": 0.25, "lr": 0.25}
    assert seen({"weight_decay": linear(1.0, 0.0), **rest}) == [0.5, 0.5 if by_hand and not decay else 0.0]
    assert seen({"weight_decay": linear(1.0, 0.0), "weight_decay/1": 0.125, **rest}) == [0.5, 0.125]


def test_what_is_scheduled_is_in_the_log_under_its_name() -> None:
    net = classifier()
    sgd = torch.optim.SGD(net.parameters(), 1.0, momentum=0.5)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=one_cycle(0.1))
    run = trainer(epochs=2).fit(task, loader(40, batch_size=5))
    made = one_cycle(0.1)
    assert run.history["lr"] == [made["lr"](7 / 16), made["lr"](15 / 16)]
    assert run.history["momentum"] == [made["momentum"](7 / 16), made["momentum"](15 / 16)]


class Two(lw.Task):
    """Two optimizers; the second moves every other step, on schedules of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = line(), line()

    def phases(self) -> list[lw.Phase]:
        return [
            lw.Phase("a", lambda batch: self.a(batch[0]).mean(), optimizers="a"),
            lw.Phase("b", lambda batch: self.b(batch[0]).mean(), optimizers="b", every=2, schedule=linear(8.0, 0.0)),
        ]

    def configure_optimizers(self) -> Any:
        return {
            "a": (torch.optim.SGD(self.a.parameters(), 1.0), cosine(1.0, 0.0)),
            "b": torch.optim.SGD(self.b.parameters(), 1.0, momentum=0.5),
        }


def test_a_phase_that_runs_now_and_then_sees_the_progress_of_the_stage() -> None:
    seen: list[tuple[str, float]] = []
    note = acts(on_grads_ready=lambda run, phase, norm: seen.append((phase.name, phase.moved[0].param_groups[0]["lr"])))
    run = trainer(epochs=2, callbacks=[note]).fit(Two(), BATCHES)
    assert [lr for name, lr in seen if name == "b"] == [7.0, 5.0, 3.0, 1.0]
    assert [lr for name, lr in seen if name == "a"] == [cosine(1.0, 0.0)(k / 8) for k in range(8)]
    assert run.metrics["lr/b"] == 1.0


def test_a_stage_has_its_own_schedule_and_the_next_one_the_values_that_the_optimizer_came_with() -> None:
    seen: list[tuple[float, float]] = []
    net = line()
    sgd = torch.optim.SGD(net.parameters(), 0.25, momentum=0.5)
    task = lw.Supervised(net, nn.MSELoss(), sgd, schedule={"weight_decay": linear(0.0, 4.0)})
    stages = [
        lw.Stage("own", until="1 epoch", schedule={"lr": linear(4.0, 0.0), "momentum": 0.75}),
        lw.Stage("plain", until="1 epoch"),
        lw.Stage("lr", until="2 steps", lr=0.125),
    ]
    note = acts(
        on_step_start=lambda run: seen.append(tuple(sgd.param_groups[0][k] for k in ("lr", "momentum", "weight_decay")))
    )  # type: ignore[arg-type]
    trainer(callbacks=[note], nonfinite=None).fit(task, BATCHES, stages=stages)
    assert seen[:4] == [(4.0 - k, 0.75, 0) for k in range(4)]
    assert seen[4:8] == [(0.25, 0.5, float(k)) for k in range(4)]
    assert seen[8:] == [(0.125, 0.5, 0.0)] * 2


def test_torch_schedulers_and_ours_share_an_optimizer_where_they_set_different_values() -> None:
    net = line()
    sgd = torch.optim.SGD(net.parameters(), 1.0, momentum=0.5)
    both = [lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5), {"momentum": linear(0.0, 0.8)}]
    run = trainer(epochs=2).fit(lw.Supervised(net, nn.MSELoss(), sgd, schedule=both), BATCHES)
    assert run.history["lr"] == [1.0, 0.5]
    assert sgd.param_groups[0]["momentum"] == pytest.approx(0.8 * 7 / 8)
    task = sgd_task(line(), schedule=[both[0], cosine(1, 0)])
    with pytest.raises(lw.SettingError, match=r"^lr of SGD is set by a schedule and by StepLR; leave one of them out"):
        trainer(epochs=2).fit(task, BATCHES)


def test_a_second_fit_goes_on_to_the_new_total_with_the_schedule_over_all_of_it() -> None:
    seen: list[float] = []
    task = sgd_task(line(), schedule={"lr": scaled(linear(1.0, 0.0))})
    trainer(epochs=1, callbacks=[watch(seen, "lr")]).fit(task, BATCHES)
    trainer(epochs=2, callbacks=[watch(seen, "lr")]).fit(task, BATCHES)
    assert seen == [1 - k / 4 for k in range(4)] + [1 - k / 8 for k in range(4, 8)]


def test_a_replaced_optimizer_goes_on_with_the_schedule() -> None:
    net, seen = line(), list[float]()
    new = torch.optim.SGD(net.parameters(), 1.0, momentum=0.9)
    change = acts(on_step_end=lambda run, _: run.replace("optimizer", new) if run.progress.step == 2 else None)
    run = trainer(epochs=1, callbacks=[change, watch(seen, "lr")]).fit(sgd_task(net, schedule=linear(4, 0)), BATCHES)
    assert seen == [4.0, 3.0, 2.0, 1.0]
    assert run.optimizers["main"] is new


def test_a_plan_and_a_run_that_cannot_begin_leave_the_optimizer_as_it_was() -> None:
    task = sgd_task(line(), schedule={"lr": scaled(linear(1.0, 0.0))})
    before = dict(task.optimizer.param_groups[0])
    plan = trainer(epochs=1).plan(task, BATCHES)
    assert plan.problems == []
    assert "  SGD: {lr: scaled(part=linear(start=1.0, end=0.0))} over 1 epoch" in plan.facts
    assert task.optimizer.param_groups[0] == before
    with pytest.raises(lw.PlanError):
        trainer(epochs=1, callbacks=[lw.EarlyStopping("valid/loss")]).fit(task, BATCHES)
    assert task.optimizer.param_groups[0] == before
    assert "set lr of SGD by schedule" in trainer(epochs=1).explain(task, BATCHES)


def test_everything_that_cannot_be_scheduled_is_told_by_plan() -> None:
    def told(schedule: Any, data: Any = BATCHES, **settings: Any) -> str:
        (problem,) = trainer(**{"epochs": 1, **settings}).plan(sgd_task(line(), schedule=schedule), data).problems
        return problem

    known = "Known: 'dampening', 'lr', 'momentum', 'weight_decay'."
    assert told({"momentums": 0.5}) == f"SGD has no 'momentums' to schedule. {known} Did you mean 'momentum'?"
    assert told({"lr/head": 0.5}) == "schedule 'lr/head': no group is called 'head'. Known: '0'."
    assert told({"lr": (1, 2)}) == (
        "'lr' of SGD is 1.0, which the schedule (constant(value=1.0), constant(value=2.0)) cannot set; "
        "a number takes one schedule"
    )
    assert told({"lr": "cosine"}).startswith("'cosine' is no schedule; write a number, or one such as")
    assert told(warmup(constant(1), "9 steps")) == (
        "'9 steps' is longer than the whole in which it lies; make it shorter, or give a fraction"
    )
    assert told(warmup(constant(1), "2 epochs"), epochs=None, time="1 min") == (
        "what part '2 epochs' is of a stage that lasts 60 seconds is not known before it is over; give a fraction such "
        "as 0.1, or a duration in seconds"
    )

    def stream() -> Any:
        yield from BATCHES

    assert told(cosine(1, 0), stream).startswith(
        "cosine(start=1, end=0) needs to know how long its stage is, which lasts 1 epoch of data whose length is not "
        "known; count in steps, Trainer(steps=1000) or Stage(until='1000 steps')"
    )
    assert trainer(epochs=1).plan(sgd_task(line(), schedule=0.5), stream).problems == []
    assert trainer(steps=9).plan(sgd_task(line(), schedule=cosine(1, 0)), stream).problems == []
    adam = lw.Supervised(net := line(), nn.MSELoss(), torch.optim.Adam(net.parameters()), schedule={"betas": 0.5})
    assert trainer(epochs=1).plan(adam, BATCHES).problems == [
        "'betas' of Adam is (0.9, 0.999), which the schedule constant(value=0.5) cannot set; a tuple of numbers takes "
        "a tuple of schedules"
    ]
    adam = lw.Supervised(line(), nn.MSELoss(), torch.optim.Adam, schedule={"betas": (0.5, 0.9), "momentum": 0.5})
    adam.optimizer = torch.optim.Adam(adam.module.parameters())
    assert trainer(epochs=1).plan(adam, BATCHES).problems == [
        "'momentum' and 'betas' both set the first beta here; leave one of them out"
    ]
    with pytest.raises(lw.SettingError, match=r"^Stage 'a' has both lr= and schedule=; write schedule="):
        lw.Stage("a", until="1 epoch", lr=0.1, schedule={"lr": 0.1})
    torchs = lw.Stage("a", until="1 epoch", schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 1))
    (problem,) = trainer().plan(sgd_task(line()), BATCHES, stages=[torchs]).problems
    assert "expected one of lw.schedules, or a dict of them. A torch scheduler goes with the optimizer" in problem


# ---------------------------------------------------------------------------------------------------------- resume


def parts(*, accumulate: int = 1) -> tuple[lw.Supervised, Any, list[lw.Stage]]:
    seed_all(3)
    net = classifier(dropout=0.2)
    groups = [{"params": net[0].parameters(), "lr": 0.01}, {"params": net[3].parameters(), "lr": 0.1}]
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.AdamW(groups), schedule=one_cycle())
    stages = [
        lw.Stage("first", until="6 steps", accumulate=accumulate),
        lw.Stage("second", until="1 epoch", schedule={"lr": concat([cosine(0.1, 0.05), 0.01]), "weight_decay": 0.5}),
    ]  # fmt: skip
    return task, loader(40, batch_size=8, shuffle=True), stages


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_at_any_step_a_scheduled_run_ends_with_the_same_bits(folder: Path, accumulate: int) -> None:
    def fit(resume: Any, **settings: Any) -> lw.Run:
        task, data, stages = parts(accumulate=accumulate)
        return lw.Trainer(**settings).fit(task, data, stages=stages, resume=resume)

    assert ends_alike(fit, folder) == 10


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
        lambda optimizer: lr_scheduler.StepLR(optimizer, 3),
        lambda optimizer: lw.per_step(lr_scheduler.ExponentialLR(optimizer, 0.9)),
        lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, threshold=10.0),
    ],
)
def test_the_torch_scheduler_of_the_task_goes_on_after_a_stage_with_a_rate_of_its_own(scheduler: Any) -> None:
    """Killed inside of that stage, where nothing steps the scheduler: it has not forgotten where it was."""

    def make() -> Any:
        net = classifier()
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=scheduler(sgd))
        stages = [lw.Stage("a", "2 epochs"), lw.Stage("b", "1 epoch", lr=0.01), lw.Stage("c", "3 epochs")]
        return {"task": task, "train": loader(20, batch_size=5), "stages": stages}

    assert lw.verify_resume(make, lw.Trainer(), steps=24, stop=[6, 10, 14]).differences == []


@pytest.mark.parametrize("scheduler", [lr_scheduler.StepLR, lr_scheduler.MultiplicativeLR, lr_scheduler.CyclicLR])
def test_after_a_stage_with_values_of_its_own_a_torch_scheduler_goes_on_from_what_it_had_set(scheduler: Any) -> None:
    """So the rates are those of a run without that stage, also where it is killed in it, or in the one after."""
    own = lw.Stage("b", "1 epoch", schedule={"lr": 0.7, "momentum": linear(0.0, 0.5)})
    made = {
        lr_scheduler.StepLR: lambda sgd: lr_scheduler.StepLR(sgd, 1, 0.5),
        lr_scheduler.MultiplicativeLR: lambda sgd: lr_scheduler.MultiplicativeLR(sgd, lambda epoch: 0.5),
        lr_scheduler.CyclicLR: lambda sgd: lr_scheduler.CyclicLR(sgd, 0.1, 0.6, step_size_up=5),
    }[scheduler]

    def make(stages: list[lw.Stage]) -> dict[str, Any]:
        net = classifier()
        sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.25)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=made(sgd))
        return {"task": task, "train": loader(20, batch_size=5), "stages": stages}

    def seen(*stages: lw.Stage) -> list[Any]:
        values: list[Any] = []
        trainer(callbacks=[watch(values, "lr", "momentum")]).fit(**make(list(stages)))
        return values

    a, c = lw.Stage("a", "2 epochs"), lw.Stage("c", "2 epochs")
    without = seen(a, c)
    assert seen(a, own, c) == without[:8] + [(0.7, 0.125 * k) for k in range(4)] + without[8:]
    if scheduler is lr_scheduler.StepLR:
        assert [lr for lr, _ in without[::4]] == [0.1, 0.05, 0.025, 0.0125]
        assert (
            lw.verify_resume(lambda: make([a, own, c]), lw.Trainer(), steps=20, stop=[8, 10, 12, 14]).differences == []
        )


@pytest.mark.parametrize("fits", [[3], [2, 1]])
def test_a_plateau_keeps_its_reduction_after_a_stage_with_a_rate_of_its_own(fits: list[int]) -> None:
    """Also where that stage was the end of an earlier fit."""
    seen: list[float] = []

    def plateau(sgd: Any) -> Any:  # never content
        return lr_scheduler.ReduceLROnPlateau(sgd, patience=0, threshold=10.0)

    stages = [lw.Stage("a", "2 epochs"), lw.Stage("b", "1 epoch", lr=0.75), lw.Stage("c", "1 epoch")]
    task = sgd_task(line(), schedule=plateau)
    for count in fits:
        trainer(callbacks=[watch(seen, "lr")]).fit(task, BATCHES, stages=stages[:count])
        stages = stages[count:]
    assert seen[::4] == pytest.approx([1.0, 0.1, 0.75, 0.01])


class Noting(lr_scheduler.ReduceLROnPlateau):
    """Keeps what it is stepped with."""

    def step(self, metrics: Any, epoch: Any = None) -> None:
        self.given = [*getattr(self, "given", []), float(metrics)]
        super().step(metrics)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_plateau_looks_at_the_validation_in_stages_that_have_one_and_at_the_training_in_the_others(
    order: str,
) -> None:
    net = classifier()
    sgd = torch.optim.SGD(net.parameters(), 0.01)
    task = lw.Supervised(net, nn.CrossEntropyLoss(), sgd, schedule=(plateau := Noting(sgd)))
    of = {"a": lw.Stage("a", "2 epochs", valid=loader(9, batch_size=9)), "b": lw.Stage("b", "3 epochs")}
    run = trainer().fit(task, loader(20, batch_size=5), stages=[of[name] for name in order])
    train, valid = run.history["train/loss"], [one for one in run.history["valid/loss"] if one is not None]
    assert len({*train, *valid}) == 7
    assert plateau.given == ([*valid, *train[2:]] if order == "ab" else [*train[:3], *valid])


def test_a_plateau_told_to_look_at_a_validation_is_told_of_in_a_stage_that_has_none() -> None:
    """No way to guess what it should go by there; a warning, since it may be meant."""

    def make(sgd: Any) -> Any:
        return lw.Scheduler(lr_scheduler.ReduceLROnPlateau(sgd), monitor="valid/loss")

    stages = [lw.Stage("a", "2 epochs", valid=pairs([9.0])), lw.Stage("b", "3 epochs")]
    plan = trainer().plan(sgd_task(line(), schedule=make), BATCHES, stages=stages)
    assert plan.problems == []
    assert plan.warnings == [
        "ReduceLROnPlateau monitors 'valid/loss', and stage 'b' has no validation: it leaves the learning rate as it "
        "is there. Give the stage valid=, or leave monitor out: then it looks at 'train/loss' in such a stage"
    ]
    assert trainer().plan(sgd_task(line(), schedule=make), BATCHES, stages=stages[:1]).warnings == []


def test_another_length_or_schedule_is_refused_since_the_bits_would_be_others(tmp_path: Path) -> None:
    def fit(epochs: int, schedule: Any, resume: Any = None) -> lw.Run:
        task = sgd_task(line(), schedule=schedule)
        return lw.Trainer(epochs, folder=tmp_path, progress=False).fit(task, BATCHES, resume=resume)

    fit(1, cosine(1.0, 0.0))
    with pytest.raises(lw.CheckpointError, match="schedules/0/over was '1 epoch' and is '2 epochs'"):
        fit(2, cosine(1.0, 0.0), "auto")
    with pytest.raises(lw.CheckpointError, match="cosine"):
        fit(2, linear(1.0, 0.0), "auto")
    assert fit(2, cosine(1.0, 0.0), "approximate").progress.step == 8


@pytest.mark.parametrize(
    ("name", "schedule", "text"),
    [
        ("lr", linear(1.0, -1.0), "gives -0.0625 when 0.53125 of the stage is done; expected 0 or more"),
        ("lr", scaled(linear(1.0, -1.0)), "gives -0.0625 when 0.53125 of the stage is done; expected 0 or more"),
        ("lr", lambda f: float("inf"), "gives inf when 0 of the stage is done; expected 0 or more"),
        ("weight_decay", -0.1, "gives -0.1 when 0 of the stage is done; expected 0 or more"),
        ("momentum", 1.0, "gives 1 when 0 of the stage is done; expected a number from 0 to below 1"),
        ("betas", (0.9, linear(0.9, 1.5)), "gives 1.0125 when 0.1875 of the stage is done; expected a number from 0 "
         "to below 1"),
        ("lr", lambda f: 1 / (f - 0.5), "gives -2 when 0 of the stage is done; expected 0 or more"),
        ("lr", lambda f: 1 / f, "fails when 0 of the stage is done: ZeroDivisionError('float division by zero'). It is "
         "called with numbers from 0 to 1 and gives a number"),
        ("lr", lambda f: None, "fails when 0 of the stage is done: TypeError(\"float() argument must be a string or a "
         "real number, not 'NoneType'\"). It is called with numbers from 0 to 1 and gives a number"),
    ],
)  # fmt: skip
def test_values_that_torch_refuses_of_an_optimizer_are_told_by_plan(name: str, schedule: Any, text: str) -> None:
    """A learning rate below 0, betas of 1, what is no number."""
    net = line()
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.Adam(net.parameters()), schedule={name: schedule})
    assert trainer(epochs=1).plan(task, BATCHES).problems == [f"the schedule of {name!r} {text}"]


def test_a_factor_of_a_beta_may_be_1_and_a_momentum_that_is_no_beta_above_it() -> None:
    net = line()
    for kind, schedule in ((torch.optim.Adam, scaled(linear(1.0, 0.5))), (torch.optim.RMSprop, constant(1.0))):
        task = lw.Supervised(net, nn.MSELoss(), kind(net.parameters()), schedule={"momentum": schedule})
        assert trainer(epochs=1).plan(task, BATCHES).problems == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_schedule_goes_on_under_mixed_precision(precision: str) -> None:
    net, seen = classifier(), list[float]()
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 1.0), schedule=linear(0.4, 0.0))
    trainer(epochs=1, precision=precision, callbacks=[watch(seen, "lr")]).fit(task, (samples(32)))
    assert len(seen) == 1
    trainer(steps=4, precision=precision, callbacks=[watch(seen, "lr")]).fit(
        lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 1.0), schedule=linear(0.4, 0.0)),
        loader(32, batch_size=8),
    )
    assert seen[1:] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_a_step_that_failed_is_replayed_with_the_values_that_it_had(folder: Path) -> None:
    def make() -> lw.Supervised:
        net = line(1.0)
        sgd = torch.optim.SGD(net.parameters(), 1.0)
        schedule = {"lr": warmup(cosine(1.0, 0.0), "3 steps"), "weight_decay": linear(0.0, 1.0)}
        return lw.Supervised(net, lambda preds, target: (preds / target).mean(), sgd, schedule=schedule)

    data = [(torch.ones(2, 1), torch.full((2, 1), 5.0 - i)) for i in range(8)]  # divides by 0 at step 6
    with pytest.raises(lw.NonFiniteError):
        lw.Trainer(epochs=1, folder=folder, progress=False).fit(make(), data)
    (path,) = folder.rglob("capsules/*")
    seen: list[Any] = []
    found = lw.replay(path, make(), callbacks=[acts(on_backward_end=lambda run, *_: seen.append(run.lr))])
    assert (found.same_error, found.same_values) == (True, True)
    assert seen == [warmup(cosine(1.0, 0.0), 3 / 8)(5 / 8)]


def test_windows_of_so_many_tokens_are_scheduled_by_the_batches_of_an_epoch() -> None:
    """How many steps an epoch has is not known before its batches are read; how many batches it has is."""
    seen: list[tuple[float, float]] = []
    batches = [torch.ones(size, 1) for size in (3, 1, 4, 2, 2)]

    def tokens(batch: Any) -> int:
        return 2 * len(batch)

    run = trainer(epochs=2, accumulate="8 tokens")
    run.on(lw.Event.STEP_START)(lambda run: seen.append(((run.progress.epoch + run.progress.batch / 5) / 2, run.lr)))
    run.fit(
        sgd_task(line(), schedule=warmup(cosine(1, 0), "1 batch")),
        [(x, x) for x in batches],
        weight=lambda b: tokens(b[0]),
    )
    assert [batch for batch, _ in seen] == [0.0, 0.2, 0.3, 0.5, 0.7, 0.8]
    for part, lr in seen[1:]:
        assert lr == pytest.approx(0.5 * (1 + math.cos(math.pi * (part - 0.1) / 0.9)), abs=1e-12)
    assert seen[0][1] == 0.0
