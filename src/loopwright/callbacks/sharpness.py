"""SAM: the gradient where the loss is worst nearby, by a second pass over the window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from loopwright.errors import SettingError, choose
from loopwright.events import Callback, fold
from loopwright.state import Phase, Run
from loopwright.steps import as_output, rescale, zero_grad

__all__ = ["SAM"]


class SAM(Callback):
    """Sharpness-aware minimization: each step is taken with the gradient found ``rho`` uphill of the weights.

    The gradients of the whole window (all batches of an accumulation, all ranks) say which way is up; the weights go
    there, the window is gone through again, and its gradients are what is clipped, checked and stepped from the weights
    as they were. What is logged and measured is of the first pass. Buffers, such as the statistics of batch norm, are
    those of the first pass as well. Forward and backward happen twice, and the window's batches are held in memory.

    ``phases`` names the phases that it is for; by default all. Put it before callbacks that read or edit gradients in
    ``on_grads_ready``: they are to see the second ones. ``result.grad_norm`` is that of the first. With a norm to clip
    to, both gradients are clipped, which does not change the way of the first.

    Reads: batches and gradients. Changes: gradients. Stops: no.
    FSDP, a gradient scaler (``precision="fp16"``), optimizers that call back (LBFGS) and phases that move no optimizer
    are refused before step 0.
    Source: Foret et al. 2021 (arXiv:2010.01412), algorithm 1 with p = 2; for several ranks the gradient of all of them.

    >>> SAM(rho=0.1).rho
    0.1
    """

    changes = ("weights", "random")  # both as if it was written by hand: weights return, dropout draws again

    def __init__(self, rho: float = 0.05, *, phases: str | Sequence[str] | None = None) -> None:
        if not rho > 0:
            raise SettingError(f"SAM(rho={rho!r}): expected a positive number, such as 0.05")
        self.rho, self.phases = rho, phases
        self._names = [phases] if isinstance(phases, str) else phases
        self._window: list[Any] = []

    def problems(self, run: Run) -> Iterator[str]:
        if run.team is not None and run.team.fills:
            what, instead = "sync_batch_norm=True", "leave one of the two out"
            if run.team.shards:
                what, instead = "FSDP", "train with strategy='ddp'"
            yield f"SAM cannot go over the window again with {what}; {instead}"
        if getattr(run.task, "truncate", None) is not None:
            yield (
                f"SAM would go over a piece of a sequence again with what its first pass has carried on "
                f"(truncate={run.task.truncate}); leave one of the two out"
            )
        if run.precision.scaler is not None:
            yield (
                f"SAM needs gradients twice a step, and a gradient scaler (precision={run.precision.name!r}) takes out "
                "its scale once; train with precision='bf16', which needs no scaler"
            )
        phases = {phase.name: phase for stage in run.stages for phase in stage.phases}
        for name in phases if self._names is None else self._names:
            if name not in phases:
                yield f"SAM(phases={name!r}): {choose(name, phases)}"
            elif not phases[name].moved:
                yield f"SAM cannot apply to phase {name!r}, whose step moves its optimizers itself; do it in that step"
        yield from self._met(run, phases)

    def _met(self, run: Run, phases: Iterable[str]) -> Iterator[str]:
        """Another one before it that looks uphill for the same phase: neither has a meaning then."""
        own = [{id(c) for c in stage.callbacks} for stage in run.stages]
        for other in run.callbacks[: next(i for i, c in enumerate(run.callbacks) if c is self)]:
            if not isinstance(other, SAM):
                continue
            apart = not any({id(self), id(other)} <= ids for ids in own)
            if apart and all(any(id(c) in ids for ids in own) for c in (self, other)):
                continue  # each in stages of its own
            both = [name for name in phases if all(c._names is None or name in c._names for c in (self, other))]
            if both:
                yield (
                    f"two SAM go uphill for the phase {both[0]!r}, and what the first has found is lost in the second; "
                    "leave one out, or say which phases each is for: lw.SAM(phases=...)"
                )

    def on_step_start(self, run: Run) -> None:
        self._window.clear()  # a step that was dropped may have left some

    def on_backward_end(self, run: Run, loss: Tensor, output: Any, batch: Any, phase: Phase) -> None:
        if self._names is None or phase.name in self._names:
            self._window.append(batch)

    def on_grads_ready(self, run: Run, phase: Phase, grad_norm: Tensor | None) -> None:
        if self._names is not None and phase.name not in self._names:
            return
        batches = self._window.copy()
        self._window.clear()
        with uphill(run, phase, self.rho):
            for optimizer in phase.moved:
                zero_grad(optimizer)
            _backward(run, phase, batches)
        if phase.clip_norm is not None:
            clip_grad_norm_(phase.parameters(), phase.clip_norm)


@contextmanager
def uphill(run: Run, phase: Phase, rho: float) -> Iterator[None]:
    """The parameters of ``phase`` are ``rho`` further along their gradients in here; they and all buffers return."""
    moved = [p for p in phase.parameters() if p.grad is not None]
    buffers = [b for model in run.models.values() for b in model.buffers()]
    kept = [*moved, *buffers]
    with torch.no_grad():
        before = [tensor.detach().clone() for tensor in kept]
        grads = [p.grad for p in moved]
        scale = rho / (get_total_norm(grads) + 1e-12)  # type: ignore[arg-type]
        torch._foreach_add_(moved, torch._foreach_mul(grads, scale))  # type: ignore[arg-type]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)


def _backward(run: Run, phase: Phase, batches: list[Any]) -> None:
    """Gradients of a window once more, with the weights, hooks and ranks of the first time."""
    team, stage, hooks = run.team, run.stage, run.hooks
    assert stage is not None
    planned, ranks, seen = run.open_step[0], 1 if team is None else team.comm.world_size, 0.0
    total = (sum(planned) or None) if planned is not None and (ranks > 1 or len(planned) > 1) else None
    for batch in batches if team is None else team.marked(run, batches, phase):
        weight = stage.weight(batch)
        with run.precision.autocast(run.device):
            output = as_output(phase.step(batch), phase)
        if hooks.map_output:
            output = fold(hooks.map_output, run, output, batch, phase)
        loss = output["loss"]
        if hooks.map_loss:
            loss = fold(hooks.map_loss, run, loss, output, batch, phase)
        loss = loss.reshape(())
        loss.backward(None if total is None else loss.new_full((), weight * ranks / total))
        seen += weight
    if team is not None:
        seen, _, _ = team.join(run, phase, seen, False, False)
    if total is not None and seen != total:
        rescale(phase, total / seen)
