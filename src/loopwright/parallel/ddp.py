"""Data parallel: every rank has the whole model, and torch's DistributedDataParallel averages the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from loopwright.errors import SettingError
from loopwright.given import check_flag
from loopwright.state import Phase, Run, Stage

__all__ = ["DDP"]

_NOTHING = object()  # the batch of a rank that has none


class DDP:
    """Strategy: the whole model on every rank, its gradients averaged while ``backward`` goes on.

    Each phase has a DistributedDataParallel of its own, around the phase's step and the parameters that it moves: two
    objectives do not wait for each other's gradients, ``state_dict`` keys stay, and your module is not wrapped. Of an
    accumulation window only the last backward communicates. ``find_unused=True`` allows for steps that do not reach
    all parameters, and costs a walk through the graph at each step; without it such a step is an error that names
    them. ``sync_batch_norm=True``: the batch norms of the models measure the whole batch, and not each rank's part of
    it; your layers are what they were when the fit has ended. A rank that fails, dies, is stopped or is alone in a
    collective ends all of them within ``timeout`` seconds; one that is slow or sleeps is waited for. ``options`` go to
    DistributedDataParallel (``bucket_cap_mb``, ...).

    Raises SettingError for options that Loopwright sets itself.

    >>> DDP(bucket_cap_mb=50).options
    {'bucket_cap_mb': 50}
    """

    name = "ddp"

    def __init__(
        self, *, find_unused: bool = False, sync_batch_norm: bool = False, timeout: float = 30.0, **options: Any
    ) -> None:
        own = {"find_unused_parameters", "module", "device_ids", "output_device", "process_group", "init_sync"}
        taken = sorted(own & options.keys())
        if taken:
            raise SettingError(f"DDP({taken[0]}=...) is set by Loopwright; leave it out (find_unused=True is ours)")
        if not timeout > 0:
            raise SettingError(f"DDP(timeout={timeout!r}); expected a number of seconds above 0")
        check_flag("sync_batch_norm", sync_batch_norm)
        self.find_unused, self.sync_batch_norm = find_unused, sync_batch_norm
        self.timeout, self.options = timeout, options

    def begin_stage(self, run: Run, stage: Stage) -> dict[str, Synced]:
        """Let the phases of ``stage`` synchronise the parameters that train now; each by its name."""
        return {phase.name: self._synced(run, phase) for phase in stage.phases if phase.moved}

    def _synced(self, run: Run, phase: Phase) -> Synced:
        if isinstance(phase.step, Synced):
            phase.step.end()
        step = phase.step
        parameters = {id(p): p for p in phase.parameters() if p.requires_grad}
        lazy = next((name for name, p in _named(run) if id(p) in parameters and is_lazy(p)), None)
        if lazy is not None:
            raise SettingError(
                f"the parameter {lazy} has no shape yet, and gradients are exchanged in buckets of known shapes; call "
                "the model once on a batch before fit"
            )
        if not parameters:
            raise SettingError(f"phase {phase.name!r} has no parameter that requires a gradient in this stage")
        buffers = [b for model in run.models.values() for b in model.buffers() if b.is_floating_point()]
        part = _Part(step, parameters.values(), buffers)
        ddp = DistributedDataParallel(
            part, find_unused_parameters=self.find_unused, init_sync=False, **self.options
        )  # the parameters are those of rank 0 already
        if run.comm.world_size > 2:  # a + b is b + a
            _lay_out(ddp, part)
        names = {id(p): name for name, p in _named(run)}
        known = {} if self.find_unused else {k: names.get(k, "?") for k in parameters}
        phase.step = synced = Synced(phase, run, ddp, known, waits=self.sync_batch_norm)
        return synced


class Synced:
    """A phase's step whose gradients are those of all ranks once ``last`` was set for its last batch."""

    def __init__(
        self, phase: Phase, run: Run, ddp: DistributedDataParallel, names: Mapping[int, str], *, waits: bool
    ) -> None:
        self.phase, self.run, self.step, self.ddp, self.names, self.waits = phase, run, phase.step, ddp, names, waits
        self.own = list(ddp.module.own)  # a ParameterList is slow to go through
        self.moves = _trained(phase)
        self.last = True
        self._at: Any = None  # the step in which it has gone forward
        self._open = False  # its backward has not begun yet
        self.seconds = 0.0  # in forward, unless this rank ``waits`` for others there

    def __call__(self, batch: Any) -> Any:
        began, self._at, self._open = perf_counter(), self.run.open_step, True
        with nullcontext() if self.last else self.ddp.no_sync():
            output = self.ddp(batch)
        if self.run.team.steered and isinstance(loss := _loss(output), Tensor) and loss.requires_grad:
            loss.register_hook(self._close)
        if not self.waits:
            self.seconds += perf_counter() - began
        return output

    @property
    def stale(self) -> bool:
        """True if the phase moves other parameters by now: a group was added, or some were frozen or freed."""
        return _trained(self.phase) != self.moves

    def end(self) -> None:
        """Give the phase its own step back."""
        self.phase.step = self.step

    def idle(self, batch: Any) -> None:
        """Take part in the forward and the backward of the others, and add nothing to the gradients."""
        idle(self.run, self, batch)

    def flush(self) -> None:
        """Exchange what was accumulated although no batch is left; a rank without any contributes zeros."""
        if self._at is self.run.open_step:
            if self.last and not self._open:  # a hook has ended the window after its last backward
                return
            self.ddp.require_forward_param_sync = False  # buffers come with the first forward of a window, on all ranks
        self.last = True
        self.ddp(_NOTHING).backward()

    def _close(self, grad: Tensor) -> None:
        self._open = False

    def check(self) -> None:
        """Raise SettingError if the step did not reach some of the parameters: the others wait for their gradients."""
        if not self.names:
            return
        missed = [self.names[id(p)] for p in self.own if p.grad is None]
        if missed:
            told = ", ".join(missed[:5]) + (", ..." if len(missed) > 5 else "")
            raise SettingError(
                f"{len(missed)} of the parameters that are trained got no gradient in this step: {told}. Leave them "
                "out of the optimizer, freeze them (lw.Stage(freeze=...)), or allow for it: "
                "Trainer(strategy=lw.DDP(find_unused=True))"
            )


