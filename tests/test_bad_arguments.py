"""Slips of the hand in arguments and names: each error names what was given, and what to type in its place."""

from __future__ import annotations

import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import loopwright as lw
from loopwright.errors import DataError, LoopwrightError, LoopwrightWarning, PlanError, SettingError
from tiny import classifier, samples, trainer

X, Y = samples(24)
DATA = [(X, Y)]


def task_of(**more: Any) -> lw.Supervised:
    net = classifier()
    return lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), **more)


def fitted(**more: Any) -> lw.Run:
    return trainer(epochs=1).fit(task_of(**more), DATA)


@pytest.mark.parametrize(
    "metrics", [lw.metrics.Accuracy(), lw.metrics.Accuracy, [lw.metrics.Accuracy()], lw.metrics.F1()]
)
def test_metrics_without_names_are_told_how_to_be_named(metrics: Any) -> None:
    with pytest.raises(
        SettingError, match=r"expected a dict with a name for each: metrics=\{\"accuracy\": \w+\(\.\.\.\)\}"
    ):
        task_of(metrics=metrics)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_to_measure_nothing_is_no_success(verb: str) -> None:
    with pytest.raises(DataError, match="cannot read batches from None"):
        getattr(trainer(), verb)(task_of(), None)


def test_a_data_module_without_the_data_to_validate_on_is_told() -> None:
    with pytest.raises(DataError):
        trainer().validate(task_of(), lw.DataModule())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t: t.fit(task_of(), DATA, val=DATA), "val=...: that argument is called valid here"),
        (lambda t: t.fit(task_of(), DATA, vald=DATA), "vald=...: there is no such argument. Known: 'resume', 'stages', "
         "'task', 'train', 'valid', 'weight'. Did you mean 'valid'?"),
        (lambda t: t.validate(task_of(), DATA, wieght=1), "wieght=1: there is no such argument. Known: 'data', 'task', "
         "'weight'. Did you mean 'weight'?"),
        (lambda t: t.test(task_of(), DATA, dta=1), "dta=1: there is no such argument. Known: 'data', 'task', 'weight'. "
         "Did you mean 'data'?"),
        (lambda t: t.predict(task_of(), DATA, batch_size=8), "batch_size=8: there is no such argument. Known: 'data', "
         "'task'."),
        (lambda t: t.run(lambda run, batch: None, DATA, valid=3), "valid=3: there is no such argument. Known: 'data', "
         "'resume', 'state', 'step', 'weight'."),
        (lambda t: t.plan(task_of(), DATA, val=3), "val=3: that argument is called valid here"),
        (lambda t: t.explain(task_of(), DATA, vald=3), "vald=3: there is no such argument. Known: 'of', 'stages', "
         "'state', 'task', 'train', 'valid'. Did you mean 'valid'?"),
        (lambda t: lw.metrics.Accuracy(topk=2), "topk=2: there is no such argument. Known: 'average', 'ignore_index', "
         "'preds', 'target', 'threshold', 'top_k'. Did you mean 'top_k'?"),
        (lambda t: t.fit(task_of(), train_loader=DATA), "train_loader=...: that argument is called train here"),
        (lambda t: t.fit(model=task_of()), "model=...: that argument is called task here"),
        (lambda t: t.fit(task_of(), loaders={"train": DATA}), "loaders=...: there is no such argument here; write "
         "fit(task, train=loaders['train'], valid=loaders['valid'])"),
        (lambda t: t.fit(task_of()), "train missing; write fit(task, train, ...)"),
        (lambda t: t.run(dta=DATA), "dta=...: there is no such argument. Known: 'data', 'resume', 'state', 'step', "
         "'weight'. Did you mean 'data'?"),
        (lambda t: t.run(), "step and data missing; write run(step, data, ...)"),
        (lambda t: t.fit(task_of(), DATA, epochs=3), "epochs=3: there is no such argument here; write "
         "lw.Trainer(epochs=...)"),
        (lambda t: t.fit(task_of(), DATA, dry=True), "dry=True: there is no such argument here; write "
         "trainer.plan(task, ...)"),
        (lambda t: lw.Trainer(gpus=1), "gpus=1: that argument is called devices here"),
        (lambda t: lw.Trainer(lr=0.1), "lr=0.1: there is no such argument here; write "
         "torch.optim.AdamW(net.parameters(), lr=...)"),
    ],
)  # fmt: skip
def test_an_unknown_argument_names_the_nearest(call: Callable[[lw.Trainer], Any], said: str) -> None:
    with pytest.raises(TypeError) as caught:
        call(trainer(epochs=1))
    assert str(caught.value) == said


