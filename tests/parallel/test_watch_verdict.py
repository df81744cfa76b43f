"""The judgement, without processes: what is a cause, what followed from it, and what is no fault at all."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loopwright.parallel.calls import Call
from loopwright.parallel.standing import Process
from loopwright.parallel.verdict import Report, Seen, Verdict, awaited, ended, judge, unreachable

HERE = Process("m", "node-1", 7, "3")
ON = " (its last report: at step 120, train.py:41 in main; process 7 on node-1)"
SINCE = ON.replace("report:", "report, which came 2.4 s ago:")


def seen(*, silent: float = 0.0, lost: float = 0.0, state: str = "runs", **fields: Any) -> Seen:
    usual: dict[str, Any] = {
        "beat": 9, "step": 120, "place": "train.py:41 in main", "waits": "", "path": 1, "still": 0.0,
    }  # fmt: skip
    return Seen(HERE, Report(**{**usual, **fields}), silent=silent, age=2.4, lost=lost, state=state)


def waits(path: int = 1, call: str = "all_reduce", still: float = 99.0, **fields: Any) -> Seen:
    return seen(waits=call, still=still, path=path, **fields)


def verdict(*ranks: Seen) -> Verdict | None:
    return judge(dict(enumerate(ranks)), patience=18, beat=1)


def test_an_error_is_told_with_its_rank_step_place_and_traceback() -> None:
    assert verdict(seen(), seen(error="ValueError: no", trace="Traceback ...")) == Verdict(
        1, "rank 1 failed at step 120, train.py:41 in main: ValueError: no", "Traceback ..."
    )


def test_a_rank_that_is_gone_is_told_at_once_and_one_that_has_left_is_not() -> None:
    found = verdict(seen(), seen(state="gone"))
    assert found is not None
    assert found.text == f"rank 1 ended without a word, killed or crashed{SINCE}"
    assert verdict(seen(), seen(state="gone", left=True)) is None


def test_silence_counts_from_patience_on_and_a_process_that_runs_is_alive() -> None:
    assert verdict(seen(), seen(silent=17.9, state="stopped")) is None
    found = verdict(seen(), seen(silent=18.2, state="stopped"))
    assert found == Verdict(
        1, f"rank 1 has not been heard of for 18 s: its process was stopped by a signal{ON}", "", HERE
    )
    found = verdict(seen(), seen(silent=18.2, state="unknown"))
    assert found is not None
    assert found.text == f"rank 1 has not been heard of for 18 s{ON}"
    assert verdict(seen(), seen(silent=999, state="runs")) is None


def test_a_rank_that_never_came_is_named() -> None:
    assert verdict(seen(), Seen(HERE, silent=17)) is None
    found = verdict(seen(), Seen(HERE, silent=18.4, state="unknown"))
    assert found is not None
    assert found.text == "rank 1 has not been heard of for 18 s (process 7 on node-1)"


def test_a_cause_goes_before_a_connection_that_was_lost_by_it() -> None:
    victim = seen(error="RuntimeError: Connection closed by peer", lost=5, state="gone")
    victim.report = victim.report._replace(lost=True)  # type: ignore[union-attr]
    for culprit in (seen(error="ValueError: no"), seen(state="gone"), seen(silent=20, state="stopped")):
        found = verdict(victim, culprit)
        assert found is not None
        assert found.rank == 1
    quiet = verdict(victim, seen(silent=4.5, state="unknown"))
    assert quiet is not None
    assert quiet.text == (
        f"rank 1 has not been heard of for 4 s{ON}; rank 0 failed at step 120, train.py:41 in main: "
        "RuntimeError: Connection closed by peer"
    )
    alone = verdict(victim, seen())
    assert alone is not None
    assert alone.rank == 0
    victim.lost = 3.9  # the cause may still show itself
    assert verdict(victim, seen()) is None


def test_a_deadlock_shows_where_each_rank_waits() -> None:
    found = verdict(waits(), waits(path=2, call="barrier", place="train.py:33 in log"), waits(), waits())
    assert found is not None
    assert found.rank is None
    assert found.text == (
        "deadlock: no rank has moved for 18 s. ranks 0, 2-3: step 120, waits in all_reduce, train.py:41 in main; "
        "rank 1: step 120, waits in barrier, train.py:33 in log"
    )
    assert found.more.splitlines()[0] == "  ranks 0, 2-3: step 120, waits in all_reduce, train.py:41 in main"


def test_ranks_in_different_steps_or_calls_are_locked_and_those_in_one_place_are_not() -> None:
    assert verdict(waits(), waits()) is None
    assert verdict(waits(), waits(step=121)) is not None
    assert verdict(waits(), waits(call="barrier")) is not None
    left = verdict(waits(), seen(left=True))
    assert left is not None
    assert left.text.endswith("rank 1: step 120, has left training")
    assert verdict(seen(left=True), seen(left=True)) is None


def test_one_that_has_left_is_waited_for_in_vain_after_four_beats() -> None:
    assert verdict(waits(still=4.0), seen(left=True)) is not None
    assert verdict(waits(still=3.9), seen(left=True)) is None
    assert verdict(waits(still=17.9), waits(path=2, still=17.9)) is None


def made(*calls: str, **fields: Any) -> Seen:
    told = [Call("default_pg gloo", 7 + i, call, f"{call}()", f"train.py:{i} in step") for i, call in enumerate(calls)]
    return waits(calls=tuple(told), still=2.0, **fields)


def test_calls_that_do_not_match_are_told_at_once_with_the_lines_of_the_rank_that_differs() -> None:
    assert verdict(made("all_reduce", "barrier"), made("all_reduce")) is None
    assert verdict(made("all_reduce"), waits(path=2, still=2.0)) is None  # not known yet of the other
    found = verdict(made("all_reduce"), made("barrier", stack=("a.py:1 in main", "a.py:5 in log")), made("all_reduce"))
    assert found is not None
    assert found.rank == 1
    assert found.text == (
        "collectives do not match at step 120: call 7 of the default group: ranks 0, 2: all_reduce(), train.py:0 in "
        "step; rank 1: barrier(), train.py:0 in step"
    )
    stood = "rank 1 stood in, when it last reported (most recent call last):\n  a.py:1 in main\n  a.py:5 in log\n"
    assert found.more.startswith(stood)
    two = verdict(made("all_reduce"), made("barrier"))
    assert two is not None
    assert two.rank is None


def test_a_rank_that_was_killed_is_told_with_the_lines_where_it_last_stood() -> None:
    found = verdict(seen(), seen(state="gone", stack=("train.py:41 in main",)))
    assert found is not None
    assert found.more == "rank 1 stood in, when it last reported (most recent call last):\n  train.py:41 in main"


def test_no_deadlock_while_one_rank_moves_works_or_is_quiet() -> None:
    other = waits(path=2)
    assert verdict(other, waits(still=17)) is None  # moved a moment ago
    assert verdict(other, seen(still=99)) is None  # sleeps, reads, saves: no call that waits for others
    assert verdict(other, waits(silent=5)) is None  # its report is old: it may have moved
    assert verdict(other, Seen(HERE)) is None


@given(
    st.lists(
        st.builds(
            seen, silent=st.floats(0, 17.9), still=st.floats(0, 99), step=st.integers(0, 3), path=st.integers(0, 3),
            left=st.booleans(), state=st.sampled_from(["runs", "stopped", "unknown"]),
        ),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_ranks_that_work_and_report_are_never_judged(ranks: list[Seen]) -> None:
    assert verdict(*ranks) is None


def test_a_store_that_is_gone_is_news_of_rank_0_unless_it_had_left() -> None:
    assert unreachable(seen(left=True), "Broken pipe") is None
    gone = unreachable(seen(state="gone"), "Broken pipe")
    assert gone == Verdict(0, f"rank 0 ended without a word, killed or crashed{SINCE}")
    assert unreachable(seen(state="unknown"), "Broken pipe") == Verdict(
        0, f"rank 0 cannot be reached (Broken pipe){SINCE}"
    )
    failed = unreachable(seen(error="ValueError: no", left=True), "Broken pipe")
    assert failed == Verdict(0, "rank 0 failed at step 120, train.py:41 in main: ValueError: no")


def test_the_others_judge_only_whether_rank_0_lives() -> None:
    assert ended({0: seen(error="ValueError: no")}, patience=18) is None  # its own verdict is on the way
    assert ended({0: seen(state="gone")}, patience=18) is not None


def test_reports_and_verdicts_survive_the_way() -> None:
    report = made("barrier", error="E: x", trace="t", lost=True, stack=("a.py:1 in f",)).report
    assert report is not None
    assert Report.unpack(report.pack()) == report
    for one in (Verdict(None, "text", "more"), Verdict(1, "text", silent=HERE)):
        assert Verdict.unpack(one.pack()) == one


def test_those_that_are_waited_for_are_named_with_the_place_of_the_first() -> None:
    done = seen(left=True)
    assert awaited({0: done, 1: seen(), 2: seen()}) == "ranks 1-2 (step 120, train.py:41 in main)"
    assert awaited({0: done, 1: Seen(HERE)}) == "rank 1"
    assert awaited({0: done}) == ""
