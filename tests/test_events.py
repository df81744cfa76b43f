"""Handlers: which occurrences of an event they are called at, with what, in which order, and until when."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import loopwright as lw
from loopwright.errors import LoopwrightWarning
from loopwright.events import HOOKS, Hooks
from loopwright.handlers import EVENTS, Handler
from tiny import line, pairs, recorder, sgd_task, trainer

Event = lw.Event
DATA = pairs([1.0], [1.0], [1.0])  # 3 steps an epoch
NEVER = ("STEP_END(every=13)", "STEP_END(once=13)", "STAGE_END(every=2)")  # in 4 epochs, as is said before step 0


def steps_at(event: Any, *, epochs: int = 4, data: Any = DATA, **settings: Any) -> list[int]:
    """Steps that are complete whenever a handler for ``event`` is called."""
    seen: list[int] = []
    user = trainer(epochs=epochs, **settings)
    user.on(event)(lambda run: seen.append(run.progress.step))
    user.fit(sgd_task(line(), lr=1e-3), data)
    return seen


# ------------------------------------------------------------------------------------------------------------ filters


@pytest.mark.capability("IG-07")
@pytest.mark.parametrize(
    ("event", "steps"),
    [
        (Event.STEP_END, [*range(1, 13)]),
        (Event.STEP_END(every=5), [5, 10]),
        (Event.STEP_END(5), [5, 10]),
        (Event.STEP_END(every=5.0), [5, 10]),
        (Event.STEP_END(every=1), [*range(1, 13)]),
        (Event.STEP_END(every=13), []),
        (Event.STEP_END(once=1), [1]),
        (Event.STEP_END(once=7), [7]),
        (Event.STEP_END(once=13), []),
        (Event.STEP_END(after=10), [11, 12]),
        (Event.STEP_END(before=3), [1, 2]),
        (Event.STEP_END(after=3, before=7), [4, 5, 6]),
        (Event.STEP_END(every=2, after=3, before=9), [4, 6, 8]),
        (Event.STEP_END(when=lambda run: run.progress.samples in (2, 9)), [2, 9]),
        (Event.STEP_END(every=3, when=lambda run: run.progress.epoch > 1), [9, 12]),
        (Event.STEP_END(every="4 steps"), [4, 8, 12]),
        (Event.STEP_END(every="5 samples"), [5, 10]),
        (Event.STEP_END(every="0.5 epochs"), [2, 3, 5, 6, 8, 9, 11, 12]),
        (Event.STEP_END(every=lw.Duration(6, "steps")), [6, 12]),
        (Event.STEP_END(every="4 steps", after=4), [8, 12]),
        (Event.STEP_START(every=5), [4, 9]),  # the 5th step is about to begin
        (Event.STEP_START(once=1), [0]),
        (Event.BATCH_START(every=4), [3, 7, 11]),
        (Event.GRADS_READY(once=3), [2]),
        (Event.BACKWARD_END(after=10), [10, 11]),
        (Event.EPOCH_START(once=2), [3]),
        (Event.EPOCH_END(every=2), [6, 12]),
        (Event.EPOCH_END(every="2 epochs"), [6, 12]),
        (Event.EPOCH_END(after=3), [12]),
        (Event.STAGE_START(once=1), [0]),
        (Event.STAGE_END(once=1), [12]),
        (Event.STAGE_END(every=2), []),
        (Event.FIT_START, [0]),
        (Event.FIT_END(once=1), [12]),
        (Event.FIT_END(once=2), []),
        (Event.EPOCH_END(every=2) | Event.FIT_START, [0, 6, 12]),
        (Event.STEP_END(every=5) | Event.STEP_END(every=4), [4, 5, 8, 10, 12]),
        (Event.STEP_END(every="5 steps") | Event.STEP_END(every="4 steps"), [4, 5, 8, 10, 12]),
        (Event.STEP_END(every="4 steps") | Event.STEP_END(every="4 samples"), [4, 8, 12]),
        (Event.STEP_END(once=2) | Event.STEP_END(once=2), [2]),
        (Event.STEP_END(every=2) & Event.STEP_END(every=3), [6, 12]),
        (Event.STEP_END(every="2 steps") & Event.STEP_END(every="3 steps"), [6, 12]),
        (Event.STEP_END & Event.STEP_END(once=3), [3]),
        ((Event.STEP_END(every=2) | Event.STEP_END(once=9)) & Event.STEP_END(after=6), [8, 9, 10, 12]),
        (Event.FIT_START | Event.STEP_END(once=5) & Event.STEP_END(every=5) | Event.FIT_END, [0, 5, 12]),
    ],
    ids=repr,
)
def test_a_handler_is_called_at_the_occurrences_that_its_filter_names(event: Any, steps: list[int]) -> None:
    """every, once, after, before, when, durations, | and & choose among the occurrences, which count from 1."""
    told = pytest.warns(LoopwrightWarning, match="is never called") if repr(event) in NEVER else nullcontext()
    with told:
        assert steps_at(event) == steps


@pytest.mark.capability("IG-04")
def test_fit_epoch_and_step_events_come_in_the_order_of_the_loop() -> None:
    """Handlers at start and end of fit, epoch and step are called in the order of the nested loop, each so often."""
    seen: list[str] = []
    user = trainer(epochs=2)
    for event in (Event.FIT_END, Event.STEP_END, Event.STEP_START, Event.EPOCH_START, Event.EPOCH_END, Event.FIT_START):
        user.on(event, event.name)(lambda run, name: seen.append(name))
    user.fit(sgd_task(line()), pairs([1.0], [1.0]))
    epoch = ["EPOCH_START", *["STEP_START", "STEP_END"] * 2, "EPOCH_END"]
    assert seen == ["FIT_START", *epoch * 2, "FIT_END"]


@pytest.mark.capability("FA-22")
def test_every_hook_is_an_event(folder: Path) -> None:
    """Callbacks and handlers are called at every hook there is: of fit, validation, test, prediction, exceptions."""
    seen: list[str] = []
    user = trainer(epochs=1, validate_every="2 steps", folder=folder, checkpoint=lw.Checkpoint("1 step"), loggers=[])
    for event in EVENTS.values():
        user.on(event, event.hook)(lambda run, hook: seen.append(hook))
    seen_by_callback: list[str] = []
    user.callbacks.append(recorder(seen_by_callback))
    task = sgd_task(line())
    user.fit(task, DATA, pairs([1.0]))
    user.test(task, DATA)
    user.predict(task, DATA)
    with pytest.raises(KeyError):
        user.fit(sgd_task(line(), loss=lambda preds, target: {}["loss"]), DATA, pairs([1.0]))
    assert {f"on_{name.lower()}" for name in EVENTS} == set(seen) == {n for n in HOOKS if n.startswith("on_")}
    assert seen == [name for name in seen_by_callback if name.startswith("on_")]
    assert set(seen_by_callback) == set(HOOKS)


def test_two_handlers_of_one_filter_have_intervals_of_their_own() -> None:
    filtered, seen = Event.STEP_END("2 steps"), []
    user = trainer(epochs=1)
    register = user.on(filtered)
    for name in "ab":
        register(lambda run, name=name: seen.append((name, run.progress.step)))
    user.on(filtered)(lambda run: seen.append(("c", run.progress.step)))
    user.fit(sgd_task(line()), pairs(*[[1.0]] * 4))
    assert seen == [(name, step) for step in (2, 4) for name in "abc"]


def test_counts_go_on_when_the_same_task_is_fitted_on() -> None:
    seen: list[tuple[str, int]] = []
    task = sgd_task(line(), lr=1e-3)
    user = trainer(epochs=2)
    again = trainer(epochs=4)
    for one in (user, again):
        one.on(Event.STEP_END(every=4) | Event.EPOCH_END(once=3) | Event.STEP_END("5 steps"))(
            lambda run: seen.append(("fit", run.progress.step))
        )
    user.fit(task, DATA)
    again.fit(task, DATA)
    assert seen == [("fit", 4), ("fit", 5), ("fit", 8), ("fit", 9), ("fit", 10), ("fit", 12)]


def test_batches_are_counted_on_by_the_same_trainer_and_anew_for_another_task() -> None:
    seen: list[int] = []
    user = trainer(epochs=1)
    user.on(Event.BATCH_START(every=4))(lambda run: seen.append(run.progress.step))
    task = sgd_task(line(), lr=1e-3)
    user.fit(task, DATA)
    user.until = [lw.Duration(2, "epochs")]
    user.fit(task, DATA)
    assert seen == [3]
    user.fit(sgd_task(line()), DATA)
    assert seen == [3, 3]


def test_stages_are_counted_over_the_run() -> None:
    seen: list[tuple[str, str]] = []
    user = trainer()
    for n in (1, 2):
        user.on(Event.STAGE_START(once=n))(lambda run, stage, n=n: seen.append((f"start {n}", stage.name)))
        user.on(Event.STAGE_END(once=n))(lambda run, stage, n=n: seen.append((f"end {n}", stage.name)))
    user.fit(sgd_task(line()), DATA, stages=[lw.Stage("head", "1 epoch"), lw.Stage("all", "1 epoch")])
    assert seen == [("start 1", "head"), ("end 1", "head"), ("start 2", "all"), ("end 2", "all")]


# ----------------------------------------------------------------------------------------------- what a handler may be


@pytest.mark.capability("IG-05")
def test_a_handler_is_any_callable_that_takes_the_run() -> None:
    """Functions, lambdas, methods, builtins, partials and callable objects need no base class."""
    seen: list[Any] = []

    class Object:
        def method(self, run: lw.Run) -> str:
            seen.append("method")
            return "what handlers return does not matter"

        def __call__(self, run: lw.Run) -> None:
            seen.append("object")

        @staticmethod
        def static(run: lw.Run) -> None:
            seen.append("static")

        @classmethod
        def of_class(cls, run: lw.Run) -> None:
            seen.append("class")

    def function(run: lw.Run) -> None:
        seen.append("function")

    user = trainer(epochs=1)
    taking: list[Callable[..., Any]] = [
        function, lambda run: seen.append("lambda"), Object().method, Object(), Object.static, Object.of_class,
        partial(lambda word, run: seen.append(word), "partial"), lambda *args: seen.append(len(args)), seen.append,
    ]  # fmt: skip
    for one in taking:
        assert user.on(Event.FIT_END)(one) is one
    run = user.fit(sgd_task(line()), DATA)
    assert seen == ["function", "lambda", "method", "object", "static", "class", "partial", 1, run]


def test_builtins_are_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    user = trainer(epochs=1)
    user.on(Event.FIT_END, "trained", sep=": ")(print)
    user.fit(sgd_task(line()), DATA)
    assert capsys.readouterr().out.startswith("Run(running, epoch=1, step=3, ")
    assert user.handlers[0].name == "print"


@pytest.mark.capability("IG-06", "IG-08")
def test_a_handler_is_registered_with_extra_arguments_by_decorator_or_by_call() -> None:
    """What is called is said apart from when; the same function serves several events with other arguments."""
    seen: list[Any] = []

    def note(run: lw.Run, word: str, *, mark: str = "") -> None:
        seen.append((run.progress.step, word, mark))

    user = trainer(epochs=1)
    user.on(Event.STEP_END(once=1), "one", mark="!")(note)
    user.on(Event.FIT_END, word="two")(note)

    @user.on(Event.STEP_END(once=2), 5)
    def other(run: lw.Run, number: int) -> None:
        seen.append(number)

    user.fit(sgd_task(line()), DATA)
    assert seen == [(1, "one", "!"), 5, (3, "two", "")]


def test_arguments_of_the_hook_are_given_by_name() -> None:
    seen: list[Any] = []
    user = trainer(epochs=1)
    user.on(Event.STEP_END(once=1))(lambda run, result: seen.append(result.values["loss"].item()))
    user.on(Event.BATCH_START(once=1))(lambda run, batch=None: seen.append(batch[0].item()))
    user.on(Event.GRADS_READY(once=1))(lambda run, *, grad_norm, phase: seen.append((phase.name, grad_norm)))
    user.on(Event.VALIDATION_END)(lambda run, values: seen.append(sorted(values)))
    user.on(Event.BACKWARD_END(once=2), "x")(
        lambda run, word, loss, output: seen.append((word, loss is output["loss"]))
    )
    user.on(Event.STEP_END(once=3), result="mine")(lambda run, result: seen.append(result))
    user.fit(sgd_task(line()), pairs([3.0], [1.0], [1.0]), pairs([1.0]))
    assert seen == [3.0, ("main", None), 0.0, ("x", True), "mine", ["valid/loss"]]


def test_a_handler_of_two_events_gets_the_arguments_of_each() -> None:
    seen: list[Any] = []
    user = trainer(epochs=1)
    user.on(Event.STEP_END | Event.FIT_END)(lambda run, result=None: seen.append(result is None))
    user.fit(sgd_task(line()), DATA)
    assert seen == [False, False, False, True]


# ---------------------------------------------------------------------------------------------------------- taken away


def test_a_handler_is_removed_before_a_run() -> None:
    seen: list[str] = []
    user = trainer(epochs=1)

    def gone(run: lw.Run) -> None:
        seen.append("gone")

    user.on(Event.STEP_END)(gone)
    user.on(Event.FIT_END)(gone)
    user.on(Event.FIT_END)(lambda run: seen.append("stays"))
    user.off(gone)
    user.fit(sgd_task(line()), DATA)
    assert seen == ["stays"]


def test_a_handler_is_removed_during_a_run_by_another_or_by_itself() -> None:
    seen: list[str] = []
    user = trainer(epochs=1)

    @user.on(Event.STEP_END)
    def twice(run: lw.Run) -> None:
        seen.append(f"twice {run.progress.step}")
        if run.progress.step == 2:
            user.off(twice)
            user.off(other)

    @user.on(Event.STEP_END)
    def other(run: lw.Run) -> None:
        seen.append(f"other {run.progress.step}")

    user.fit(sgd_task(line()), DATA)
    assert seen == ["twice 1", "other 1", "twice 2"]
    user.fit(sgd_task(line()), DATA)
    assert len(seen) == 3


def test_a_bound_method_is_removed() -> None:
    class Look:
        calls = 0

        def at(self, run: lw.Run) -> None:
            self.calls += 1

    mine, other = Look(), Look()
    user = trainer(epochs=1)
    user.on(Event.STEP_END)(mine.at)
    user.on(Event.STEP_END)(other.at)
    user.off(mine.at)
    user.fit(sgd_task(line()), DATA)
    assert (mine.calls, other.calls) == (0, 3)


def test_what_is_registered_during_a_fit_is_called_from_the_next_one_on() -> None:
    seen: list[int] = []
    user = trainer(epochs=1)
    user.on(Event.STEP_END(once=1))(lambda run: user.on(Event.FIT_END, 1)(lambda run, n: seen.append(n)) and None)
    user.fit(sgd_task(line()), DATA)
    assert seen == []
    user.fit(sgd_task(line()), DATA)
    assert seen == [1]


# --------------------------------------------------------------------------------------------------- wrong registration


def bare() -> None: ...
def look(run: lw.Run) -> None: ...
def demanding(run: lw.Run, word: str, result: Any) -> None: ...


NAMES = ", ".join(repr(name) for name in sorted(EVENTS))
CALL = "handler demanding(run: 'lw.Run', word: 'str', result: 'Any') -> 'None' cannot be called at"


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda user: user.on("EPOCH_ENDED"),
         f"'EPOCH_ENDED' is not an event; use lw.Event.<NAME>. Known: {NAMES}. Did you mean 'EPOCH_END'?"),
        (lambda user: user.on(Event),
         f"<class 'loopwright.handlers.Event'> is not an event; use lw.Event.<NAME>. Known: {NAMES}."),
        (lambda user: user.on(None)(look), f"None is not an event; use lw.Event.<NAME>. Known: {NAMES}."),
        (lambda user: Event.STEP_END | "FIT_END",
         f"'FIT_END' is not an event; use lw.Event.<NAME>. Known: {NAMES}. Did you mean 'FIT_END'?"),
        (lambda user: Event.STEP_END & Event.EPOCH_END(once=1),
         "'&' joins two filters of one event; got STEP_END & EPOCH_END(once=1)"),
        (lambda user: Event.STEP_END(every=0),
         "STEP_END(every=0): expected a whole number from 1, or a duration '10 min'"),
        (lambda user: Event.STEP_END(every=-3),
         "STEP_END(every=-3): expected a whole number from 1, or a duration '10 min'"),
        (lambda user: Event.STEP_END(every=2.5),
         "STEP_END(every=2.5): expected a whole number from 1, or a duration '10 min'"),
        (lambda user: Event.STEP_END(every=True),
         "STEP_END(every=True): expected a whole number from 1, or a duration '10 min'"),
        (lambda user: Event.STEP_END(every=[5]),
         "STEP_END(every=[5]): expected a whole number from 1, or a duration '10 min'"),
        (lambda user: Event.STEP_END(every="5 stepps"),
         "unknown unit 'stepps' in the duration '5 stepps'. Known: '%', 'batch', 'batches', 'day', 'days', 'epoch', "
         "'epochs', 'h', 'hour', 'hours', 'min', 'minute', 'minutes', 'percent', 's', 'sample', 'samples', 'sec', "
         "'second', 'seconds', 'step', 'steps', 'token', 'tokens'. Did you mean 'steps'?"),
        (lambda user: Event.STEP_END(once=0),
         "STEP_END(once=0): count occurrences from 1, such as once=20, or give a duration '20 epochs'"),
        (lambda user: Event.STEP_END(after="5 stepps"),
         "unknown unit 'stepps' in the duration '5 stepps'. Known: '%', 'batch', 'batches', 'day', 'days', 'epoch', "
         "'epochs', 'h', 'hour', 'hours', 'min', 'minute', 'minutes', 'percent', 's', 'sample', 'samples', 'sec', "
         "'second', 'seconds', 'step', 'steps', 'token', 'tokens'. Did you mean 'steps'?"),
        (lambda user: Event.STEP_END(before=True),
         "STEP_END(before=True): count occurrences from 1, such as before=20, or give a duration '20 epochs'"),
        (lambda user: Event.STEP_END(when=lambda: True),
         "STEP_END(when=...): <lambda>() cannot be called with (run): too many positional arguments. Write: "
         "when=lambda run: ..."),
        (lambda user: Event.STEP_END(when=True),
         "STEP_END(when=True): expected a function of the run that returns True or False"),
        (lambda user: user.on(Event.STEP_END)(bare),
         "handler bare() -> 'None' cannot be called at STEP_END: too many positional arguments. Expected bare(run) "
         "plus "
         "the extra arguments given to trainer.on (this event also offers result)"),
        (lambda user: user.on(Event.STEP_END)(demanding),
         f"{CALL} STEP_END: missing a required argument: 'word'. Expected demanding(run) plus the extra arguments "
         f"given "
         "to trainer.on (this event also offers result)"),
        (lambda user: user.on(Event.STEP_END(every=2) | Event.FIT_END, "word")(demanding),
         f"{CALL} STEP_END(every=2) | FIT_END: missing a required argument: 'result'. Expected demanding(run) plus the "
         "extra arguments given to trainer.on. result is offered at STEP_END"),
        (lambda user: user.on(Event.FIT_END, wrod=1)(look),
         "handler look(run: 'lw.Run') -> 'None' cannot be called at FIT_END: got an unexpected keyword argument "
         "'wrod'. "
         "Expected look(run) plus the extra arguments given to trainer.on"),
        (lambda user: user.on(Event.FIT_END)("print"),
         "'print' cannot be called; register a function: @trainer.on(lw.Event.FIT_END)"),
        (lambda user: (user.on(Event.FIT_END)(look), user.off(demanding)),
         "demanding is not a handler here. Known: 'look'."),
        (lambda user: user.off(look), "look is not a handler here. Known: none."),
    ],
)  # fmt: skip
def test_a_wrong_registration_is_refused_where_it_stands(register: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(lw.SettingError) as caught:
        register(trainer(epochs=1))
    assert str(caught.value) == message


def test_a_filter_reads_as_it_was_written() -> None:
    def warm(run: lw.Run) -> bool:
        return True

    text = "STEP_END(every='10 min', after=3, when=warm) | EPOCH_END(once=2) | FIT_END"
    assert repr(Event.STEP_END("10 min", after=3, when=warm) | Event.EPOCH_END(once=2) | Event.FIT_END) == text
    joined = (Event.STEP_END(2) | Event.STEP_END(once=3)) & Event.STEP_END(after=1)
    assert repr(joined) == "(STEP_END(every=2) | STEP_END(once=3)) & STEP_END(after=1)"
    assert repr(Event.STEP_END) == "STEP_END"


# ----------------------------------------------------------------------------------------------------- callbacks' hooks


ALL = ", ".join(repr(name) for name in sorted(HOOKS))


class Wrong(lw.Callback):
    def on_epoch_end(self) -> None: ...  # type: ignore[override]


class Longer(lw.Callback):
    def on_step_end(self, run: lw.Run, result: Any, more: Any) -> None: ...


class Misspelt(lw.Callback):
    def on_epoch_ended(self, run: lw.Run) -> None: ...


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Wrong(), "Wrong.on_epoch_end(self) -> 'None' has the wrong parameters; write: def on_epoch_end(self, run)"),
        (Longer(), "Longer.on_step_end(self, run: 'lw.Run', result: 'Any', more: 'Any') -> 'None' has the wrong "
                   "parameters; write: def on_step_end(self, run, result)"),
        (Misspelt(), f"Misspelt.on_epoch_ended is not a hook of Loopwright. Known: {ALL}. "
                     "Did you mean 'on_epoch_end'?"),
        (type("Own", (lw.Callback,), {"on_batch_end": print})(), "Own.on_batch_end is not a hook of Loopwright. After "
         "each optimizer step comes on_step_end; after each backward of a batch, on_backward_end"),
        (lw.EarlyStopping, "callbacks must be lw.Callback objects; got the class EarlyStopping; make an instance, "
                           "EarlyStopping()"),
        (print, "callbacks must be lw.Callback objects; got <built-in function print>"),
    ],
    ids=["too few", "too many", "unknown hook", "another's hook", "class", "function"],
)  # fmt: skip
def test_a_callback_that_cannot_be_called_is_refused_by_the_trainer(callback: Any, message: str) -> None:
    """A hook with a wrong signature or name, or an object that is no callback, is an error where it is given."""
    with pytest.raises(lw.HookError) as caught:
        trainer(epochs=1, callbacks=[callback])
    assert str(caught.value) == message


def test_hooks_may_name_their_parameters_as_they_like_and_have_defaults() -> None:
    seen: list[Any] = []

    class Free(lw.Callback):
        def on_step_end(self, r: lw.Run, *rest: Any) -> None:  # type: ignore[override]
            seen.append(len(rest))

        def on_epoch_end(self, run: lw.Run, extra: int = 5) -> None:
            seen.append(extra)

        @staticmethod
        def on_fit_end(run: lw.Run) -> None:  # type: ignore[override]
            seen.append("static")

    class Duck:  # no base class
        def on_fit_start(self, run: lw.Run) -> None:
            seen.append("duck")

    trainer(epochs=1, callbacks=[Free(), Duck()]).fit(sgd_task(line()), DATA)
    assert seen == ["duck", 1, 1, 1, 5, "static"]


def test_only_overridden_hooks_are_kept() -> None:
    class One(lw.Callback):
        def on_step_end(self, run: lw.Run, result: Any) -> None: ...

    hooks = Hooks([One(), lw.Callback()], [Handler(Event.FIT_END, look, (), {})])
    assert {name: len(getattr(hooks, name)) for name in HOOKS if getattr(hooks, name)} == {
        "on_step_end": 1, "on_fit_end": 1,
    }  # fmt: skip
