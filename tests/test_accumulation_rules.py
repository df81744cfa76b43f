"""Accumulation by samples, by tokens, and changing over time: true means, counted by hand, exact after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import loopwright as lw
from every_step import Experiment, resumed_at_every_step
from loopwright.accumulation import Accumulation, parse_accumulate
from test_accumulation import BOTH, gradients
from tiny import bits, classifier, line, loader, pairs, same, sgd_task, trainer


def tokens(batch: Any) -> float:
    """Each value of x counts as so many tokens."""
    return float(batch[0].sum())


@BOTH
def test_a_window_holds_the_batches_up_to_that_which_reaches_the_samples(given_as: Any) -> None:
    """Batches of 2, 1, 3, 1, 1 samples: at least 3 a step, and what is left over."""
    data = given_as(pairs([1, 3], [5], [2, 4, 6], [8], [10]))
    assert gradients(data, accumulate="3 samples") == [3.0, 4.0, 9.0]


@BOTH
def test_tokens_are_counted_by_weight_and_are_the_mean(given_as: Any) -> None:
    """A batch weighs what ``weight`` says, in the window and in its mean."""
    data = given_as(pairs([1, 3], [2], [3], [4, 4]))
    found = gradients(data, accumulate="6 tokens", weight=tokens)
    # {4 tokens, mean 2} + {2 tokens, mean 2}; {3, mean 3} + {8, mean 4}
    assert found == pytest.approx([2.0, (3 * 3 + 4 * 8) / 11])


@BOTH
def test_it_changes_at_the_steps_of_a_list_and_by_a_function(given_as: Any) -> None:
    """One batch a step for two steps, then two, then all that reaches 3 samples."""
    data = given_as(pairs([1], [2], [3], [5], [6], [7], [8]))
    rule: Any = [(0, 1), (2, 2), (3, "3 samples")]
    assert gradients(data, accumulate=rule) == [1.0, 2.0, 4.0, 7.0]
    assert gradients(data, accumulate=lambda p: 1 if p.step < 2 else 2 if p.step == 2 else "3 samples") == [
        1.0, 2.0, 4.0, 7.0,
    ]  # fmt: skip


def test_a_list_counts_the_steps_of_its_stage() -> None:
    net = line()
    stages = [lw.Stage(name, "1 epoch", accumulate=[(0, 1), (1, 2)]) for name in "ab"]
    run = trainer().fit(sgd_task(net), pairs([1], [2], [4]), stages=stages)
    assert run.progress.step == 4
    assert net.weight.item() == -2 * (1 + 3)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 20))
def test_steps_of_an_epoch_are_told_before_it_begins(sizes: list[int], amount: int) -> None:
    """Half an epoch, a plan and a bar need the number of steps: it is the number that is taken."""
    data = pairs(*[[1.0] * size for size in sizes])
    run = trainer(epochs=1, accumulate=f"{amount} samples").fit(sgd_task(line()), data)
    assert run.progress.step == Accumulation(f"{amount} samples").steps(sizes)
    assert run.progress.samples == sum(sizes)


def test_as_many_batches_as_a_number_have_its_bits() -> None:
    def fitted(accumulate: Any) -> list[Any]:
        torch.manual_seed(0)
        net = classifier(dropout=0.3)
        task = sgd_task(net, lr=0.1, loss=nn.CrossEntropyLoss())
        trainer(epochs=2, accumulate=accumulate).fit(task, loader(batch_size=4, shuffle=True))
        return bits(net)

    expected = fitted(3)
    for same_thing in ("3 batches", "12 samples", [(0, 3)], lambda progress: 3):
        assert same(fitted(same_thing), expected)


@pytest.mark.parametrize("rule", ["9 samples", [(0, 1), (2, "9 samples"), (4, 2)], lambda p: 1 + p.epoch, "11 tokens"])
def test_a_resume_at_every_step_ends_with_the_same_bits(rule: Any, tmp_path: Path) -> None:
    def make() -> Experiment:
        net = classifier(dropout=0.3)
        task = lw.Supervised(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.05))
        data = loader(23, noisy=True, batch_size=4, shuffle=True)
        weight = (lambda batch: 1.0 + len(batch[0])) if rule == "11 tokens" else None
        return Experiment(task, data, settings={"epochs": 2, "accumulate": rule}, weight=weight)

    assert resumed_at_every_step(make, tmp_path).progress.step > 3


@pytest.mark.parametrize(
    ("rule", "weight", "says"),
    [
        ("4096 tokens", None, "nothing says how many a batch has; pass fit(..., weight=lambda batch: ...)"),
        ("256 samples", tokens, "weight= weighs batches by something else; leave weight= out"),
    ],
)
def test_a_unit_that_nobody_counts_is_refused_at_the_start(rule: Any, weight: Any, says: str) -> None:
    with pytest.raises(lw.PlanError) as caught:
        trainer(epochs=1, accumulate=rule).fit(sgd_task(line()), pairs([1]), weight=weight)
    assert says in str(caught.value)
    with pytest.raises(lw.SettingError) as later:
        trainer(epochs=1, accumulate=lambda p: rule).fit(sgd_task(line()), pairs([1]), weight=weight)
    assert says in str(later.value)


@pytest.mark.parametrize(
    "rule", [0, True, "4 pages", "0 samples", [], [(1, 4)], [(0, 1), (0, 2)], [(0, "x")], [4], 2.5]
)
def test_a_rule_that_is_none_is_refused_where_it_is_given(rule: Any) -> None:
    for make in (lambda: trainer(epochs=1, accumulate=rule), lambda: lw.Stage("s", "1 epoch", accumulate=rule)):
        with pytest.raises(lw.SettingError, match="accumulate="):
            make()


def test_a_function_that_returns_no_amount_is_named() -> None:
    with pytest.raises(
        lw.SettingError, match=r"^accumulate='many': expected a whole number of batches, at least 1, '256"
    ):
        trainer(epochs=1, accumulate=lambda progress: "many").fit(sgd_task(line()), pairs([1]))


def test_part_of_an_epoch_is_refused_where_its_steps_depend_on_progress() -> None:
    with pytest.raises(lw.SettingError, match=r"'0.5 epochs' needs to know the steps of an epoch; count steps instead"):
        trainer(epochs=0.5, accumulate=[(0, 1), (2, 2)]).fit(sgd_task(line()), pairs([1], [2]))


def test_a_plan_tells_the_steps_and_explain_the_rule() -> None:
    task, data = sgd_task(line()), pairs([1, 1], [1, 1], [1])
    assert "an epoch is 3 batches, 2 steps" in str(trainer(epochs=1, accumulate="3 samples").plan(task, data))
    assert "for each window of 3 samples of" in trainer(epochs=1, accumulate="3 samples").explain(task, data)
    assert parse_accumulate("5 batches") == 5


def test_closures_take_one_batch_a_step_whatever_the_rule() -> None:
    net = line()
    task = lw.Supervised(net, nn.MSELoss(), torch.optim.LBFGS(net.parameters()))
    with pytest.raises(lw.PlanError, match="accumulate=3 samples cannot apply to LBFGS"):
        trainer(epochs=1, accumulate="3 samples").fit(task, pairs([1]))
