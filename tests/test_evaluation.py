"""validate, test and predict: known values, in order, and a model that is afterwards as it was."""

from __future__ import annotations

import random
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import loopwright as lw
from tiny import acts, bits, classifier, line, loader, pairs, recorder, same, samples, seed_all, sgd_task, trainer

Pair = namedtuple("Pair", ["first", "second"])


class Parity(lw.Task):
    """Predicts x; every method of a task does something else, so that it shows which was called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = line(1.0)
        self.seen: list[str] = []

    def training_step(self, batch: Any) -> Any:
        self.seen.append("training")
        x, y = batch
        return {"loss": self.net(x).mean(), "preds": x[:, 0].long(), "target": y[:, 0].long(), "extra": x.max()}

    def validation_step(self, batch: Any) -> Any:
        self.seen.append("validation")
        return {**self.training_step(batch), "extra": 7}

    def predict_step(self, batch: Any) -> Any:
        return {"twice": batch[0] * 2, "both": (batch[0], [batch[1] + 1]), "pair": Pair(batch[0], batch[1])}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def configure_metrics(self) -> dict[str, Any]:
        return {"accuracy": lw.metrics.Accuracy()}


@pytest.mark.capability("PL-02", "PL-03")
def test_a_task_class_and_fit_are_all_that_training_needs() -> None:
    """A class with two steps and configure_optimizers, and one call of fit: trained and measured."""
    task = Parity()
    run = trainer(epochs=2).fit(task, pairs([1], [2, 3]), pairs([0, 0, 1], [4]))
    assert task.net.weight.item() == 1 - 2 * (1 + 2.5)
    assert task.seen == [*["training"] * 2, *["validation", "training"] * 2] * 2
    assert run.history["train/loss"] == [pytest.approx((1 + 2 * 0.0) / 3), pytest.approx((-2.5 + 2 * -8.75) / 3)]
    assert run.history["train/extra"] == [pytest.approx((1 + 2 * 3) / 3)] * 2
    assert run.metrics["valid/extra"] == 7.0
    assert run.metrics["valid/loss"] == -6.0 * 5 / 4
    assert run.metrics["valid/accuracy"] == 0.5  # x is the prediction and 0 the target: 2 of 4
    assert run.history["train/accuracy"] == [0.0, 0.0]


@pytest.mark.capability("IG-03", "IG-14", "PL-22")
def test_validate_and_test_give_the_means_over_all_samples() -> None:
    """A metric attached to a task is computed over a loader; a test reuses validation_step under other names."""
    data = pairs([0, 0, 1], [4])
    task = Parity()
    expected = {"loss": 1.25, "extra": 7.0, "accuracy": 0.5}
    assert trainer().validate(task, data) == pytest.approx({f"valid/{name}": v for name, v in expected.items()})
    assert trainer().test(task, data) == pytest.approx({f"test/{name}": v for name, v in expected.items()})

    class Own(Parity):
        def test_step(self, batch: Any) -> Any:
            return {"only": len(batch[0])}

        def configure_metrics(self) -> dict[str, Any]:
            return {}

    assert trainer().test(Own(), data) == {"test/only": (3 * 3 + 1) / 4}


@pytest.mark.capability("PL-22")
def test_several_loaders_are_named() -> None:
    """With a dict of loaders each value carries the name of its loader, in fit, validate and test."""
    loaders = {"clean": pairs([0, 2], [4]), "noisy": pairs([8])}
    expected = {"clean/loss": 2.0, "clean/extra": 7.0, "clean/accuracy": 1 / 3}
    expected |= {"noisy/loss": 8.0, "noisy/extra": 7.0, "noisy/accuracy": 0.0}
    for name, values in (("valid", trainer().validate(Parity(), loaders)), ("test", trainer().test(Parity(), loaders))):
        assert values == pytest.approx({f"{name}/{key}": value for key, value in expected.items()})
    run = trainer(epochs=1).fit(Parity(), pairs([0]), loaders)
    assert {k: v for k, v in run.metrics.items() if k.startswith("valid/")} == pytest.approx(
        {f"valid/{key}": value for key, value in expected.items()}
    )


def test_predictions_come_in_order_with_their_nesting() -> None:
    data = pairs([1, 2], [3])
    found = trainer().predict(Parity(), data)
    assert found["twice"].flatten().tolist() == [2.0, 4.0, 6.0]
    assert found["both"][0].flatten().tolist() == [1.0, 2.0, 3.0]
    assert isinstance(found["both"], tuple)
    assert isinstance(found["both"][1], list)
    assert found["both"][1][0].flatten().tolist() == [1.0, 1.0, 1.0]
    assert type(found["pair"]) is Pair
    assert found["pair"].first.shape == (3, 1)


def test_predict_reads_arrays_in_their_order_and_holds_no_graph() -> None:
    x = torch.arange(150.0).view(-1, 1)
    for data in (x, (x,), TensorDataset(x), DataLoader(TensorDataset(x), 7), (x, torch.zeros(150))):
        preds = trainer().predict(sgd_task(line(2.0)), data)
        assert torch.equal(preds, 2 * x)
        assert not preds.requires_grad


def test_predict_of_other_things_is_a_list_with_one_entry_a_batch() -> None:
    class Words(Parity):
        def predict_step(self, batch: Any) -> Any:
            return f"{len(batch[0])} rows"

    assert trainer().predict(Words(), pairs([1, 2], [3])) == ["2 rows", "1 rows"]


def test_predictions_of_single_numbers_are_joined() -> None:
    class Sums(Parity):
        def predict_step(self, batch: Any) -> Any:
            return batch[0].sum()

    assert trainer().predict(Sums(), pairs([1, 2], [3])).tolist() == [3.0, 3.0]


# ------------------------------------------------------------------------------------------------ nothing is changed


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_each_module_gets_its_own_flag_back_also_after_an_error(verb: str) -> None:
    net = classifier(dropout=0.5, batch_norm=True)
    net[1].eval()  # a frozen batch norm
    task = sgd_task(net, loss=nn.CrossEntropyLoss())
    flags = [m.training for m in task.modules()]
    seen = []
    net[3].register_forward_hook(lambda module, *rest: seen.append([m.training for m in net.modules()]))
    before = bits(net)
    getattr(trainer(), verb)(task, loader(batch_size=7, noisy=True))
    assert [m.training for m in task.modules()] == flags
    assert same(bits(net), before)
    assert seen == [[False] * len(list(net.modules()))] * 6

    def fail(run: lw.Run, *args: Any) -> None:
        raise ValueError("in a hook")

    with pytest.raises(ValueError, match="in a hook"):
        getattr(trainer(callbacks=[acts(on_eval_batch_end=fail, on_predict_batch_end=fail)]), verb)(
            task, loader(batch_size=7, noisy=True)
        )
    assert [m.training for m in task.modules()] == flags
    assert same(bits(net), before)


def test_a_frozen_module_stays_in_eval_mode_while_training() -> None:
    net = classifier(batch_norm=True)
    net[1].eval()
    mean = net[1].running_mean.clone()
    trainer(epochs=1).fit(sgd_task(net, loss=nn.CrossEntropyLoss()), [samples()], [samples()])
    assert torch.equal(net[1].running_mean, mean)
    assert [m.training for m in net] == [True, False, True, True]


def test_a_model_in_eval_mode_is_set_to_train_mode_and_it_is_said() -> None:
    net = classifier(dropout=0.5).eval()
    with pytest.warns(UserWarning, match="^model was in eval mode; it has been set to train mode$"):
        trainer(epochs=1).fit(sgd_task(net, loss=nn.CrossEntropyLoss()), [samples()])
    assert all(m.training for m in net.modules())


def test_handlers_may_draw_random_numbers_while_evaluating() -> None:
    seed_all(1)
    before = bits()
    user = trainer()

    @user.on(lw.Event.VALIDATION_START | lw.Event.EVAL_BATCH_END | lw.Event.VALIDATION_END)
    def draw(run: lw.Run) -> None:
        torch.rand(3), random.random(), np.random.rand()

    user.validate(sgd_task(classifier(), loss=nn.CrossEntropyLoss()), loader(batch_size=7, shuffle=True, noisy=True))
    assert same(bits(), before)


# -------------------------------------------------------------------------------------------------------- when, errors


@pytest.mark.parametrize(
    ("every", "settings", "steps"),
    [
        ("1 epoch", {"epochs": 3}, [3, 6, 9]),
        ("2 epochs", {"epochs": 3}, [6, 9]),  # and at the end
        ("2 steps", {"epochs": 2}, [2, 4, 6]),
        (4, {"epochs": 2}, [4, 6]),
        ("1 epoch", {"steps": 4}, [3, 4]),
        ("0.5 epochs", {"epochs": 1}, [2, 3]),
    ],
)
def test_validation_is_due_after_so_many_completed_units(
    every: Any, settings: dict[str, Any], steps: list[int]
) -> None:
    seen: list[int] = []
    user = trainer(validate_every=every, **settings)
    user.on(lw.Event.VALIDATION_END)(lambda run: seen.append(run.progress.step))
    user.fit(sgd_task(line()), pairs([1], [2], [3]), pairs([1]))
    assert seen == steps


def test_an_epoch_record_holds_the_validation_of_that_epoch_only() -> None:
    run = trainer(epochs=3, validate_every="2 epochs").fit(sgd_task(line()), pairs([1]), pairs([1]))
    assert run.history["valid/loss"] == [None, -2.0, -3.0]  # the last epoch always has one
    assert run.metrics["valid/loss"] == -3.0


def test_an_error_while_evaluating_says_in_which_batch() -> None:
    def broken() -> Any:
        yield from pairs([1], [2])
        raise OSError("disk")

    with pytest.raises(OSError, match="disk") as caught:
        trainer().test(sgd_task(line()), broken)
    assert "[loopwright] in test, batch 2" in caught.value.__notes__


def test_data_that_is_used_up_is_refused() -> None:
    used = iter([])
    with pytest.raises(lw.DataError) as caught:
        trainer().validate(sgd_task(line()), used)
    assert str(caught.value) == (
        "the valid data gave no batch. If it is an iterator, it is used up: pass a list or a DataLoader"
    )


def test_an_output_is_not_kept_by_the_loop() -> None:
    """Predictions and batches of a validation are let go one by one: at most two are alive at a time."""
    import weakref

    alive: list[Any] = []
    most = []

    def watch(run: lw.Run, output: Any, batch: Any) -> None:
        alive.append(weakref.ref(output["preds"]))
        most.append(sum(ref() is not None for ref in alive))

    trainer(callbacks=[acts(on_eval_batch_end=watch)]).validate(sgd_task(line()), pairs([1], [2], [3], [4]))
    assert max(most) <= 2


def test_validation_inside_a_handler_does_not_disturb_the_fit() -> None:
    ends, seen = [], []
    for extra in (False, True):
        seed_all(2)
        net = classifier(dropout=0.5)
        task = sgd_task(net, lr=0.1, loss=nn.CrossEntropyLoss())
        user = trainer(epochs=2)
        if extra:
            other = trainer(callbacks=[recorder([])])
            user.on(lw.Event.STEP_END)(lambda run, o=other, t=task: seen.append(o.validate(t, loader(batch_size=7))))
        user.fit(task, loader(batch_size=7, shuffle=True))
        ends.append(bits(net))
    assert len(seen) == 12
    assert same(*ends)


def test_a_loss_module_with_weights_is_part_of_the_model() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds: Tensor, target: Tensor) -> Tensor:
            assert self.training == self.expects
            return (preds * self.scale).mean()

    net, loss = line(1.0), Scaled()
    loss.expects = True
    optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=1.0)
    task = lw.Supervised(net, loss, optimizer)
    user = trainer(epochs=1)
    user.on(lw.Event.VALIDATION_START)(lambda run: setattr(loss, "expects", False))
    user.on(lw.Event.EPOCH_START)(lambda run: setattr(loss, "expects", True))
    run = user.fit(task, pairs([2]), pairs([2]))
    assert (net.weight.item(), loss.scale.item()) == (-1.0, -1.0)
    assert list(run.models) == ["model", "loss"]


def test_every_module_of_a_task_is_in_eval_mode_and_its_weights_are_saved() -> None:
    class More(lw.Supervised):
        def __init__(self) -> None:
            net = line()
            super().__init__(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=0.1))
            self.drop = nn.Dropout(0.5)
            self.seen: list[bool] = []

        def validation_step(self, batch: Any) -> Any:
            self.seen.append(self.drop.training)
            return super().training_step(batch)

    task = More()
    trainer(epochs=1).fit(task, pairs([1.0]), pairs([1.0]))
    assert task.seen == [False]
    assert task.drop.training
    task.more = nn.Linear(1, 1)
    problem = trainer(epochs=2).plan(task, pairs([1.0])).problems[0]
    assert problem.startswith("More.models() leaves out 2 parameters (more.weight, more.bias), which no checkpoint")


class Teacher(lw.Task):
    """Its training_step moves a teacher and counts in a buffer, in whatever data it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.teacher = line(1.0), line(0.0).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch: Any) -> Any:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.net.weight, 0.5)
        self.steps += 1
        return (self.net(batch[0]) - self.teacher(batch[0])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


class Measured(Teacher):
    def validation_step(self, batch: Any) -> Any:
        self.steps += 1  # it is meant
        return (self.net(batch[0]) - self.teacher(batch[0])).square().mean()


class OfTests(Teacher):
    test_step = Measured.validation_step


class Caches(nn.Sequential):
    """Its forward writes to a buffer that is not saved, and to an embedding whose rows it bounds."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.bounded = nn.Embedding(2, 3, max_norm=0.1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self[0](x) + 0 * self.bounded(x.new_zeros(1).long()).sum()


def test_a_training_step_that_changes_the_model_in_validation_is_told_once() -> None:
    data = pairs([1, 2], [0, 0])
    with pytest.warns(
        lw.LoopwrightWarning, match="in the valid data training_step changed teacher.weight, steps: what"
    ):
        run = trainer(epochs=2).fit(Teacher(), data, data)
    assert len(run.history) == 2
    trainer(epochs=2).fit(Measured(), data, data)
    trainer().test(OfTests(), data)
    trainer().validate(lw.Supervised(nn.LazyLinear(1), nn.MSELoss()), data)
    trainer(epochs=1).fit(sgd_task(Caches(line(1.0))), data, data)
    trainer(epochs=2).fit(sgd_task(nn.Sequential(nn.BatchNorm1d(1), line(1.0))), data, data)  # in eval mode it is still
