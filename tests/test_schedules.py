"""Schedules as functions of a fraction: known values, torch's own, and what holds for any of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

import loopwright as lw
from loopwright.progress import Whole
from loopwright.schedules import (
    Schedule,
    concat,
    constant,
    cosine,
    curve,
    cyclical,
    exponential,
    from_plain,
    linear,
    one_cycle,
    piecewise,
    polynomial,
    repeat,
    restarts,
    scaled,
    warmup,
)
from tiny import line, pairs, trainer

TOTAL = 24


def of_torch(make: Callable[[Any], Any], key: str = "lr", lr: float = 0.5) -> list[float]:
    """What torch's scheduler sets before each of TOTAL steps, and after the last of them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.9)
    scheduler, seen = make(optimizer), []
    for _ in range(TOTAL):
        seen.append(optimizer.param_groups[0][key])
        optimizer.step()
        scheduler.step()
    return [*seen, optimizer.param_groups[0][key]]


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (cosine(0.5, 0.01), lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.01)),
        (linear(0.05, 0.5), lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, TOTAL)),
        (polynomial(0.5, 0.0, power=3), lambda o: lr_scheduler.PolynomialLR(o, TOTAL, power=3)),
        (exponential(0.5, 0.5 * 0.9**TOTAL), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
        (concat([constant(0.5), constant(0.05)], [0.5]), lambda o: lr_scheduler.StepLR(o, TOTAL // 2)),
        (
            restarts(0.5, 0.01, cycles=3),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, TOTAL // 3, eta_min=0.01),
        ),
        (
            cyclical(0.1, 0.6, cycles=3),
            lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.6, step_size_up=TOTAL // 6, cycle_momentum=False),
        ),
        (
            warmup(cosine(0.5, 0.0), "8 steps", start=0.05).within(lambda duration: duration.value / TOTAL),
            lambda o: lr_scheduler.SequentialLR(
                o,
                [lr_scheduler.LinearLR(o, 0.1, 1.0, 8), lr_scheduler.CosineAnnealingLR(o, TOTAL - 8)],
                milestones=[8],
            ),
        ),
    ],
    ids=["cosine", "linear", "polynomial", "exponential", "step", "restarts", "cyclic", "warm-up and cosine"],
)
@pytest.mark.capability("IG-11")
def test_the_values_are_those_of_torch_where_the_definitions_coincide(ours: Schedule, torchs: Any) -> None:
    expected = of_torch(torchs)[:TOTAL]  # what a restart does at the very end is another matter
    assert [ours(k / TOTAL) for k in range(TOTAL)] == pytest.approx(expected, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("key", ["lr", "momentum"])
def test_one_cycle_is_that_of_torch_which_reaches_its_end_one_step_earlier(key: str) -> None:
    settings: dict[str, Any] = {"pct_start": 0.25, "div_factor": 25.0, "final_div_factor": 4e3}

    def make(optimizer: Any) -> Any:
        return lr_scheduler.OneCycleLR(optimizer, 0.5, TOTAL + 2, **settings)

    last = TOTAL + 1  # torch counts total_steps - 1 intervals, and its peak lies at pct_start * total_steps - 1
    ours = one_cycle(0.5, rise=(0.25 * (TOTAL + 2) - 1) / last)[key]
    assert [ours(k / last) for k in range(TOTAL)] == pytest.approx(of_torch(make, key)[:TOTAL], abs=1e-12)
    if key == "momentum":
        assert [ours(0.0), ours((0.25 * (TOTAL + 2) - 1) / last), ours(1.0)] == [0.95, 0.85, 0.95]


def test_one_cycle_has_the_shape_and_the_defaults_of_fastai() -> None:
    made = one_cycle(0.1)
    assert [made["lr"](f) for f in (0, 0.25, 1)] == [0.1 / 25, 0.1, 0.1 / 1e5]
    assert [made["momentum"](f) for f in (0, 0.25, 1)] == [0.95, 0.85, 0.95]
    middle = 0.1 + (0.1 / 1e5 - 0.1) * (1 - math.cos(math.pi * 0.5)) / 2
    assert made["lr"](0.25 + 0.75 / 2) == pytest.approx(middle, rel=1e-12)
    assert set(one_cycle(0.1, momentum=None)) == {"lr"}
    assert one_cycle()["lr"] == scaled(one_cycle(1.0)["lr"])


@pytest.mark.capability("IG-11")
def test_known_values() -> None:
    """Straight lines through points, growing restarts, a function of one's own: values worked out by hand."""
    assert [constant(0.3)(f) for f in (0, 0.5, 1)] == [0.3] * 3
    assert [piecewise([(0.2, 1.0), (0.4, 3.0)])(f) for f in (0, 0.2, 0.3, 0.4, 1)] == pytest.approx([1, 1, 2, 3, 3])
    assert [piecewise({0: 0.0, 0.5: 1.0, 1: 0.0})(f) for f in (0, 0.25, 0.5, 1)] == [0, 0.5, 1, 0]
    assert [piecewise([(0, 1.0), (0.5, 1.0), (0.5, 2.0)])(f) for f in (0.49, 0.5)] == [1, 2]
    growing = restarts(1.0, cycles=2, stretch=3)  # a quarter, and three
    assert [growing(f) for f in (0, 0.125, 0.25, 0.625, 1)] == pytest.approx([1, 0.5, 1, 0.5, 0], abs=1e-12)
    assert curve(lambda f: f**2)(0.5) == 0.25


def test_a_cycle_begins_at_the_very_step_at_which_it_should() -> None:
    for cycles, total in ((3, 3 * 29), (10, 100), (7, 7 * 11), (100, 100 * 3)):
        for stretch in (1.0, 2.0) if cycles < 5 else (1.0,):
            saw = repeat(linear(1.0, 0.0), cycles, stretch)
            values = [saw(k / total) for k in range(total)]
            jumps = [k for k in range(1, total) if values[k] > values[k - 1]]
            if stretch == 1:
                assert jumps == list(range(total // cycles, total, total // cycles))
            assert len(jumps) == cycles - 1
            assert saw(1.0) == 0.0


# ------------------------------------------------------------------------------------- what holds for any of them

numbers = st.floats(1e-6, 10.0)
shapes = st.one_of(
    st.builds(constant, numbers),
    st.builds(linear, numbers, numbers),
    st.builds(cosine, numbers, numbers),
    st.builds(polynomial, numbers, numbers, st.floats(0.2, 5.0)),
    st.builds(exponential, numbers, numbers),
)
fractions = st.floats(0.0, 1.0)


@given(shapes)
def test_a_shape_begins_and_ends_exactly_where_it_says(shape: Any) -> None:
    start, end = (shape.value,) * 2 if isinstance(shape, constant) else (shape.start, shape.end)
    assert (shape(0.0), shape(1.0)) == (start, end)


@given(shapes, st.lists(fractions, min_size=2, max_size=9))
def test_a_shape_goes_one_way_and_stays_between_its_ends(shape: Any, at: list[float]) -> None:
    values = [shape(fraction) for fraction in sorted(at)]
    low, high = sorted((shape(0.0), shape(1.0)))
    slack = 1e-12 * high
    assert all(low - slack <= value <= high + slack for value in values)
    rising = shape(1.0) >= shape(0.0)
    assert all((b - a if rising else a - b) >= -slack for a, b in pairwise(values))


@given(st.lists(shapes, min_size=1, max_size=5), fractions, st.data())
@pytest.mark.capability("IG-11")
def test_a_concatenation_is_each_of_its_parts_in_turn(parts: list[Any], fraction: float, data: Any) -> None:
    bounds = sorted(data.draw(st.lists(st.floats(0.01, 0.99), min_size=len(parts) - 1, max_size=len(parts) - 1)))
    whole = concat(parts, bounds)
    edges = [0.0, *bounds, 1.0]
    assert (whole(0.0), whole(1.0)) == (parts[0](0.0), parts[-1](1.0))
    i = max(n for n, low in enumerate(edges[:-1]) if low <= fraction and (edges[n + 1] > low or n == 0))
    low, high = edges[i], edges[i + 1]
    assert whole(fraction) == pytest.approx(parts[i]((fraction - low) / (high - low)), rel=1e-9)


@given(shapes, st.floats(0.01, 0.99), numbers)
@pytest.mark.capability("IG-11")
def test_a_warm_up_joins_without_a_jump(shape: Any, over: float, start: float) -> None:
    warm = warmup(shape, over, start=start)
    step = 1e-9
    assert warm(0.0) == start
    assert warm(over) == pytest.approx(shape(0.0), rel=1e-9)
    assert warm(over - step * over) == pytest.approx(warm(over), abs=1e-6)
    assert warm(1.0) == shape(1.0)


@given(shapes, st.integers(1, 7), st.floats(0.5, 3.0), fractions)
def test_repeating_gives_no_value_that_the_part_does_not(shape: Any, times: int, stretch: float, at: float) -> None:
    low, high = sorted((shape(0.0), shape(1.0)))
    again = repeat(shape, times, stretch)
    assert low * (1 - 1e-9) <= again(at) <= high * (1 + 1e-9)
    assert (again(0.0), again(1.0)) == (shape(0.0), shape(1.0))


trees = st.recursive(
    shapes,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(concat),
        st.builds(repeat, inner, st.integers(1, 3)),
        st.builds(warmup, inner, st.sampled_from([0.1, "500 steps", "2 epochs"])),
    ),
    max_leaves=6,
)


@given(st.one_of(trees, trees.map(scaled)))
def test_plain_data_and_the_printed_form_read_back_equal(schedule: Schedule) -> None:
    names = {**{name: getattr(lw.schedules, name) for name in lw.schedules.__all__}, "Duration": lw.Duration}
    assert from_plain(schedule.plain()) == schedule
    assert eval(repr(schedule), names) == schedule
    assert copy.deepcopy(schedule) == schedule
    assert hash(schedule) == hash(copy.deepcopy(schedule))


# ------------------------------------------------------------------------------------------------- durations, errors


def test_durations_become_fractions_of_the_whole_that_they_stand_in() -> None:
    whole = Whole((lw.Duration.parse("4 epochs"),), 13, 25)  # 13 steps an epoch
    schedule = concat([constant(1.0), warmup(constant(2.0), "13 steps")], ["1 epoch"]).within(whole.share)
    values = [round(schedule(k / 52), 3) for k in (0, 12, 13, 13 + 6, 26, 51)]
    assert values == [1.0, 1.0, 0.0, round(2 * 6 / 13, 3), 2.0, 2.0]
    twice = repeat(warmup(constant(1.0), "13 steps"), 2).within(whole.share)  # of 26 steps each
    assert [twice(k / 52) for k in (0, 13, 26, 39)] == [0.0, 1.0, 0.0, 1.0]
    assert piecewise([("1 epoch", 0.0), ("2 epochs", 1.0)]).within(whole.share)(39 / 104) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: cosine(0.1, 0.0)(1.5), "a schedule goes from 0 to 1, the part of a stage that is done; got 1.5"),
        (lambda: linear("a", 1), "start='a': expected a finite number"),
        (lambda: constant(math.nan), "value=nan: expected a finite number"),
        (lambda: exponential(1.0, 0.0), "no factor leads from one to the other; expected two numbers of one sign"),
        (lambda: concat([linear(0, 1)], [0.5]), "1 parts have 0 bounds between them; got bounds=[0.5]"),
        (lambda: concat([1, 2, 3], [0.5, 0.2]), "expected fractions from 0 to 1 that do not fall, or durations"),
        (lambda: concat([1, scaled(linear(0, 1))]), "put scaled(...) around the whole one"),
        (lambda: repeat(linear(0, 1), 0), "times=0: expected a whole number, from 1"),
        (lambda: warmup(1.0, "5 stepps"), "unknown unit 'stepps' in the duration '5 stepps'"),
        (lambda: warmup(1.0, "5 steps")(0.1), "how much '5 steps' is of the whole is known in a run only"),
        (lambda: warmup(1.0, "5 steps").within(lambda d: 1.5), "'5 steps' is longer than the whole in which it lies"),
        (lambda: warmup(1.0, 2), "over=2: expected a fraction from 0 to 1, or a duration such as '500 steps'"),
        (lambda: one_cycle(0.1, div=0), "div=0: expected a positive number, by which the peak is divided"),
        (lambda: one_cycle(0.1, div_final=-1), "div_final=-1: expected a positive number"),
        (lambda: one_cycle(math.nan), "peak=nan: expected a finite number"),
        (lambda: one_cycle(0.1, rise=2), "rise=2: expected a fraction from 0 to 1, or a duration"),
        (lambda: one_cycle(0.1, momentum=(0.9, 0.8)), "momentum=(0.9, 0.8): expected three numbers, at the start"),
        (lambda: one_cycle(0.1, momentum=0.9), "momentum=0.9: expected three numbers"),
        (lambda: one_cycle(0.1, momentum=(0.9, "a", 0.9)), "momentum='a': expected a finite number"),
        (lambda: cyclical(0.0, 1.0, cycles=-1), "cycles=-1: expected a whole number, from 1"),
        (lambda: cyclical(0.0, 1.0, cycles=2, rise=-1), "rise=-1: expected a fraction from 0 to 1"),
        (lambda: cyclical("a", 1.0, cycles=2), "low='a': expected a finite number"),
        (lambda: restarts(1.0, cycles=0), "cycles=0: expected a whole number, from 1"),
        (lambda: restarts(math.inf, cycles=2), "high=inf: expected a finite number"),
        (lambda: from_plain({"kind": "cosin"}), "Did you mean 'cosine'?"),
        (lambda: from_plain({"kind": "cosine", "begin": 1}), "cosine does not take these fields"),
        (lambda: lw.schedules.as_schedule("0.1"), "'0.1' is no schedule; write a number, or one such as"),
        (lambda: lw.schedules.as_schedule(cosine), "cosine is a kind of schedule; make one, such as cosine(...)"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_fix(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(lw.SettingError) as error:
        make()
    assert text in str(error.value)


def test_the_picture_shows_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    schedule = warmup(cosine(1.0, 0.0), 0.1)
    ax = schedule.plot()
    x, y = ax.lines[0].get_data()
    assert [schedule(at) for at in x] == list(y)
    both = lw.schedules.plot(one_cycle(0.1))
    assert [one.get_ylabel() for one in both] == ["lr", "momentum"]
    assert schedule.plot(both[0]) is both[0]
    pyplot.close("all")


@pytest.mark.parametrize("rule", [lambda f: 0.1 * (1 - f), lambda f: math.cos(f), lambda f: 0.1 if f < 0.5 else 0.2])
def test_a_function_of_the_fraction_outside_of_a_dict_is_told_where_it_goes(rule: Any) -> None:
    task = lw.Supervised(net := line(), nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1), schedule=rule)
    with pytest.raises(lw.SettingError) as error:
        trainer(epochs=1).fit(task, pairs([1.0]))
    assert str(error.value).startswith(
        "the function schedule=... is called with the optimizer, SGD, to make a scheduler of it, and failed: "
    )
    assert str(error.value).endswith(
        '. A function of the part of the stage that is done goes into a dict: schedule={"lr": function}'
    )


def test_an_error_of_a_factory_itself_stays_what_it_is() -> None:
    def made(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, None)  # type: ignore[arg-type]

    task = lw.Supervised(net := line(), nn.MSELoss(), torch.optim.SGD(net.parameters(), 0.1), schedule=made)
    with pytest.raises(TypeError, match="NoneType"):
        trainer(epochs=1).fit(task, pairs([1.0]))
