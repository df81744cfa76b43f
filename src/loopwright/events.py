"""The hooks: where a callback or a handler meets the loop, with one exact signature each.

The order in which they fire, recorded from a run with one phase (a test compares this picture with a real run)::

    on_fit_start
      on_stage_start
        on_epoch_start, on_loader_start
          on_step_start                        # an optimizer step: a window of 1..accumulate batches
            on_batch_start, map_batch          # each batch (with several phases: all of them first, once)
            map_output, map_loss, on_backward_end
            on_grads_ready                     # each phase, before its optimizers move
          on_step_end
          on_validation_start                  # when due: between two steps, or after the on_loader_end of training
            on_loader_start                    # each loader, each of its batches
              on_eval_batch_start, on_eval_batch_end
            on_loader_end
          on_validation_end
          on_checkpoint                        # when due
        on_loader_end
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
from typing import TYPE_CHECKING, Any, ClassVar

from loopwright.errors import HookError, NonFiniteError, SkipBatch, SkipStep, StopEpoch, choose, name_nearest
from loopwright.state import Phase, Run, Stage, StepResult
from loopwright.written import warn

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from loopwright.handlers import Handler

__all__ = ["Callback", "Hooks"]


class Callback:
    """Base of all callbacks: override the hooks that you need; the others cost nothing.

    A callback keeps its memory on itself; what ``state_dict`` returns is saved in checkpoints.

    >>> class Shout(Callback):
    ...     def on_epoch_end(self, run):
    ...         print("epoch", run.progress.epoch)

    ``changes`` names what a callback changes besides what its ``map_*`` hooks return and the gradients in
    ``on_grads_ready``: of "weights", "gradients", "values" (what it is passed), "random", "flags" and "rates".
    ``lw.Audit`` allows that and nothing else, and ``trainer.explain(..., of=...)`` tells it. ``stops`` says of our own
    callbacks that they may ask to stop: only then do ranks wait for one another to hear it. Of yours that is assumed.
    """

    changes: ClassVar[tuple[str, ...]] = ()
    stops: ClassVar[bool] = False

    def __init_subclass__(cls, **settings: Any) -> None:
        """An unknown argument of a callback is an error that names the nearest, as everywhere."""
        super().__init_subclass__(**settings)
        if "__init__" in vars(cls) and not hasattr(cls.__init__, "__wrapped__"):
            name_nearest(cls)

    def problems(self, run: Run) -> Iterable[str]:
        """Why this callback cannot do its work in ``run``, each with the fix: PlanError before step 0."""
        return ()

    def on_fit_start(self, run: Run) -> None:
        """Training is about to begin; everything on ``run`` is ready."""

    def on_stage_start(self, run: Run, stage: Stage) -> None:
        """A stage begins: its optimizers and phases are ready."""

    def on_epoch_start(self, run: Run) -> None:
        """An epoch begins, which is a pass over the training data; none of it has been touched."""

    def on_loader_start(self, run: Run, kind: str, name: str) -> None:
        """A pass over one loader begins. ``kind`` is "train", "valid", "test" or "predict".

        ``name`` is its key where a dict of loaders was given, else "". In training it comes once an epoch, not again
        where a resume goes on in the middle of one.
        """

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

    def on_loader_end(self, run: Run, kind: str, name: str, values: Mapping[str, float]) -> None:
        """A pass over one loader has ended; in training before the validation at the end of the epoch.

        ``values`` has the means over a loader of validation or test, such as ``loss``, without kind and name. It is
        empty for training, whose means come with the record of the epoch, for prediction, and where a signal cut a
        validation short. Where a signal cuts short the validation of an epoch's end, a resume makes that end again.
        """

    def on_validation_start(self, run: Run) -> None:
        """A validation begins: modules are in eval mode, random generators are forked."""

    def on_eval_batch_start(self, run: Run, batch: Any) -> None:
        """A batch of validation or test is on the device."""

    def on_eval_batch_end(self, run: Run, output: Any, batch: Any) -> None:
        """A batch of validation or test has been evaluated."""

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        """A validation is complete; ``values`` has its names, such as ``valid/loss``.

        ``values`` is empty where a signal cut it short: put back what ``on_validation_start`` has changed.
        """

    def on_checkpoint(self, run: Run, path: Path) -> None:
        """A checkpoint exists at ``path``."""

    def on_epoch_end(self, run: Run) -> None:
        """An epoch is complete: ``run.history[-1]`` is its record."""

    def on_stage_end(self, run: Run, stage: Stage) -> None:
        """A stage is complete."""

    def on_fit_end(self, run: Run) -> None:
        """Training has ended by itself or by a stop request."""

    def on_exception(self, run: Run, error: BaseException) -> None:
        """An exception leaves the loop, in training or from a verb such as ``trainer.test``; it is raised again."""

    def on_test_start(self, run: Run) -> None:
        """A test begins."""

    def on_test_end(self, run: Run, values: Mapping[str, float]) -> None:
        """A test is complete; ``values`` has its names, such as ``test/loss``."""

    def on_predict_start(self, run: Run) -> None:
        """A prediction begins."""

    def on_predict_batch_start(self, run: Run, batch: Any) -> None:
        """A batch to predict is on the device."""

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
_MEANT = {  # a window may have several batches, which all phases go over before its step ends
    "on_batch_end": "After each optimizer step comes on_step_end; after each backward of a batch, on_backward_end"
}
_OF_FIT = ("on_fit_start", "on_fit_end", "on_exception")


class Hooks:
    """The callables of each hook, in order: only those overridden, so that an unused hook costs nothing.

    Raises HookError for a callback whose hook has the wrong parameters, or that has an ``on_...`` unknown here.
    """

    __slots__ = (*HOOKS, "_arounds")

    on_fit_start: Calls
    on_stage_start: Calls
    on_epoch_start: Calls
    on_loader_start: Calls
    on_step_start: Calls
    on_batch_start: Calls
    map_batch: Calls
    map_output: Calls
    map_loss: Calls
    on_backward_end: Calls
    on_grads_ready: Calls
    on_step_end: Calls
    on_loader_end: Calls
    on_validation_start: Calls
    on_eval_batch_start: Calls
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
    on_predict_batch_start: Calls
    on_predict_batch_end: Calls
    on_predict_end: Calls

    def __init__(self, callbacks: Iterable[Callback] = (), handlers: Iterable[Handler] = ()) -> None:
        callbacks, handlers = list(callbacks), list(handlers)
        self._arounds: list[Callable[[str, Callable[..., Any]], Callable[..., Any]]] = []
        for callback in callbacks:
            check_callback(callback)
        for hook in HOOKS:
            found = tuple(h.bound(hook) for h in handlers if hook in h.tests) if handlers else ()
            setattr(self, hook, _overridden(hook, callbacks) + found if callbacks else found)

    @staticmethod
    def passed_to(name: str) -> list[str]:
        """The hooks that are passed ``name``: what lives shorter than the run is seen there and nowhere else.

        >>> Hooks.passed_to("grad_norm")
        ['on_grads_ready']
        """
        return [hook for hook in HOOKS if name in list(inspect.signature(getattr(Callback, hook)).parameters)[2:]]

    def admit(self, callbacks: Iterable[Callback]) -> None:
        """Let the callbacks of stages know when the fit begins and ends."""
        for hook in _OF_FIT:
            setattr(self, hook, getattr(self, hook) + _overridden(hook, callbacks))

    def exchange(self, out: Iterable[Callback], into: Iterable[Callback]) -> None:
        """Where a stage begins: the callbacks of others are not called any more, its own are, after all that are."""
        gone = {id(callback) for callback in out}
        for hook in HOOKS:
            if hook not in _OF_FIT:
                stay = tuple(call for call in getattr(self, hook) if id(getattr(call, "__self__", None)) not in gone)
                setattr(self, hook, stay + tuple(self._around(hook, call) for call in _overridden(hook, into)))

    def wrap(self, around: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
        """Put ``around(hook, function)`` in the place of each function; it keeps its owner and its name.

        For callbacks that look at the others, from their ``on_fit_start``: what a hook has begun to call stays as it
        is until the next time. What a later stage brings is dressed as well.
        """
        self._arounds.append(around)
        for hook in HOOKS:
            setattr(self, hook, tuple(_dressed(around(hook, one), one) for one in getattr(self, hook)))

    def _around(self, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        for around in self._arounds:
            call = _dressed(around(hook, call), call)
        return call


def _overridden(hook: str, callbacks: Iterable[Callback]) -> Calls:
    base = getattr(Callback, hook)
    return tuple(getattr(c, hook) for c in callbacks if getattr(type(c), hook, base) is not base)


def _dressed(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the owner and the name of ``original``, by which errors name it."""
    if function is not original:
        for name in ("__self__", "__name__", "__qualname__"):
            if hasattr(original, name):
                setattr(function, name, getattr(original, name))
    return function


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
            meant = _MEANT.get(name) or choose(name, HOOKS)
            raise HookError(f"{kind.__name__}.{name} is not a hook of Loopwright. {meant}")
        expected = inspect.signature(getattr(Callback, name))
        no_self = isinstance(inspect.getattr_static(kind, name), (staticmethod, classmethod))
        given = len(expected.parameters) - no_self
        try:
            inspect.signature(method).bind(*[None] * given)
        except TypeError:
            names = ", ".join(expected.parameters)
            raise HookError(
                f"{kind.__name__}.{name}{inspect.signature(method)} has the wrong parameters; write: "
                f"def {name}({names}){_elsewhere(name, inspect.signature(method).parameters)}"
            ) from None


