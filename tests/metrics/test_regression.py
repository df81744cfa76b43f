"""R2, RMSE, perplexity, sums and extremes: the numbers of torchmetrics, and of nothing a value that says so."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.text import Perplexity as TheirPerplexity

import loopwright as lw
from loopwright.errors import LoopwrightWarning, MetricError, SettingError
from loopwright.events import describe
from loopwright.metrics import MSE, R2, RMSE, Max, Meters, Min, Perplexity, Sum, functional
from undefined import is_of_nothing

ROWS = st.lists(st.integers(1, 5), min_size=1, max_size=4)


BOTH = torch.tensor([1 + 1j, 2.0])


@pytest.mark.parametrize("name", ["MAE", "MSE", "RMSE", "R2"])
@pytest.mark.parametrize(
    ("preds", "target", "fix"),
    [
        (BOTH, torch.zeros(2), "preds.abs(), or torch.view_as_real(preds)"),
        (torch.zeros(2), BOTH, "target.abs(), or torch.view_as_real(target)"),
        (torch.zeros(2).bool(), torch.zeros(2).bool(), "preds.float()"),
        (torch.zeros(2), torch.zeros(2).bool(), "target.float()"),
        (torch.zeros(2).bool(), torch.zeros(2), "preds.float()"),
    ],
)
def test_errors_are_of_real_numbers(name: str, preds: Tensor, target: Tensor, fix: str) -> None:
    for call in (getattr(lw.metrics, name)().update, getattr(functional, name.lower())):
        with pytest.raises(MetricError) as error:
            call(preds, target)
        assert str(error.value) == (
            f"preds {describe(preds)} and target {describe(target)}: an error is the difference of real numbers. Write "
            f"{fix}"
        )


@pytest.mark.parametrize(
    "metric", [Sum(), Max(), Min(), lw.metrics.Mean(), lw.metrics.Mean(weight="w")], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("value", [BOTH, BOTH[0], 1 + 1j])
def test_a_value_of_complex_numbers_is_refused(metric: Any, value: Any) -> None:
    with pytest.raises(MetricError, match=r"a record holds real numbers. Write value.abs\(\), or value.real"):
        metric.update(value, *[1.0] * (len(metric.inputs) - 1))


@settings(max_examples=30)
@given(
    rows=ROWS, outputs=st.integers(0, 3), seed=st.integers(0, 99), each=st.booleans(), shift=st.sampled_from([0, 100])
)
def test_r2_equals_that_of_torchmetrics(rows: Any, outputs: int, seed: int, each: bool, shift: int) -> None:
    g = torch.Generator().manual_seed(seed)
    average = None if each else "macro"
    metric = R2(average=average)
    theirs = torchmetrics.R2Score(multioutput="raw_values" if each else "uniform_average")
    seen = []
    for n in [2, *rows]:
        target = torch.randn((n, outputs) if outputs else (n,), generator=g, dtype=torch.float64) + shift
        preds = target + torch.randn(target.shape, generator=g, dtype=torch.float64)
        seen.append((preds, target))
        metric.update(preds, target)
        theirs.set_dtype(torch.float64).update(preds, target)
    expected = theirs.compute()
    assert torch.allclose(torch.as_tensor(metric.compute()).double(), expected.double(), rtol=1e-4)
    preds, target = (torch.cat(column) for column in zip(*seen, strict=True))
    assert torch.allclose(functional.r2(preds, target, average=average), expected.double(), rtol=1e-4)


@pytest.mark.parametrize(
    ("preds", "target", "why"),
    [
        ([1.0], [1.0], "of 1 sample"),
        ([1.0, 2.0], [3.0, 3.0], "the targets are all the same"),
        ([[1.0, 2.0], [2.0, 3.0]], [[1.0, 0.1], [2.0, 0.1]], "the targets of output 1 are all the same"),
    ],
)
def test_r2_says_why_it_is_undefined(preds: Any, target: Any, why: str) -> None:
    metric = R2()
    metric.update(torch.tensor(preds), torch.tensor(target))
    with pytest.warns(LoopwrightWarning) as told:
        assert math.isnan(metric.compute())
    assert str(told[0].message) == f"R2 is undefined, since {why}: it is nan"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compute()  # once
    assert functional.r2(torch.tensor(preds), torch.tensor(target)).isnan()
    assert is_of_nothing(R2())


def test_shapes_of_r2_are_checked() -> None:
    with pytest.raises(MetricError, match=r"R2 expects one shape for both, \[N\] or \[N, M\]"):
        R2().update(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(SettingError, match="average='mean': expected 'macro'"):
        R2(average="mean")


def test_rmse_shares_the_totals_of_mse() -> None:
    meters = Meters({"rmse": RMSE(), "mse": MSE()})
    preds, target = torch.randn(9), torch.randn(9)
    meters.feed({"preds": preds, "target": target})
    theirs = torchmetrics.MeanSquaredError(squared=False)
    assert meters.compute()["rmse"] == pytest.approx(theirs(preds, target).item())
    assert meters.compute()["mse"] == pytest.approx(theirs(preds, target).item() ** 2)
    assert len(meters._parts) == 1
    assert functional.rmse(preds, target).item() == pytest.approx(theirs(preds, target).item())


def test_an_rmse_of_nothing_says_its_own_name() -> None:
    with pytest.warns(LoopwrightWarning, match="^RMSE was given no sample") as told:
        assert math.isnan(RMSE().compute())
    assert len(told) == 1
    assert is_of_nothing(torch.log(RMSE()))


@settings(max_examples=30)
@given(
    rows=ROWS,
    v=st.integers(2, 6),
    seed=st.integers(0, 99),
    ignore=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_perplexity_equals_that_of_torchmetrics(rows: Any, v: int, seed: int, ignore: bool, dtype: str) -> None:
    g = torch.Generator().manual_seed(seed)
    ours, theirs = (cls(ignore_index=-100 if ignore else None) for cls in (Perplexity, TheirPerplexity))
    seen = []
    for n in rows:
        preds, target = torch.randn(n, 4, v, generator=g), torch.randint(v, (n, 4), generator=g)
        preds = preds.to(getattr(torch, dtype))
        target[0, 0] = -100 if ignore else 0
        seen.append((preds, target))
        ours.update(preds, target)
        theirs.update(preds.float(), target)
    assert ours.compute() == pytest.approx(theirs.compute().item(), rel=1e-4)
    preds, target = (torch.cat(column) for column in zip(*seen, strict=True))
    twin = functional.perplexity(preds, target, ignore_index=-100 if ignore else None)
    assert twin.item() == pytest.approx(ours.compute(), rel=1e-6)


def test_perplexity_of_nothing_and_of_nonsense() -> None:
    assert is_of_nothing(Perplexity())
    ignored = Perplexity(ignore_index=-100)
    ignored.update(torch.zeros(2, 3), torch.tensor([-100, -100]))
    assert is_of_nothing(ignored)
    sure = Perplexity()
    sure.update(torch.tensor([[1e4, 0.0]]), torch.tensor([1]))
    assert sure.compute() == math.inf
    with pytest.raises(MetricError) as error:
        Perplexity().update(torch.zeros(2, 3), torch.tensor([0, 3]))
    assert str(error.value) == (
        "1 targets are no tokens (0 to 2). To leave out what has a certain target, name it: "
        "Perplexity(ignore_index=-100)"
    )
    with pytest.raises(MetricError, match=r"with the vocabulary last, .* write preds.movedim\(1, -1\)"):
        Perplexity().update(torch.zeros(2, 3, 4), torch.zeros(2, 4).long())
    with pytest.raises(MetricError, match=r"token indices are integers. Write target.long\(\)"):
        Perplexity().update(torch.zeros(2, 3), torch.zeros(2))


@given(rows=ROWS, seed=st.integers(0, 99))
@settings(max_examples=20)
def test_sums_and_extremes_equal_those_of_torchmetrics(rows: Any, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    pairs = [(Sum, torchmetrics.SumMetric()), (Max, torchmetrics.MaxMetric()), (Min, torchmetrics.MinMetric())]
    values = [torch.randn(n, generator=g) for n in rows]
    for ours, theirs in pairs:
        metric = ours("x")
        for value in values:
            metric.update(value)
            theirs.update(value)
        assert metric.compute() == pytest.approx(theirs.compute().item(), rel=1e-5)
    twins = {"sum": functional.sum, "maximum": functional.maximum, "minimum": functional.minimum}
    expected = [theirs.compute().item() for _, theirs in pairs]
    assert [twin(torch.cat(values)).item() for twin in twins.values()] == pytest.approx(expected, rel=1e-5)
    assert functional.mean(torch.cat(values)).item() == pytest.approx(torch.cat(values).mean().item())


def test_sums_and_extremes_of_nothing_of_numbers_and_of_nan() -> None:
    assert [Sum().compute(), *map(is_of_nothing, (Max(), Min()))] == [0.0, True, True]
    for metric, expected in ((Sum(), 5.0), (Max(), 3.0), (Min(), 2.0)):
        metric.update(torch.zeros(0))
        metric.update(3)
        metric.update(torch.tensor(2))
        assert metric.compute() == expected
        metric.update(torch.tensor([math.nan, 1.0]))
        assert math.isnan(metric.compute())
    with pytest.raises(SettingError, match=r"Max.3.: expected the name of a value in a step's output"):
        Max(3)  # type: ignore[arg-type]
