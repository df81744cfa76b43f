"""Metrics by name, and functions as metrics: what torchmetrics and scikit-learn have needs nothing of ours."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.base
import sklearn.metrics
import torch
import torchmetrics
from torch import Tensor, nn

import loopwright as lw
from loopwright.errors import MetricError, SettingError
from loopwright.metrics import Accuracy, Function, Meters, On, check_metrics
from undefined import is_of_nothing


def scores(kind: str = "classes", n: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    shape = {"classes": (n, 3), "binary": (n,), "labels": (n, 4), "numbers": (n,)}[kind]
    preds = torch.randn(shape, generator=g)
    if kind == "numbers":
        return preds, preds + torch.randn(n, generator=g)
    return preds, torch.randint(3 if kind == "classes" else 2, (n,) if kind != "labels" else shape, generator=g)


def measured(metric: Any, preds: Tensor, target: Tensor) -> dict[str, float]:
    meters = Meters({"m": metric})
    for rows in torch.arange(len(preds)).split(7):
        meters.feed({"preds": preds[rows], "target": target[rows]})
    return meters.compute()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("classes", {"task": "multiclass", "num_classes": 3}),
        ("binary", {"task": "binary"}),
        ("labels", {"task": "multilabel", "num_labels": 4}),
    ],
)
@pytest.mark.parametrize("name", ["auroc", "average_precision", "f1_score", "calibration_error"])
def test_torchmetrics_by_name_finds_the_task_in_the_shapes(kind: str, settings: Any, name: str) -> None:
    if (kind, name) == ("labels", "calibration_error"):
        return  # torchmetrics has none
    preds, target = scores(kind)
    expected = getattr(torchmetrics.functional, name)(preds, target, **settings)
    assert measured(f"torchmetrics:{name}", preds, target) == {"m": pytest.approx(expected.item())}


def test_a_class_of_torchmetrics_by_name() -> None:
    preds, target = scores("numbers")
    found = measured("torchmetrics:MeanSquaredError", preds, target)
    assert found == {"m": pytest.approx((preds - target).square().mean().item())}
    with pytest.raises(
        SettingError, match=r"'torchmetrics:AUROC' cannot be made without arguments .* pass the object, "
    ):
        check_metrics({"m": "torchmetrics:AUROC"})


@pytest.mark.capability("SK-03")
@pytest.mark.parametrize("name", sorted(sklearn.metrics.get_scorer_names()))
def test_any_scorer_of_scikit_learn_by_name_or_as_object(name: str) -> None:
    """Every scorer gives the number that it gives for an estimator with these answers, by name and as a callable."""
    preds, target = _for_scorer(name)
    scorer = sklearn.metrics.get_scorer(name)
    expected = scorer(_Estimator(preds, target), preds.numpy(), target.numpy())
    assert measured(f"sklearn:{name}", preds, target) == {"m": pytest.approx(expected, abs=1e-6)}
    assert measured(scorer, preds, target) == {"m": pytest.approx(expected, abs=1e-6)}


def _for_scorer(name: str) -> tuple[Tensor, Tensor]:
    regression = ("error", "r2", "explained", "deviance", "d2_abs", "d2_pin", "mean_squared")
    if any(word in name for word in regression):
        preds, target = scores("numbers")
        return preds.abs() + 0.1, target.abs() + 0.1
    if "samples" in name:
        preds, target = scores("labels")
        preds[:, 0] = target[:, 0] = 1  # no sample without a label
        return preds, target
    several = any(
        word in name for word in ("ovr", "ovo", "macro", "micro", "weighted", "log_loss", "top_k", "adjusted", "info")
    )
    return scores("classes" if several or name in ("accuracy", "balanced_accuracy") else "binary")


class _Estimator(sklearn.base.ClassifierMixin, sklearn.base.BaseEstimator):
    """Answers with what it was given."""

    def __init__(self, preds: Tensor, target: Tensor) -> None:
        self.preds, self.target = preds, target
        if target.is_floating_point():
            self.classes_ = None
        else:
            self.classes_ = np.arange(3 if preds.ndim == 2 and target.ndim == 1 else 2)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.estimator_type = "regressor" if self.target.is_floating_point() else "classifier"
        return tags

    def predict(self, X: Any) -> Any:
        if self.target.is_floating_point():
            return self.preds.numpy()
        if self.preds.ndim > self.target.ndim:
            return self.preds.argmax(1).numpy()
        return (self.preds > 0).long().numpy()

    def decision_function(self, X: Any) -> Any:
        return self.preds.numpy()

    def predict_proba(self, X: Any) -> Any:
        if self.preds.ndim == 2:
            return self.preds.double().softmax(1).numpy()
        p = self.preds.double().sigmoid()
        return torch.stack([1 - p, p], 1).numpy()


def test_functions_of_scikit_learn_get_the_target_first() -> None:
    preds, target = scores()
    classes = preds.argmax(1)
    recall = partial(sklearn.metrics.recall_score, average="macro")
    expected = sklearn.metrics.recall_score(target, classes, average="macro")
    assert expected != pytest.approx(sklearn.metrics.recall_score(classes, target, average="macro"))
    assert measured(recall, preds, target)["m"] == pytest.approx(expected)
    chances, two = scores("binary")
    brier = sklearn.metrics.brier_score_loss(two, chances.sigmoid())
    assert measured("sklearn:brier_score_loss", chances, two)["m"] == pytest.approx(brier)
    assert measured(sklearn.metrics.r2_score, *scores("numbers"))["m"] == pytest.approx(
        sklearn.metrics.r2_score(*reversed([t.numpy() for t in scores("numbers")]))
    )


def test_any_function_is_a_metric_and_may_return_a_dict() -> None:
    preds, target = scores("numbers")

    def worst(preds: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"most": (preds - target).max(), "least": (preds - target).min()}

    assert measured(worst, preds, target) == {
        "m/most": pytest.approx((preds - target).max().item()), "m/least": pytest.approx((preds - target).min().item()),
    }  # fmt: skip
    meters = Meters({"n": On(lambda a: len(a), "ids")})
    meters.feed({"ids": [1, 2, 3]})
    meters.feed({"ids": torch.tensor([4])})
    assert meters.compute() == {"n": 4.0}
    assert is_of_nothing(Function(worst))


def test_a_function_of_batches_that_are_padded_differently_is_refused_at_the_second_of_them() -> None:
    share = Function(lambda preds, target: (preds == target).double().mean())
    share.update(torch.ones(2, 5), torch.ones(2, 5))
    with pytest.raises(MetricError) as error:
        share.update(torch.ones(2, 7), torch.ones(2, 7))
    assert str(error.value).startswith(
        "<lambda> is given preds: float32[2, 7], and float32[2, 5] before: all are joined"
    )
    share.update(torch.empty(0), torch.empty(0))  # torch joins nothing with anything
    share.update(torch.zeros(2, 5), torch.ones(2, 5))
    assert float(share.compute()) == 0.5


def test_a_function_in_a_run_is_logged_like_any_metric() -> None:
    preds, target = scores()
    net = nn.Linear(3, 3)
    metrics = {
        "f1": "sklearn:f1_macro",
        "auroc": "torchmetrics:auroc",
        "gap": lambda p, t: (p.argmax(1) - t).abs().max(),
    }
    task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), metrics=metrics)
    run = lw.Trainer(epochs=1, folder=None, progress=False).fit(
        task, lw.Loader((preds, target), batch_size=8), (preds, target)
    )
    logits = net(preds).detach()
    assert run.metrics["valid/f1"] == pytest.approx(sklearn.metrics.f1_score(target, logits.argmax(1), average="macro"))
    auroc = torchmetrics.functional.auroc(logits, target, task="multiclass", num_classes=3)
    assert run.metrics["valid/auroc"] == pytest.approx(auroc.item())
    assert run.exact is True


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("accuracy", "metric 'accuracy': expected a name such as 'torchmetrics:auroc' or 'sklearn:f1_macro', or an "
         "object such as lw.metrics.Accuracy()"),
        ("torchmetrics:aurok", "metric 'torchmetrics:aurok' is unknown. Did you mean 'auroc'? 2"),
        ("sklearn:f1macro", "metric 'sklearn:f1macro' is unknown. Did you mean 'f1_macro', "),
        ("torchmetrics:minkowski_distance", "metric 'torchmetrics:minkowski_distance' needs p as well: pass a "
         "function, functools.partial(torchmetrics.functional.minkowski_distance, p=...)"),
    ],
)  # fmt: skip
def test_unknown_names_tell_those_that_are_near(metric: str, message: str) -> None:
    with pytest.raises(SettingError) as error:
        check_metrics({"m": metric})
    assert str(error.value).startswith(message)


def test_a_negated_scorer_may_not_have_a_name_that_says_less_is_better() -> None:
    with pytest.raises(SettingError) as error:
        check_metrics({"mse": "sklearn:neg_mean_squared_error"})
    assert str(error.value) == (
        "metric 'mse' is neg_mean_squared_error, of which more is better, and its name says that less is: name it "
        "'neg_mse'"
    )
    assert list(check_metrics({"neg_mse": "sklearn:neg_mean_squared_error"})) == ["neg_mse"]


@pytest.mark.parametrize(("name", "extra"), [("torchmetrics:auroc", "metrics"), ("sklearn:f1_macro", "sklearn")])
def test_a_missing_package_is_named_with_its_extra(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name.partition(":")[0], None)
    with pytest.raises(SettingError, match=rf"pip install loopwright\[{extra}\]"):
        check_metrics({"m": name})


@pytest.mark.parametrize("name", ["sklearn:f1_macro", "torchmetrics:auroc", "sklearn:log_loss"])
def test_nan_scores_are_an_error_with_the_fix(name: str) -> None:
    preds, target = scores()
    preds[3, 1] = preds[5, 0] = float("nan")
    with pytest.raises(MetricError, match=r"preds are NaN in 2 of 40 samples\. Look for where they come from"):
        measured(name, preds, target)


def test_what_makes_a_function_fail_is_noted_with_what_to_do() -> None:
    """Targets that are NaN, and a class that no target has."""

    def notes(name: str, preds: Tensor, target: Tensor) -> list[str]:
        with pytest.raises(ValueError, match=r".") as error:
            measured(name, preds, target)
        return list(error.value.__notes__)

    preds, target = scores("numbers")
    target[3] = float("nan")
    assert notes("sklearn:r2", preds, target)[0] == (
        "[loopwright] a cause may be that the targets are NaN or infinite in 1 of 40 samples: look at the data, or "
        "leave these samples out with lw.metrics.Where(metric, lambda target: target.isfinite())"
    )
    preds, target = scores()
    split = "such as lw.data.train_valid_split(data, 0.2, stratify=y)"
    for seen, told in ((target * 0, "one class alone, 0"), (target.clamp(max=1), "2 of the 3 classes")):
        assert notes("sklearn:roc_auc_ovr", preds, seen) == [
            f"[loopwright] a cause may be that the 40 targets of this evaluation have {told}; what compares classes "
            f"needs all of them: give data that has them, {split}",
            "[loopwright] when metric 'm' was computed",
        ]


def test_what_cannot_be_kept_or_told_is_refused() -> None:
    with pytest.raises(MetricError, match=r"is given preds: \[str, str\]; only tensors, arrays and numbers are kept"):
        Function(max).update(["a", "b"], torch.zeros(2))
    with pytest.raises(MetricError, match=r"does not follow from the shapes\. Give scores, or a function that says it"):
        measured("torchmetrics:accuracy", torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(MetricError, match=r"f1_score: preds .* do not fit: expected one shape for both"):
        measured(sklearn.metrics.f1_score, torch.zeros(3, 2, 2), torch.zeros(3).long())
    with pytest.raises(SettingError, match=r"Function\(<class 'int'>\): expected a function"):
        Function(int)
    assert list(check_metrics({"a": Accuracy(preds="logits", target="y")})["a"].inputs) == ["logits", "y"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("f11", "sklearn:f1"), ("acuracy", "sklearn:accuracy"), ("sklern:roc_auk", "sklearn:roc_auc"),
     ("word_eror_rate", "torchmetrics:word_error_rate"), ("qqqq", None), ("", None)],
)  # fmt: skip
def test_a_name_without_its_package_is_told_the_nearest_with_it(name: str, near: str | None) -> None:
    with pytest.raises(SettingError) as caught:
        check_metrics({"m": name})
    assert str(caught.value) == (
        f"metric {name!r}: expected a name such as 'torchmetrics:auroc' or 'sklearn:f1_macro', or an object such as "
        f"lw.metrics.Accuracy(){f'. Did you mean {near!r}?' if near else ''}"
    )


def test_the_nearest_is_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SettingError, match=r"\. Did you mean 'torchmetrics:accuracy'\?$"):
        check_metrics({"m": "acuracy"})


# ------------------------------------------------------------------------------------------ told at the first batch


def of_kind(kind: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    if kind == "numbers":  # some functions take no other than positive ones
        return torch.rand(20, generator=g) + 0.1, torch.rand(20, generator=g) + 0.1
    if kind == "numbers in columns":
        return torch.rand(20, 2, generator=g), torch.rand(20, 2, generator=g)
    if kind == "classes as predictions":
        return torch.randint(3, (20,), generator=g), torch.randint(3, (20,), generator=g)
    if kind == "a column of scores":
        return 9 * torch.randn(20, 1, generator=g), torch.randint(2, (20,), generator=g)
    if kind == "pixels":
        return torch.randn(20, 3, 4, generator=g), torch.randint(3, (20, 4), generator=g)
    return scores(kind)


MORE = ["numbers in columns", "classes as predictions", "a column of scores", "pixels"]


def named_functions() -> list[str]:
    """Scorers, but for a few of the many of one kind, and functions that are told the task and nothing else."""
    found = [f"sklearn:{n}" for n in sklearn.metrics.get_scorer_names() if not n.endswith(("_micro", "_weighted"))]
    for name in torchmetrics.functional.__all__:
        given = inspect.signature(getattr(torchmetrics.functional, name)).parameters.values()
        required = [one.name for one in given if one.default is one.empty]
        if "task" in required and len(required) == 3:
            found.append(f"torchmetrics:{name}")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["classes", "binary", "labels", "numbers", *(pytest.param(one, marks=pytest.mark.nightly) for one in MORE)]
)
def test_a_function_is_refused_at_its_first_batch_exactly_if_all_samples_would_fail(kind: str) -> None:
    """Of all scorers of scikit-learn and all functions of torchmetrics that are told the task, on all that fits."""
    preds, target = of_kind(kind)
    few = 20 if kind == "classes as predictions" else 1  # a batch that lacks most classes
    for name in named_functions():
        metric, later = (check_metrics({"m": name})["m"] for _ in range(2))
        later._tried = True
        try:
            later.update(preds, target)
            later.compute()
        except Exception:
            with pytest.raises(MetricError, match=r"cannot be computed of preds|do not fit|does not follow"):
                metric.update(preds[:few], target[:few])
        else:
            metric.update(preds[:few], target[:few])


def test_a_scorer_that_cannot_apply_ends_a_run_before_anything_has_moved(folder: Path) -> None:
    for name, said, instead in (
        ("f1", "f1_score cannot be computed of preds float32[2, 10] and target int64[2]: Target is multiclass but "
         "average='binary'. Please choose another average setting, one of [None, 'micro', 'macro', 'weighted']",
         "'sklearn:f1_macro' or 'sklearn:f1_micro' or 'sklearn:f1_weighted'"),
        ("roc_auc", "roc_auc_score cannot be computed of preds float32[2, 10] and target int64[2]: multi_class must be "
         "in ('ovo', 'ovr')", "'sklearn:roc_auc_ovr' or 'sklearn:roc_auc_ovo' or 'sklearn:roc_auc_ovo_weighted'"),
    ):  # fmt: skip
        net = nn.Linear(3, 10)
        before = [p.clone() for p in net.parameters()]
        task = lw.Supervised(
            net, nn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1), metrics={"m": f"sklearn:{name}"}
        )
        data = (torch.randn(8, 3), torch.randint(10, (8,)))
        with pytest.raises(MetricError) as caught:
            lw.Trainer(epochs=1, folder=folder, progress=False).fit(task, lw.Loader(data, 2), data)
        assert str(caught.value) == f"{said}. For these, write {instead}"
        assert task._run.progress.step == 0
        assert all(map(torch.equal, net.parameters(), before))


def test_what_is_tried_first_leaves_the_value_and_the_generators_as_they_are() -> None:
    preds, target = scores()
    expected = sklearn.metrics.f1_score(target, preds.argmax(1), average="macro")
    state = torch.get_rng_state()
    assert measured("sklearn:f1_macro", preds, target) == {"m": pytest.approx(expected)}
    assert torch.equal(torch.get_rng_state(), state)
    seen: list[int] = []

    def own(y_true: Any, y_pred: Any) -> float:
        seen.append(len(y_true))
        return 0.0

    measured(own, preds, target)
    assert seen == [40]  # a function of one's own is called once, on all samples


def test_large_binary_logits_are_of_two_classes() -> None:
    target = torch.tensor([0, 1, 1, 0])
    assert measured("sklearn:roc_auc_ovr", 20.0 * target - 3.0, target) == {"m": 1.0}
    assert measured("torchmetrics:auroc", (20.0 * target - 3.0).unsqueeze(1), target) == {"m": 1.0}
