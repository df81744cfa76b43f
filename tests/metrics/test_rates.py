"""Precision, recall and their like equal torchmetrics on any counts, and say why where nothing is to divide by."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import sklearn.metrics
import torch
import torchmetrics.classification as theirs
import torchmetrics.functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import loopwright as lw
from loopwright.errors import LoopwrightWarning, MetricError, SettingError
from loopwright.metrics import ConfusionMatrix, Meters, functional
from undefined import is_of_nothing

REGRESSION = [
    "torchmetrics:explained_variance", "torchmetrics:kendall_rank_corrcoef", "torchmetrics:log_cosh_error",
    "torchmetrics:mean_absolute_error", "torchmetrics:mean_absolute_percentage_error",
    "torchmetrics:mean_squared_error",
    "torchmetrics:mean_squared_log_error", "torchmetrics:normalized_root_mean_squared_error",
    "torchmetrics:pearson_corrcoef", "torchmetrics:r2_score", "torchmetrics:relative_squared_error",
    "torchmetrics:spearman_corrcoef", "torchmetrics:symmetric_mean_absolute_percentage_error",
    "torchmetrics:tweedie_deviance_score", "torchmetrics:weighted_mean_absolute_percentage_error", "sklearn:max_error",
    "sklearn:median_absolute_error", "sklearn:mean_pinball_loss", "sklearn:mean_gamma_deviance",
    "sklearn:d2_absolute_error_score",
]  # fmt: skip
RATES = {
    "precision": (lw.metrics.Precision, "Precision", {}),
    "recall": (lw.metrics.Recall, "Recall", {}),
    "specificity": (lw.metrics.Specificity, "Specificity", {}),
    "iou": (lw.metrics.IoU, "JaccardIndex", {}),
    "dice": (lw.metrics.Dice, "F1Score", {}),
    "f1": (lw.metrics.F1, "F1Score", {}),
    "fbeta": (lw.metrics.FBeta, "FBetaScore", {"beta": 0.5}),
}
TWINS = {
    "precision": functional.precision, "recall": functional.recall, "specificity": functional.specificity,
    "iou": functional.iou, "dice": functional.dice, "f1": functional.f1, "fbeta": functional.fbeta,
}  # fmt: skip


def data(kind: str, n: int, c: int, seed: int, *, few: bool, ignore: bool) -> tuple[Tensor, Tensor]:
    """Scores and targets; with ``few`` of one or two classes only, with ``ignore`` a target of -1 here and there."""
    g = torch.Generator().manual_seed(seed)
    shape = {"binary": (n,), "classes": (n, c), "labels": (n, c)}[kind]
    preds = torch.rand(shape, generator=g)
    if few:
        preds = preds * (0.3 if kind != "classes" else 1.0)
        preds[..., :1] += 0.6 if kind == "classes" else 0.0
    high = c if kind == "classes" else 2
    target = torch.randint(2 if few else high, shape[:1] if kind == "classes" else shape, generator=g)
    if ignore:
        target = target.masked_fill(torch.rand(target.shape, generator=g) < 0.2, -1)
    return preds, target


def their(name: str, kind: str, c: int, **more: Any) -> Any:
    _, label, extra = RATES[name]
    if kind == "binary":
        return getattr(theirs, f"Binary{label}")(**extra, **more)
    prefix, size = ("Multiclass", "num_classes") if kind == "classes" else ("Multilabel", "num_labels")
    return getattr(theirs, f"{prefix}{label}")(**extra, **{size: c}, **more)


@pytest.mark.parametrize("name", RATES)
@settings(max_examples=30)
@given(
    kind=st.sampled_from(["binary", "classes", "labels"]), c=st.integers(2, 5), seed=st.integers(0, 999),
    n=st.integers(1, 12), few=st.booleans(), ignore=st.booleans(),
    average=st.sampled_from(["macro", "micro", "weighted", None]), batches=st.integers(1, 3),
)  # fmt: skip
def test_rates_equal_those_of_torchmetrics(
    name: str, kind: str, c: int, seed: int, n: int, few: bool, ignore: bool, average: Any, batches: int
) -> None:
    ours, _, extra = RATES[name]
    given_ = {} if kind == "binary" else {"average": average}
    size = {} if kind == "binary" else {kind: c}
    ignored = {"ignore_index": -1} if ignore else {}
    metric = ours(**extra, **size, **given_, **ignored, zero_division=0.0)
    assert isinstance(metric, lw.metrics.Rate)
    other = their(name, kind, c, **given_, **ignored)
    seen = [data(kind, n, c, seed + i, few=few, ignore=ignore) for i in range(batches)]
    for preds, target in seen:
        metric.update(preds, target)
        other.update(preds, target)
    expected = other.compute().double()
    assert torch.allclose(torch.as_tensor(metric.compute()).double(), expected, atol=1e-6)
    together = [torch.cat(column) for column in zip(*seen, strict=True)]
    twin: Any = TWINS[name](*together, **extra, **size, **given_, **ignored, zero_division=0.0)
    assert torch.allclose(twin, expected, atol=1e-6)


@settings(max_examples=30)
@given(
    kind=st.sampled_from(["binary", "classes", "labels"]), c=st.integers(2, 5), seed=st.integers(0, 999),
    n=st.integers(1, 12), few=st.booleans(), ignore=st.booleans(), large=st.booleans(),
)  # fmt: skip
def test_counts_equal_those_of_torchmetrics(
    kind: str, c: int, seed: int, n: int, few: bool, ignore: bool, large: bool
) -> None:
    n = n + 5000 * large  # counted at once, not kept
    preds, target = data(kind, n, c, seed, few=few, ignore=ignore)
    ignored = {"ignore_index": -1} if ignore else {}
    size = {} if kind == "binary" else {kind: c}
    other = {
        "binary": theirs.BinaryConfusionMatrix, "classes": theirs.MulticlassConfusionMatrix,
        "labels": theirs.MultilabelConfusionMatrix,
    }[kind](*size.values(), **ignored)  # fmt: skip
    metric = ConfusionMatrix(**size, **ignored)  # type: ignore[arg-type]
    for _ in range(2):
        metric.update(preds, target)
        other.update(preds, target)
    assert torch.equal(metric.compute(), other.compute())
    assert torch.equal(2 * functional.confusion_matrix(preds, target, **size, **ignored), other.compute())  # type: ignore[arg-type]


def test_further_dimensions_and_class_indices_are_counted_alike() -> None:
    g = torch.Generator().manual_seed(0)
    preds, target = torch.randn(2, 3, 4, 5, generator=g), torch.randint(3, (2, 4, 5), generator=g)
    scores, indices, logits = ConfusionMatrix(3), ConfusionMatrix(3), ConfusionMatrix(labels=3, threshold=0.0)
    scores.update(preds, target)
    indices.update(preds.argmax(1).to(torch.uint8), target.to(torch.int16))
    assert torch.equal(scores.compute(), theirs.MulticlassConfusionMatrix(3)(preds, target))
    assert torch.equal(indices.compute(), scores.compute())
    many = torch.randint(2, (2, 3, 4, 5), generator=g)
    logits.update(preds, many)
    assert torch.equal(logits.compute(), theirs.MultilabelConfusionMatrix(3)(preds.sigmoid(), many))


def test_reused_buffers_change_nothing() -> None:
    metric, buffer = ConfusionMatrix(3), (torch.eye(3), torch.tensor([0, 1, 2]))
    metric.update(*buffer)
    buffer[0].zero_(), buffer[1].zero_()
    assert torch.equal(metric.compute(), torch.eye(3).long())


@pytest.mark.capability("IG-13")
def test_ready_metrics_come_out_of_one_pass_over_the_predictions() -> None:
    """Precision, Recall, Accuracy, ConfusionMatrix, IoU in one dict; 20 regression metrics by name; each fed once."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=g), torch.randint(3, (50,), generator=g)
    net = torch.nn.Linear(4, 3)
    m = lw.metrics
    metrics = {
        "accuracy": m.Accuracy(), "p": m.Precision(3), "r": m.Recall(3), "iou": m.IoU(3),
        "counts": m.ConfusionMatrix(3), "dice": m.Dice(3, average=None),
    }  # fmt: skip
    assert list(Meters(metrics)._parts) == ["accuracy", "p/0"]
    found = lw.Trainer(folder=None, progress=False).test(lw.Supervised(net, metrics=metrics), (x, y))
    given_ = net(x), y
    assert found["test/accuracy"] == pytest.approx(theirs.MulticlassAccuracy(3, average="micro")(*given_).item())
    assert found["test/p"] == pytest.approx(theirs.MulticlassPrecision(3)(*given_).item())
    assert found["test/r"] == pytest.approx(theirs.MulticlassRecall(3)(*given_).item())
    assert found["test/iou"] == pytest.approx(theirs.MulticlassJaccardIndex(3)(*given_).item())
    counts = theirs.MulticlassConfusionMatrix(3)(*given_)
    assert [found[f"test/counts/{i}/{j}"] for i in range(3) for j in range(3)] == counts.flatten().tolist()
    assert found["test/dice/2"] == pytest.approx(theirs.MulticlassF1Score(3, average=None)(*given_)[2].item())

    x, y = x.abs() + 0.1, torch.rand(50, generator=g) + 0.1
    regression = {f"n{i}": name for i, name in enumerate(REGRESSION)}
    net = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Softplus(), torch.nn.Flatten(0))
    own = {"mae": m.MAE(), "mse": m.MSE(), "rmse": m.RMSE(), "r2": m.R2()}
    meters = Meters({**regression, **own})
    for rows in torch.arange(50).split(8):
        meters.feed({"preds": net(x[rows]), "target": y[rows]})
    values, preds = meters.compute(), net(x).detach()
    for i, name in enumerate(REGRESSION):
        value = values[f"n{i}"]
        package, _, function = name.partition(":")
        if package == "sklearn":
            expected = getattr(sklearn.metrics, function)(y, preds)
        else:
            expected = getattr(torchmetrics.functional, function)(preds, y)
        assert value == pytest.approx(float(expected), rel=1e-5), name
    error = preds - y
    assert values["mae"] == pytest.approx(error.abs().mean().item())
    assert values["rmse"] == pytest.approx(error.square().mean().sqrt().item())
    assert values["r2"] == pytest.approx(values["n9"])


