"""How long and how often: durations and intervals, with one language for everything that has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import loopwright as lw
from loopwright.checkpoint import list_checkpoints
from loopwright.every import Every
from loopwright.progress import Whole
from loopwright.schedules import concat, constant
from tiny import acts, bits, line, mean_of_preds, pairs, same, sgd_task, trainer

UNITS = ("steps", "epochs", "samples", "tokens", "batches", "percent", "seconds")


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
        ("1e9 tokens", 1e9, "tokens"),
        ("1 batch", 1, "batches"),
        ("10%", 10, "percent"),
        ("2.5 percent", 2.5, "percent"),
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
        ("5 stepps", "unknown unit 'stepps' in the duration '5 stepps'. Known: '%', 'batch', 'batches', 'day', 'days', "
                     "'epoch', 'epochs', 'h', 'hour', 'hours', 'min', 'minute', 'minutes', 'percent', 's', 'sample', "
                     "'samples', 'sec', 'second', 'seconds', 'step', 'steps', 'token', 'tokens'. Did you mean "
                     "'steps'?"),
        (0, "the duration 0 must be a positive number"),
        ("0 min", "the duration '0 min' must be a positive number"),
        ("1e999 min", "the duration '1e999 min' must be a positive whole number"),
        ("2.5 steps", "the duration '2.5 steps' must be a positive whole number"),
        (0.5, "the duration 0.5 must be a positive whole number"),
        ("1.5 batches", "the duration '1.5 batches' must be a positive whole number"),
        ("101%", "the duration '101%' is more than all; write at most 100%"),
    ],
)  # fmt: skip
def test_what_is_no_duration_is_refused(text: Any, message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        lw.Duration.parse(text)
    assert str(caught.value) == message


@given(st.sampled_from(UNITS), st.integers(1, 10**15), st.floats(1e-6, 1e6))
def test_a_duration_reads_back_what_it_prints(unit: str, whole: int, part: float) -> None:
    value = float(whole) if unit in ("steps", "samples", "tokens", "batches") else float(f"{part:.15g}")
    assume(unit != "percent" or value <= 100)
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


@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 4))
def test_what_is_done_of_a_stage_counts_its_steps_whatever_the_last_window_holds(
    batches: int, window: int, epochs: int
) -> None:
    each = -(-batches // window)
    whole = Whole((lw.Duration(epochs, "epochs"),), each, batches)
    for epoch in range(epochs):
        for step in range(1, each + 1):
            now = lw.Progress(epoch=epoch, batch=min(step * window, batches))
            assert whole.fraction(now, lw.Progress()) == (epoch * each + step) / (epochs * each)


@pytest.mark.capability("B-10")
@pytest.mark.parametrize(
    ("every", "steps"),
    [("at 100%", [9]), ("33%", [3, 6, 9]), ("1 epoch & before 90%", [3, 6]), ("at 0.5 epochs", [2])],
)
@pytest.mark.parametrize(("count", "window"), [(7, 3), (5, 2)])  # batches: a last window of one
def test_parts_of_a_stage_come_at_the_same_steps_with_a_short_last_window(
    every: str, steps: list[int], count: int, window: int
) -> None:
    """A step counts as one in the part of a stage that is done, however many batches its window holds."""
    seen: list[int] = []
    user = lw.Trainer(epochs=3, accumulate=window, folder=None, progress=False)
    user.on(lw.Event.STEP_END(every))(lambda run: seen.append(run.progress.step))
    user.fit(sgd_task(line(), lr=0.1), pairs(*([float(i)] for i in range(count))))
    assert seen == steps


BOUNDS = st.sampled_from(["after 2 steps", "before 1.5 epochs", "after 10 s", "before 60%", "after 7 tokens"])
MOMENTS = st.sampled_from(["2 steps", "1 epoch", "0.3 epochs", "4 batches", "15%", "5 samples", "25 s", "at 3 steps",
                           "at 2 epochs", "at 40%", "at 21 s"])  # fmt: skip
GROUPS = st.tuples(MOMENTS, st.lists(BOUNDS, max_size=2)).map(lambda parts: " & ".join([parts[0], *parts[1]]))


@given(st.lists(GROUPS, min_size=1, max_size=3).map(" | ".join), st.integers(1, 6), st.integers(0, 24))
def test_any_sentence_goes_on_after_a_resume_where_it_would_have(text: str, batches: int, cut: int) -> None:
    """Begun again at any step, with nothing saved, it is due at the steps at which it would have been."""

    def at(step: int) -> lw.Progress:
        epoch, batch = divmod(step - 1, batches) if step else (0, -1)
        return lw.Progress(epoch=epoch, batch=batch + 1, step=step, samples=3 * step, seconds=7.5 * step)

    def due(first: int) -> list[int]:
        every = Every(text)
        every.start(at(first), batches, lambda now: now.step / 24)
        return [step for step in range(first + 1, 25) if every.due(at(step))]

    assert due(cut) == [step for step in due(0) if step > cut]


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

# a minute a step, 4 batches an epoch, 8 steps in all; after the steps so many samples (or tokens) are done:
DATA = ([1.0], [1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])  # 1, 3, 6, 10, 11, 13, 16, 20
SAYINGS: list[tuple[Any, list[int]]] = [
    ("2 steps", [2, 4, 6, 8]),
    ("every 2 steps", [2, 4, 6, 8]),
    (3, [3, 6]),
    ("1 epoch", [4, 8]),
    ("2 epochs", [8]),
    ("0.5 epochs", [2, 4, 6, 8]),
    ("0.75 epochs", [3, 6]),
    ("10 samples", [4, 8]),
    ("7 tokens", [4, 7]),
    ("3 batches", [3, 6]),
    ("25%", [2, 4, 6, 8]),
    ("30%", [3, 5, 8]),
    ("3 min", [3, 6]),
    ("0.05 hours | 7 steps", [3, 6, 7]),
    ("at 3 steps", [3]),
    ("at 1 epoch", [4]),
    ("at 12 tokens", [6]),
    ("at 50%", [4]),
    ("at 5 min", [5]),
    ("at 2 batches | at 7 batches", [2, 7]),
    ("2 steps & after 1 epoch", [4, 6, 8]),
    ("2 steps & before 1 epoch", [2]),
    ("1 step & after 25% & before 11 samples", [2, 3, 4]),
    ("1 epoch & after 5 steps", [8]),
    ("2 steps & 3 steps", [6]),
    ("3 steps | 1 epoch", [3, 4, 6, 8]),
    ("3 steps & before 1 epoch | at 50% | 4 min & after 5 steps", [3, 4, 8]),
]


def _watched(every: Any, folder: Any, *, resume: Any = None, states: Any = None) -> tuple[dict[str, list[int]], Any]:
    """At which steps handlers, validations, records and checkpoints come that are all asked for by ``every``."""
    seen: dict[str, list[int]] = {"event": [], "valid": [], "train": []}

    class Log:
        def log(self, progress: lw.Progress, values: Any, kind: str) -> None:
            if kind in seen:
                seen[kind].append(progress.step)

    own = lw.Checkpoint(every, keep=9, at_end=False, folder=folder)
    user = trainer(
        epochs=2,
        validate_every=every,
        log_every=every,
        loggers=[Log()],
        checkpoint=[own] if states is None else [own, lw.Checkpoint(1, keep=9, at_end=False, folder=states)],
        callbacks=[acts(on_step_start=lambda run: setattr(run, "began", run.began - 60.0))],
    )
    user.on(lw.Event.STEP_END(every))(lambda run: seen["event"].append(run.progress.step))
    task = sgd_task(line(), lr=0.1)
    run = user.fit(task, pairs(*DATA), pairs([1.0]), weight=lambda batch: len(batch[0]), resume=resume)
    seen["saved"] = [int(path.name[5:]) for path in list_checkpoints(folder)]
    return seen, bits(task, *run.optimizers.values())


@pytest.mark.capability("B-10")
@pytest.mark.parametrize(("every", "steps"), SAYINGS, ids=lambda value: str(value))
def test_events_validations_logs_and_checkpoints_share_one_language(
    every: Any, steps: list[int], tmp_path: Any
) -> None:
    """The same words let all come at the same steps, also in a run that was resumed from any of its steps."""
    states = tmp_path / "states"
    seen, whole = _watched(every, tmp_path / "own", states=states)
    last = [] if steps[-1] == 8 else [8]  # the end of training is validated and logged in any case
    assert seen == {"event": steps, "valid": steps + last, "train": steps + last, "saved": steps}
    for at in range(1, 8):
        place = lw.Resume(states / f"step-{at:08d}")
        seen, again = _watched(every, tmp_path / f"own-{at}", resume=place)
        rest = [step for step in steps if step > at]
        # the state after step 4 was taken before the epoch ended: what goes by whole epochs comes after the resume
        ends = [at] * (at == 4 and at in steps and not Every(every).inside)
        came = {"event": rest, "valid": ends + rest + last, "train": ends + rest + last, "saved": ends + rest}
        assert seen == came, f"from step {at}"
        assert same(again, whole)


@pytest.mark.capability("B-10")
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"once": "1 epoch"}, [4]),
        ({"once": "12 samples"}, [6]),
        ({"after": "50%"}, [4, 5, 6, 7, 8]),
        ({"before": "3 min"}, [1, 2]),
        ({"after": "2 batches", "before": "6 steps"}, [2, 3, 4, 5]),
        ({"every": 3, "after": "1 epoch"}, [6]),
        ({"every": "2 steps", "after": 4}, [6, 8]),
        ({"every": "3 steps | 1 epoch", "before": "7 steps"}, [3, 4, 6]),
    ],
    ids=lambda value: str(value),
)
def test_once_after_and_before_are_durations_too(settings: Any, steps: list[int]) -> None:
    seen: list[int] = []
    minute = acts(on_step_start=lambda run: setattr(run, "began", run.began - 60.0))
    user = trainer(epochs=2, callbacks=[minute])
    user.on(lw.Event.STEP_END(**settings))(lambda run: seen.append(run.progress.step))
    user.fit(sgd_task(line()), pairs(*DATA))
    assert seen == steps


@pytest.mark.parametrize(
    ("every", "message"),
    [
        ("after 2 epochs", "'after 2 epochs': 'after 2 epochs' says for how long, but not when; add moments, such as "
                           "'every 100 steps & after 2 epochs', or mean a single one: 'at 2 epochs'"),
        ("10 min & 1 epoch", "'10 min & 1 epoch': a time and another moment hardly ever fall on the same step; join "
                             "moments by '|', and by '&' what holds for a while: 'after ...', 'before ...'"),
        ("(1 epoch | 2 steps) & after 3 steps", "'(1 epoch | 2 steps) & after 3 steps': write it without brackets; '&' "
                                                "binds closer than '|': 'a & c | b & c'"),
        ("evry 2 steps", "'evry 2 steps' begins with an unknown word. Known: 'after', 'at', 'before', 'every'. Did you "
                         "mean 'every'?"),
        ("five steps", "'five steps' begins with an unknown word: a number comes first, as in '5 steps', or a word "
                       "before that. Known: 'after', 'at', 'before', 'every'."),
        ("2 steps |", "'' is not a duration; write a number and a unit, such as '500 steps', '2 epochs', '10 min' or "
                      "'1e6 samples'"),
    ],
)  # fmt: skip
def test_what_says_no_moment_is_refused(every: str, message: str) -> None:
    named = message if message.startswith(repr(every)) else f"{every!r}: {message}"
    for make, told in (
        (lambda: lw.Trainer(1, log_every=every), f"log_every={named}"),
        (lambda: lw.Trainer(1, validate_every=every), f"validate_every={named}"),
        (lambda: lw.Checkpoint(every), f"Checkpoint: every={named}"),
        (lambda: lw.Event.STEP_END(every), message),
    ):
        with pytest.raises(lw.SettingError) as caught:
            make()
        assert str(caught.value) == told


def test_what_this_run_does_not_count_is_refused() -> None:
    """Tokens without weights, batches and parts of what nobody knows the length of."""
    user = trainer(epochs=1, log_every="100 tokens", validate_every="3 steps | 1 epoch", checkpoint=False)
    user.on(lw.Event.STEP_END("10%"))(repr)
    user.on(lw.Event.STEP_END("3 batches"))(repr)
    with pytest.raises(lw.PlanError) as caught:
        user.fit(sgd_task(line()), lambda: iter(pairs(*DATA)), pairs([1.0]))
    assert caught.value.problems == [
        "log_every: '100 tokens' counts tokens, and nothing says how many a batch has; pass fit(..., "
        "weight=lambda batch: ...)",
        "handler repr: '10%' of a stage that lasts 1 epoch is not known before it is over; count steps",
        "handler repr: '3 batches' needs data with a known number of batches; count steps instead",
        "validate_every: '1 epoch' needs data with a known number of batches; count steps instead",
    ]


@pytest.mark.capability("B-10")
@pytest.mark.parametrize(
    ("until", "step"),
    [
        ("3 steps", 3),
        ("1 epoch", 4),
        ("1.5 epochs", 6),
        ("5 samples", 3),
        ("11 tokens", 5),
        ("6 batches", 6),
        ("2 min", 2),
        ("2 epochs | 5 steps", 5),
        ("1 epoch | 1 hour | 7 steps", 4),
        ("1 epoch & 6 steps", 6),
        ("2 steps & 3 batches | 1 min", 1),
        (["2 epochs", "3 steps & 1 epoch"], 4),
    ],
    ids=lambda value: str(value),
)
def test_the_end_of_a_stage_is_a_duration_too(until: Any, step: int, tmp_path: Any) -> None:
    """Also after a resume from any of its steps."""

    def fit(resume: Any = None, **settings: Any) -> lw.Run:
        minute = acts(on_step_start=lambda run: setattr(run, "began", run.began - 60.0))
        task, stages = sgd_task(line()), [lw.Stage("only", until)]
        user = trainer(callbacks=[minute], **settings)
        approximate = resume and lw.Resume(resume, "approximate")  # what is bounded by time cannot be exact
        return user.fit(task, pairs(*DATA), stages=stages, weight=lambda batch: len(batch[0]), resume=approximate)

    assert fit(checkpoint=lw.Checkpoint(1, folder=tmp_path, keep=9)).progress.step == step
    for place in list_checkpoints(tmp_path):
        assert fit(place).progress.step == step


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ("50%", "stage 'only': how many steps '50%' of it are is not known before; let it end with one duration, in "
                "steps, epochs, samples or time, or by run.end_stage() in a callback"),
        ("2 h & 3 epochs", "stage 'only': how many steps '7200 seconds' of it are is not known before; let it end with "
                           "one duration, in steps, epochs, samples or time, or by run.end_stage() in a callback"),
        ("9 tokens", "until '9 tokens' counts tokens, and nothing says how many a batch has; pass fit(..., "
                     "weight=lambda batch: ...)"),
        ("at 3 epochs", "until='at 3 epochs' is not a duration; write a number and a unit, such as '500 steps', '2 "
                        "epochs', '10 min' or '1e6 samples'"),
    ],
)  # fmt: skip
def test_an_end_that_a_stage_cannot_count_is_refused(until: str, message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        trainer().fit(sgd_task(line()), pairs(*DATA), stages=[lw.Stage("only", until)])
    assert str(caught.value) == message


@pytest.mark.capability("B-10")
@pytest.mark.parametrize(
    ("place", "step"),
    [("2 steps", 2), ("1 epoch", 4), ("6 batches", 6), ("25%", 2), (0.25, 2), ("3 steps | 1 epoch", 3),
     ("3 steps & 1 epoch", 4)],
)  # fmt: skip
def test_the_places_of_schedules_are_durations_too(place: Any, step: int, tmp_path: Any) -> None:
    """The rate changes from 1 to 2 where it is told to, also in a run that was resumed from any of its steps."""

    def rates(resume: Any = None, **settings: Any) -> list[float | None]:
        seen: list[float | None] = []
        net = line()
        task = lw.Supervised(
            net, mean_of_preds, torch.optim.SGD(net.parameters(), lr=9.0),
            schedule=concat([constant(1.0), constant(2.0)], [place]),
        )  # fmt: skip
        look = acts(on_step_end=lambda run, result: seen.append(run.lr))
        trainer(epochs=2, callbacks=[look], **settings).fit(task, pairs(*DATA), resume=resume)
        return seen

    expected = [1.0] * step + [2.0] * (8 - step)
    assert rates(checkpoint=lw.Checkpoint(1, folder=tmp_path, keep=9)) == expected
    for at in range(1, 8):
        assert rates(lw.Resume(tmp_path / f"step-{at:08d}")) == expected[at:]


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


@pytest.mark.parametrize(
    ("every", "steps"),
    [("0.5 epochs", [2, 4, 5, 6]), ("50%", [2, 4, 5, 6]), ("at 50%", [2, 5]), ("3 batches", [3]),
     ("at 2 batches", [2, 6]), ("1 epoch | at 5 steps", [4, 5, 6])],
)  # fmt: skip
def test_what_goes_by_the_length_of_a_stage_goes_by_that_of_each(every: str, steps: list[int], tmp_path: Any) -> None:
    saver = lw.Checkpoint(every, keep=9, at_end=False, folder=tmp_path)
    user, seen = trainer(checkpoint=saver), []
    user.on(lw.Event.STEP_END(every))(lambda run: seen.append(run.progress.step))
    stages = [lw.Stage("a", "1 epoch"), lw.Stage("b", "1 epoch", source=pairs([1.0], [1.0]))]
    user.fit(sgd_task(line()), pairs(*DATA), stages=stages)
    assert seen == steps
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == steps
