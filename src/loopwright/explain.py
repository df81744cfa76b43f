"""The flat loop of a run, with each callback and handler in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from loopwright.errors import SettingError, choose
from loopwright.events import HOOKS, Hooks, hook_name
from loopwright.every import Every
from loopwright.state import Phase, Run, Stage
from loopwright.text import rule_name

__all__ = ["explain", "writers"]


def explain(run: Run) -> str:
    """The loop that this very run walks, as indented pseudo-code; only what takes place is shown."""
    lines: list[str] = []

    def put(depth: int, text: str) -> None:
        lines.append("    " * depth + text)

    def put_hook(depth: int, hook: str) -> None:
        for function in getattr(run.hooks, hook):
            name = hook_name(function, run)
            put(depth, name if name.endswith(f".{hook}") else f"{name}  # {hook}")

    if debug := run.settings.get("debug"):
        put(0, f"Debug({', '.join(f'{name}={value!r}' for name, value in debug.items())})")
    put_hook(0, "on_fit_start")
    for stage in run.stages:
        _open(run, stage)
        put(0, f"stage {stage.name!r}: until {' or '.join(stage.ends)}")
        put_hook(1, "on_stage_start")
        put(1, "for each epoch:")
        put_hook(2, "on_epoch_start")
        put_hook(2, "on_loader_start")
        size = "batch" if stage.accumulate == 1 else f"window of up to {stage.accumulate} batches"
        if not isinstance(stage.accumulate, int):
            size = f"window of {stage.accumulate}"
        put(2, f"for each {size} of {type(stage.source).__name__}:")
        for scheduled in stage.scheduled:
            put(3, f"set {', '.join(scheduled.schedules)} of {type(scheduled.optimizer).__name__} by schedule")
        put_hook(3, "on_step_start")
        _steps(run, stage, put, put_hook)
        put(3, f"{_when(run.log_every)}: log train/..." + (f" to {_names(run.loggers)}" if run.loggers else ""))
        for phase in stage.phases:
            for scheduler in phase.step_schedulers:
                put(3, f"{type(scheduler.torch).__name__}.step()")
        put_hook(3, "on_step_end")
        within = stage.valid and stage.validate_every.inside
        if within:
            _validation(stage, 3, put, put_hook)
        _saving(run, 3, put, put_hook)
        put_hook(2, "on_loader_end")
        if stage.valid and not within:
            _validation(stage, 2, put, put_hook)
        put(2, "append the record of the epoch to run.history")
        for phase in stage.phases:
            for scheduler in phase.epoch_schedulers:
                put(2, f"{type(scheduler.torch).__name__}.step()")
        put_hook(2, "on_epoch_end")
        put_hook(1, "on_stage_end")
    if any(saver.at_end for saver in run.savers):
        put(0, "save a last checkpoint")
    put_hook(0, "on_fit_end")
    return "\n".join(lines)


def _open(run: Run, stage: Stage) -> None:
    """Let the hooks of ``run`` be those of ``stage``: its own callbacks are called in it alone."""
    run.hooks.exchange([c for other in run.stages for c in other.callbacks], stage.callbacks)


def _steps(run: Run, stage: Stage, put: Any, put_hook: Any) -> None:
    several, scaler = len(stage.phases) > 1, run.precision.scaler
    if several and (run.hooks.on_batch_start or run.hooks.map_batch):
        put(3, "for each batch of the window:")
        put_hook(4, "on_batch_start")
        put_hook(4, "map_batch")
    for phase in stage.phases:
        depth = 3
        if several or phase.every != 1:
            when = (
                f", when {rule_name(phase.every)} says so" if callable(phase.every) else f", every {phase.every} steps"
            )
            put(3, f"phase {phase.name!r}{when if phase.every != 1 else ''}:")
            depth = 4
        if phase.moved and not phase.closure:
            put(depth, "set gradients to None")
        inner = depth
        if stage.accumulate != 1:
            put(depth, "for each batch of the window:")
            inner += 1
        if not several:
            put_hook(inner, "on_batch_start")
            put_hook(inner, "map_batch")
        if phase.closure:
            put(inner, f"{type(phase.moved[0]).__name__}.step(closure), which calls as often as it needs:")
            inner += 1
        call = getattr(phase.step, "__qualname__", "step")
        compiled = "" if run.compiler is None else ", compiled"
        with_precision = "" if run.precision.plain else f" under autocast to {run.precision.name}"
        put(inner, f"output = {call}(batch){with_precision}{compiled}")
        put_hook(inner, "map_output")
        if phase.moved:
            put_hook(inner, "map_loss")
            scaled = "" if stage.accumulate == 1 else " scaled by the batch's share of the window"
            put(inner, f"loss.backward(){scaled}" if scaler is None else f"scaler.scale(loss).backward(){scaled}")
            put_hook(inner, "on_backward_end")
        if phase.meters is not None:
            put(inner, f"update metrics: {', '.join(run.task.configure_metrics())}")
        if scaler is not None and phase.moved:
            put(depth, "scaler.unscale_() the gradients")
        if phase.clip_norm is not None:
            put(depth, f"clip the gradients to a norm of {phase.clip_norm:g}")
        put_hook(depth, "on_grads_ready")
        if phase.moved and not phase.closure:
            if run.nonfinite is not None:
                put(depth, f"if the loss{' or a gradient' if scaler is None else ''} is not finite: {run.nonfinite}")
            if scaler is not None:
                put(depth, "if a gradient is not finite: drop the step")
            for optimizer in phase.moved:
                put(depth, f"{type(optimizer).__name__}.step()")
    if scaler is not None:
        put(3, "scaler.update()")


def _validation(stage: Stage, depth: int, put: Any, put_hook: Any) -> None:
    put(depth, f"{_when(stage.validate_every)}: validate, with random generators and train/eval flags put back:")
    put_hook(depth + 1, "on_validation_start")
    for name in stage.valid:
        put_hook(depth + 1, "on_loader_start")
        put(depth + 1, f"for each batch of valid{f' {name!r}' if name else ''}: validation_step(batch), update metrics")
        put_hook(depth + 2, "on_eval_batch_start")
        put_hook(depth + 2, "on_eval_batch_end")
        put_hook(depth + 1, "on_loader_end")
    put_hook(depth + 1, "on_validation_end")


def _saving(run: Run, depth: int, put: Any, put_hook: Any) -> None:
    for saver in run.savers:
        put(depth, f"when due (also after validations and epochs): {type(saver).__name__}.save(run)")
        put_hook(depth + 1, "on_checkpoint")


def _when(every: Every) -> str:
    """An interval in words."""
    return " | ".join(part if part.startswith("at ") else f"every {part}" for part in str(every).split(" | "))


def _names(objects: list[Any]) -> str:
    return ", ".join(type(obj).__name__ for obj in objects)


# ---------------------------------------------------------------------------------------------------- who writes what


def writers(run: Run, name: str) -> str:
    """Who writes ``name`` in this very run, in the order in which they do it, and who is given it to read.

    ``name`` is "batch", "output", "loss", "gradients", "weights" or "lr". Raises SettingError for another one.
    """
    if name not in _WRITERS:
        raise SettingError(f"explain(of={name!r}): nothing here is called so. {choose(name, _WRITERS)}")
    lines: list[str] = []
    readers: dict[str, None] = {}  # in order, each once
    for stage in run.stages:
        _open(run, stage)
        readers |= dict.fromkeys(_readers(run, stage, name))
        for phase in stage.phases:
            several = len(run.stages) > 1 or len(stage.phases) > 1
            head = f" in stage {stage.name!r}, phase {phase.name!r}" if several else ""
            found = [*_WRITERS[name](run, stage, phase)] or ["nobody"]
            numbered = (f"  {number}. {one}" for number, one in enumerate(found, 1))
            lines += [f"{name}{head}, in this order:", *numbered]
    return "\n".join([*lines, *(["and passed to:"] if readers else []), *(f"  - {one}" for one in readers)])


def _readers(run: Run, stage: Stage, name: str) -> Iterator[str]:
    """Callbacks and handlers that are given ``name`` in training, to look at it; those of a stage with its name."""
    at, own = Hooks.passed_to(name), {id(callback) for callback in stage.callbacks if len(run.stages) > 1}
    for hook in (hook for hook in at if hook not in _OF_OTHERS and hook != f"map_{name}"):
        for function in getattr(run.hooks, hook):
            if (owner := getattr(function, "__self__", None)) is not None:
                yield hook_name(function, run) + (f", in stage {stage.name!r}" if id(owner) in own else "")
        for handler in run.handlers:
            if any(asked == name for _, asked in handler.passed.get(hook, ())):
                yield f"{handler.name}, at {handler.event}"


_OF_OTHERS = ("on_eval_batch_start", "on_eval_batch_end", "on_predict_batch_start", "on_predict_batch_end")


def _hooks(run: Run, hook: str) -> Iterator[str]:
    for function in getattr(run.hooks, hook):
        name = hook_name(function, run)
        yield name if name.endswith(f".{hook}") else f"{name}, as {hook}"


def _declared(run: Run, stage: Stage, kind: str) -> Iterator[str]:
    """Callbacks that say that they change it; of those of stages, the stage's own."""
    of_stages = {id(c) for other in run.stages for c in other.callbacks} - {id(c) for c in stage.callbacks}
    for callback in (one for one in run.callbacks if id(one) not in of_stages):
        if kind in callback.changes:
            at = ", ".join(hook for hook in HOOKS for f in getattr(run.hooks, hook)
                           if getattr(f, "__self__", None) is callback)  # fmt: skip
            yield f"{type(callback).__qualname__}, which says so (changes = {callback.changes!r}), in {at}"