# ------------------------------------------------------------------------------------------------- undefined values


def test_nothing_over_nothing_is_nan_and_says_why_once() -> None:
    precision = lw.metrics.Precision(classes=["cat", "dog", "fox"], average=None)
    precision.update(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 1]))
    with pytest.warns(LoopwrightWarning) as told:
        value = precision.compute()
    assert [str(one.message) for one in told] == [
        "Precision is 0/0 for class 'fox', which was never predicted: it counts as nan. Write zero_division=0.0 for a "
        "number without this warning"
    ]
    assert str(value.tolist()) == "[0.5, 1.0, nan]"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.compute()


@pytest.mark.parametrize(
    ("metric", "preds", "target", "value", "why"),
    [
        (lw.metrics.Precision(), [0, 0], [0, 1], "nan",
         "Precision is 0/0 for class 1, which was never predicted: it counts as nan."),
        (lw.metrics.Recall(), [0, 1], [0, 0], "nan",
         "Recall is 0/0 for class 1, which has no target: it counts as nan."),
        (lw.metrics.F1(), [0, 0], [0, 0], "nan",
         "F1 is 0/0 for class 1, which is in neither targets nor predictions: it counts as nan."),
        (lw.metrics.Specificity(), [1, 1], [1, 1], "nan",
         "Specificity is 0/0 for class 1, which has no target of another class: it counts as nan."),
        (lw.metrics.Precision(3), [0, 0], [0, 1], "0.25",
         "Precision is 0/0 for class '1', which was never predicted: it counts as 0 in the mean."),
        (lw.metrics.Precision(labels=2, average="micro"), [[0, 0], [0, 0]], [[1, 0], [1, 0]], "nan",
         "Precision is 0/0 for all labels together, which was never predicted: it counts as nan."),
        (lw.metrics.Recall(labels=2), [[1, 0], [1, 0]], [[1, 0], [1, 0]], "0.5",
         "Recall is 0/0 for label '1', which has no target: it counts as 0 in the mean."),
    ],
)  # fmt: skip
def test_each_undefined_rate_names_what_is_missing(metric: Any, preds: Any, target: Any, value: str, why: str) -> None:
    metric.update(torch.tensor(preds), torch.tensor(target))
    with pytest.warns(LoopwrightWarning) as told:
        assert str(metric.compute()) == value
    assert str(told[0].message).startswith(why)


