"""Arithmetic builds metrics; what they share is fed once, and they keep the whole protocol."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn.metrics import f1_score, precision_score, recall_score
from torch import Tensor
from torchmetrics.classification import MulticlassF1Score, MulticlassPrecision, MulticlassRecall

import loopwright as lw
from loopwright.errors import CheckpointError, MetricError, SettingError
from loopwright.metrics import (
    F1,
    MAE,
    MSE,
    Accuracy,
    ConfusionMatrix,
    Derived,
    Mean,
    Meters,
    Metric,
    On,
    Precision,
    Recall,
    Sum,
    keys_of,
)
from undefined import is_of_nothing


class Counted(Metric):
    """The sum of a value; knows how often it was updated and computed."""

    state: ClassVar[Any] = {"total": "sum"}
    inputs = ("x",)

    def __init__(self) -> None:
        self.updates, self.computed = [], []  # type: ignore[var-annotated]

    def update(self, x: Tensor) -> None:
        self.updates.append(1)
        self.add(total=x.sum())

    def compute(self) -> float:
        self.computed.append(1)
        return float(self.total("total"))


def value_of(metric: Any, *given: Tensor) -> Any:
    metric.update(*given)
    return metric.compute()


X = torch.tensor([1.0, 2.0, 4.0])  # sum 7


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda m: m + 1, 8.0), (lambda m: 1 + m, 8.0), (lambda m: m - 1, 6.0), (lambda m: 1 - m, -6.0),
        (lambda m: m * 2, 14.0), (lambda m: 2 * m, 14.0), (lambda m: m / 2, 3.5), (lambda m: 14 / m, 2.0),
        (lambda m: m // 2, 3.0), (lambda m: m % 4, 3.0), (lambda m: m**2, 49.0), (lambda m: 2**m, 128.0),
        (lambda m: -m, -7.0), (lambda m: abs(-m), 7.0), (lambda m: m < 8, 1.0), (lambda m: m <= 6, 0.0),
        (lambda m: m > 8, 0.0), (lambda m: m >= 7, 1.0), (lambda m: torch.eq(m, m), 1.0),
        (lambda m: torch.log(m), float(torch.tensor(7.0).double().log())), (lambda m: torch.tensor(2.0) * m, 14.0),
        (lambda m: np.float64(2) * m, 14.0), (lambda m: (m > 3).mean(), 1.0), (lambda m: m / (m - 7), float("inf")),
        (lambda m: torch.where(m > 3, m, -m), 7.0), (lambda m: torch.stack([m, 2 * m]).mean(), 10.5),
        (lambda m: torch.stack([m, 2 * m])[1], 14.0), (lambda m: np.array([1.0, 2.0]) * m, [7.0, 14.0]),
        (lambda m: torch.tensor([[1.0, 2.0]]).double() @ torch.stack([m, m]), [21.0]),
        (lambda m: Derived(lambda v: {"v": v}, m)["v"], 7.0),
    ],
)  # fmt: skip
def test_operators_and_torch_functions_build_metrics(build: Any, expected: Any) -> None:
    found = value_of(build(Counted()), X)
    assert isinstance(found, Tensor) == isinstance(expected, list)
    assert (found.tolist() if isinstance(found, Tensor) else found) == expected


def test_nothing_over_nothing_is_nan_and_no_exception() -> None:
    total = Counted()
    assert np.isnan(value_of(total / total, torch.zeros(2)))


def test_a_shared_operand_is_updated_and_computed_once_a_batch() -> None:
    shared = Counted()
    built = 2 * shared * shared / (shared + shared) + torch.log(shared) - shared
    for _ in range(3):
        built.update(X)
    built.compute()
    assert (len(shared.updates), len(shared.computed)) == (3, 1)


def test_the_mean_of_the_f1_of_each_class_is_scikit_learns_macro_f1_and_the_f1_of_two_means_is_another() -> None:
    """What docs/metrics.md says of ``2 * p * r / (p + r)``."""
    torch.manual_seed(3)
    preds, target = torch.randint(4, (200,)), torch.randint(4, (200,))
    preds[:80] = target[:80]

    def f1(kinds: list[Any], preds: Tensor, target: Tensor) -> float:
        precision, recall = kinds
        built = (2 * precision * recall / (precision + recall)).mean()
        return float(value_of(built, preds, target))

    each, means = ([kind(classes=4, average=how) for kind in (Precision, Recall)] for how in (None, "macro"))
    macro = f1_score(target, preds, average="macro")
    assert f1(each, preds, target) == pytest.approx(macro, abs=1e-12)
    assert value_of(F1(classes=4), preds, target) == pytest.approx(macro, abs=1e-12)
    p, r = (score(target, preds, average="macro") for score in (precision_score, recall_score))
    assert f1(means, preds, target) == pytest.approx(2 * p * r / (p + r), abs=1e-12)
    assert abs(2 * p * r / (p + r) - macro) > 1e-4
    two = preds > 1, target > 1
    assert f1([Precision(), Recall()], *two) == pytest.approx(f1_score(two[1], two[0]), abs=1e-12)


@pytest.mark.capability("IG-15")
def test_f1_from_precision_and_recall_is_fed_once_beside_its_parts() -> None:
    """``precision * recall * 2 / (precision + recall)``, then ``.mean()``, is a metric that runs beside its parts."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.randint(3, (60,))
    net = torch.nn.Linear(5, 3)
    precision, recall = Precision(classes=3, average=None), Recall(classes=3, average=None)
    f1 = (precision * recall * 2 / (precision + recall)).mean()
    task = lw.Supervised(net, metrics={"f1": f1, "precision": precision, "recall": recall})
    found = lw.Trainer(folder=None, progress=False).test(task, lw.Loader((x, y), batch_size=7))
    given = net(x), y
    theirs = [cls(num_classes=3, average=None)(*given) for cls in (MulticlassPrecision, MulticlassRecall)]
    expected = {f"precision/{i}": v for i, v in enumerate(theirs[0].tolist())}
    expected |= {f"recall/{i}": v for i, v in enumerate(theirs[1].tolist())}
    expected["f1"] = MulticlassF1Score(num_classes=3)(*given).item()
    assert {name.removeprefix("test/"): value for name, value in found.items() if name != "test/loss"} == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.capability("IG-15")
