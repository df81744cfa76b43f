"""Training steps as CUDA graphs: all that a step does on the device is recorded once, and replayed for each batch.

What is recorded is ``loop.train_step`` itself, with one batch or window of fixed tensors; a replay copies the next one
into them. Python runs while it is recorded and not when it is replayed, so that all that a step reads of Python's
numbers is compared before every step: where it is another one, the step is recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loopwright import rng
from loopwright.data import Chunks
from loopwright.data.batch import with_tensors
from loopwright.data.generators import OF_MODULES
from loopwright.errors import SettingError
from loopwright.events import fire, hook_name
from loopwright.loop import train_step
from loopwright.state import Phase, Run, Stage, StepResult
from loopwright.steps import nonfinite, prepared
from loopwright.written import warn

__all__ = ["StepGraphs", "obstacles"]

_DEVICE = "cuda"
_WARM_UP = 3  # steps of one kind before it is recorded: libraries choose their kernels, optimizers make their state
_KINDS = 8  # of windows that are recorded, as many as torch keeps compiled forms of one function
_SHORT = 16  # lists that are compared by what is in them, such as betas; longer ones by their length
_UNSTEADY = 12  # steps in a row before each of which something is new
_INSIDE = ("map_output", "map_loss", "on_backward_end", "on_grads_ready")
_PLAIN = (bool, int, float, complex, str, type(None))


def obstacles(run: Run) -> Iterator[str]:
    """Why the steps of ``run`` cannot be recorded, each with what to do."""
    if run.device.type != _DEVICE:
        yield f"cuda_graphs=True needs a CUDA device, and this run is on {run.device}; leave it out"
    for hook in (hook for name in _INSIDE for hook in getattr(run.hooks, name)):
        yield (
            f"{hook_name(hook, run)} is called in the middle of a step, which cuda_graphs=True runs in one "
            "piece; leave one of them out"
        )
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
        ("an optimizer or a parameter with hooks", any(map(_has_hooks, stage.phases))),
    ):
        if given:
            yield f"cuda_graphs=True cannot apply to stage {stage.name!r}, which has {setting}; leave it out"
    scheduled = {id(one.optimizer) for one in stage.scheduled}
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


def _has_hooks(phase: Phase) -> bool:
    """True where functions of Python hang on gradients or on the steps of optimizers."""
    stepped = (one._optimizer_step_pre_hooks or one._optimizer_step_post_hooks for one in phase.moved)
    return any(stepped) or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in phase.parameters())


def _follows(group: dict[str, Any], device: torch.device, *, fused: bool) -> bool:
    """True if a recorded step reads the learning rate of ``group`` from the device."""
    lr = group["lr"]
    return isinstance(lr, Tensor) and lr.device.type == device.type and (not fused or bool(group.get("fused")))


# ------------------------------------------------------------------------------------------- what is recorded with


class Recorder(Protocol):
    """Records what is done on a device, in pieces."""

    def aside(self) -> AbstractContextManager[Any]:
        """Steps that are done before one is recorded."""

    def begin(self) -> None:
        """Record from here on, instead of doing it."""

    def end(self) -> Callable[[], None]:
        """End the piece; what replays it."""


class CudaRecorder:
    """Pieces are CUDA graphs, of one stream and with one pool of memory.

    The pool may be one: what a later recording takes of it was free when an earlier one ended, and what outlives a
    replay (gradients, losses) is held by its recording.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._open: tuple[torch.cuda.CUDAGraph, Any] | None = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        # by what torch says of CUDA graphs: libraries and autograd must have met the stream that is recorded
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def begin(self) -> None:
        graph, self._before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.stream.device)
        # loaders pin memory in threads of their own, which must not spoil it
        context = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        context.__enter__()
        self._open = graph, context

    def end(self) -> Callable[[], None]:
        assert self._open is not None
        (graph, context), self._open = self._open, None
        try:
            context.__exit__(None, None, None)
        except BaseException:  # torch leaves its stream as the current one
            torch.cuda.set_stream(self._before)
            raise
        replay: Callable[[], None] = graph.replay
        return replay