def test_classes_that_occur_nowhere_are_left_out_of_the_macro_mean() -> None:
    recall = lw.metrics.Recall(10)
    recall.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert recall.compute() == 1.0


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("average", ["macro", "weighted", "micro"])
@pytest.mark.parametrize("of", [{"classes": 3}, {"labels": 3}])
def test_a_rate_of_nothing_says_that_it_was_given_nothing(name: str, average: Any, of: Any) -> None:
    kind, _, more = RATES[name]
    assert is_of_nothing(kind(**of, average=average, **more))


def test_a_rate_of_nothing_in_a_run_says_so_and_a_missing_class_is_still_told_later() -> None:
    metric = lw.metrics.Precision(3)
    assert is_of_nothing(metric)
    metric.update(torch.tensor([0, 0]), torch.tensor([0, 1]))
    with pytest.warns(LoopwrightWarning, match="^Precision is 0/0 for class '1', which was never predicted"):
        metric.compute()
    none = lw.metrics.Where(lw.metrics.F1(3), lambda target: target > 5)
    task = lw.Supervised(torch.nn.Linear(2, 3), metrics={"f1": none})
    with pytest.warns(LoopwrightWarning, match="^F1 was given no sample"):
        found = lw.Trainer(folder=None, progress=False).test(task, [(torch.zeros(4, 2), torch.zeros(4).long())])
    assert str(found["test/f1"]) == "nan"


