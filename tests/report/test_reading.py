"""A run folder is read with patience: what is torn, damaged or hostile is said, and costs no more than itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loopwright as lw
from loopwright.loggers import JSONLLogger
from loopwright.report.curves import band, thin
from loopwright.report.log import Curve
from loopwright.report.reading import find_run, read_run
from recorded import line, made


def test_what_a_logger_writes_is_read(tmp_path):
    logger = JSONLLogger(made(tmp_path / "a") / "metrics.jsonl")
    for step, value in ((1, 0.5), (2, math.nan), (3, math.inf)):
        logger.log(lw.Progress(step=step), {"train/loss": value, "lr": 1}, "train")
    run = read_run(tmp_path / "a")
    curve = run.curves["train"]["train/loss"]
    assert curve.step.tolist() == [1, 2, 3]
    assert curve.value[0] == 0.5
    assert math.isnan(curve.value[1])
    assert curve.value[2] == math.inf
    assert run.curves["train"]["lr"].value.tolist() == [1.0, 1.0, 1.0]
    assert run.notes == []


def test_a_torn_last_line_is_left_out_and_said(tmp_path):
    folder = made(tmp_path / "a", line(1, x=1.0) + line(2, x=2.0) + '{"kind": "train", "st')
    run = read_run(folder)
    assert run.curves["train"]["x"].step.tolist() == [1, 2]
    assert run.notes == [
        "the last line of metrics.jsonl (line 3) was not written to its end and is left out: the run was killed then, "
        "or is writing now"
    ]
    assert "was not written to its end" in lw.report.write(folder).read_text()


@pytest.mark.parametrize(
    "bad",
    ["[1]", "null", "{", '{"kind": "train"}', '{"step": "x"}', '{"step": -1}', '{"step": 1e400}', '{"step": null}',
     '{"step": 99999999999999999999}', "\x00", "[" * 100_000, '{"step": ' + "9" * 10_000 + "}"],
)  # fmt: skip
def test_a_line_that_is_no_record_costs_itself_only(tmp_path, bad):
    run = read_run(made(tmp_path / "a", line(1, x=1.0) + bad + "\n" + line(3, x=3.0)))
    assert run.curves["train"]["x"].step.tolist() == [1, 3]
    assert run.notes == ["1 line of metrics.jsonl could not be read: line 2"]


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    log = line(1, x=1.0, text="NaN?", flag=True, none=None, many=[1], deep={"a": 1}, huge=10**400)
    assert list(read_run(made(tmp_path / "a", log)).curves["train"]) == ["x"]


def test_steps_that_go_back_are_put_in_order(tmp_path):
    run = read_run(made(tmp_path / "a", line(5, x=5.0) + line(2, x=2.0)))
    assert run.curves["train"]["x"].value.tolist() == [2.0, 5.0]


def test_the_newest_run_of_a_name_is_found(tmp_path):
    for name in ("20260101-000000-aaaaaa", "20260102-000000-bbbbbb"):
        made(tmp_path / "digits" / name)
    assert find_run(tmp_path / "digits").name == "20260102-000000-bbbbbb"


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("digitz", "digitz does not exist. Known: '{0}/digits'. Did you mean '{0}/digits'? To list runs: "),
        (".", "is not the folder of a run: it has no run.json. Known: '{0}/digits'"),
        ("digits/one/metrics.jsonl", "is a file of a run; give that: {0}/digits/one"),
        ("none/of/this", "does not exist. A run writes one with Trainer(folder='runs')."),
    ],
)
def test_what_is_no_run_is_refused_with_what_to_give(tmp_path, where, told):
    made(tmp_path / "digits" / "one")
    with pytest.raises(lw.SettingError) as error:
        find_run(tmp_path / where)
    assert told.format(tmp_path) in str(error.value)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=300), st.integers(2, 60))
def test_a_thinned_curve_has_the_extremes_and_no_more_points_than_asked(values, limit):
    curve = Curve(np.arange(len(values)), np.array(values))
    few = thin(curve, limit)
    assert len(few) <= max(limit, 2)
    assert (np.diff(few.step) > 0).all()
    good = curve.value[np.isfinite(curve.value)]
    if len(good):
        kept = few.value[np.isfinite(few.value)]
        assert (kept.min(), kept.max()) == (good.min(), good.max())
    known = dict(zip(curve.step.tolist(), values, strict=True))
    assert all(v == known[s] or math.isnan(v) for s, v in zip(few.step.tolist(), few.value.tolist(), strict=True))


def test_a_band_is_the_mean_and_the_range_over_runs():
    runs = [
        Curve(np.array([0, 10, 20]), np.array([0.0, 1.0, math.nan])),
        Curve(np.array([0, 5, 10]), np.array([2.0, 2, 3])),
    ]
    steps, mean, low, high = (part.tolist() for part in band(runs))
    assert steps == [0, 5, 10]
    assert (mean, low, high) == ([1.0, 1.25, 2.0], [0.0, 0.5, 1.0], [2.0, 2.0, 3.0])
