"""The hooks: where a callback or a handler meets the loop, with one exact signature each.

The order in which they fire, recorded from a run with one phase (a test compares this picture with a real run)::

    on_fit_start
      on_stage_start
        on_epoch_start
          on_step_start                        # an optimizer step: a window of 1..accumulate batches
            on_batch_start, map_batch          # each batch (with several phases: all of them first, once)
            map_output, map_loss, on_backward_end
            on_grads_ready                     # each phase, before its optimizers move
          on_step_end
          on_validation_start, on_eval_batch_end, on_validation_end      # when due
          on_checkpoint                                                  # when due
        on_epoch_end                           # after the validation of that epoch, before its checkpoint
      on_stage_end
    on_fit_end                                 # on_exception instead, if one leaves the loop

``on_*`` observe and return None. ``map_*`` return the new value of what they are given. Gradients may be edited in
place in ``on_grads_ready`` and nowhere else. Callbacks are called in the order of their list, handlers after them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Any

from loopwright.errors import HookError, SettingError, SkipBatch, SkipStep, StopEpoch, choose
from loopwright.state import Duration, Every, Phase, Run, Stage, StepResult

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["Callback", "Event", "Filter", "Handler", "Hooks"]


class Callback:
    """Base of all callbacks: override the hooks that you need; the others cost nothing.

    A callback keeps its memory on itself; what ``state_dict`` returns is saved in checkpoints.

    >>> class Shout(Callback):
    ...     def on_epoch_end(self, run):
    ...         print("epoch", run.progress.epoch)
    """

    def on_fit_start(self, run: Run) -> None:
        """Training is about to begin; everything on ``run`` is ready."""

    def on_stage_start(self, run: Run, stage: Stage) -> None:
        """A stage begins: its optimizers and phases are ready."""

    def on_epoch_start(self, run: Run) -> None:
        """An epoch begins; its data has not been touched."""

    def on_step_start(self, run: Run) -> None:
        """An optimizer step begins; no batch has been moved."""

    def on_batch_start(self, run: Run, batch: Any) -> None:
        """A batch is on the device. May raise SkipBatch."""

    def map_batch(self, run: Run, batch: Any) -> Any:
        """Return the batch to train on. May raise SkipBatch."""
        return batch

    def map_output(self, run: Run, output: Any, batch: Any, phase: Phase) -> Any:
        """Return the output of the phase's step (a dict with ``loss``)."""
        return output

    def map_loss(self, run: Run, loss: Tensor, output: Any, batch: Any, phase: Phase) -> Tensor:
        """Return the loss to go backward from."""
        return loss

    def on_backward_end(self, run: Run, loss: Tensor, output: Any, batch: Any, phase: Phase) -> None:
        """The gradients of one batch have been added."""

    def on_grads_ready(self, run: Run, phase: Phase, grad_norm: Tensor | None) -> None:
        """All gradients of the window are there, clipped; they may be edited in place here."""

    def on_step_end(self, run: Run, result: StepResult) -> None:
        """The optimizers have moved and ``run.progress`` has counted it."""

    def on_validation_start(self, run: Run) -> None:
        """A validation begins: modules are in eval mode, random generators are forked."""

    def on_eval_batch_end(self, run: Run, output: Any, batch: Any) -> None:
        """A batch of validation or test has been evaluated."""

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        """A validation is complete; ``values`` has its names, such as ``valid/loss``."""

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """A checkpoint exists at ``path``."""

    def on_epoch_end(self, run: Run) -> None:
        """An epoch is complete: ``run.history[-1]`` is its record."""

    def on_stage_end(self, run: Run, stage: Stage) -> None:
        """A stage is complete."""

    def on_fit_end(self, run: Run) -> None:
        """Training has ended by itself or by a stop request."""

    def on_exception(self, run: Run, error: BaseException) -> None:
        """An exception leaves the loop; it is raised again afterwards."""

    def on_test_start(self, run: Run) -> None:
        """A test begins."""

    def on_test_end(self, run: Run, values: Mapping[str, float]) -> None:
        """A test is complete; ``values`` has its names, such as ``test/loss``."""

    def on_predict_start(self, run: Run) -> None:
        """A prediction begins."""

    def on_predict_batch_end(self, run: Run, output: Any, batch: Any) -> None:
        """A batch has been predicted."""

    def on_predict_end(self, run: Run) -> None:
        """A prediction is complete."""

    def state_dict(self) -> dict[str, Any]:
        """What to keep in checkpoints: plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""


Calls = tuple[Callable[..., Any], ...]
HOOKS = tuple(name for name in vars(Callback) if name.startswith(("on_", "map_")))


Test = Callable[[Run, int], bool]


class Filter:
    """One or several events, and the occurrences of them that count. Made by calling an Event.

    ``a | b`` means at either, ``a & b`` (of one event) when both hold. A filter may serve several handlers.
    """

    def __init__(self, hooks: Iterable[str], make: Callable[[list[Every]], dict[str, Test]], text: str) -> None:
        self.hooks, self.text = tuple(hooks), text
        self.make = make  # the tests by hook, anew for each handler: an interval is used up by what it fires for

    def __or__(self, other: Filter | Event) -> Filter:
        other = _as_filter(other)

        def make(intervals: list[Every]) -> dict[str, Test]:
            tests = self.make(intervals)
            for hook, test in other.make(intervals).items():
                tests[hook] = _either(tests[hook], test) if hook in tests else test
            return tests

        return Filter(dict.fromkeys(self.hooks + other.hooks), make, f"{self.text} | {other.text}")

    def __and__(self, other: Filter | Event) -> Filter:
        other = _as_filter(other)
        if set(self.hooks) != set(other.hooks) or len(self.hooks) != 1:
            raise SettingError(f"'&' joins two filters of one event; got {self.text} & {other.text}")

        def make(intervals: list[Every]) -> dict[str, Test]:
            (hook, a), b = *self.make(intervals).items(), next(iter(other.make(intervals).values()))
            return {hook: lambda run, n: a(run, n) & b(run, n)}

        return Filter(self.hooks, make, f"{_in_brackets(self)} & {_in_brackets(other)}")

    def __repr__(self) -> str:
        return self.text


def _either(a: Test, b: Test) -> Test:
    # both are asked each time: an interval keeps its place only if it sees every occurrence
    return lambda run, n: a(run, n) | b(run, n)


def _in_brackets(part: Filter) -> str:
    return f"({part})" if " | " in part.text else part.text


class Event:
    """The moments at which handlers can be called: ``trainer.on(lw.Event.STEP_END(every=50))``.

    Call an event to choose among its occurrences, which count from 1: ``every=5`` takes the 5th, 10th, ...;
    ``every="10 min"`` one each ten minutes; ``once=20`` the 20th alone; ``after=3`` those beyond the third,
    ``before=3`` the first two; ``when=`` a function of the run. Steps, epochs and stages count over the whole run,
    also after a resume; batches, validations and checkpoints are counted as they come.

    >>> Event.EPOCH_END(every=5) | Event.FIT_END
    EPOCH_END(every=5) | FIT_END
    """

    FIT_START: Event
    STAGE_START: Event
    EPOCH_START: Event
    STEP_START: Event
    BATCH_START: Event
    BACKWARD_END: Event
    GRADS_READY: Event
    STEP_END: Event
    VALIDATION_START: Event
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
    PREDICT_BATCH_END: Event
    PREDICT_END: Event

    def __init__(self, hook: str) -> None:
        self.hook = hook
        self.name = hook.removeprefix("on_").upper()

    def __call__(
        self,
        every: int | str | Duration | None = None,
        *,
        once: int | None = None,
        after: int | None = None,
        before: int | None = None,
        when: Callable[[Run], bool] | None = None,
    ) -> Filter:
        given = {"every": every, "once": once, "after": after, "before": before, "when": when}
        given = {k: v for k, v in given.items() if v is not None}
        for name in ("once", "after", "before"):
            value = given.get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise SettingError(f"{self.name}({name}={value!r}): count occurrences from 1, such as {name}=20")
        if when is not None and not callable(when):
            raise SettingError(f"{self.name}(when={when!r}): expected a function of the run that returns True or False")
        if isinstance(every, float) and every % 1 == 0:
            every = int(every)
        number = isinstance(every, int) and not isinstance(every, bool) and every > 0
        if not number and not isinstance(every, (str, Duration, NoneType)):
            raise SettingError(f"{self.name}(every={every!r}): expected a whole number from 1, or a duration '10 min'")
        duration = Duration.parse(every) if isinstance(every, (str, Duration)) else None
        count = every if isinstance(every, int) else 1

        def make(intervals: list[Every]) -> dict[str, Test]:
            interval = None if duration is None else Every(duration)
            intervals += [] if interval is None else [interval]

            def test(run: Run, n: int) -> bool:
                ok = n % count == 0 if interval is None else interval.due(run.progress)
                ok = ok and (once is None or n == once) and (after is None or n > after)
                return ok and (before is None or n < before) and (when is None or bool(when(run)))

            return {self.hook: test}

        text = ", ".join(f"{k}={getattr(v, '__name__', None) or repr(v)}" for k, v in given.items())
        return Filter((self.hook,), make, f"{self.name}({text})" if text else self.name)

    def __or__(self, other: Filter | Event) -> Filter:
        return self() | other

    def __and__(self, other: Filter | Event) -> Filter:
        return self() & other

    def __repr__(self) -> str:
        return self.name


for _hook in HOOKS:
    if _hook.startswith("on_"):
        setattr(Event, _hook.removeprefix("on_").upper(), Event(_hook))
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

    def __init__(self, event: Event | Filter, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.event, self.fn, self.args, self.kwargs = _as_filter(event), fn, args, kwargs
        if not callable(fn):
            raise SettingError(f"{fn!r} cannot be called; register a function: @trainer.on(lw.Event.{self.event})")
        self.name = getattr(fn, "__qualname__", type(fn).__name__)
        self.active = True
        self.intervals: list[Every] = []
        self.tests = self.event.make(self.intervals)
        self.counts = dict.fromkeys(self.tests, 0)
        self.passed = {hook: self._passed(hook) for hook in self.tests}

    def _passed(self, hook: str) -> list[tuple[int, str]]:
        """Positions and names of the hook's arguments that the function asks for by name."""
        try:
            signature = inspect.signature(self.fn)
        except (TypeError, ValueError):  # a builtin without a signature takes the run and the extra arguments
            return []
        offered = list(inspect.signature(getattr(Callback, hook)).parameters)[2:]
        wanted = [(i, n) for i, n in enumerate(offered) if n in signature.parameters and n not in self.kwargs]
        try:
            signature.bind(None, *self.args, **self.kwargs, **{n: None for _, n in wanted})
        except TypeError as error:
            offers = f" (this event also offers {', '.join(offered)})" if offered else ""
            raise SettingError(
                f"handler {self.name}{signature} cannot be called at {self.event}: {error}. Expected "
                f"{self.name}(run) plus the extra arguments given to trainer.on{offers}"
            ) from None
        return wanted

    def start(self, run: Run) -> None:
        """Begin with ``run``: intervals stand where its progress does, and a new run counts from 0."""
        for interval in self.intervals:
            interval.start(run.progress, run.stage.source.batches if run.stage is not None else None)
        if run.progress.step == 0:
            self.counts = dict.fromkeys(self.counts, 0)

    def start_stage(self, run: Run, stage: Stage) -> None:
        """Parts of an epoch go by the number of batches in an epoch of ``stage``."""
        for interval in self.intervals:
            if interval.duration.is_part:
                interval.start(run.progress, stage.source.batches)

    def bound(self, hook: str) -> Callable[..., None]:
        """The function that a run calls for ``hook``."""
        test, passed = self.tests[hook], self.passed[hook]

        def call(run: Run, *given: Any) -> None:
            self.counts[hook] = n = _number(hook, run, self.counts[hook])
            if self.active and test(run, n):
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