class Unread(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        raise AssertionError("a batch was read")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t: t.run(task_of(), DataLoader(Unread())),
         "Supervised is a task, and no function step(run, batch); call trainer.fit(task, ...)"),
        (lambda t: t.fit(task_of(), {"train": DataLoader(Unread()), "valid": Unread()}),
         "a dict of data sets ('train', 'valid') is not data to train on; give each its place: fit(task, train=..., "
         "valid=...)"),
        (lambda t: t.on(lw.Event.EPOCH_END, print_epoch),
         "trainer.on(EPOCH_END, print_epoch) registers nothing; write trainer.on(EPOCH_END)(print_epoch). A function "
         "that a handler is to be called with is given by name: trainer.on(event, fn=...)"),
        (lambda t: t.on(lw.Event.STEP_END(every=2), print_epoch),
         "trainer.on(STEP_END(every=2), print_epoch) registers nothing; write trainer.on(STEP_END(every=2))"
         "(print_epoch). A function that a handler is to be called with is given by name: trainer.on(event, fn=...)"),
    ],
)  # fmt: skip
def test_what_is_given_to_another_verb_is_told_before_a_batch_is_read(
    call: Callable[[lw.Trainer], Any], said: str
) -> None:
    with pytest.raises(LoopwrightError) as caught:
        call(trainer(epochs=1))
    assert str(caught.value) == said


def print_epoch(run: lw.Run) -> None:
    print(run.progress.epoch)


def test_a_handler_takes_functions_that_cannot_be_handlers_and_any_by_name() -> None:
    user, seen = trainer(epochs=1), list[float]()
    user.on(lw.Event.FIT_END, lambda: 1.0)(lambda run, make: seen.append(make()))
    user.on(lw.Event.FIT_END, make=lambda run: 2.0)(lambda run, make: seen.append(make(run)))
    user.fit(task_of(), DATA)
    assert seen == [1.0, 2.0]


def test_the_verbs_keep_their_signatures() -> None:
    names = ["self", "task", "train", "valid", "stages", "weight", "resume"]
    assert list(inspect.signature(lw.Trainer.fit).parameters) == names
    assert list(inspect.signature(lw.metrics.Mean).parameters) == ["value", "weight"]
    assert lw.Trainer.fit.__doc__ is not None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: trainer(epochs="25%"), "epochs='25%' is a part of a whole whose length nothing else says; write "
         "epochs=10, or epochs=0.25 for a quarter of an epoch"),
        (lambda: trainer(epochs="3 batches"), "epochs='3 batches' is not a number of epochs; write fit(..., "
         "stages=[lw.Stage('all', until='3 batches')]) instead"),
        (lambda: trainer(epochs=0), "epochs=0: expected a positive number, such as epochs=10"),
        (lambda: trainer(log_every=None), "log_every=None is not a duration; write a number and a unit, such as "
         "'500 steps', '2 epochs', '10 min' or '1e6 samples'"),
        (lambda: trainer(log_every=0), "log_every=0: the duration 0 must be a positive number"),
        (lambda: trainer(validate_every=0), "validate_every=0: the duration 0 must be a positive number"),
        (lambda: lw.Checkpoint(every=0), "Checkpoint: every=0: the duration 0 must be a positive number"),
        (lambda: trainer().fit(task_of(), DATA, stages=[lw.Stage("a", "1 epoch", validate_every=0)]),
         "validate_every=0: the duration 0 must be a positive number"),
        (lambda: trainer().fit(task_of(), DATA, stages=[lw.Stage("a", 0)]),
         "until=0: the duration 0 must be a positive number"),
    ],
)  # fmt: skip
def test_a_duration_that_cannot_be_names_its_argument(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(SettingError) as caught:
        make()
    assert str(caught.value) == said


def test_what_the_error_of_batches_advises_trains() -> None:
    run = lw.Trainer(folder=None, progress=False).fit(
        task_of(), [*DATA] * 9, stages=[lw.Stage("all", until="3 batches")]
    )
    assert run.progress.step == 3


# ------------------------------------------------------------------------------------------------------- functions


class Both(lw.DataModule):
    def train_data(self) -> Any:
        return DATA

    def valid_data(self) -> Any:
        return DATA


def test_a_function_takes_a_data_module_that_has_data_to_validate_on() -> None:
    run = trainer(epochs=2).run(lambda run, batch: None, Both(), state={})
    assert run.progress.step == 2
    assert run.status == "done"


def test_a_function_is_not_told_to_pass_what_it_cannot() -> None:
    with pytest.raises(PlanError) as caught:
        trainer(epochs=1, validate_every=3).run(lambda run, batch: None, DATA, state={})
    assert "fit(" not in str(caught.value)
    assert "leave it out, and call trainer.validate(...) in a handler" in str(caught.value)


# ----------------------------------------------------------------------------------------------- names that are none


@pytest.mark.capability("TB-06")
@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("epoch", "write run.progress.epoch"),
        ("step", "write run.progress.step"),
        ("global_step", "write run.progress.step"),
        ("net", "write run.models, a dict by name, or run.task"),
        ("model", "write run.models"),
        ("optimizer", "write run.optimizers"),
        ("grads", "write parameter.grad of run.models, in on_grads_ready"),
        ("preds", "write output['preds']; what a step returned is passed as output to map_output, on_backward_end"),
        ("histroy", "Did you mean 'history'"),
    ],
)
def test_what_is_asked_of_a_run_by_another_name_is_told(name: str, instead: str) -> None:
    run = fitted()
    with pytest.raises(AttributeError) as caught:
        getattr(run, name)
    assert instead in str(caught.value)