class _Part(nn.Module):
    """The step as a module of just the parameters that it trains, and the buffers that follow rank 0."""

    def __init__(self, step: Callable[[Any], Any], parameters: Iterable[Any], buffers: Iterable[Tensor]) -> None:
        super().__init__()
        self.__dict__["_step"] = step  # it may be a module, which is not ours to hold
        self.own = nn.ParameterList(parameters)
        for number, buffer in enumerate(buffers):
            self.register_buffer(str(number), buffer)

    _step: Callable[[Any], Any]

    def forward(self, batch: Any) -> Any:
        if batch is _NOTHING:
            return sum(p.flatten()[:0].sum() for p in self.own)  # with a gradient of zeros, whatever is in p
        return self._step(batch)


def _lay_out(ddp: DistributedDataParallel, part: _Part) -> None:
    """Have the buckets laid out now: DDP does so anew after its first backward, in the order in which gradients came.

    Where a gradient lies in its bucket tells in which order ranks are summed up, if they are more than two. A run
    that goes on from a checkpoint must sum as the one that was not interrupted, whose first backward was long ago.
    """
    kept = [p.grad for p in part.own]
    ddp(_NOTHING).backward()
    for p, grad in zip(part.own, kept, strict=True):
        p.grad = grad


def idle(run: Run, step: Callable[[Any], Any], batch: Any) -> None:
    """Go forward and backward with the other ranks, on a ``batch`` of which nothing counts."""
    with run.precision.autocast(run.device):
        output = step(batch)
    loss = _loss(output)
    loss.backward(torch.zeros_like(loss))


def _loss(output: Any) -> Any:
    return output.get("loss") if isinstance(output, Mapping) else output


def _trained(phase: Phase) -> int:
    return sum(p.requires_grad for p in phase.parameters())


def _named(run: Run) -> list[tuple[str, Tensor]]:
    return [(name, p) for model in run.models.values() for name, p in model.named_parameters()]
