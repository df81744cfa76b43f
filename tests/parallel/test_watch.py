"""Real ranks, forked: what is done to one of them ends all, in time and with a reason; waiting ends none."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from loopwright.parallel.verdict import Verdict
from loopwright.parallel.watch import Watch

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:  # the harness is a folder of scripts beside the tests
    sys.path.append(ROOT)

from reliability.ranks import GOES_ON, injected  # noqa: E402

TIMEOUT, PROMISE = 4.0, 30.0  # of the watch; and of the test, for a machine that is busy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "world_size", "rank"),
    [
        ("raise", 2, 1),
        pytest.param("kill", 4, 1, marks=pytest.mark.nightly),
        ("stop", 2, 0),
        pytest.param("raise in backward", 2, 0, marks=pytest.mark.nightly),
        pytest.param("gather alone", 4, 0, marks=pytest.mark.nightly),
        pytest.param("raise", 4, 0, marks=pytest.mark.nightly),
        ("kill", 2, 0),
        pytest.param("stop", 4, 1, marks=pytest.mark.nightly),
        pytest.param("barrier alone", 2, 1, marks=pytest.mark.nightly),
        pytest.param("leaves early", 2, 1, marks=pytest.mark.nightly),
        ("shapes", 3, 2),
        pytest.param("shapes", 2, 1, marks=pytest.mark.nightly),
        pytest.param("sizes", 2, 1, marks=pytest.mark.nightly),
    ],
)
def test_what_ends_one_rank_ends_all_and_each_names_the_rank_the_step_and_the_line(
    kind: str, world_size: int, rank: int
) -> None:
    outcome = injected(kind, world_size, rank, timeout=TIMEOUT, within=PROMISE)
    assert outcome.problems == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        pytest.param(kind, i % 2, marks=pytest.mark.nightly)
        for i, kind in enumerate(GOES_ON)
        if kind != "all stopped"  # which takes long: python -m reliability.ranks
    ],
)
def test_a_slow_rank_a_pause_of_all_an_early_end_and_a_second_fit_are_no_alarm(kind: str, rank: int) -> None:
    outcome = injected(kind, 2, rank, timeout=TIMEOUT)
    assert outcome.problems == []


def test_a_single_rank_has_nothing_to_watch() -> None:
    before = threading.active_count()
    with Watch(0, 1, lambda: 3):
        assert threading.active_count() == before


def test_an_error_of_a_single_rank_is_left_as_it_is() -> None:
    with pytest.raises(ValueError, match="mine") as caught, Watch(0, 1, lambda: 0):
        raise ValueError("mine")
    assert not hasattr(caught.value, "__notes__")


def test_a_rank_that_leaves_by_the_error_that_another_has_caused_says_where_it_was() -> None:
    """Whether it is out by then or not; one whose training was over says nothing of itself."""
    dead, watch = Verdict(1, "rank 1 ended without a word"), Watch(0, 2, lambda: 7)
    says = "rank 0 ends at step 7: rank 1 ended without a word"
    assert watch._words(dead) == says
    watch._error = {"error": "RuntimeError: Connection closed by peer", "lost": True}
    assert watch._words(dead) == says
    watch._left.set()
    assert watch._words(dead) == says
    watch._error = {}
    assert watch._words(dead) == "rank 1 ended without a word"
