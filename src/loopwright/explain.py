"""The flat loop of a run, with each callback and handler in its place."""

from __future__ import annotations

from typing import Any

from loopwright.events import hook_name
from loopwright.state import Run, Stage

__all__ = ["explain"]


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
        put(0, f"stage {stage.name!r}: until {' or '.join(map(str, stage.until))}")
        put_hook(1, "on_stage_start")
        put(1, "for each epoch:")
        put_hook(2, "on_epoch_start")
        size = "batch" if stage.accumulate == 1 else f"window of up to {stage.accumulate} batches"
        put(2, f"for each {size} of {type(stage.source).__name__}:")
        put_hook(3, "on_step_start")
        _steps(run, stage, put, put_hook)
        put(3, f"every {run.log_every.duration}: log train/..." + (f" to {_names(run.loggers)}" if run.loggers else ""))
        for phase in stage.phases:
            for scheduler in phase.step_schedulers:
                put(3, f"{type(scheduler.torch).__name__}.step()")
        put_hook(3, "on_step_end")
        every = stage.validate_every.duration
        within = stage.valid and (every.unit != "epochs" or every.is_part)
        if within:
            _validation(stage, 3, put, put_hook)
        _saving(run, 3, put, put_hook)
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


def _steps(run: Run, stage: Stage, put: Any, put_hook: Any) -> None:
    several, scaler = len(stage.phases) > 1, run.precision.scaler
    if several and (run.hooks.on_batch_start or run.hooks.map_batch):
        put(3, "for each batch of the window:")
        put_hook(4, "on_batch_start")
        put_hook(4, "map_batch")
    for phase in stage.phases:
        depth = 3
        if several or phase.every > 1:
            put(3, f"phase {phase.name!r}" + (f", every {phase.every} steps:" if phase.every > 1 else ":"))
            depth = 4
        if phase.moved and not phase.closure:
            put(depth, "set gradients to None")
        inner = depth
        if stage.accumulate > 1:
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
    put(
        depth, f"every {stage.validate_every.duration}: validate, with random generators and train/eval flags put back:"
    )
    put_hook(depth + 1, "on_validation_start")
    for name in stage.valid:
        put(depth + 1, f"for each batch of valid{f' {name!r}' if name else ''}: validation_step(batch), update metrics")
        put_hook(depth + 2, "on_eval_batch_end")
    put_hook(depth + 1, "on_validation_end")


def _saving(run: Run, depth: int, put: Any, put_hook: Any) -> None:
    for saver in run.savers:
        put(depth, f"when due (also after validations and epochs): {type(saver).__name__}.save(run)")
        put_hook(depth + 1, "on_checkpoint")


def _names(objects: list[Any]) -> str:
    return ", ".join(type(obj).__name__ for obj in objects)
