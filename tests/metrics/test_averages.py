"""Means and errors equal torchmetrics' and known answers, summed so that nothing is lost."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torchmetrics
from hypothesis import given, settings

from loopwright.errors import MetricError, SettingError
from loopwright.metrics import MAE, MSE, Mean, functional
from undefined import is_of_nothing

PAIRS = [
    (MAE, torchmetrics.MeanAbsoluteError, functional.mae),
    (MSE, torchmetrics.MeanSquaredError, functional.mse),
]


@pytest.mark.parametrize(("ours", "theirs", "function"), PAIRS)
@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2**30)), min_size=1, max_size=4), st.sampled_from([(), (3,)])
)
def test_errors_equal_those_of_torchmetrics(ours: Any, theirs: Any, function: Any, rows: Any, extra: Any) -> None:
    mine, other = ours(), theirs()
    for n, seed in rows:
        g = torch.Generator().manual_seed(seed)
        preds, target = torch.randn(n, *extra, generator=g), torch.randn(n, *extra, generator=g)
        mine.update(preds, target)
        other.update(preds, target)
        single = theirs()
        single.update(preds, target)
        torch.testing.assert_close(function(preds, target), single.compute())
    assert mine.compute() == pytest.approx(other.compute().item(), rel=1e-5)


@pytest.mark.parametrize(("ours", "theirs", "function"), PAIRS)
def test_integers_do_not_wrap(ours: Any, theirs: Any, function: Any) -> None:
    preds, target = torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([3, 0], dtype=torch.uint8)
    mine = ours()
    mine.update(preds, target)
    expected = 2.0 if ours is MAE else 5.0
    assert mine.compute() == expected
    assert function(preds, target).item() == expected


def test_float16_errors_do_not_overflow() -> None:
    mse = MSE()
    mse.update(torch.full((4,), 1000.0, dtype=torch.float16), torch.zeros(4, dtype=torch.float16))
    assert mse.compute() == 1e6


def test_sums_keep_what_float32_would_lose() -> None:
    mae, zero = MAE(), torch.zeros(1)
    mae.update(torch.tensor([2.0**25]), zero)
    for _ in range(15):
        mae.update(torch.ones(1), zero)
    assert mae.compute() == (2**25 + 15) / 16


@pytest.mark.parametrize("metric", [MAE, MSE])
def test_errors_of_nothing_are_nan_and_of_nan_too(metric: Any) -> None:
    assert is_of_nothing(metric())
    mine = metric()
    mine.update(torch.tensor([math.nan]), torch.tensor([1.0]))
    assert math.isnan(mine.compute())


@pytest.mark.parametrize("call", [MAE().update, MSE().update, functional.mae, functional.mse])
def test_shapes_are_not_broadcast(call: Any) -> None:
    with pytest.raises(MetricError) as error:
        call(torch.zeros(64, 1), torch.zeros(64))
    assert str(error.value) == "preds float32[64, 1] and target float32[64] do not fit: write preds.squeeze(1)"
    with pytest.raises(MetricError, match=r"write target.squeeze\(1\)"):
        call(torch.zeros(64), torch.zeros(64, 1))
    with pytest.raises(MetricError) as error:
        call(torch.zeros(64, 3), torch.zeros(64, 2))
    assert str(error.value) == (
        "preds float32[64, 3] and target float32[64, 2] do not fit: expected one shape for both"
    )
    with pytest.raises(MetricError) as error:
        call(torch.zeros(64, 3), torch.zeros(64, dtype=torch.long))
    assert str(error.value) == (
        "preds float32[64, 3] and target int64[64] do not fit: these are scores of 3 classes and class indices; take "
        "lw.metrics.Accuracy()"
    )


def test_functional_errors_have_a_gradient() -> None:
    preds = torch.tensor([3.0, 1.0], requires_grad=True)
    functional.mse(preds, torch.tensor([1.0, 1.0])).backward()
    assert preds.grad is not None
    assert preds.grad.tolist() == [2.0, 0.0]


def test_mean_counts_each_element_once() -> None:
    mean = Mean()
    mean.update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    mean.update(torch.tensor(10.0))
    mean.update(20)
    assert mean.compute() == pytest.approx(40 / 6)
    assert is_of_nothing(Mean())


def test_mean_of_a_step_value_is_named_by_it() -> None:
    assert Mean("each").inputs == ("each",)
    assert Mean("each", weight="n").inputs == ("each", "n")
    with pytest.raises(SettingError, match="expected the name of a value in a step's output"):
        Mean(torch.ones(2))  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 2**30)), min_size=1, max_size=4))
@settings(max_examples=40)
def test_weighted_means_equal_those_of_torchmetrics(rows: Any) -> None:
    mine, other = Mean(), torchmetrics.MeanMetric()
    for n, scalar, seed in rows:
        g = torch.Generator().manual_seed(seed)
        value = torch.randn(n, generator=g)
        weight = torch.rand((), generator=g) + 0.1 if scalar else torch.rand(n, generator=g) + 0.1
        mine.update(value, weight)
        other.update(value, weight)
    assert mine.compute() == pytest.approx(other.compute().item(), rel=1e-5, abs=1e-6)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MetricError) as error:
        Mean().update(torch.zeros(3), torch.ones(2))
    assert str(error.value) == (
        "value float64[3] and weight float64[2] do not fit: expected one shape for both, or one number as the weight "
        "of the batch"
    )
    weighted = Mean()
    weighted.update(torch.tensor([1.0, 2.0]), 3.0)
    assert weighted.compute() == 1.5


def test_integer_values_are_averaged_as_floats() -> None:
    mean = Mean()
    mean.update(torch.tensor([True, False, False, True]))
    mean.update(torch.tensor([1, 4], dtype=torch.int32))
    assert mean.compute() == pytest.approx(7 / 6)