class Hooks:
    """The callables of each hook, in order: only those overridden, so that an unused hook costs nothing.

    Raises HookError for a callback whose hook has the wrong parameters, or that has an ``on_...`` unknown here.
    """

    __slots__ = HOOKS

    on_fit_start: Calls
    on_stage_start: Calls
    on_epoch_start: Calls
    on_step_start: Calls
    on_batch_start: Calls
    map_batch: Calls
    map_output: Calls
    map_loss: Calls
    on_backward_end: Calls
    on_grads_ready: Calls
    on_step_end: Calls
    on_validation_start: Calls
    on_eval_batch_end: Calls
    on_validation_end: Calls
    on_checkpoint: Calls
    on_epoch_end: Calls
    on_stage_end: Calls
    on_fit_end: Calls
    on_exception: Calls
    on_test_start: Calls
    on_test_end: Calls
    on_predict_start: Calls
    on_predict_batch_end: Calls
    on_predict_end: Calls

    def __init__(self, callbacks: Iterable[Callback] = (), handlers: Iterable[Handler] = ()) -> None:
        callbacks, handlers = list(callbacks), list(handlers)
        for callback in callbacks:
            check_callback(callback)
        for hook in HOOKS:
            base = getattr(Callback, hook)
            found = [getattr(c, hook) for c in callbacks if getattr(type(c), hook, base) is not base]
            found += [h.bound(hook) for h in handlers if hook in h.tests]
            setattr(self, hook, tuple(found))