# ------------------------------------------------------------------------------------------------- a recording


@dataclass(slots=True)
class _Check:
    """Between two pieces: are loss and gradients of a phase finite?"""

    phase: Phase
    norm: Tensor | None
    names: frozenset[str]  # of the values that there are by then


@dataclass(slots=True)
class _Recording:
    """A step for one kind of window: what it reads, its pieces, and what it leaves behind."""

    inputs: list[Tensor]
    standing: list[Any]
    pieces: list[Callable[[], None]] = field(default_factory=list)
    checks: list[_Check] = field(default_factory=list)
    outputs: list[tuple[Phase, int, Any]] = field(default_factory=list)
    grads: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    result: StepResult | None = None

    def play(self, run: Run, batches: list[Any], weight: float) -> StepResult | None:
        """The next step, of ``batches``; None where it was dropped."""
        assert self.result is not None
        for held, new in zip(self.inputs, _tensors(batches), strict=True):
            held.copy_(new, non_blocking=True)
        for parameter, grad in self.grads:
            parameter.grad = grad
        moved, names = self.result.moved, frozenset(self.result.values)
        for i, piece in enumerate(self.pieces):
            piece()
            if i < len(self.checks) and self._is_bad(run, self.checks[i]):
                moved = tuple(check.phase.name for check in self.checks[:i])
                names = self.checks[i - 1].names if i else frozenset()
                break
        if not moved:
            return None
        for phase, i, output in self.outputs:
            if phase.meters is not None and phase.name in moved:
                phase.meters.feed(_copied(output), batches[i])
        values = {name: _copied(value) for name, value in self.result.values.items() if name in names}
        output = _copied(self.result.output) if run.hooks.on_step_end else None
        return StepResult(values, output, weight, _copied(self.result.grad_norm), moved)

    def _is_bad(self, run: Run, check: _Check) -> bool:
        assert self.result is not None
        loss = self.result.values.get(check.phase.prefix + "loss")
        return nonfinite(run, check.phase, loss, check.norm)


