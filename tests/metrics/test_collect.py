"""What the loop holds: metrics fed by name, left out or refused for a reason, computed to numbers, saved mid-way."""

from __future__ import annotations

import copy
import random
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
)
from torchmetrics.segmentation import MeanIoU
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric, Running

import loopwright as lw
from loopwright import rng
from loopwright.errors import MetricError, SettingError
from loopwright.metrics import Accuracy, Mean, Meters, On, check_metrics, fresh


class Plain:
    """A metric of nobody's library, without a way to be saved."""

    def __init__(self, value: Any = 0.0) -> None:
        self.value, self.got = value, []  # type: ignore[var-annotated]

    def update(self, *args: Any) -> None:
        self.got.append(args)

    def compute(self) -> Any:
        return self.value

    def reset(self) -> None:
        self.got = []


def batch(seed: int, n: int = 30, c: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, c, generator=g)
    return {"loss": torch.rand((), generator=g), "preds": logits, "target": torch.randint(c, (n,), generator=g)}


# ------------------------------------------------------------------------------------------------------ feeding


def test_inputs_are_passed_by_name_and_in_order() -> None:
    plain, odd = Plain(), Plain()
    odd.inputs = ("target", "preds", "loss")  # type: ignore[attr-defined]
    meters = Meters({"plain": plain, "odd": odd, "on": On(Plain(), "loss")})
    output = batch(0)
    meters.feed(output)
    assert meters.metrics["plain"].got == [(output["preds"], output["target"])]
    assert meters.metrics["odd"].got == [(output["target"], output["preds"], output["loss"])]
    assert meters.metrics["on"].metric.got == [(output["loss"],)]
    assert plain.got == []  # the meters hold copies


def test_inputs_are_detached_at_any_depth() -> None:
    leaf = torch.ones(2, requires_grad=True)
    box: dict[str, Any] = {"boxes": leaf * 2, "names": ["a"]}
    meters = Meters({"a": On(Plain(), "x", "nested")})
    meters.feed({"x": leaf * 1, "nested": [box, (leaf, 3)]})
    ((x, nested),) = meters.metrics["a"].metric.got
    assert not x.requires_grad
    assert not nested[0]["boxes"].requires_grad
    assert not nested[1][0].requires_grad
    assert nested[0]["names"] == ["a"]
    assert box["boxes"].requires_grad


def test_a_training_step_without_inputs_leaves_a_metric_out() -> None:
    meters = Meters({"accuracy": Accuracy(), "mean": On(Mean(), "loss")}, training=True)
    meters.feed({"loss": torch.tensor(2.0)})
    assert meters.compute() == {"mean": 2.0}
    meters = Meters({"accuracy": Accuracy()}, training=True)
    meters.feed(torch.tensor(2.0))  # a step may return the loss alone
    assert meters.compute() == {}


def test_who_takes_part_is_settled_anew_after_a_reset() -> None:
    meters = Meters({"accuracy": Accuracy()}, training=True)
    meters.feed({"loss": torch.tensor(2.0)})
    meters.feed(batch(0))
    assert meters.compute() == {}
    meters.reset()
    meters.feed(batch(0))
    assert set(meters.compute()) == {"accuracy"}


READS = "metric 'accuracy' reads 'preds' and 'target' of what the step returns, which "


@pytest.mark.parametrize(
    ("output", "training", "message"),
    [
        ({"loss": 1.0, "pred": torch.ones(2), "target": torch.ones(2)}, True, READS + "has no 'preds'. Known: 'loss', "
         "'pred', 'target'. Did you mean 'pred'? Return it under this name, or name what to "
         "read: lw.metrics.On(Accuracy(...), 'pred', 'target')"),
        ({"loss": 1.0}, False, READS + "has no 'preds'. Known: 'loss'. Return it under this name, or name what to "
         "read: lw.metrics.On(Accuracy(...), 'loss', 'preds')"),
        (torch.tensor(1.0), False, READS + "is float32[]. Return a dict: "
         "{'loss': loss, 'preds': preds, 'target': target}"),
    ],
)  # fmt: skip
def test_missing_inputs_are_an_error_with_the_fix(output: Any, training: bool, message: str) -> None:
    with pytest.raises(MetricError) as error:
        Meters({"accuracy": Accuracy()}, training=training).feed(output)
    assert str(error.value) == message


