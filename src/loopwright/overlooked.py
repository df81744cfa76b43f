"""What a run would pass over in silence: methods, layers and states of the user's own that nothing here asks for."""

from __future__ import annotations

import difflib
import gc
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from loopwright.events import HOOKS, Callback
from loopwright.state import Metric, Run
from loopwright.task import Supervised, Task
from loopwright.written import is_ours, where

__all__ = ["misnamed", "own_functions", "passed_over", "saved_in_vain"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step", "configure_optimizers", "configure_metrics")
_ELSEWHERE = {  # what others call them
    "train_step": "training_step", "forward_step": "training_step", "val_step": "validation_step",
    "valid_step": "validation_step", "eval_step": "validation_step", "evaluation_step": "validation_step",
    "prediction_step": "predict_step",
}  # fmt: skip
_EPOCH_ENDS = {
    "training_epoch_end": "EPOCH_END", "validation_epoch_end": "VALIDATION_END", "test_epoch_end": "TEST_END",
}  # fmt: skip
_HOOK = re.compile("on_(train|validation|test|predict|fit|epoch|batch|before|after|save|load|sanity)_.*")


def passed_over(run: Run) -> Iterator[tuple[str, Any]]:
    """What may have been meant for something: methods that nothing calls, layers in no module, schedulers at rest.

    Each with its line.
    """
    if isinstance(run.task, Task):
        yield from _uncalled(run)
        yield from _unregistered(run)
        yield from _unstepped(run)


def own_functions(run: Run) -> Iterator[tuple[str, Any]]:
    """The user's own functions that a run may call, each with its name in a class: of the task, callbacks, handlers."""
    for kind in {kind for one in (run.task, *run.callbacks) for kind in type(one).__mro__ if _is_theirs(kind)}:
        yield from vars(kind).items()
    yield from (("", one) for one in (*(h.fn for h in run.handlers), *_steps_of(run)))


def misnamed(run: Run, wanted: str) -> str | None:
    """A method of the task that may have been meant as ``wanted``, which it lacks, and that nothing calls."""
    return next((name for name, meant, _ in _unused(run) if meant == wanted), None)


def saved_in_vain(run: Run) -> Iterator[tuple[str, str]]:
    """What has a state that a checkpoint would hold, and that nothing could put back; each with its line."""
    for one in (*run.callbacks, *run.loggers) if run.savers else ():
        kind, load = type(one), getattr(one, "load_state_dict", None)
        saves = (
            callable(getattr(one, "state_dict", None)) and getattr(kind, "state_dict", None) is not Callback.state_dict
        )
        if saves and (load is None or getattr(load, "__func__", None) is Callback.load_state_dict):
            yield (
                f"{kind.__name__} has a state_dict and no load_state_dict, so that a resume would begin without its "
                "state; write: def load_state_dict(self, state): ..., which takes back what state_dict returns",
                where(one.state_dict),
            )


def _unstepped(run: Run) -> Iterator[tuple[str, Any]]:
    """A scheduler of torch that was made for an optimizer and not given to the task, so that nothing steps it.

    One that the user's own code may step is none of our business. torch puts a ``step`` of its own on the optimizer of
    a scheduler; who it is, only the garbage collector knows.
    """
    phases = [phase for stage in run.stages for phase in stage.phases]
    given = {id(o) for phase in phases if phase.step_schedulers or phase.epoch_schedulers for o in phase.moved}
    for optimizer in {id(o): o for phase in phases for o in phase.moved}.values():
        if "step" not in vars(optimizer) or id(optimizer) in given:
            continue
        made = list(_schedulers_of(optimizer))
        codes = (_code(function) for _, function in own_functions(run))
        if made and not any("step" in _names_in(code) for code in codes if code is not None):
            name = type(made[0]).__name__
            give = "return (optimizer, scheduler) from configure_optimizers"
            if isinstance(run.task, Supervised):
                give = "write lw.Supervised(..., schedule=scheduler)"
            yield (
                f"{name} was made for {type(optimizer).__name__}, and nothing in this run steps it; {give}, which "
                "steps it once an epoch, or lw.per_step(scheduler) to go with the optimizer",
                run.task,
            )


def _schedulers_of(optimizer: Any) -> Iterator[LRScheduler]:
    """The schedulers of torch that hold ``optimizer``, by themselves or by their ``__dict__``."""
    for held in gc.get_referrers(optimizer):
        for one in (held, *(gc.get_referrers(held) if type(held) is dict else ())):
            if isinstance(one, LRScheduler) and getattr(one, "optimizer", None) is optimizer:
                yield one


def _uncalled(run: Run) -> Iterator[tuple[str, str]]:
    name = type(run.task).__name__
    for method, meant, function in _unused(run):
        if meant in _STEPS:
            told = f"did you mean {meant}?"
        elif meant in HOOKS:
            asked = ", ".join(inspect.signature(getattr(Callback, meant)).parameters)
            told = f"a task has no hooks. Put it in a callback: class Own(lw.Callback): def {meant}({asked}): ..."
        else:
            told = f"a task has no hooks. Make it a handler: @trainer.on(lw.Event.{meant})"
        yield f"{name}.{method} is never called: {told}", where(function)


def _unused(run: Run) -> Iterator[tuple[str, str, Any]]:
    """Methods that nothing calls: their names, what of ours they may have been meant as, and their functions."""
    kinds = [kind for kind in type(run.task).__mro__ if _is_theirs(kind)]
    for name, function in {k: v for kind in reversed(kinds) for k, v in vars(kind).items()}.items():
        meant = _meant(name) if inspect.isfunction(function) else None
        if meant is None or (meant in HOOKS and any(one is run.task for one in run.callbacks)):
            continue
        ours = meant not in _STEPS or is_ours(getattr(type(run.task), meant))  # else there is one already
        if ours and name not in _names_used(run, kinds, function) and not _is_step(run, function):
            yield name, meant, function


def _meant(name: str) -> str | None:
    """What of ours a method may have been meant as, going by its name alone; None for a name of its own.

    >>> _meant("val_step"), _meant("trainng_step"), _meant("on_train_epoch_end"), _meant("pretraining_step")
    ('validation_step', 'training_step', 'on_epoch_end', None)
    """
    if name in HOOKS or _HOOK.fullmatch(name):
        return difflib.get_close_matches(name, HOOKS, n=1)[0]
    known = _ELSEWHERE.get(name) or _EPOCH_ENDS.get(name)
    if known is not None or name in _STEPS or any(one in name for one in _STEPS):
        return known
    return next(iter(difflib.get_close_matches(name, _STEPS, n=1, cutoff=0.87)), None)


def _names_used(run: Run, kinds: Iterable[type], but: Any) -> set[str]:
    """Names that the user's own code uses: the classes, what a run calls, and the files in which the classes are."""
    files = [sys.modules.get(kind.__module__) for kind in kinds]
    functions = [one for file in files if file is not None for one in vars(file).values() if inspect.isfunction(one)]
    functions += [function for _, function in own_functions(run)]
    codes = (_code(one) for one in functions if one is not but)
    return {name for code in codes if code is not None for name in _names_in(code)}


def _code(function: Any) -> CodeType | None:
    function = getattr(function, "fget", None) or getattr(function, "__func__", function)
    return getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, str):  # getattr(self, "val_step")
            yield value
        elif isinstance(value, CodeType):
            yield from _names_in(value)