def test_equal_built_in_parts_of_different_metrics_are_one() -> None:
    """Equal built-in parts of different metrics, such as those of precision and recall, are fed once."""
    a, b = Precision(classes=3), Recall(classes=3, average="micro")
    meters = Meters({"a": a, "b": b, "c": Precision(classes=4), "d": Precision(classes=3, target="y"), "ab": a * b})
    assert list(meters._parts) == ["a/0", "c/0", "d/0"]


def test_one_metric_read_from_different_names_is_not_shared() -> None:
    mean = Mean("a")
    meters = Meters({"on a": mean, "on b": On(mean, "b")})
    meters.feed({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    assert meters.compute() == {"on a": 1.0, "on b": 2.0}


def test_each_class_keeps_its_name_in_arithmetic() -> None:
    p, r = (rate(["cat", "dog"], average=None) for rate in (Precision, Recall))
    meters = Meters({"f1": 2 * p * r / (p + r), "mixed": torch.stack([p, r]), "mean": (p + r).mean()})
    meters.feed({"preds": torch.tensor([0, 1, 1]), "target": torch.tensor([0, 1, 0])})
    assert meters.compute() == pytest.approx({
        "f1/cat": 2 / 3, "f1/dog": 2 / 3, "mixed/0/0": 1.0, "mixed/0/1": 0.5, "mixed/1/0": 0.5, "mixed/1/1": 1.0,
        "mean": 1.5,
    })  # fmt: skip
    known = {name: keys_of(name, metric) for name, metric in meters.metrics.items()}
    assert known == {"f1": ["f1/cat", "f1/dog"], "mixed": None, "mean": ["mean"]}


def test_a_class_is_picked_by_its_name() -> None:
    names, given = ["cat", "dog", "fox"], (torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))
    recall = Recall(names, average=None, zero_division=0.0)
    assert [value_of(recall[name], *given) for name in names] == [1.0, 1.0, 0.0]
    assert value_of((2 * recall)["dog"], *given) == 2.0
    assert value_of(ConfusionMatrix(names)["fox/dog"], *given) == 1.0
    with pytest.raises(
        MetricError, match=r"^the metric computed no 'dgo'. Known: 'cat', 'dog', 'fox'. Did you mean 'd"
    ):
        value_of(recall["dgo"], *given)
    with pytest.raises(MetricError, match=r"^\['a'\] of a metric that computed a single number. Of each class"):
        value_of(Recall(names)["a"], *given)
    with pytest.raises(MetricError, match=r"computed \[3\] values, which have no names: take a number, such as \[0\]"):
        value_of(torch.sqrt(recall)["dog"], *given)


def test_parts_may_read_different_names_and_be_foreign() -> None:
    built = On(torchmetrics.MeanMetric(), "loss") / Sum("tokens")
    assert built.inputs == ("loss", "tokens")
    built.update(torch.tensor([2.0, 4.0]), torch.tensor([3.0, 1.0]))
    assert built.compute() == 0.75
    built.reset()
    built.update(tokens=torch.tensor(2.0), loss=torch.tensor(1.0))
    assert built.compute() == 0.5
    with pytest.raises(MetricError, match=r"this metric reads loss, tokens; got 1 values. Call update\(loss, tokens\)"):
        built.update(torch.tensor(1.0))


def outputs() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [{"preds": torch.randn(6, generator=g), "target": torch.randn(6, generator=g)} for _ in range(4)]


def built() -> Any:
    return MAE() / torch.sqrt(MSE()) + On(torchmetrics.MeanMetric(), "preds")


def test_state_reset_and_copies_of_a_built_metric() -> None:
    whole, first, second = built(), built(), built()
    for output in outputs():
        whole.update(**output)
    for output in outputs()[:2]:
        first.update(**output)
    state = first.state_dict()
    other = copy.deepcopy(first)
    first.reset()
    second.load_state_dict(state)
    for output in outputs()[2:]:
        second.update(**output)
        other.update(**output)
    assert second.compute() == other.compute() == whole.compute()
    assert is_of_nothing(first.args[0])
    with pytest.raises(CheckpointError, match="the saved metric has 3 parts, this one has 1"):
        (MAE() + 1).load_state_dict(state)


def test_merging_a_built_metric_equals_taking_in_both() -> None:
    whole, first, second = (MAE() / MSE() for _ in range(3))
    for i, output in enumerate(outputs()):
        whole.update(**output)
        (first if i < 2 else second).update(**output)
    first.merge(second)
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-15)
    with pytest.raises(MetricError, match="both must be built of the same metrics"):
        first.merge(MAE() + 1)