@pytest.mark.parametrize("later", [{"preds": torch.ones(2)}, torch.tensor(1.0), None])
def test_inputs_that_disappear_later_are_an_error(later: Any) -> None:
    meters = Meters({"accuracy": Accuracy()}, training=True)
    meters.feed(batch(0))
    with pytest.raises(MetricError, match="metric 'accuracy' reads 'preds' and 'target'"):
        meters.feed(later)


def test_a_returned_number_may_not_have_the_name_of_a_metric() -> None:
    output = batch(0) | {"accuracy": torch.tensor(0.5)}
    with pytest.raises(MetricError, match="the step returns the number 'accuracy', and a metric has this name too"):
        Meters({"accuracy": Accuracy()}).feed(output)
    Meters({"accuracy": Accuracy()}, training=True).feed({"loss": torch.ones(()), "accuracy": torch.tensor(0.5)})


def test_what_a_metric_raises_keeps_its_type_and_names_the_metric() -> None:
    meters = Meters({"f1": MulticlassF1Score(num_classes=3)})
    with pytest.raises(RuntimeError, match="must match the size") as error:
        meters.feed({"preds": torch.zeros(4, 3), "target": torch.zeros(5, dtype=torch.int64)})
    assert error.value.__notes__ == ["[loopwright] in metric 'f1', given preds: float32[4, 3], target: int64[5]"]


# ---------------------------------------------------------------------------------------------------- computing


def test_results_are_plain_numbers_with_names() -> None:
    values = {
        "scalar": torch.tensor(0.5), "float": 2, "numpy": np.float32(1.5), "array": np.array([1.0, 2.0]),
        "vector": torch.tensor([1, 2]), "dict": {"a": torch.tensor(1.0), "b": {"c": [1.0][0], "d": torch.ones(1)}},
    }  # fmt: skip
    meters = Meters({name: Plain(value) for name, value in values.items()})
    meters.feed(batch(0))
    expected = {
        "scalar": 0.5, "float": 2.0, "numpy": 1.5, "array/0": 1.0, "array/1": 2.0, "vector/0": 1.0, "vector/1": 2.0,
        "dict/a": 1.0, "dict/b/c": 1.0, "dict/b/d/0": 1.0,
    }  # fmt: skip
    assert meters.compute() == expected
    assert {type(value) for value in meters.compute().values()} == {float}


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (torch.zeros(40, 40), "float32[40, 40]"),
        (torch.zeros(1, 1, 1, 1), "float32[1, 1, 1, 1]"),
        ((torch.zeros(2), torch.zeros(2)), "(float32[2], float32[2])"),
        (None, "NoneType"),
        ("good", "str"),
        (torch.zeros((), dtype=torch.complex64), "complex64[]"),
    ],
)
def test_results_that_are_no_numbers_are_refused(value: Any, seen: str) -> None:
    meters = Meters({"odd": Plain(value)})
    meters.feed(batch(0))
    with pytest.raises(MetricError) as error:
        meters.compute()
    assert str(error.value) == (
        f"metric 'odd' computed {seen}; a record holds numbers: expected a number, a vector, or a dict of them. Look "
        "at other values in a callback, or reduce them in a metric of your own"
    )


def test_an_error_while_computing_names_the_metric() -> None:
    meters = Meters({"accuracy": Accuracy()})
    meters.feed({"preds": torch.eye(3), "target": torch.tensor([0, 1, 3])})
    with pytest.raises(MetricError, match="targets range from 0 to 3") as error:
        meters.compute()
    assert error.value.__notes__ == ["[loopwright] when metric 'accuracy' was computed"]