class StepGraphs:
    """In the place of ``loop.train_step``: does the first steps of each kind by it, then records and replays it.

    A kind is all of a window but the numbers in its tensors. ``recorded`` counts the recordings. Raises SettingError
    for a step that cannot be recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.recorded = device, 0
        self._recorder: Recorder | None = None  # made at the first step: until then a device is not touched
        self._recordings: dict[Any, _Recording] = {}
        self._seen: dict[Any, int] = {}
        self._before: list[Any] = []
        self._unsteady = 0
        self._told = False

    def __call__(self, run: Run, stage: Stage, window: Iterable[Any], planned: list[float] | None) -> StepResult | None:
        """One optimizer step, as ``loop.train_step`` makes it."""
        run.window, run.open_step = window, (planned, {})
        for scheduled in stage.scheduled:
            scheduled.set(stage.whole.fraction(run.progress, run.stage_start))
        fire(run.hooks.on_step_start, run)
        batches = list(prepared(run, window))
        with _done_before(run, stage):
            if len(batches) < len(planned or (1,)) or any(getattr(run.hooks, name) for name in _INSIDE):
                return train_step(run, stage, batches, planned)  # batches were left out, or SIGTERM has come
            weights = [stage.weight(batch) for batch in batches]
            kind = stage.name, _form(batches), repr((planned, planned and weights))
            standing = _standing(run, stage)
            recording = self._recordings.get(kind)
            if recording is not None and recording.standing != standing:
                recording = None
                self._recordings.clear()  # what one of them has built in, the others have as well
                self._seen.clear()
            if recording is None and not self._is_ready(run, stage, kind, standing):
                with self._device().aside():
                    return train_step(run, stage, batches, planned)
            if recording is None:
                recording = self._record(run, stage, batches, planned, weights, standing)
                if recording is None:
                    return None
                self._recordings[kind] = recording
            return recording.play(run, batches, float(sum(weights)))

    def _device(self) -> Recorder:
        if self._recorder is None:
            self._recorder = CudaRecorder(self.device)
        return self._recorder

    def _is_ready(self, run: Run, stage: Stage, kind: Any, standing: list[Any]) -> bool:
        """True if a step of this kind is to be recorded now; notes that one more is done without."""
        if standing != self._before:
            self._unsteady += 1
            if self._unsteady > _UNSTEADY:
                raise SettingError(
                    f"cuda_graphs=True: before each of {_UNSTEADY} steps {_changed(self._before, run, stage)} was "
                    "another, and a replayed step has built in what it was. Keep it in a tensor that is changed in "
                    "place, such as a buffer, or leave cuda_graphs=True out"
                )
            self._before = standing
            self._seen.clear()
        else:
            self._unsteady = 0
        if len(self._recordings) >= _KINDS:
            if not self._told:
                self._told = True
                warn(
                    f"cuda_graphs=True: {_KINDS} kinds of windows are recorded, and there are more; their steps are "
                    "done without. Batches of one shape (padded to a few lengths, drop_last=True) need few recordings"
                )
            return False
        self._seen[kind] = self._seen.get(kind, 0) + 1
        return self._seen[kind] > _WARM_UP

    def _record(
        self, run: Run, stage: Stage, batches: list[Any], planned: list[float] | None, weights: list[float],
        standing: list[Any],
    ) -> _Recording | None:  # fmt: skip
        """Record a step, of which nothing is done yet; None if it drops itself."""
        held, device, before = with_tensors(batches, Tensor.clone), self._device(), _drawn()
        recording, known = _Recording(_tensors(held), standing), cycle(weights)

        def keep(run: Run, output: dict[str, Any], batch: Any, phase: Phase) -> dict[str, Any]:
            recording.outputs.append((phase, len(recording.outputs) % len(weights), output))
            return output

        def cut(run: Run, phase: Phase, norm: Tensor | None) -> None:
            recording.checks.append(_Check(phase, norm, frozenset(run.open_step[1])))
            recording.pieces.append(device.end())
            device.begin()

        checks = (cut,) if run.nonfinite is not None else ()
        with ExitStack() as changed:
            changed.enter_context(_set(run.hooks, map_output=(keep,), on_grads_ready=checks))
            changed.enter_context(_set(run, nonfinite=None))  # it reads the device: between two pieces
            changed.enter_context(_set(stage, weight=lambda batch: next(known)))  # as counting tokens may
            for phase in stage.phases:
                changed.enter_context(_set(phase, meters=None))
            device.begin()
            try:
                recording.result = train_step(run, stage, held, planned)
                recording.pieces.append(device.end())
            except BaseException as error:
                with suppress(RuntimeError):  # what has failed cannot be ended in order
                    device.end()
                if not isinstance(error, (RuntimeError, ValueError, AssertionError)):
                    raise
                raise SettingError(
                    f"cuda_graphs=True: the step cannot be recorded: {str(error).partition(chr(10))[0]}. What is "
                    "recorded reads nothing from the device (.item(), print, if loss > 1, x[mask]): take that out of "
                    "the step, or leave cuda_graphs out"
                ) from error
        if recording.result is None:
            return None
        if drawn := [name for name, state in _drawn().items() if not rng.same(state, before[name])]:
            raise SettingError(
                f"cuda_graphs=True: the step draws random numbers of {' and '.join(drawn)} on the host, and a replay "
                "does not; draw them on the device, such as torch.rand((), device=x.device), or leave cuda_graphs out"
            )
        recording.grads = [(p, p.grad) for phase in stage.phases for p in phase.parameters() if p.grad is not None]
        recording.outputs = [(*at, with_tensors(output, Tensor.detach)) for *at, output in recording.outputs]
        recording.result.output = with_tensors(recording.result.output, Tensor.detach)
        self.recorded += 1
        return recording


# ------------------------------------------------------------------------------------- what a recording has built in


def _form(value: Any) -> Any:
    """All of a batch but the numbers in its tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, _PLAIN):
        return type(value), value
    if type(value) is dict:
        return dict, *((key, _form(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *map(_form, value)
    raise SettingError(
        f"cuda_graphs=True: a batch holds a {type(value).__qualname__}, and each batch is copied into one that was "
        "recorded: give tensors, numbers and texts in tuples, lists or dicts (map_batch can make them)"
    )


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def take(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with_tensors(value, take)
    return found


def _standing(run: Run, stage: Stage, names: list[str] | None = None) -> list[Any]:
    """What a step finds beside its window: where tensors lie, which are trained, and plain numbers."""
    found: list[Any] = []
    task: Any = run.task
    told = partial(_told, device=run.device.type)
    for path, module in task.named_modules() if names is not None else (("", one) for one in task.modules()):
        at = len(found)
        found += (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        labels = ["train or eval mode", "forward hooks", "forward hooks"]
        for kept in (module._parameters, module._buffers):
            for name, value in kept.items():
                found.append(told(value))
                labels.append(name)
        for name, value in vars(module).items():
            if name not in OF_MODULES:
                found.append(told(value))
                labels.append(name)
        if names is not None:
            where = f"{type(module).__name__} {path!r}" if path else type(module).__name__
            names += [f"{label} of {where}" for label in labels[: len(found) - at]]
    for phase in stage.phases:
        for optimizer in phase.moved:
            kind = type(optimizer).__name__
            for group in optimizer.param_groups:
                for name, value in group.items():
                    if name != "params":
                        found.append(told(value))
                        _add(names, f"{name} of {kind}")
                for parameter in group["params"]:
                    state = optimizer.state.get(parameter, {})
                    found.append((told(parameter), *map(told, state.values())))
                    _add(names, f"the state of {kind}")
    return found


def _add(names: list[str] | None, name: str) -> None:
    if names is not None:
        names.append(name)


def _told(value: Any, device: str) -> Any:
    """A number by itself, a tensor by where it lies, a short list by what is in it, anything else by what it is."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):  # what the host can read, a recorded step may have read
        return value.data_ptr(), value.requires_grad, None if value.device.type == device else value.tolist()
    if type(value) in (tuple, list) and len(value) <= _SHORT:
        return tuple(_told(one, device) for one in value)
    return id(value), len(value) if isinstance(value, (list, dict, set)) else None


def _changed(before: list[Any], run: Run, stage: Stage) -> str:
    """The first name whose value is not what it was."""
    names: list[str] = []
    now = _standing(run, stage, names)
    if len(now) != len(before):
        return "what hangs on the task"
    return next((name for name, a, b in zip(names, before, now, strict=True) if a != b), "something")


def _drawn() -> dict[str, Any]:
    """The states of the generators that a replay does not draw from."""
    return {name: read() for name, read in rng.READ.items()}


# ------------------------------------------------------------------------------------------------------- small things


@contextmanager
def _set(target: Any, **values: Any) -> Iterator[None]:
    """``target`` with other values of some attributes."""
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@contextmanager
def _done_before(run: Run, stage: Stage) -> Iterator[None]:
    """Within, a step finds its batches ready: schedules, hooks before it and moves are done."""
    hooks = {"on_step_start": (), "on_batch_start": (), "map_batch": ()}
    with _set(run.hooks, **hooks), _set(run, moves_batches=False), _set(stage, scheduled=()):
        yield


def _copied(value: Any) -> Any:
    """A copy that the next replay leaves alone."""
    return with_tensors(value, lambda tensor: tensor.detach().clone())