def check_callback(callback: Any) -> None:
    """Raise HookError unless every hook of ``callback`` exists and takes what the loop passes."""
    if isinstance(callback, type):
        raise HookError(
            f"callbacks must be lw.Callback objects; got the class {callback.__name__}; make an instance, "
            f"{callback.__name__}()"
        )
    if not any(hasattr(type(callback), hook) for hook in HOOKS):
        raise HookError(f"callbacks must be lw.Callback objects; got {callback!r}")
    _check_class(callback.__class__)


@cache
def _check_class(kind: type) -> None:
    for name in dir(kind):
        method = getattr(kind, name)
        if not name.startswith(("on_", "map_")) or not callable(method) or method is getattr(Callback, name, None):
            continue
        if name not in HOOKS:
            raise HookError(f"{kind.__name__}.{name} is not a hook of Loopwright. {choose(name, HOOKS)}")
        expected = inspect.signature(getattr(Callback, name))
        given = len(expected.parameters) - isinstance(inspect.getattr_static(kind, name), staticmethod)
        try:
            inspect.signature(method).bind(*[None] * given)
        except TypeError:
            names = ", ".join(expected.parameters)
            raise HookError(
                f"{kind.__name__}.{name}{inspect.signature(method)} has the wrong parameters; write: "
                f"def {name}({names})"
            ) from None


