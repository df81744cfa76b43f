"""What is no tensor is refused by every metric that reads predictions and targets, with what to write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loopwright.errors import MetricError
from loopwright.metrics import (
    MAE,
    MSE,
    R2,
    Accuracy,
    ConfusionMatrix,
    Mean,
    Perplexity,
    Precision,
    Sum,
    functional,
)

GOOD = torch.tensor([0, 1])


@pytest.mark.parametrize("value", [[0, 1], np.array([0, 1])], ids=["list", "array"])
@pytest.mark.parametrize(
    "update",
    [
        *(metric.update for metric in (Accuracy(), ConfusionMatrix(2), Precision(), MAE(), MSE(), R2(), Perplexity())),
        *(functional.accuracy, functional.mae, functional.mse, functional.r2, functional.perplexity),
        lambda preds, target: functional.f1(preds, target, 2),
    ],
)
@pytest.mark.parametrize("name", ["preds", "target"])
def test_what_is_no_tensor_is_refused(update: Any, name: str, value: Any) -> None:
    with pytest.raises(MetricError, match=rf"^{name} is .*: expected a tensor. Write torch.as_tensor\({name}\)$"):
        update(**{"preds": GOOD.float(), "target": GOOD, name: value})


def test_predictions_that_are_no_class_are_told_apart_from_targets() -> None:
    says = (
        r"targets or predictions are none of the classes 0 to 2 \(targets range from 0 to 1, predictions from 0 to 5\)"
    )
    counts = ConfusionMatrix(3)
    counts.update(torch.tensor([0, 5]), GOOD)  # held, and counted later
    with pytest.raises(MetricError, match=says):
        counts.compute()


@pytest.mark.parametrize("metric", [Sum(), Mean()])
def test_complex_numbers_are_refused_where_they_would_lose_a_part(metric: Any) -> None:
    with pytest.raises(
        MetricError, match=r"^value complex64\[2\]: a record holds real numbers. Write value.abs\(\), or "
    ):
        metric.update(torch.tensor([1j, 2.0]))
