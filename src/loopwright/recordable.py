"""Whether the steps of a run can be recorded as CUDA graphs, and why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loopwright._compat import hooks_on
from loopwright.data import Chunks
from loopwright.events import hook_name
from loopwright.state import Phase, Run, Stage

__all__ = ["HOOKED", "has_hooks", "in_the_way", "obstacles"]

_DEVICE = "cuda"
_INSIDE = ("map_output", "map_loss", "on_backward_end", "on_grads_ready")
HOOKED = (
    "cuda_graphs=True cannot apply where functions of Python hang on gradients or on the steps of an optimizer "
    "(register_hook, register_step_post_hook): a replay does not call them; remove them, or leave cuda_graphs out"
)


def obstacles(run: Run) -> Iterator[str]:
    """Why the steps of ``run`` cannot be recorded, each with what to do."""
    if run.device.type != _DEVICE:
        yield f"cuda_graphs=True needs a CUDA device, and this run is on {run.device}; leave it out"
    if reason := in_the_way(run):
        yield reason
    if any(has_hooks(phase) for stage in run.stages for phase in stage.phases):
        yield HOOKED
    for setting, given, instead in (
        (f"precision={run.precision.name!r}", run.precision.scaler is not None, "precision='bf16' needs no scaler"),
        ("several processes", run.team is not None, "compile=True works there"),
        ("a step that does all the work", not isinstance(run.task, nn.Module), "let fit call the optimizer"),
    ):
        if given:
            yield f"cuda_graphs=True cannot apply to {setting}: {instead}, or leave cuda_graphs out"
    for stage in run.stages:
        yield from _obstacles_in(stage, run.device)


def _obstacles_in(stage: Stage, device: torch.device) -> Iterator[str]:
    for setting, given in (
        ("a loop of its own", stage.loop is not None),
        (f"accumulate={stage.accumulate}", not isinstance(stage.accumulate, int)),
        ("data that is cut by truncate=", isinstance(stage.source, Chunks)),
        ("a phase that does not run in every step", any(phase.every != 1 for phase in stage.phases)),
        ("a phase that moves its optimizers itself", any(not phase.moved for phase in stage.phases)),
        ("an optimizer that calls the step back", any(phase.closure for phase in stage.phases)),
    ):
        if given:
            yield f"cuda_graphs=True cannot apply to stage {stage.name!r}, which has {setting}; leave it out"
    scheduled = {id(one.optimizer) for one in stage.scheduled if "lr" in _keys(one)}
    for phase in stage.phases:
        scheduled |= {id(one.torch.optimizer) for one in phase.step_schedulers}
        for optimizer in phase.moved:
            name, groups = type(optimizer).__name__, optimizer.param_groups
            counts = not isinstance(optimizer, torch.optim.SGD)
            if counts and not all(group.get("capturable") for group in groups):
                yield (
                    f"{name} counts its steps on the host, and cuda_graphs=True replays what it did in one of them; "
                    f"make it with capturable=True, as torch's own can be"
                )
            elif id(optimizer) in scheduled and not all(_follows(group, device, fused=not counts) for group in groups):
                yield (
                    f"the lr of {name} is set before every step, and cuda_graphs=True would keep the first; let it lie "
                    f"on the device: lr=torch.tensor({float(groups[0]['lr']):g}, device='cuda')"
                    f"{'' if counts else ', fused=True'}"
                )
    for one in stage.scheduled:
        for key in sorted(_keys(one) - {"lr"}):
            if not all(isinstance(group.get(key), Tensor) for group in one.optimizer.param_groups):
                yield (
                    f"{key} of {type(one.optimizer).__name__} is set before every step, and is a number that "
                    "cuda_graphs=True would keep; leave that schedule out, or cuda_graphs"
                )


def _keys(scheduled: Any) -> set[str]:
    return {name.partition("/")[0] for name in scheduled.schedules}


def in_the_way(run: Run) -> str | None:
    """Why a hook is in the way of recording; None if there is none in the middle of a step."""
    found = [hook_name(hook, run) for name in _INSIDE for hook in getattr(run.hooks, name)]
    if not found:
        return None
    return (
        f"{' and '.join(found)} would be called in the middle of a step, which cuda_graphs=True runs in one piece; "
        "leave one of them out"
    )


def has_hooks(phase: Phase) -> bool:
    """True where functions of Python hang on gradients or on the steps of optimizers."""
    return any(hooks_on(one) for one in (*phase.moved, *phase.parameters()))


def _follows(group: dict[str, Any], device: torch.device, *, fused: bool) -> bool:
    """True if a recorded step reads the learning rate of ``group`` from the device."""
    lr = group["lr"]
    return isinstance(lr, Tensor) and lr.device.type == device.type and (not fused or bool(group.get("fused")))
