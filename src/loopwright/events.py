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
from typing import TYPE_CHECKING, Any

from loopwright.errors import HookError, SettingError, SkipBatch, SkipStep, StopEpoch, choose
from loopwright.state import Every, Phase, Run, Stage, StepResult

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


class Filter:
    """One or several events, and the occurrences of them that count. Made by calling an Event.

    ``a | b`` means at either, ``a & b`` (of one event) when both hold.
    """

    def __init__(self, hook: str, test: Callable[[Run, int], bool], text: str) -> None:
        self.tests: dict[str, Callable[[Run, int], bool]] = {hook: test}
        self.text = text
        self.intervals: list[Every] = []

    def __or__(self, other: Filter | Event) -> Filter:
        other = _as_filter(other)
        joined = Filter("", lambda run, n: False, f"{self.text} | {other.text}")
        joined.tests, joined.intervals = dict(self.tests), self.intervals + other.intervals
        for hook, test in other.tests.items():
            mine = self.tests.get(hook)
            # both are asked each time: an interval keeps its place only if it sees every occurrence
            joined.tests[hook] = test if mine is None else _either(mine, test)
        return joined

    def __and__(self, other: Filter | Event) -> Filter:
        other = _as_filter(other)
        if set(self.tests) != set(other.tests) or len(self.tests) != 1:
            raise SettingError(f"'&' joins two filters of one event; got {self.text} & {other.text}")
        ((hook, mine),), test = self.tests.items(), next(iter(other.tests.values()))
        both = Filter(hook, lambda run, n: mine(run, n) & test(run, n), f"{self.text} & {other.text}")
        both.intervals = self.intervals + other.intervals
        return both

    def __repr__(self) -> str:
        return self.text


def _either(a: Callable[[Run, int], bool], b: Callable[[Run, int], bool]) -> Callable[[Run, int], bool]:
    return lambda run, n: a(run, n) | b(run, n)


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
        every: int | str | None = None,
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
        if isinstance(every, (int, float)) and (every < 1 or every % 1 or isinstance(every, bool)):
            raise SettingError(f"{self.name}(every={every!r}): expected a whole number from 1, or a duration '10 min'")
        interval = Every(every) if isinstance(every, str) else None

        def test(run: Run, n: int) -> bool:
            if interval is not None:
                ok = interval.due(run.progress)
            else:
                ok = not isinstance(every, int) or n % every == 0
            ok = ok and (once is None or n == once) and (after is None or n > after) and (before is None or n < before)
            return ok and (when is None or bool(when(run)))

        text = ", ".join(f"{k}={getattr(v, '__name__', None) or repr(v)}" for k, v in given.items())
        made = Filter(self.hook, test, f"{self.name}({text})" if text else self.name)
        made.intervals = [] if interval is None else [interval]
        return made

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
        self.name = getattr(fn, "__qualname__", type(fn).__name__)
        self.active = True
        self.counts = dict.fromkeys(self.event.tests, 0)
        self.passed = {hook: self._passed(hook) for hook in self.event.tests}

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
        for interval in self.event.intervals:
            interval.start(run.progress)
        if run.progress.step == 0:
            self.counts = dict.fromkeys(self.counts, 0)

    def bound(self, hook: str) -> Callable[..., None]:
        """The function that a run calls for ``hook``."""
        test, passed = self.event.tests[hook], self.passed[hook]

        def call(run: Run, *given: Any) -> None:
            self.counts[hook] = n = _number(hook, run, self.counts[hook])
            if self.active and test(run, n):
                self.fn(run, *self.args, **self.kwargs, **{name: given[i] for i, name in passed})

        call.__qualname__ = self.name
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
    return unit + 1 if hook.endswith("_start") else unit


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
            found += [h.bound(hook) for h in handlers if hook in h.event.tests]
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
    _check_class(type(callback))


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
                f"{kind.__name__}.{name}{inspect.signature(method)} has the wrong parameters; write: def {name}({names})"
            ) from None


def fire(hooks: Calls, run: Run, *args: Any) -> None:
    """Call every hook; each must return None. An exception keeps its type and gains a note with the place."""
    for hook in hooks:
        returned = _call(hook, run, args)
        if returned is not None:
            wrong = HookError(
                f"{hook.__qualname__} returned {_short(returned)}; on_* hooks observe and must return None. "
                "To change a value, override map_batch, map_output or map_loss and return the new one there"
            )
            add_place(wrong, run, hook)
            raise wrong


def fold(hooks: Calls, run: Run, value: Any, *args: Any) -> Any:
    """Thread ``value`` through every ``map_*`` hook, in order."""
    for hook in hooks:
        value = _call(hook, run, (value, *args))
        if value is None:
            wrong = HookError(f"{hook.__qualname__} returned None; map_* hooks must return the (new) value")
            add_place(wrong, run, hook)
            raise wrong
    return value


def _call(hook: Callable[..., Any], run: Run, args: tuple[Any, ...]) -> Any:
    try:
        return hook(run, *args)
    except (SkipBatch, SkipStep, StopEpoch):
        raise
    except BaseException as error:
        add_place(error, run, hook)
        raise


def add_place(error: BaseException, run: Run, hook: Any = None, batch: Any = None) -> None:
    """Note on ``error`` where training stood, in units completed: hook, epoch, batch, step, shapes and dtypes."""
    p = run.progress
    who = f"in {getattr(hook, '__qualname__', hook)}, " if hook is not None else ""
    note = f"[loopwright] {who}after epoch {p.epoch}, batch {p.batch} of the open epoch, step {p.step}"
    if batch is not None:
        note += f"; batch: {describe(batch)}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


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