def test_a_series_cut_in_two_gives_the_same_bits() -> None:
    metrics = {"p": Precision(classes=3), "f": Precision(classes=3) * Recall(classes=3), "a": 1 - Accuracy()}
    g = torch.Generator().manual_seed(3)
    fed = [{"preds": torch.randn(9, 3, generator=g), "target": torch.randint(3, (9,), generator=g)} for _ in range(4)]
    whole, first, second = (Meters(metrics) for _ in range(3))
    for output in fed:
        whole.feed(output)
    first.feed(fed[0])
    second.load_state_dict(first.state_dict())
    for output in fed[1:]:
        second.feed(output)
    assert second.compute() == whole.compute()
    parts = [Meters(metrics) for _ in fed]
    for meters, output in zip(parts, fed, strict=True):
        meters.feed(output)
    first.reset()
    first.join([meters.cut() for meters in parts])  # as ranks do
    assert first.compute() == whole.compute()
    assert whole.exact == []


def test_what_makes_no_sense_is_refused() -> None:
    accuracy = Accuracy()
    with pytest.raises(MetricError, match="a comparison of metrics has no truth value before it is computed"):
        bool(accuracy > 0.5)
    with pytest.raises(TypeError):
        list(accuracy)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        0.5 in accuracy  # type: ignore[operator]  # noqa: B015
    with pytest.raises(SettingError, match="has no metric among its arguments"):
        Derived(torch.log, 3)
    assert accuracy == accuracy
    assert (accuracy == Accuracy()) is False
    vector = Derived(lambda value: {"cat": value, "dog": 1 + value}, MAE())
    vector.update(torch.zeros(1), torch.zeros(1))
    with pytest.raises(MetricError, match=r"the metric computed no 'dogs'\. Known: 'cat', 'dog'. Did you mean 'dog'?"):
        vector["dogs"].compute()
    plain = Precision(classes=2, average=None)
    plain.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(MetricError, match=r"\[5\] of a metric that computed \[2\] values"):
        plain[5].compute()
    assert vector["dog"].compute() == 1.0
