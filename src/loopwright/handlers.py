"""Handlers: functions called at events, and the filters that choose among the occurrences of an event."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import NoneType
from typing import TYPE_CHECKING, Any

from loopwright.errors import SettingError, choose, elsewhere
from loopwright.events import HOOKS, Callback, Hooks
from loopwright.every import Every
from loopwright.given import not_callable_with
from loopwright.state import Duration, Run
from loopwright.written import caller

__all__ = ["Event", "Filter", "Handler"]

Test = Callable[[Run, int], bool]
Needs = Mapping[str, float]  # how much of each unit of progress must be completed before; "" counts occurrences


class Filter:
    """One or several events, and the occurrences of them that count. Made by calling an Event.

    ``a | b`` means at either, ``a & b`` (of one event) when both hold. A filter may serve several handlers.
    """

    def __init__(
        self, hooks: Iterable[str], make: Callable[[list[Every]], dict[str, Test]], text: str,
        needs: Mapping[str, Needs],
    ) -> None:  # fmt: skip
        self.hooks, self.text, self.needs = tuple(hooks), text, needs
        self.make = make  # the tests by hook, anew for each handler: an interval is used up by what it fires for

    def __or__(self, other: Filter | Event) -> Filter:
        other = _as_filter(other)

        def make(intervals: list[Every]) -> dict[str, Test]:
            tests = self.make(intervals)
            for hook, test in other.make(intervals).items():
                tests[hook] = _either(tests[hook], test) if hook in tests else test
            return tests

        needs = {**self.needs, **other.needs}
        for hook in self.needs.keys() & other.needs.keys():  # the one that needs less: what both need
            one, two = self.needs[hook], other.needs[hook]
            needs[hook] = {unit: min(one[unit], two[unit]) for unit in one.keys() & two.keys()}
        return Filter(dict.fromkeys(self.hooks + other.hooks), make, f"{self.text} | {other.text}", needs)

    def __and__(self, other: Filter | Event) -> Filter:
        other = _as_filter(other)
        if set(self.hooks) != set(other.hooks) or len(self.hooks) != 1:
            raise SettingError(f"'&' joins two filters of one event; got {self.text} & {other.text}")

        def make(intervals: list[Every]) -> dict[str, Test]:
            (hook, a), b = *self.make(intervals).items(), next(iter(other.make(intervals).values()))
            return {hook: lambda run, n: a(run, n) & b(run, n)}

        (hook,) = self.hooks
        one, two = self.needs[hook], other.needs[hook]
        needs = {unit: max(one.get(unit, 0), two.get(unit, 0)) for unit in one.keys() | two.keys()}
        return Filter(self.hooks, make, f"{_in_brackets(self)} & {_in_brackets(other)}", {hook: needs})

    def __repr__(self) -> str:
        return self.text


def _either(a: Test, b: Test) -> Test:
    # both are asked each time: an interval keeps its place only if it sees every occurrence
    return lambda run, n: a(run, n) | b(run, n)


def _in_brackets(part: Filter) -> str:
    return f"({part})" if " | " in part.text else part.text


_IGNITE = {  # what Ignite calls them
    "STARTED": "FIT_START", "COMPLETED": "FIT_END", "EPOCH_STARTED": "EPOCH_START", "EPOCH_COMPLETED": "EPOCH_END",
    "ITERATION_STARTED": "STEP_START", "ITERATION_COMPLETED": "STEP_END", "EXCEPTION_RAISED": "EXCEPTION",
}  # fmt: skip


class _Names(type):
    if not TYPE_CHECKING:  # type checkers know the events, and mark what is none

        def __getattr__(cls, name: str) -> Any:
            """Only asked for what is no event."""
            if name[:1] == "_":
                raise AttributeError(name)
            if name in _IGNITE:
                raise AttributeError(f"lw.Event has no {name!r}: it is called lw.Event.{_IGNITE[name]} here")
            raise AttributeError(f"lw.Event has no {name!r}. {choose(name, EVENTS)}")


class Event(metaclass=_Names):
    """The moments at which handlers can be called: ``trainer.on(lw.Event.STEP_END(every=50))``.

    Call an event to choose among its occurrences, which count from 1: ``every=5`` takes the 5th, 10th, ...;
    ``once=20`` the 20th alone; ``after=3`` those beyond the third, ``before=3`` the first two; ``when=`` a function of
    the run. Steps, epochs and stages count over the whole run, also after a resume; batches, validations and
    checkpoints are counted as they come.
    Durations go by what the run has completed: ``every="10 min"`` takes one each ten minutes, and anything else that
    ``Trainer(log_every=...)`` takes; ``once="20 epochs"`` the first by which so much is completed, ``after=`` all of
    these, ``before=`` those with less.

    >>> Event.EPOCH_END(every=5) | Event.FIT_END
    EPOCH_END(every=5) | FIT_END
    """

    FIT_START: Event
    STAGE_START: Event
    EPOCH_START: Event
    LOADER_START: Event
    STEP_START: Event
    BATCH_START: Event
    BACKWARD_END: Event
    GRADS_READY: Event
    STEP_END: Event
    LOADER_END: Event
    VALIDATION_START: Event
    EVAL_BATCH_START: Event
    EVAL_BATCH_END: Event
    VALIDATION_END: Event
    CHECKPOINT: Event
    EPOCH_END: Event
    STAGE_END: Event
    FIT_END: Event
    EXCEPTION: Event
    TEST_START: Event
    TEST_END: Event
    PREDICT_START: Event
    PREDICT_BATCH_START: Event
    PREDICT_BATCH_END: Event
    PREDICT_END: Event

    def __init__(self, hook: str) -> None:
        self.hook = hook
        self.name = _event(hook)

    @elsewhere()
    def __call__(
        self,
        every: int | str | Duration | None = None,
        *,
        once: int | str | Duration | None = None,
        after: int | str | Duration | None = None,
        before: int | str | Duration | None = None,
        when: Callable[[Run], bool] | None = None,
    ) -> Filter:
        given = {"every": every, "once": once, "after": after, "before": before, "when": when}
        given = {k: v for k, v in given.items() if v is not None}
        said = {k: v for k, v in given.items() if isinstance(v, (str, Duration))}
        for name in ("once", "after", "before"):
            value = given.get(name, 1)
            if name not in said and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise SettingError(
                    f"{self.name}({name}={value!r}): count occurrences from 1, such as {name}=20, or give a duration "
                    "'20 epochs'"
                )
        if when is not None and not callable(when):
            raise SettingError(f"{self.name}(when={when!r}): expected a function of the run that returns True or False")
        if when is not None and (why := not_callable_with(when, "run")) is not None:
            name = getattr(when, "__name__", type(when).__name__)
            raise SettingError(f"{self.name}(when=...): {name}{why}. Write: when=lambda run: ...")
        if isinstance(every, float) and every % 1 == 0:
            given["every"] = every = int(every)
        number = isinstance(every, int) and not isinstance(every, bool) and every > 0
        if not number and not isinstance(every, (str, Duration, NoneType)):
            raise SettingError(f"{self.name}(every={every!r}): expected a whole number from 1, or a duration '10 min'")
        counted: dict[str, Any] = {k: v for k, v in given.items() if k not in said and k != "when"}
        for name in said:
            _interval(name, said[name])  # raises for what is no duration

        def make(intervals: list[Every]) -> dict[str, Test]:
            mine = [_interval(name, one) for name, one in said.items()]
            intervals += mine

            def test(run: Run, n: int) -> bool:
                due = [one.due(run.progress) for one in mine]  # all are asked each time
                ok = all(due) and all(_COUNTS[name](n, count) for name, count in counted.items())
                return ok and (when is None or bool(when(run)))

            return {self.hook: test}

        text = ", ".join(f"{k}={getattr(v, '__name__', None) or repr(v)}" for k, v in given.items())
        return Filter((self.hook,), make, f"{self.name}({text})" if text else self.name, {self.hook: _needs(given)})

    def __or__(self, other: Filter | Event) -> Filter:
        return self() | other

    def __and__(self, other: Filter | Event) -> Filter:
        return self() & other

    def __repr__(self) -> str:
        return self.name


_COUNTS: dict[str, Callable[[int, int], bool]] = {
    "every": lambda n, count: n % count == 0,
    "once": lambda n, count: n == count,
    "after": lambda n, count: n > count,
    "before": lambda n, count: n < count,
}


def _needs(given: Mapping[str, Any]) -> dict[str, float]:
    """What is needed for the first occurrence that an event is asked for; infinity where there can be none.

    >>> _needs({"every": 5, "after": 12}), _needs({"once": "20 epochs"}), _needs({"before": 1})
    ({'': 15}, {'epochs': 20.0}, {'': inf})
    """
    needs: dict[str, float] = {}
    for name, said in given.items():
        if name != "before" and isinstance(said, (str, Duration)):
            with suppress(SettingError):  # several, as "500 steps | 2 epochs": what all need is not worked out
                one = Duration.parse(said)
                needs[one.unit] = one.value
    counts = {k: v for k, v in given.items() if isinstance(v, int)}
    if counts:
        step, after = counts.get("every", 1), counts.get("after", 0)
        first = counts.get("once", (after // step + 1) * step)
        possible = first > after and first % step == 0 and first < counts.get("before", math.inf)
        needs[""] = first if possible else math.inf
    return needs


def _interval(name: str, given: str | Duration) -> Every:
    """What ``every``, ``once``, ``after`` or ``before`` means with a duration."""
    word = {"every": "", "once": "at "}.get(name, f"{name} ")
    return Every(f"{word}{given}", inside=True, bounds=name != "every")


def _event(hook: str) -> str:
    return hook.removeprefix("on_").upper()


for _hook in HOOKS:
    if _hook.startswith("on_"):
        setattr(Event, _event(_hook), Event(_hook))
EVENTS = {e.name: e for e in vars(Event).values() if isinstance(e, Event)}


def _as_filter(event: Any) -> Filter:
    if isinstance(event, Event):
        return event()
    if isinstance(event, Filter):
        return event
    raise SettingError(f"{event!r} is not an event; use lw.Event.<NAME>. {choose(event, EVENTS)}")


class Handler:
    """A function called at an event, as ``trainer.on`` registers it: ``fn(run, *args, **kwargs)``.

    A parameter of ``fn`` that is named like one of the hook's own (``result`` at STEP_END, ``values`` at
    VALIDATION_END) receives it. Raises SettingError if the function cannot be called so.
    """

    def __init__(
        self, event: Event | Filter, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
        made_at: str | None = None,
    ) -> None:  # fmt: skip
        self.event, self.fn, self.args, self.kwargs = _as_filter(event), fn, args, kwargs
        if not callable(fn):
            raise SettingError(f"{fn!r} cannot be called; register a function: @trainer.on(lw.Event.{self.event})")
        self.name = getattr(fn, "__qualname__", type(fn).__name__)
        self.removed: list[bool] = []  # shared with the copies that runs use: not empty once it is removed
        self.intervals: list[Every] = []
        self.tests = self.event.make(self.intervals)
        self.counts = dict.fromkeys(self.tests, 0)
        self.passed = {hook: self._passed(hook) for hook in self.tests}
        self.made_at = made_at or caller()

    def _passed(self, hook: str) -> list[tuple[int, str]]:
        """Positions and names of the hook's arguments that the function asks for by name."""
        try:
            signature = inspect.signature(self.fn)
        except (TypeError, ValueError):  # a builtin without a signature takes the run and the extra arguments
            return []
        offered = list(inspect.signature(getattr(Callback, hook)).parameters)[2:]
        try:
            return self._wanted(signature, offered)
        except TypeError as error:
            with suppress(TypeError):  # a decorator may have made it of a function that takes others
                return self._wanted(inspect.signature(self.fn, follow_wrapped=False), offered)
            offers = f" (this event also offers {', '.join(offered)})" if offered else ""
            events = {n: [_event(h) for h in Hooks.passed_to(n) if h.startswith("on_")] for n in signature.parameters}
            lives = "".join(
                f". {n} is offered at {', '.join(at)}" for n, at in events.items() if at and n not in offered
            )
            raise SettingError(
                f"handler {self.name}{signature} cannot be called at {self.event}: {error}. Expected "
                f"{self.name}(run) plus the extra arguments given to trainer.on{offers}{lives}"
            ) from None

    def _wanted(self, signature: inspect.Signature, offered: list[str]) -> list[tuple[int, str]]:
        wanted = [(i, n) for i, n in enumerate(offered) if n in signature.parameters and n not in self.kwargs]
        signature.bind(None, *self.args, **self.kwargs, **{n: None for _, n in wanted})
        return wanted

    def anew(self) -> Handler:
        """This handler with nothing counted yet, for one run."""
        copy = Handler(self.event, self.fn, self.args, self.kwargs, self.made_at)  # not where the run begins
        copy.removed = self.removed
        return copy

    def take_over(self, old: Handler) -> None:
        """Count on from ``old``, if it is of the same registration."""
        if old.removed is self.removed:
            self.counts = dict(old.counts)

    def start(self, run: Run) -> None:
        """Begin with ``run``: intervals stand where its progress does."""
        for interval in self.intervals:
            interval.begin(run)

    def start_stage(self, run: Run) -> None:
        """What goes by the length of a stage, or of its epochs, goes by that of the one that begins."""
        for interval in self.intervals:
            if interval.of_stage:
                interval.begin(run)

    def bound(self, hook: str) -> Callable[..., None]:
        """The function that a run calls for ``hook``."""
        test, passed = self.tests[hook], self.passed[hook]

        def call(run: Run, *given: Any) -> None:
            self.counts[hook] = n = _number(hook, run, self.counts[hook])
            if not self.removed and test(run, n):
                self.fn(run, *self.args, **self.kwargs, **{name: given[i] for i, name in passed})

        call.__qualname__ = f"{self.name}, at {self.event}"
        return call

    def state_dict(self) -> dict[str, Any]:
        return dict(self.counts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counts.update(state)


def _number(hook: str, run: Run, count: int) -> int:
    """Which occurrence this is, from 1: units that progress counts are read there, the others counted."""
    p = run.progress
    unit = {"step": p.step, "epoch": p.epoch, "stage": p.stage}.get(hook.split("_")[1])
    if unit is None:
        return count + 1
    # a stage is counted after its end
    return unit + 1 if hook.endswith("_start") or hook == "on_stage_end" else unit