def test_where_nothing_is_near_nothing_is_offered() -> None:
    with pytest.raises(AttributeError) as caught:
        fitted().qqq  # noqa: B018
    assert "Did you mean" not in str(caught.value)


def test_a_value_that_was_not_logged_names_those_that_were() -> None:
    run = fitted(metrics={"accuracy": lw.metrics.Accuracy()})
    with pytest.raises(KeyError) as caught:
        run.metrics["train/acuracy"]
    assert "Known: 'lr', 'train/accuracy', 'train/loss'. Did you mean 'train/accuracy'?" in str(caught.value)
    assert run.metrics.get("train/acuracy") is None
    assert type(pickle.loads(pickle.dumps(run.metrics))) is type(pickle.loads(pickle.dumps(run.latest))) is dict


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ITERATION_COMPLETED", "it is called lw.Event.STEP_END here"),
        ("EPOCH_COMPLETED", "it is called lw.Event.EPOCH_END here"),
        ("STARTED", "it is called lw.Event.FIT_START here"),
        ("COMPLETED", "it is called lw.Event.FIT_END here"),
        ("EPOCH_ENDS", "Did you mean 'EPOCH_END'?"),
    ],
)
def test_an_event_that_is_none_names_the_one_that_is_meant(name: str, said: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(lw.Event, name)
    assert said in str(caught.value)
    assert not hasattr(lw.Event, "_nothing")


# ------------------------------------------------------------------------------------------------------- optimizers


class Several(lw.Task):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.a, self.b, self.kind = classifier(), classifier(), kind

    def training_step(self, batch: Any) -> Any:
        return self.a(batch[0]).mean() + self.b(batch[0]).mean()

    def configure_optimizers(self) -> Any:
        return self.kind(torch.optim.SGD(net.parameters(), 0.1) for net in (self.a, self.b))


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_optimizers_are_asked_for_their_names(kind: type) -> None:
    with pytest.raises(SettingError, match="returned 2 optimizers without names; return a dict, such as"):
        trainer(epochs=1).fit(Several(kind), DATA)


@pytest.mark.parametrize(
    ("schedule", "way"),
    [
        (
            torch.optim.lr_scheduler.CosineAnnealingLR,
            "Write: schedule=lambda optimizer: CosineAnnealingLR(optimizer, ...)",
        ),
        (lw.schedules.cosine, "Write: schedule=lw.schedules.cosine(...)"),
    ],
)
def test_the_class_of_a_schedule_is_told_how_to_be_made(schedule: Any, way: str) -> None:
    with pytest.raises(SettingError) as caught:
        fitted(schedule=schedule)
    assert str(caught.value).endswith(way)


def shown(names: list[str], **more: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bar = lw.ProgressBar(metrics=names, mode="lines", file=io.StringIO())
        lw.Trainer(1, folder=None, progress=bar).fit(task_of(metrics={"accuracy": lw.metrics.Accuracy()}), DATA, **more)
    return [str(one.message) for one in told if issubclass(one.category, LoopwrightWarning)]


def test_a_bar_that_is_to_show_what_nothing_produces_is_told_once() -> None:
    (told,) = shown(["train/loss", "train/acuracy", "lr"])
    assert told.startswith("ProgressBar shows 'train/acuracy', which nothing produces. Known: 'train/accuracy', ")
    assert "Did you mean 'train/accuracy'?" in told
    assert shown(["train/loss", "train/accuracy", "lr", "valid/loss"]) == []
    assert len(shown(["valid/acuracy", "valid/accuracy"], valid=DATA)) == 1
