"""How long and how often: durations and intervals, with one language for everything that has one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import loopwright as lw
from loopwright.progress import Every
from tiny import line, pairs, sgd_task, trainer

UNITS = ("steps", "epochs", "samples", "seconds")


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        (500, 500, "steps"),
        ("500", 500, "steps"),
        ("1 step", 1, "steps"),
        ("500 steps", 500, "steps"),
        ("1e6 samples", 1e6, "samples"),
        ("2 epochs", 2, "epochs"),
        ("0.5 epochs", 0.5, "epochs"),
        ("2Epochs", 2, "epochs"),
        (" 3  epochs ", 3, "epochs"),
        ("1_000 steps", 1000, "steps"),
        ("30 s", 30, "seconds"),
        ("10 min", 600, "seconds"),
        ("1.5 hours", 5400, "seconds"),
        ("2 days", 172800, "seconds"),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text: Any, value: float, unit: str) -> None:
    assert lw.Duration.parse(text) == lw.Duration(value, unit)


def test_a_bare_number_has_the_unit_of_its_argument() -> None:
    assert lw.Duration.parse(3, unit="epochs") == lw.Duration(3, "epochs")
    assert lw.Duration.parse("3 steps", unit="epochs") == lw.Duration(3, "steps")
    assert lw.Duration.parse(lw.Duration(3, "steps"), unit="epochs") == lw.Duration(3, "steps")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("often", "'often' is not a duration; write a number and a unit, such as '500 steps', '2 epochs', '10 min' or "
                  "'1e6 samples'"),
        (True, "True is not a duration; write a number and a unit, such as '500 steps', '2 epochs', '10 min' or "
               "'1e6 samples'"),
        (-5, "-5 is not a duration; write a number and a unit, such as '500 steps', '2 epochs', '10 min' or "
             "'1e6 samples'"),
        ("1.2.3 steps", "'1.2.3 steps' is not a duration; write a number and a unit, such as '500 steps', '2 epochs', "
                        "'10 min' or '1e6 samples'"),
        ("2 epoch5", "'2 epoch5' is not a duration; write a number and a unit, such as '500 steps', '2 epochs', "
                     "'10 min' or '1e6 samples'"),
        ("5 stepps", "unknown unit 'stepps' in the duration '5 stepps'. Known: 'day', 'days', 'epoch', 'epochs', 'h', "
                     "'hour', 'hours', 'min', 'minute', 'minutes', 's', 'sample', 'samples', 'sec', 'second', "
                     "'seconds', 'step', 'steps'. Did you mean 'steps'?"),
        (0, "the duration 0 must be a positive number"),
        ("0 min", "the duration '0 min' must be a positive number"),
        ("1e999 min", "the duration '1e999 min' must be a positive whole number"),
        ("2.5 steps", "the duration '2.5 steps' must be a positive whole number"),
        (0.5, "the duration 0.5 must be a positive whole number"),
    ],
)  # fmt: skip
def test_what_is_no_duration_is_refused(text: Any, message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.Duration.parse(text)
    assert str(caught.value) == message


@given(st.sampled_from(UNITS), st.integers(1, 10**15), st.floats(1e-6, 1e6))
def test_a_duration_reads_back_what_it_prints(unit: str, whole: int, part: float) -> None:
    value = float(whole) if unit in ("steps", "samples") else float(f"{part:.15g}")
    duration = lw.Duration(value, unit)
    assert lw.Duration.parse(str(duration)) == duration


# ---------------------------------------------------------------------------------------------------------- intervals


@given(st.integers(1, 7), st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(0, 29))
def test_an_interval_is_due_once_for_each_multiple_also_after_a_resume(n: int, jumps: list[int], cut: int) -> None:
    """It is due whenever a multiple has been reached since it was asked last, wherever it was begun again."""
    assume(cut < len(jumps))
    every, position = Every(f"{n} samples"), 0
    for i, jump in enumerate(jumps):
        if i == cut:  # a resume: nothing of the interval was saved
            every = Every(f"{n} samples")
            every.start(lw.Progress(samples=position))
        before, position = position, position + jump
        assert every.due(lw.Progress(samples=position)) == (position // n > before // n)
        assert not every.due(lw.Progress(samples=position))


@pytest.mark.parametrize(("batches", "expected"), [(4, [2, 4]), (3, [2, 3]), (1, [1]), (5, [3, 5])])
def test_a_part_of_an_epoch_is_reached_by_batches(batches: int, expected: list[int]) -> None:
    every = Every("0.5 epochs")
    for epoch in (0, 1, 7):
        every.start(lw.Progress(epoch=epoch), batches)
        due = [n for n in range(1, batches + 1) if every.due(lw.Progress(epoch=epoch, batch=n))]
        assert due == expected


def test_many_small_parts_of_an_epoch_do_not_drift() -> None:
    every = Every("0.1 epochs")
    every.start(lw.Progress(), 10)
    for epoch in range(50):
        for n in range(1, 11):
            assert every.due(lw.Progress(epoch=epoch, batch=n))
            assert not every.due(lw.Progress(epoch=epoch, batch=n))


# -------------------------------------------------------------------------------------------- one language for all

SAYINGS = [
    ("2 steps", [2, 4, 6, 8]),
    (3, [3, 6]),
    ("1 epoch", [4, 8]),
    ("2 epochs", [8]),
    ("0.5 epochs", [2, 4, 6, 8]),
    ("0.75 epochs", [3, 6]),
    ("10 samples", [4, 8]),
]
DATA = ([1.0], [1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])  # 10 samples in 4 batches


@pytest.mark.parametrize(("every", "steps"), SAYINGS, ids=lambda value: str(value))
def test_events_validations_logs_and_checkpoints_share_one_language(every: Any, steps: list[int], folder: Any) -> None:
    """The same duration lets handlers, validations, records and checkpoints come at the same steps."""
    seen: dict[str, list[int]] = {"event": [], "valid": [], "train": []}

    class Log:
        def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
            if kind in seen:
                seen[kind].append(progress.step)

    user = trainer(
        epochs=2,
        validate_every=every,
        log_every=every,
        loggers=[Log()],
        folder=folder,
        checkpoint=lw.Checkpoint(every, keep=9, at_end=False),
    )
    event = lw.Event.EPOCH_END if every in ("1 epoch", "2 epochs") else lw.Event.STEP_END
    user.on(event(every))(lambda run: seen["event"].append(run.progress.step))
    run = user.fit(sgd_task(line(), lr=0.1), pairs(*DATA), pairs([1.0]))
    last = [] if steps[-1] == 8 else [8]  # the end of training is validated and logged in any case
    assert seen["event"] == steps
    assert seen["valid"] == steps + last
    assert seen["train"] == steps + last
    assert run.folder is not None
    saved = sorted(int(path.name[5:]) for path in (run.folder / "checkpoints").glob("step-*"))
    assert saved == steps


@pytest.mark.parametrize(
    ("until", "step"), [("3 steps", 3), ("1 epoch", 4), ("1.5 epochs", 6), ("5 samples", 3), ("11 samples", 5)]
)
def test_the_end_of_a_stage_is_a_duration_too(until: str, step: int) -> None:
    run = trainer().fit(sgd_task(line()), pairs(*DATA), stages=[lw.Stage("only", until)])
    assert run.progress.step == step


def test_training_lasts_until_the_first_of_its_limits() -> None:
    assert trainer(epochs=2, steps=3).fit(sgd_task(line()), pairs(*DATA)).progress.step == 3
    assert trainer(epochs=1, steps=30).fit(sgd_task(line()), pairs(*DATA)).progress.step == 4
    run = trainer(epochs=10**6, time="0.05 s").fit(sgd_task(line(), lr=1e-9), pairs(*DATA))
    assert 0.05 <= run.progress.seconds < 5.0
    assert run.progress.step > 0


def test_a_time_interval_fires_once_for_each_of_its_multiples() -> None:
    import time

    seen, user = [], trainer(epochs=1)
    user.on(lw.Event.STEP_START)(lambda run: time.sleep(0.03))
    user.on(lw.Event.STEP_END(every="0.05 s"))(lambda run: seen.append(run.progress.seconds))
    run = user.fit(sgd_task(line()), pairs(*DATA, *DATA))
    assert len(seen) == len({int(s / 0.05) for s in seen})
    assert 1 <= len(seen) <= int(run.progress.seconds / 0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {"validate_every": "0.5 epochs"},
        {"log_every": "0.5 epochs"},
        {"epochs": 1.5},
        {"checkpoint": lw.Checkpoint("0.5 epochs")},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_parts_of_an_epoch_are_refused_where_its_length_is_not_known(settings: Any, folder: Any) -> None:
    user = trainer(**{"epochs": 1, "folder": folder, **settings})
    with pytest.raises(lw.PlanError, match="needs data with a known number of batches; count steps instead"):
        user.fit(sgd_task(line()), lambda: iter(pairs(*DATA)), pairs([1.0]))
    assert not folder.exists()


def test_a_handler_at_parts_of_an_epoch_of_unknown_length_is_refused() -> None:
    user = trainer(epochs=1)

    def look(run: lw.Run) -> None: ...

    user.on(lw.Event.STEP_END("0.5 epochs"))(look)
    with pytest.raises(lw.PlanError) as caught:
        user.fit(sgd_task(line()), lambda: iter(pairs(*DATA)))
    (problem,) = caught.value.problems
    assert (
        problem
        == f"handler {look.__qualname__}: '0.5 epochs' needs data with a known number of batches; count steps instead"
    )


def test_parts_of_an_epoch_go_by_the_data_of_each_stage() -> None:
    user, seen = trainer(), []
    user.on(lw.Event.STEP_END("0.5 epochs"))(lambda run: seen.append(run.progress.step))
    stages = [lw.Stage("a", "1 epoch"), lw.Stage("b", "1 epoch", source=pairs([1.0], [1.0]))]
    user.fit(sgd_task(line()), pairs(*DATA), stages=stages)
    assert seen == [2, 4, 5, 6]