def fire(hooks: Calls, run: Run, *args: Any) -> None:
    """Call every hook; each must return None. An exception keeps its type and gains a note with the place."""
    for hook in hooks:
        returned = _call(hook, run, args)
        if returned is not None:
            wrong = HookError(
                f"{hook_name(hook, run)} returned {_short(returned)}; on_* hooks observe and must return None. "
                "To change a value, override map_batch, map_output or map_loss and return the new one there"
            )
            add_place(wrong, run, hook)
            raise wrong


def fold(hooks: Calls, run: Run, value: Any, *args: Any) -> Any:
    """Thread ``value`` through every ``map_*`` hook, in order."""
    for hook in hooks:
        value = _call(hook, run, (value, *args))
        if value is None:
            wrong = HookError(f"{hook_name(hook, run)} returned None; map_* hooks must return the (new) value")
            add_place(wrong, run, hook)
            raise wrong
    return value


# where the exceptions that steer the loop may come from; too late for SkipBatch, the loop itself says so
_IN_BATCH = ("on_batch_start", "map_batch", "map_output", "map_loss", "on_backward_end")
_IN_STEP = ("on_step_start", *_IN_BATCH, "on_grads_ready")
_STEERED: dict[type[Exception], tuple[str, ...]] = {
    SkipBatch: _IN_BATCH,
    SkipStep: _IN_STEP,
    StopEpoch: (*_IN_STEP, "on_step_end"),
}