def test_a_mean_weighted_by_targets_of_which_there_is_none_says_so() -> None:
    metric = lw.metrics.Precision(labels=2, average="weighted")
    metric.update(torch.tensor([[1, 1]]), torch.tensor([[0, 0]]))
    with pytest.warns(LoopwrightWarning) as told:
        assert str(metric.compute()) == "nan"
    assert [str(one.message) for one in told] == [
        "Precision is a mean weighted by the number of targets, and no label has one: it is nan. Write "
        "zero_division=0.0 for a number without this warning"
    ]


@pytest.mark.capability("IG-13")
@pytest.mark.parametrize("labels", [None, 3])
@pytest.mark.parametrize("n", [5, 9000])  # kept, and counted at once
def test_targets_of_0_and_1_may_be_floats_as_binary_cross_entropy_wants_them(labels: int | None, n: int) -> None:
    """Logits and float targets count as the same targets in integers; one between 0 and 1 is refused."""
    logits = torch.randn(n, 3 if labels else 1).squeeze(1)
    target = torch.randint(0, 2, logits.shape)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float())
    for kind in (ConfusionMatrix, lw.metrics.Precision, lw.metrics.F1, lw.metrics.IoU):
        whole, floats = (kind(labels=labels, threshold=0.0) for _ in range(2))
        whole.update(logits, target)
        floats.update(logits, target.float())
        assert torch.equal(torch.as_tensor(whole.compute()), torch.as_tensor(floats.compute()))
    soft = ConfusionMatrix(labels=labels, threshold=0.0)
    with pytest.raises(MetricError, match=r"none of the classes 0 to 1 .*targets range from 0(\.3)? to (0\.3|1)"):
        taken_in(soft, logits, target.float().index_fill(0, torch.tensor([0]), 0.3))