def _batch(run: Run, stage: Stage, phase: Phase) -> Iterator[str]:
    yield f"{type(stage.source).__name__}, which reads it"
    if run.moves_batches:
        holds = f" as {run.precision.holds}" if run.precision.holds is not None else ""
        yield f"the move to {run.device}{holds}"
    yield from _hooks(run, "map_batch")
    yield from _declared(run, stage, "values")


def _output(run: Run, stage: Stage, phase: Phase) -> Iterator[str]:
    call = getattr(phase.step, "__qualname__", "step")
    yield f"{call}(batch), which returns it{'' if run.compiler is None else ', compiled'}"
    yield from _hooks(run, "map_output")


def _loss(run: Run, stage: Stage, phase: Phase) -> Iterator[str]:
    yield from (text.replace("returns it", "returns it as output['loss']") for text in _output(run, stage, phase))
    if phase.moved:
        yield from _hooks(run, "map_loss")
        if run.precision.scaler is not None:
            yield "the gradient scaler, for the backward only"
        if stage.accumulate > 1:
            yield "the batch's share of the window, for the backward only"


def _gradients(run: Run, stage: Stage, phase: Phase) -> Iterator[str]:
    if not phase.moved:
        return
    yield "the start of the step, which sets them to None"
    yield "loss.backward()" + (" of each batch of the window" if stage.accumulate > 1 else "")
    yield from _declared(run, stage, "gradients")
    if run.precision.scaler is not None:
        yield "scaler.unscale_()"
    if phase.clip_norm is not None:
        yield f"clipping to a norm of {phase.clip_norm:g}"
    if not phase.closure:
        yield from _hooks(run, "on_grads_ready")


def _weights(run: Run, stage: Stage, phase: Phase) -> Iterator[str]:
    yield from (f"{type(optimizer).__name__}.step()" for optimizer in phase.moved)
    yield from _declared(run, stage, "weights")
    restoring = [saver for saver in run.savers if getattr(saver, "restore", None)]
    yield from (f"{type(saver).__name__}(restore={saver.restore!r}), at the end" for saver in restoring)  # type: ignore[attr-defined]


def _rate(run: Run, stage: Stage, phase: Phase) -> Iterator[str]:
    for optimizer in phase.moved:
        rates = ", ".join(dict.fromkeys(f"{group['lr']:g}" for group in optimizer.param_groups))
        yield f"{type(optimizer).__name__}, made with {rates}"
    for scheduler in (*phase.step_schedulers, *phase.epoch_schedulers):
        yield f"{type(scheduler.torch).__name__}.step(), once {'a step' if scheduler.every == 'step' else 'an epoch'}"
    yield from _declared(run, stage, "rates")


_WRITERS: dict[str, Callable[[Run, Stage, Phase], Iterator[str]]] = {
    "batch": _batch, "output": _output, "loss": _loss, "gradients": _gradients, "weights": _weights, "lr": _rate,
}  # fmt: skip