def test_torchmetrics_values_are_its_own() -> None:
    collection = torchmetrics.MetricCollection({"acc": MulticlassAccuracy(3), "f1": MulticlassF1Score(3)})
    metrics = {
        "all": collection,
        "each": MulticlassAccuracy(3, average=None),
        "named": ClasswiseWrapper(MulticlassAccuracy(3, average=None), prefix="c-"),
        "mean": On(torchmetrics.MeanMetric(), "loss"),
    }
    meters = Meters(metrics)
    own = copy.deepcopy(collection)
    for seed in range(3):
        meters.feed(batch(seed))
        own.update(batch(seed)["preds"], batch(seed)["target"])
    values, expected = meters.compute(), own.compute()
    assert values["all/acc"] == float(expected["acc"])
    assert values["all/f1"] == float(expected["f1"])
    assert [name for name in values if name[:4] in ("each", "name")] == [
        "each/0", "each/1", "each/2", "named/c-0", "named/c-1", "named/c-2",
    ]  # fmt: skip
    assert values["mean"] == pytest.approx(sum(float(batch(s)["loss"]) for s in range(3)) / 3)


def test_a_reset_begins_a_new_series() -> None:
    meters = Meters({"accuracy": Accuracy()})
    meters.feed(batch(0))
    meters.reset()
    assert meters.compute() == {}
    meters.feed(batch(1))
    assert meters.compute() == {"accuracy": meters_of(1).compute()["accuracy"]}


def meters_of(*seeds: int) -> Meters:
    meters = Meters({"accuracy": Accuracy()})
    for seed in seeds:
        meters.feed(batch(seed))
    return meters


# -------------------------------------------------------------------------------------------------------- state

SAVED: dict[str, Any] = {
    "ours": Accuracy,
    "on ours": lambda: On(Mean(), "loss"),
    "torchmetrics": lambda: MulticlassAccuracy(3),
    "on torchmetrics": lambda: On(torchmetrics.MeanMetric(), "loss"),
    "lists": lambda: On(torchmetrics.CatMetric(), "loss"),
    "vector": lambda: MulticlassAccuracy(3, average=None),
    "collection": lambda: torchmetrics.MetricCollection(
        {"acc": MulticlassAccuracy(3), "f1": MulticlassF1Score(3), "auc": MulticlassAUROC(3)}
    ),
    "wrapper": lambda: ClasswiseWrapper(MulticlassAccuracy(3, average=None)),
    "window": lambda: Running(MulticlassAccuracy(3), window=3),
    "min max": lambda: MinMaxMetric(MulticlassAccuracy(3)),
    "drawing": lambda: BootStrapper(MulticlassAccuracy(3), num_bootstraps=2),
    "sized by data": lambda: MeanIoU(input_format="one-hot"),
}