def _steps_of(run: Run) -> list[Any]:
    return [phase.step for stage in run.stages for phase in stage.phases]


def _is_step(run: Run, function: Any) -> bool:
    return any(getattr(inspect.unwrap(step), "__func__", None) is function for step in _steps_of(run))


def _is_theirs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("torch", "builtins") and not is_ours(kind)


def _known(run: Run) -> set[int]:
    """Parameters that torch finds in the models, or that an optimizer moves."""
    owners = [run.task, *run.models.values(), *run.optimizers.values()]
    known = {id(p) for one in owners if isinstance(one, nn.Module) for p in one.parameters()}
    return known | {id(p) for one in run.optimizers.values() for group in one.param_groups for p in group["params"]}


def _unregistered(run: Run) -> Iterator[tuple[str, Any]]:
    """Lists and dicts of modules that would train, and that no optimizer moves, since torch does not look into them."""
    known: set[int] | None = None  # looked for where there is need
    for module in run.task.modules():
        kind = type(module)
        for name, held in vars(module).items() if _is_theirs(kind) else ():
            listed = held.values() if isinstance(held, Mapping) else held
            if not isinstance(held, (list, tuple, dict)) or name in ("_modules", "_parameters", "_buffers"):
                continue
            layers = [one for one in listed if isinstance(one, nn.Module) and not isinstance(one, Metric)]
            if layers and known is None:
                known = _known(run)
            lost = [
                one for one in layers if any(p.requires_grad and id(p) not in (known or ()) for p in one.parameters())
            ]
            if lost:
                fitting = "nn.ModuleDict({...})" if isinstance(held, dict) else "nn.ModuleList([...])"
                yield (
                    f"{kind.__name__}.{name} is a {type(held).__name__} that holds {len(lost)} "
                    f"module{'s' * (len(lost) > 1)} whose parameters no optimizer moves; write {fitting}, or "
                    "requires_grad_(False) on what is not to be trained",
                    run.task if is_ours(kind.__init__) else where(kind.__init__),
                )
