"""What does nothing in a run is told before it begins, with its line, and what does something is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import loopwright as lw
from tiny import acts, line, pairs, sgd_task, trainer

DATA = pairs([1.0], [2.0], [3.0])  # 3 batches


def two() -> nn.Sequential:
    return nn.Sequential(line(bias=1.0), line(bias=1.0))


def half_frozen() -> nn.Sequential:
    net = two()
    net[0].requires_grad_(False)
    return net


Made = tuple[lw.Trainer, Any, dict[str, Any]]


def of(*stages: lw.Stage, net: Callable[[], nn.Module] = two, valid: Any = None, **settings: Any) -> Callable[[], Made]:
    def made() -> Made:
        length = {} if stages or settings.keys() & {"steps", "time"} else {"epochs": 2}
        more = {"stages": list(stages)} if stages else {}
        task = sgd_task(net(), lr=0.1, metrics={"accuracy": lw.metrics.Accuracy(threshold=0.0)} if valid else None)
        return trainer(**length, **settings), task, {"valid": valid, **more}

    return made


IDLE: dict[str, tuple[Callable[[], Made], str]] = {
    "a pattern of what is frozen already": (
        of(lw.Stage("a", "1 epoch", freeze=["module.0.*", "module.1.bias"]), net=half_frozen),
        "stage 'a': freeze='module.0.*' matches nothing that would train; leave it out",
    ),
    "a pattern of what the stage does not train": (
        of(lw.Stage("a", "1 epoch", train="module.1.*", freeze="module.0.*")),
        "stage 'a': freeze='module.0.*' matches nothing that would train; leave it out",
    ),
    "more batches to a step than there are": (
        of(accumulate=4),
        "accumulate=4 is more than the 3 batches of an epoch, and a step takes no batch of the next one; write "
        "accumulate=3",
    ),
    "more batches to a step of a stage": (
        of(lw.Stage("a", "1 epoch", accumulate=9, source=DATA[:1])),
        "accumulate=9 is more than the 1 batch of an epoch, and a step takes no batch of the next one; write "
        "accumulate=1",
    ),
    "a phase that is never due": (
        of(
            lw.Stage("a", "4 steps"),
            lw.Stage(
                "b",
                "4 epochs",
                phases=[
                    lw.Phase("often", lambda batch: None, optimizers=()),
                    lw.Phase("rare", lambda batch: None, optimizers=(), every=17),
                ],
            ),
        ),
        "phase 'rare': every=17 is never due in this run, which has 16 steps; take a smaller one, or leave the phase "
        "out",
    ),
    "records after the end": (
        of(log_every="at 99 epochs"),
        "log_every: 'at 99 epochs' comes after the end of this run, which has 2 epochs",
    ),
    "validations after the end": (
        of(validate_every="at 7 steps", valid=DATA),
        "validate_every: 'at 7 steps' comes after the end of this run, which has 6 steps",
    ),
    "what begins after the end": (
        of(log_every="2 steps & after 3 epochs", steps=6),
        "log_every: '2 steps & after 3 epochs' comes after the end of this run, which has 2 epochs",
    ),
    "a callback after the end": (
        of(lw.Stage("a", "2 steps"), lw.Stage("b", "1 epoch"), callbacks=[lw.Throughput("at 6 steps")]),
        "Throughput: 'at 6 steps' comes after the end of this run, which has 5 steps",
    ),
    "an average that never begins": (
        of(callbacks=[lw.SWA("100 epochs")]),
        "SWA: '100 epochs' comes after the end of this run, which has 2 epochs",
    ),
    "an average that never takes the weights": (
        of(callbacks=[lw.EMA(0.9, every="5 epochs")]),
        "EMA: '5 epochs' comes after the end of this run, which has 2 epochs",
    ),
    "a look that never comes": (
        of(callbacks=[lw.Doctor(50, show=False)]),
        "Doctor: '50 steps' comes after the end of this run, which has 6 steps",
    ),
    "a measure that is never taken": (
        of(callbacks=[lw.Throughput(100)]),
        "Throughput: '100 steps' comes after the end of this run, which has 6 steps",
    ),
    "two that watch the same": (
        of(valid=DATA, callbacks=[lw.EarlyStopping("valid/loss"), lw.EarlyStopping("valid/loss")]),
        "two EarlyStopping have the same settings, and the second one does the same again; leave it out",
    ),
    "a score that is to fall": (
        of(valid=DATA, callbacks=[lw.EarlyStopping("valid/accuracy", mode="min")]),
        "EarlyStopping monitors 'valid/accuracy' with mode='min', and its name tells the other way; leave mode out, or "
        "give the value a name that does not tell",
    ),
}


@pytest.mark.parametrize("case", IDLE)
def test_what_is_idle_is_warned_of_with_its_line_and_trains_all_the_same(case: str) -> None:
    make, told = IDLE[case]
    user, task, given = make()
    plan = user.plan(task, DATA, **given)
    assert plan.warnings == [told]
    assert plan.problems == []
    place = plan.places[told]
    assert place.rpartition(":")[0].endswith(("test_idle.py", "tiny.py"))
    assert f"warning: {told} (at {place})" in str(plan)
    user, task, given = make()
    with pytest.warns(lw.LoopwrightWarning) as caught:
        run = user.fit(task, DATA, **given)
    assert [str(one.message).partition(" (at ")[0] for one in caught] == [told]
    assert run.status == "done"


def test_what_was_said_to_the_trainer_is_told_once_with_its_line() -> None:
    stages = [lw.Stage(name, "1 epoch") for name in "ab"]
    plan = trainer(accumulate=4, validate_every="at 9 epochs").plan(sgd_task(line()), DATA, DATA, stages=stages)
    assert len(plan.warnings) == 2
    assert all(plan.places[told].rpartition(":")[0].endswith("tiny.py") for told in plan.warnings)
    stages = [lw.Stage("a", "1 epoch", accumulate=4), lw.Stage("b", "1 epoch", accumulate=5)]
    plan = trainer().plan(sgd_task(line()), DATA, stages=stages)
    assert [plan.places[told].rpartition("/")[2].partition(":")[0] for told in plan.warnings] == ["test_idle.py"] * 2


def test_a_checkpoint_that_is_never_written_is_warned_of(folder: Path) -> None:
    told = "Checkpoint: '1000 steps' comes after the end of this run, which has 6 steps"
    saver = lw.Checkpoint("1000 steps", at_end=False)
    assert trainer(epochs=2, folder=folder, checkpoint=saver).plan(sgd_task(line()), DATA).warnings == [told]
    for other in (lw.Checkpoint("1000 steps"), lw.Checkpoint("6 steps", at_end=False)):
        assert trainer(epochs=2, folder=folder, checkpoint=other).plan(sgd_task(line()), DATA).warnings == []


BUSY = {
    "a pattern of what trains": of(lw.Stage("a", "1 epoch", freeze="module.0.*")),
    "as many batches to a step as there are": of(accumulate=3),
    "a phase that is due at the last step": of(
        lw.Stage("a", "2 epochs", phases=[
            lw.Phase("p", lambda batch: None, optimizers=()), lw.Phase("q", lambda batch: None, optimizers=(), every=6),
        ]),
    ),
    "a phase of a run whose length nobody knows": of(
        lw.Stage("a", "0.05 s", phases=[
            lw.Phase("p", lambda batch: None, optimizers=()), lw.Phase("q", lambda _: None, optimizers=(), every=999),
        ]),
    ),
    "a step of data whose length nobody knows": lambda: (
        trainer(steps=2, accumulate=9), sgd_task(line()), {"train": lambda: iter(DATA)},
    ),
    "records at the last step": of(log_every="at 6 steps | at 2 epochs"),
    "records of which one comes": of(log_every="at 99 epochs | 2 steps"),
    "a moment in a run that ends by the clock": of(log_every="at 99 epochs", time="0.01 s"),
    "an interval that is longer than the run": of(log_every="500 steps"),
    "two that watch with another patience": of(
        valid=DATA, callbacks=[lw.EarlyStopping("valid/loss"), lw.EarlyStopping("valid/loss", patience=9)],
    ),
    "two of the user's own": of(callbacks=[acts(), acts()]),
    "two penalties": of(callbacks=[lw.Penalty("l2", 0.1), lw.Penalty("l2", 0.1)]),
    "what looks at the last step": of(callbacks=[lw.Doctor(6, show=False), lw.Throughput(6), lw.SWA("2 epochs")]),
    "a rehearsal": of(accumulate=3, log_every="at 2 epochs", debug=lw.Debug(dev_run=2)),
}  # fmt: skip


@pytest.mark.parametrize("case", BUSY)
def test_what_does_something_is_not_warned_of(case: str) -> None:
    user, task, given = BUSY[case]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert user.fit(task, **{"train": DATA, **given}).status == "done"


def test_a_task_that_goes_on_counts_what_it_has_done() -> None:
    task = sgd_task(line())
    trainer(epochs=2).fit(task, DATA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(epochs=3, log_every="at 3 epochs").fit(task, DATA)
    with pytest.warns(lw.LoopwrightWarning, match="'at 5 epochs' comes after the end of this run, which has 4 epochs"):
        trainer(epochs=4, log_every="at 5 epochs").fit(task, DATA)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: {"callbacks": [one := lw.EarlyStopping("valid/loss"), one]},
         "one EarlyStopping is given twice; leave it out once"),
        (lambda folder: {"checkpoint": [one := lw.Checkpoint(), one], "folder": folder},
         "one Checkpoint is given twice; leave it out once"),
        (lambda folder: {"callbacks": [lw.Plateau("valid/loss")]},
         "Plateau ends a stage, and is given to none: lw.Stage(..., until=['9 epochs', lw.Plateau(...)]). "
         "lw.EarlyStopping stops a run, and schedule=torch.optim.lr_scheduler.ReduceLROnPlateau lowers the rate"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(make: Any, told: str, folder: Path) -> None:
    plan = trainer(epochs=1, **make(folder)).plan(sgd_task(line()), DATA, DATA)
    assert plan.problems == [told]
    assert plan.places[told].rpartition(":")[0].endswith("tiny.py")


def test_checkpoints_are_given_in_one_place() -> None:
    for checkpoint in (False, lw.Checkpoint("2 steps")):
        with pytest.raises(lw.SettingError) as caught:
            trainer(epochs=1, folder="runs", callbacks=[lw.Checkpoint("1 step")], checkpoint=checkpoint)
        assert str(caught.value) == (
            f"a Checkpoint is among the callbacks, and checkpoint={checkpoint!r} says otherwise; give all of them in "
            "one place: checkpoint=[lw.Checkpoint(...), ...]"
        )


def test_an_interval_of_a_stage_without_validation_is_refused() -> None:
    stages = [lw.Stage("a", "1 epoch", validate_every="2 steps"), lw.Stage("b", "1 epoch", valid=DATA)]
    told = "stage 'a': validate_every='2 steps', but there is no validation data; pass fit(..., valid=loader)"
    plan = trainer().plan(sgd_task(line()), DATA, stages=stages)
    assert plan.problems == [told]
    assert plan.places[told].rpartition(":")[0].endswith("test_idle.py")
    both = [lw.Stage("a", "1 epoch"), lw.Stage("b", "1 epoch", valid=DATA)]
    assert trainer(validate_every="2 steps").plan(sgd_task(line()), DATA, stages=both).problems == []
    neither = trainer(validate_every="2 steps").plan(sgd_task(line()), DATA, stages=[both[0], lw.Stage("c", "1 step")])
    assert neither.problems == [
        "validate_every='2 steps', but there is no validation data; pass fit(..., valid=loader)"
    ]


@pytest.mark.parametrize("name", ["lr_find", "batch_size_find"])
def test_an_argument_that_a_finder_lacks_is_told_with_the_nearest(name: str) -> None:
    wrong, told = {
        "lr_find": ("mn_lr", "mn_lr=1: there is no such argument. Known: 'end', 'smooth', 'start', 'steps', 'stop_at', "
                    "'task', 'train', 'trainer'. Did you mean 'start', called min_lr elsewhere?"),
        "batch_size_find": ("limt", "limt=1: there is no such argument. Known: 'data', 'limit', 'start', 'steps', "
                            "'task', 'trainer'. Did you mean 'limit'?"),
    }[name]  # fmt: skip
    with pytest.raises(TypeError) as caught:
        getattr(lw, name)(trainer(), sgd_task(line()), DATA, **{wrong: 1})
    assert str(caught.value) == told
    with pytest.raises(TypeError, match="min_lr=1: that argument is called start here"):
        lw.lr_find(trainer(), sgd_task(line()), DATA, min_lr=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("modul.1.*", "Known: 'module.0.*', 'module.1.*'. Did you mean 'module.1.*'?"),
        ("1.*", "Known: 'module.0.*', 'module.1.*'. Did you mean 'module.1.*'?"),
        ("module.2.weight", "Known: 'module.0.bias', 'module.0.weight', 'module.1.bias', 'module.1.weight'. Did you "
         "mean 'module.1.weight'?"),
        ("head.*", "Known: 'module.0.bias', 'module.0.weight', 'module.1.bias', 'module.1.weight'."),
    ],
)  # fmt: skip
def test_a_pattern_without_a_match_is_told_what_it_could_be(pattern: str, told: str) -> None:
    plan = trainer().plan(sgd_task(two()), DATA, stages=[lw.Stage("a", "1 epoch", train=pattern)])
    problem = f"the pattern {pattern!r} matches no parameter. {told}"
    assert plan.problems == [problem]
    assert plan.places[problem].rpartition(":")[0].endswith("test_idle.py")


@pytest.mark.parametrize(
    ("monitor", "hint"),
    [("valid/los", " Did you mean 'valid/loss'?"), ("valid/near/acuracy", " Did you mean 'valid/near/accuracy'?"),
     ("valid/profit", "")],
)  # fmt: skip
def test_a_name_whose_direction_is_not_known_may_be_a_slip(monitor: str, hint: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.EarlyStopping(monitor)
    assert str(caught.value) == (
        f"whether {monitor!r} should fall or rise does not follow from its name; add mode='min' (smaller is better) or "
        f"mode='max'{'.' if hint else ''}{hint}"
    )


def test_one_of_two_adversaries_may_be_waited_for_to_rise() -> None:
    """The loss of a phase is not what all of the training makes smaller."""
    one, other = line(), line()

    class Two(lw.Task):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = one, other

        def configure_optimizers(self) -> Any:
            return {"one": torch.optim.SGD(one.parameters(), 0.1), "other": torch.optim.SGD(other.parameters(), 0.1)}

        def phases(self) -> list[lw.Phase]:
            return [lw.Phase(name, lambda batch, name=name: getattr(self, name)(batch[0]).mean(), name)
                    for name in ("one", "other")]  # fmt: skip

    plan = trainer(epochs=1, callbacks=[lw.EarlyStopping("train/one/loss", mode="max")]).plan(Two(), DATA)
    assert plan.problems == []


def test_losses_of_stages_that_cannot_be_compared_are_warned_of(folder: Path) -> None:
    def planned(one: Any, *, own: bool = False, **settings: Any) -> list[str]:
        callbacks = [] if one is None else [one]
        other = {"loss": nn.L1Loss()}
        stages = [
            lw.Stage("a", "1 epoch", callbacks=callbacks if own else []), lw.Stage("b", "1 epoch", **other),
        ]  # fmt: skip
        user = trainer(callbacks=[] if own else callbacks, **settings)
        task = sgd_task(line(), metrics={"accuracy": lw.metrics.Accuracy(threshold=0.0)})
        return list(user.plan(task, DATA, DATA, stages=stages).warnings)

    (told,) = planned(lw.EarlyStopping("valid/loss", restore="best"))
    assert told == (
        "EarlyStopping monitors 'valid/loss' over stages with other losses (a, b), whose values cannot be compared; "
        "monitor a metric, or give each stage an EarlyStopping of its own"
    )
    (told,) = planned(None, checkpoint=lw.Checkpoint(monitor="train/loss"), folder=folder)
    assert told.endswith("(a, b), whose values cannot be compared; monitor a metric")
    assert planned(lw.EarlyStopping("valid/loss"), own=True) == []
    assert planned(lw.EarlyStopping("valid/accuracy")) == planned(lw.KeepBest("valid/loss")) == []