def outputs(name: str) -> list[dict[str, Tensor]]:
    found = [batch(seed) for seed in range(6)]
    if name == "sized by data":
        g = torch.Generator().manual_seed(1)
        return [{k: torch.randint(2, (2, 3, 4, 4), generator=g) for k in ("preds", "target")} for _ in found]
    return found


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_series_cut_in_two_gives_the_same_bits(name: str, cut: int) -> None:
    whole, first, second = (Meters({"m": SAVED[name]()}) for _ in range(3))
    for output in outputs(name):
        whole.feed(output)
    for output in outputs(name)[:cut]:
        first.feed(output)
    state = first.state_dict()
    for output in outputs(name):
        first.feed(output)  # a state is no live reference
    assert_plain(state)
    second.load_state_dict(state)
    for output in outputs(name)[cut:]:
        second.feed(output)
    assert whole.exact == []
    assert second.compute() == whole.compute()
    for meters in (whole, second):  # and so does the epoch after it
        meters.reset()
        meters.feed(outputs(name)[2])
    assert second.compute() == whole.compute()


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        assert all(isinstance(key, str) for key in value)
        for item in value.values():
            assert_plain(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            assert_plain(item)
    else:
        assert value is None or type(value) in (Tensor, np.ndarray, int, float, str, bool)


def test_settings_are_those_of_the_code_and_not_of_the_state() -> None:
    old, new = Meters({"m": MulticlassAccuracy(3, top_k=1)}), Meters({"m": MulticlassAccuracy(3, top_k=2)})
    old.feed(batch(0))
    new.load_state_dict(old.state_dict())
    assert new.metrics["m"].top_k == 2


def test_left_out_metrics_stay_left_out_in_a_state() -> None:
    meters = Meters({"accuracy": Accuracy(), "mean": On(Mean(), "loss")}, training=True)
    meters.feed({"loss": torch.tensor(2.0)})
    other = Meters({"accuracy": Accuracy(), "mean": On(Mean(), "loss")}, training=True)
    other.load_state_dict(meters.state_dict())
    assert other.compute() == {"mean": 2.0}


@pytest.mark.parametrize(
    "other", [{"acuracy": Accuracy()}, {"accuracy": MulticlassAccuracy(3)}, {"accuracy": On(Mean(), "loss")}]
)
def test_a_metric_that_was_not_there_or_was_another_one_begins_anew(other: dict[str, Any]) -> None:
    meters, fresh = Meters(other), Meters(copy.deepcopy(other))
    meters.load_state_dict(meters_of(0).state_dict())
    for one in (meters, fresh):
        one.feed(batch(1))
    assert meters.compute() == fresh.compute()


def test_of_a_metric_of_the_same_kind_with_other_parts_nothing_is_taken() -> None:
    state = {"theirs": {"kind": "MulticlassAccuracy", "state": {"": {"tp": torch.ones(3)}}, "draws": None}}
    meters, fresh = Meters({"theirs": MulticlassAccuracy(3)}), Meters({"theirs": MulticlassAccuracy(3)})
    meters.load_state_dict(state)
    for one in (meters, fresh):
        one.feed(batch(1))
    assert meters.compute() == fresh.compute()


def test_a_metric_that_cannot_be_saved_is_a_reason_for_inexactness() -> None:
    meters = Meters({"plain": On(Plain(), "loss"), "accuracy": Accuracy()})
    assert meters.exact == [
        "metric 'plain' (Plain) has no state_dict and load_state_dict: after a resume in the middle of an epoch, its "
        "value of that epoch covers the rest only"
    ]
    meters.feed(batch(0))
    other = Meters({"plain": On(Plain(), "loss"), "accuracy": Accuracy()})
    other.load_state_dict(meters.state_dict())
    assert other.compute() == meters.compute()


# ------------------------------------------------------------------------------------------------- random numbers


class Draws:
    """Draws from all three generators, in update and in compute."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []

    def update(self, *args: Any) -> None:
        self.seen.append((torch.rand(()).item(), random.random(), float(np.random.rand())))

    def compute(self) -> float:
        return torch.rand(()).item() + random.random() + float(np.random.rand())

    def reset(self) -> None:
        self.seen = []


def test_metrics_that_draw_leave_the_generators_as_they_were() -> None:
    meters = Meters({"draws": On(Draws(), "loss"), "accuracy": Accuracy()}, training=True)
    with rng.forked():
        expected = [(torch.rand(()).item(), random.random(), float(np.random.rand())) for _ in range(3)]
    for seed in range(3):
        meters.feed(batch(seed))
    meters.compute()
    assert (torch.rand(()).item(), random.random(), float(np.random.rand())) == expected[0]
    assert meters.metrics["draws"].metric.seen == expected  # one stream, and not the same numbers each time


def test_only_metrics_that_draw_pay_for_it() -> None:
    meters = Meters({"draws": On(Draws(), "loss"), "accuracy": Accuracy()})
    meters.feed(batch(0))
    assert [type(update) for _, update, _ in meters._feeds or []] == [partial, MethodType]


# ------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (Accuracy(), 'metrics=Accuracy: expected a dict with a name for each: metrics={"accuracy": Accuracy(...)}'),
        ([Accuracy()],
         'metrics=[Accuracy, ...]: expected a dict with a name for each: metrics={"accuracy": Accuracy(...)}'),
        (Accuracy, 'metrics=Accuracy: expected a dict with a name for each: metrics={"accuracy": Accuracy(...)}'),
        (torchmetrics.MetricCollection({"f1": MulticlassF1Score(3)}),
         'metrics=MetricCollection: expected a dict with a name for each: metrics={"accuracy": MetricCollection(...)}'),
        ({"accuracy": Accuracy}, "metric 'accuracy' is the class Accuracy: write Accuracy()"),
        ({"top/1": Accuracy()},
         "metric name 'top/1': expected a text without '/', which joins the parts of logged names"),
        ({1: Accuracy()}, "metric name 1: expected a text without '/', which joins the parts of logged names"),
        ({"loss": Accuracy()},
         "a metric cannot be named 'loss': the mean of what steps return as 'loss' is logged so"),
        ({"accuracy": 0.5}, "metric 'accuracy' is a float: expected an object with update, "
         "compute and reset, such as those of loopwright.metrics and torchmetrics, or a function of predictions and "
         "targets"),
        ({"a": On(3, "x")}, "metric 'a' is an int: expected an object with update, "
         "compute and reset, such as those of loopwright.metrics and torchmetrics, or a function of predictions and "
         "targets"),
    ],
)  # fmt: skip
def test_metrics_that_cannot_be_used_are_refused_with_the_fix(metrics: Any, message: str) -> None:
    with pytest.raises(SettingError) as error:
        check_metrics(metrics)
    assert str(error.value) == message
    if not hasattr(metrics, "keys"):
        with pytest.raises(SettingError) as error:
            lw.Supervised(nn.Linear(1, 1), metrics=metrics)
        assert str(error.value) == message


def test_inputs_must_be_names() -> None:
    odd = Plain()
    odd.inputs = "preds"  # type: ignore[attr-defined]
    with pytest.raises(SettingError, match=r"metric 'odd' has inputs='preds': expected a tuple of names"):
        check_metrics({"odd": odd})
    with pytest.raises(SettingError, match=r"On\(Accuracy, ...\) needs the names of what to pass to its update"):
        On(Accuracy())
    assert On(On(Accuracy(), "a", "b"), "x", "y").metric.__class__ is Accuracy


def test_good_metrics_pass_as_they_are() -> None:
    metrics = {"a": Accuracy(), "b": BinaryAUROC(), "c": Plain()}
    assert check_metrics(metrics) == metrics
    assert check_metrics(None) == {}


def test_fresh_copies_share_nothing_and_know_nothing() -> None:
    accuracy = Accuracy()
    accuracy.update(torch.eye(2), torch.tensor([0, 1]))
    copies = fresh({"a": accuracy, "b": On(accuracy, "x", "y")})
    assert copies["a"].state_dict() == {}
    assert copies["b"].state_dict() == {}
    assert accuracy.compute() == 1.0


def test_on_is_the_metric_itself_by_hand() -> None:
    metric = On(torchmetrics.MeanMetric(), "loss")
    metric.update(torch.tensor([1.0, 3.0]))
    other = On(torchmetrics.MeanMetric(), "loss")
    other.update(torch.tensor([7.0]))
    assert other.compute().item() == 7.0  # torchmetrics keeps this result
    other.load_state_dict(metric.state_dict())
    assert other.compute().item() == 2.0
    metric.reset()
    assert metric.metric.update_count == 0
