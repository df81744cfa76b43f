from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from loopwright.errors import SettingError
from loopwright.monitor import better, direction, improved

FALLS = [
    "loss", "train/loss", "valid/disc/loss", "valid/MeanSquaredError", "valid/rmse", "valid/log_loss",
    "valid/top5_error", "valid/brier_score", "valid/perplexity", "valid/cross_entropy",
    "valid/mean_absolute_percentage_error", "test/fid",
]  # fmt: skip
RISES = [
    "valid/accuracy", "valid/acc", "valid/MulticlassAccuracy", "valid/f1", "valid/f1_macro", "valid/r2", "valid/auc",
    "valid/average_precision", "valid/mAP", "valid/top5", "valid/mean_iou", "valid/Dice", "valid/bleu", "valid/psnr",
]  # fmt: skip


@pytest.mark.parametrize("name", FALLS)
def test_losses_and_errors_fall(name):
    assert direction(name) == "min"


@pytest.mark.parametrize("name", RISES)
def test_accuracies_and_scores_rise(name):
    assert direction(name) == "max"


@pytest.mark.parametrize("name", ["lr", "valid/profit", "train/grad_norm", "loss/thing", "valid/mapping"])
def test_a_name_that_does_not_tell_must_be_said(name):
    assert better(name) is None
    assert direction(name, "max") == "max"
    with pytest.raises(SettingError) as error:
        direction(name)
    assert str(error.value) == (
        f"whether {name!r} should fall or rise does not follow from its name; "
        "add mode='min' (smaller is better) or mode='max'"
    )


def test_a_given_mode_wins_and_an_unknown_one_is_refused():
    assert direction("valid/loss", "max") == "max"
    with pytest.raises(SettingError, match="mode='auto' is unknown; use mode='min'"):
        direction("valid/loss", "auto")


@given(value=st.floats(), best=st.none() | st.floats(), delta=st.floats(0, 10))
def test_improving_is_mirrored_and_never_true_for_nan_or_the_same_value(value, best, delta):
    mirrored = improved(-value, None if best is None else -best, "max", delta)
    assert improved(value, best, "min", delta) == mirrored
    assert not improved(math.nan, best, "min", delta)
    assert not improved(value, value, "min", delta) or math.isnan(value)


def test_the_gain_must_be_larger_than_min_delta():
    assert improved(0.5, 1.0, "min", 0.25)
    assert not improved(0.5, 1.0, "min", 0.5)
    assert improved(1.0, math.nan, "min", 0.5)