def taken_in(metric: Any, preds: Any, target: Any) -> Any:
    metric.update(preds, target)
    return metric.compute()


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("metric", "preds", "target", "message"),
    [
        (ConfusionMatrix(3), torch.zeros(2, 4), torch.zeros(2).long(), "preds float32[2, 4] and target int64[2]: 4 "
         "scores a sample, but classes=3. Write classes=4"),
        (ConfusionMatrix(3), torch.zeros(2), torch.zeros(2).long(), "preds float32[2] and target int64[2]: scores "
         "[N, 3, ...] or integer class indices were expected as preds"),
        (ConfusionMatrix(3), torch.zeros(2, 3), torch.zeros(2), "preds float32[2, 3] and target float32[2]: targets "
         "are class indices. Write target.long()"),
        (ConfusionMatrix(), torch.zeros(2, 3), torch.zeros(2).long(), "preds float32[2, 3] and target int64[2]: "
         "without classes= both have one shape. Write classes=3"),
        (ConfusionMatrix(labels=2), torch.zeros(2, 3), torch.zeros(2, 3).long(), "preds float32[2, 3] and target "
         "int64[2, 3]: expected [N, 2, ...]. Write labels=3"),
        (ConfusionMatrix(), torch.zeros(2, 1), torch.zeros(2).long(), "preds float32[2, 1] and target int64[2]: one "
         "class only. Where one output means two, write preds.squeeze(1)"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_with_the_way_out(
    metric: Any, preds: Any, target: Any, message: str
) -> None:
    with pytest.raises(MetricError) as error:
        metric.update(preds, target)
    assert str(error.value) == message


@pytest.mark.parametrize("n", [3, 9000])  # kept, and counted at once
@pytest.mark.parametrize(
    ("size", "preds", "target", "message"),
    [
        (3, [0.1, 0.2, 0.7], 3, "{n} of {n} targets or predictions are none of the classes 0 to 2 (targets range "
         "from 3 to 3). To leave out what has a certain target, name it: ignore_index=-100"),
        (3, [0.1, float("nan"), 0.7], 1, "the scores of {n} of {n} samples are NaN. Look for where they come from with "
         "Trainer(debug=lw.Debug(anomaly=True)), or leave these samples out with lw.metrics.Where"),
        (None, 1.5, 1, "{n} of {n} preds are not in [0, 1], which are no probabilities. For logits, write "
         "threshold=0.0"),
        (None, float("nan"), 1, "{n} of {n} preds are not in [0, 1], which are no probabilities. For logits, write "
         "threshold=0.0"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_counted_are_found(size: Any, preds: Any, target: int, message: str, n: int) -> None:
    metric = ConfusionMatrix(size)

    def measure() -> None:
        metric.update(torch.tensor([preds] * n), torch.full((n,), target))
        metric.compute()

    with pytest.raises(MetricError) as error:
        measure()
    assert str(error.value) == message.format(n=n)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lw.metrics.Precision(1), "classes=1: expected how many there are, from 2, or a list of their names "
         "without '/'"),
        (lambda: lw.metrics.F1(2.5), "classes=2.5: expected how many there are, from 2, or a list of their names "
         "without '/'"),
        (lambda: lw.metrics.Precision("cat"), "classes='cat': expected how many there are, from 2, or a list of their "
         "names without '/'"),
        (lambda: lw.metrics.Precision(["a", "a"]), "classes=['a', 'a']: each name may stand there once"),
        (lambda: lw.metrics.Precision(3, labels=2), "classes= (one of them a sample) and labels= (any number of them) "
         "exclude each other"),
        (lambda: lw.metrics.Precision(3, threshold=0.3), "threshold=0.3 is for probabilities of one class; with "
         "classes= the largest counts"),
        (lambda: lw.metrics.Precision(average="micro"), "average='micro' is over classes or labels: add classes=... or "
         "labels=..., or leave it out"),
        (lambda: lw.metrics.Precision(3, average="macros"), "average='macros' is unknown. Known: 'None', 'macro', "
         "'micro', 'weighted'. Did you mean 'macro'? None gives each class"),
        (lambda: lw.metrics.Precision(2, average=None, zero_division="warn"), "zero_division='warn': expected a number "
         "that 0/0 counts as, such as 0.0 or 1.0, or None (nan, and a warning that says which class lacks what)"),
        (lambda: lw.metrics.Recall(threshold=float("nan")), "threshold=nan: expected a finite number, above which a "
         "score says 1: 0.5 for probabilities, 0.0 for logits"),
        (lambda: lw.metrics.Accuracy(threshold="0.5"), "threshold='0.5': expected a finite number, above which a "
         "score says 1: 0.5 for probabilities, 0.0 for logits"),
        (lambda: lw.metrics.FBeta(0), "beta=0: expected a number above 0, such as 2.0; its square weighs the recall"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(SettingError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("make", "preds", "target", "message"),
    [
        (lw.metrics.Accuracy, torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2).long(),
         "preds complex64[2, 3]: of complex scores none is the largest. Write preds.abs()"),
        (lw.metrics.Accuracy, torch.zeros(2), torch.zeros(2, dtype=torch.complex64),
         "target complex64[2]: class indices are integers. Write target.real.long()"),
        (lambda: lw.metrics.Precision(3), torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2).long(),
         "preds complex64[2, 3]: of complex scores none is the largest. Write preds.abs()"),
        (lw.metrics.Precision, torch.zeros(2, dtype=torch.complex128), torch.zeros(2).long(),
         "preds complex128[2]: of complex scores none is the largest. Write preds.abs()"),
    ],
)  # fmt: skip
def test_complex_scores_are_refused_at_once(make: Any, preds: Tensor, target: Tensor, message: str) -> None:
    metric = make()
    if preds.ndim == 1:
        metric.update(torch.zeros(2), torch.zeros(2).long())  # what went before does not hide it
    with pytest.raises(MetricError) as error:
        metric.update(preds, target)
    assert str(error.value) == message


def test_one_hot_bools_are_scores() -> None:
    for metric in (lw.metrics.Accuracy(), lw.metrics.Precision(3)):
        metric.update(torch.eye(3).bool(), torch.tensor([0, 1, 2]))
        assert metric.compute() == 1.0