def _elsewhere(hook: str, asked: Iterable[str]) -> str:
    """Where the parameters are to be had that ``hook`` is not passed."""
    known = ((name, Hooks.passed_to(name)) for name in asked)
    return "".join(f". {name} is passed to {', '.join(at)}" for name, at in known if at and hook not in at)


def fire(hooks: Calls, run: Run, *args: Any) -> None:
    """Call every hook; each must return None. An exception keeps its type and gains a note with the place."""
    for hook in hooks:
        returned = _call(hook, run, args)
        if returned is not None:
            wrong = HookError(
                f"{hook_name(hook, run)} returned {_short(returned)}; on_* hooks observe and must return None. "
                "To change a value, override map_batch, map_output or map_loss and return the new one there"
            )
            add_place(wrong, run, hook, _batch(hook, run, args))
            raise wrong


def end_early(hooks: Calls, run: Run, *where: str) -> None:
    """Call every hook that ends a validation without values. One that fails must not cost the run its checkpoint."""
    for hook in hooks:
        try:
            fire((hook,), run, *where, {})
        except Exception as error:
            warn(
                f"{hook_name(hook, run)} failed on a validation that {run.stop_reason} cut short, where values is "
                f"empty: {error!r}. Begin it with: if not values: return"
            )


def fold(hooks: Calls, run: Run, value: Any, *args: Any) -> Any:
    """Thread ``value`` through every ``map_*`` hook, in order."""
    for hook in hooks:
        given, value = value, _call(hook, run, (value, *args))
        if value is None:
            wrong = HookError(f"{hook_name(hook, run)} returned None; map_* hooks must return the (new) value")
            add_place(wrong, run, hook, _batch(hook, run, (given, *args)))
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
        add_place(wrong, run, hook, _batch(hook, run, args))
        raise wrong from signal
    except BaseException as error:
        add_place(error, run, hook, _batch(hook, run, args))
        raise


_OF_STEP = ("on_step_start", "on_grads_ready", "on_step_end")  # no batch is passed to them


def _batch(hook: Any, run: Run, args: tuple[Any, ...]) -> Any:
    """The batch that a hook was called for, or the batches of its step; None where there is none."""
    place = _place(hook, run)
    if place in _OF_STEP:
        return _of_window(run)
    base = getattr(Callback, place, None)
    names = list(inspect.signature(base).parameters)[2:] if base is not None else []
    return dict(zip(names, args, strict=False)).get("batch")


def _of_window(run: Run) -> Any:
    """The batches of the open step; None where they came one by one, and are gone."""
    window = run.window if isinstance(run.window, (tuple, list)) else ()
    return window[0] if len(window) == 1 else list(window) or None


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
    if batch is None and hook is None and isinstance(error, NonFiniteError):
        batch = _of_window(run)  # found when the step had no batch in its hands any more
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