def _call(hook: Callable[..., Any], run: Run, args: tuple[Any, ...]) -> Any:
    try:
        return hook(run, *args)
    except (SkipBatch, SkipStep, StopEpoch) as signal:
        places = next(places for kind, places in _STEERED.items() if isinstance(signal, kind))
        if _place(hook, run) in places:
            raise
        wrong = HookError(
            f"{hook_name(hook, run)} raised {type(signal).__name__}, which steers the loop only from "
            f"{', '.join(places)}. Raise it there, or stop training with run.request_stop(reason)"
        )
        add_place(wrong, run, hook)
        raise wrong from signal
    except BaseException as error:
        base = getattr(Callback, _place(hook, run), None)
        names = list(inspect.signature(base).parameters)[2:] if base is not None else []
        add_place(error, run, hook, dict(zip(names, args, strict=False)).get("batch"))
        raise


def _place(hook: Any, run: Run) -> str:
    """Which hook of ``run`` a function stands in: one may serve several, so its own name does not tell."""
    found = (name for name in HOOKS if any(one is hook for one in getattr(run.hooks, name)))
    return next(found, str(getattr(hook, "__name__", "")))


def hook_name(hook: Any, run: Run) -> str:
    """``Class.on_step_end``, with the class of the callback itself; for a handler its name and its event."""
    owner = getattr(hook, "__self__", None)
    if owner is None:
        return str(getattr(hook, "__qualname__", None) or _short(hook))
    return f"{(owner if isinstance(owner, type) else type(owner)).__qualname__}.{_place(hook, run)}"


def add_place(error: BaseException, run: Run, hook: Any = None, batch: Any = None) -> None:
    """Note on ``error`` where training stood, in units completed: hook, epoch, batch, step, shapes and dtypes.

    There is one such note for each place: a second call adds what the first did not know.
    """
    p = run.progress
    who = hook_name(hook, run) if hook is not None else ""
    place = f"after epoch {p.epoch}, batch {p.batch} of the open epoch, step {p.step}"
    shapes = "" if batch is None else f"; batch: {describe(batch)}"
    notes: list[str] = getattr(error, "__notes__", [])
    for i, note in enumerate(notes):
        known, _, described = note.partition("; batch: ")
        if known.startswith("[loopwright] ") and known.endswith(place) and who in known:
            notes[i] = note if described else note + shapes
            return
    error.add_note(f"[loopwright] {f'in {who}, ' if who else ''}{place}{shapes}")


def describe(value: Any) -> str:
    """Shapes and dtypes of a nested batch, for messages.

    >>> import torch
    >>> describe({"x": torch.zeros(2, 3), "y": [1, "a"]})
    "{'x': float32[2, 3], 'y': [int, str]}"
    """
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        on = getattr(value, "device", None)
        where = f" on {on}" if on is not None and str(on) != "cpu" else ""
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{where}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in list(value.items())[:20]) + "}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(describe(v) for v in value[:8]) + (", ..." if len(value) > 8 else "")
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return type(value).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
