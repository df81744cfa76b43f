"""Training steps as CUDA graphs: all that a step does on the device is recorded once, and replayed for each batch.

What is recorded is ``loop.train_step`` itself, with one batch or window of fixed tensors; a replay copies the next one
into them. Python runs while it is recorded and not when it is replayed, so that all that a step reads of Python's
numbers is compared before every step: where it is another one, the step is recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loopwright import rng
from loopwright.data.batch import tensors_in, with_tensors
from loopwright.data.generators import streams_of
from loopwright.errors import SettingError, StopEpoch
from loopwright.events import fire
from loopwright.loop import held, train_step
from loopwright.out_of_memory import is_out_of_memory
from loopwright.recordable import HOOKED, has_hooks, in_the_way
from loopwright.state import Phase, Run, Stage, StepResult
from loopwright.steps import nonfinite, prepared
from loopwright.unchanged import Unchanged
from loopwright.written import warn

__all__ = ["StepGraphs"]

_WARM_UP = 3  # steps of one kind before it is recorded: libraries choose their kernels, optimizers make their state
_KINDS = 8  # of windows that are recorded, as many as torch keeps compiled forms of one function
_UNSTEADY = 12  # steps in a row before each of which something is new
_PLAIN = (bool, int, float, complex, str, type(None))


_STEERS = (
    "cuda_graphs=True: the step raised SkipStep or StopEpoch, which a replay cannot; raise them in on_batch_start, or "
    "leave cuda_graphs out"
)


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
        try:
            context.__enter__()
        except BaseException:
            torch.cuda.set_stream(self._before)
            raise
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
    """Between two pieces: are loss and gradients of a phase finite? What there is of the step by then."""

    phase: Phase
    norm: Tensor | None
    grads: list[tuple[Tensor, Tensor | None]]
    values: dict[str, Any]


@dataclass(slots=True)
class _Recording:
    """A step for one kind of window: what it reads, its pieces, and what it leaves behind."""

    inputs: list[Tensor]
    pieces: list[Callable[[], None]] = field(default_factory=list)
    checks: list[_Check] = field(default_factory=list)
    outputs: list[tuple[Phase, int, Any]] = field(default_factory=list)
    grads: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    result: StepResult | None = None

    def play(self, run: Run, batches: list[Any], weight: float) -> StepResult | None:
        """The next step, of ``batches``; None where it was dropped."""
        assert self.result is not None
        for mine, new in zip(self.inputs, tensors_in(batches), strict=True):
            mine.copy_(new, non_blocking=True)
        run.open_step[1].update(self.result.values)  # for who looks at a step that fails
        values, output, norm, moved = self.result.values, self.result.output, self.result.grad_norm, self.result.moved
        for i, piece in enumerate(self.pieces):
            piece()
            if i < len(self.checks) and self._is_bad(run, self.checks[i]):
                stopped = self.checks[i]
                moved, norm = moved[:i], stopped.norm
                output = [found for phase, _, found in self.outputs if phase is stopped.phase][-1]
                values = self.checks[i - 1].values if i else {}
                break
        for parameter, grad in self.grads:
            parameter.grad = grad
        if not moved:
            return None
        for phase, i, found in self.outputs:
            if phase.meters is not None and phase.name in moved:
                phase.meters.feed(_copied(found), batches[i])
        values = {name: _copied(value) for name, value in values.items()}
        output = _copied(output) if run.hooks.on_step_end else None
        return StepResult(values, output, weight, _copied(norm), moved)

    def _is_bad(self, run: Run, check: _Check) -> bool:
        for parameter, grad in check.grads:
            parameter.grad = grad
        norm = check.norm if check.phase.clip_norm else None
        return nonfinite(run, check.phase, check.values.get(check.phase.prefix + "loss"), norm)


class StepGraphs:
    """In the place of ``loop.train_step``: does the first steps of each kind by it, then records and replays it.

    A kind is all of a window but the numbers in its tensors. ``recorded`` counts the recordings. Raises SettingError
    for a step that cannot be recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.recorded = device, 0
        self._recorder: Recorder | None = None  # made when it is needed: until then a device is not touched
        self._recordings: dict[Any, _Recording] = {}
        self._seen: dict[Any, int] = {}
        self._standing: Unchanged | None = None
        self._stage: Any = None
        self._unsteady = 0
        self._told: set[str] = set()

    def __call__(self, run: Run, stage: Stage, window: Iterable[Any], planned: list[float] | None) -> StepResult | None:
        """One optimizer step, as ``loop.train_step`` makes it."""
        run.window, run.open_step = window, (planned, {})
        for scheduled in stage.scheduled:
            scheduled.set(stage.whole.fraction(run.progress, run.stage_start))
        fire(run.hooks.on_step_start, run)
        batches, ends = held(prepared(run, window))
        with _done_before(run, stage):
            if ends:
                return self._end(run, stage, batches, planned)
            if self._standing is None and (reason := in_the_way(run)):
                raise SettingError(reason)
            self._look(run, stage)
            if len(batches) < len(planned or (1,)) or in_the_way(run):  # batches were left out, or SIGTERM has come
                return self._eager(run, stage, batches, planned)
            weights = [stage.weight(batch) for batch in batches]
            kind = _form(batches, run.device.type), repr((planned, planned and weights))
            recording = self._recordings.get(kind)
            if recording is None and not self._is_ready(kind):
                result = self._eager(run, stage, batches, planned)
                if result is not None and len(result.moved) == len(stage.phases):  # else it has made nothing ready
                    self._seen[kind] = self._seen.get(kind, 0) + 1
                return result
            if recording is None:
                recording = self._recordings[kind] = self._record(run, stage, batches, planned, weights)
            return recording.play(run, batches, float(sum(weights)))

    def _eager(self, run: Run, stage: Stage, batches: list[Any], planned: list[float] | None) -> StepResult | None:
        with self._device().aside():
            return train_step(run, stage, batches, planned)

    def _end(self, run: Run, stage: Stage, batches: list[Any], planned: list[float] | None) -> StepResult:
        """A hook has ended the epoch within the window: what came before is stepped."""
        result = self._eager(run, stage, batches, planned) if batches else None
        if result is None:
            raise StopEpoch
        result.ends_epoch = True
        return result

    def _device(self) -> Recorder:
        if self._recorder is None:
            self._recorder = CudaRecorder(self.device)
        return self._recorder

    def _look(self, run: Run, stage: Stage) -> None:
        """Forget what is recorded if anything that Python reads in a step is not what it was."""
        now = [(phase, phase.step, phase.clip_norm, phase.moved) for phase in stage.phases]
        what = "" if self._standing is None else "a phase" if now != self._stage else self._standing.changed()
        if what is None:
            self._unsteady = 0
            return
        assert isinstance(run.task, nn.Module)
        self._stage = now
        self._standing = Unchanged(run.task, (one for phase in stage.phases for one in phase.moved), run.device)
        self._seen.clear()
        if self._recordings:
            self._recordings.clear()
            self._recorder = None  # with its memory, of which something may still be held
        self._unsteady += 1
        of_group = " of a group of " in what
        if self._unsteady > _UNSTEADY and not of_group:
            raise SettingError(
                f"cuda_graphs=True: before each of {_UNSTEADY} steps {what} was another, and a replayed step has "
                "built in what it was. Keep it in a tensor that is changed in place, such as a buffer, or leave "
                "cuda_graphs out"
            )
        if self._unsteady > _UNSTEADY or self.recorded > 4 * _KINDS:
            self._tell(f"{what} changes so often that few steps are replayed")

    def _is_ready(self, kind: Any) -> bool:
        """True if a step of this kind is to be recorded now."""
        if len(self._recordings) >= _KINDS or len(self._seen) > 8 * _KINDS:
            self._tell(
                f"more than {_KINDS} kinds of windows have come, and those beyond are not recorded. Batches of one "
                "shape (padded to a few lengths, drop_last=True), without texts and with equal weights, need few"
            )
            return False
        return self._seen.get(kind, 0) >= _WARM_UP

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warn(f"cuda_graphs=True: {what}")

    def _record(
        self, run: Run, stage: Stage, batches: list[Any], planned: list[float] | None, weights: list[float]
    ) -> _Recording:
        """Record a step, of which nothing is done yet."""
        if any(map(has_hooks, stage.phases)):
            raise SettingError(HOOKED)
        fixed, device, before = with_tensors(batches, Tensor.clone), self._device(), _drawn(run)
        recording, known = _Recording(list(tensors_in(fixed))), cycle(weights)

        def keep(run: Run, output: dict[str, Any], batch: Any, phase: Phase) -> dict[str, Any]:
            recording.outputs.append((phase, len(recording.outputs) % len(weights), output))
            return output

        def cut(run: Run, phase: Phase, norm: Tensor | None) -> None:
            grads = [(p, p.grad) for p in phase.parameters()]
            norm = recording.checks[-1].norm if norm is None and recording.checks else norm
            recording.checks.append(_Check(phase, norm, grads, dict(run.open_step[1])))
            recording.pieces.append(device.end())
            device.begin()

        checks = (cut,) if run.nonfinite is not None else ()
        with ExitStack() as changed:
            changed.enter_context(_set(run.hooks, map_output=(keep,), on_grads_ready=checks))
            # the check reads the device, between two pieces; what a SIGTERM adds would read it as well
            changed.enter_context(_set(run, nonfinite=None, at_sigterm=()))
            changed.enter_context(_set(stage, weight=lambda batch: next(known)))  # counting tokens may read it
            for phase in stage.phases:
                changed.enter_context(_set(phase, meters=None))
            device.begin()
            try:
                recording.result = train_step(run, stage, fixed, planned)
                recording.pieces.append(device.end())
            except BaseException as error:
                with suppress(RuntimeError, AssertionError):  # what has failed cannot be ended in order
                    device.end()
                if isinstance(error, StopEpoch):
                    raise SettingError(_STEERS) from error
                if is_out_of_memory(error) or not isinstance(error, (RuntimeError, ValueError, AssertionError)):
                    raise
                raise SettingError(
                    f"cuda_graphs=True: the step cannot be recorded: {str(error).partition(chr(10))[0]}. What is "
                    "recorded reads nothing from the device (.item(), print, if loss > 1, x[mask]) and copies nothing "
                    "to it (torch.tensor(1.0, device=...)), and no output of the model may be held from before; "
                    "change that, or leave cuda_graphs out"
                ) from error
        self._check(run, recording, before)
        assert isinstance(run.task, nn.Module)
        assert recording.result is not None
        recording.grads = [(p, p.grad) for p in run.task.parameters()]
        recording.outputs = [(*at, _detached(output)) for *at, output in recording.outputs]
        recording.result.output = _detached(recording.result.output)
        self.recorded += 1
        return recording

    def _check(self, run: Run, recording: _Recording, before: dict[str, Any]) -> None:
        """Refuse what has done more in Python than a replay can."""
        now = _drawn(run)
        if drawn := [name for name in now if not rng.same(now[name], before.get(name))]:
            raise SettingError(
                f"cuda_graphs=True: the step draws random numbers of {' and '.join(drawn)} on the host, and a replay "
                "does not; draw them on the device, such as torch.rand((), device=x.device), or leave cuda_graphs out"
            )
        if recording.result is None or recording.result.ends_epoch:
            raise SettingError(_STEERS)
        names: dict[str, set[Any]] = {}
        for phase, _, output in recording.outputs:
            names.setdefault(phase.name, set()).add(tuple(output))
        if any(len(found) > 1 for found in names.values()):
            raise SettingError(
                "cuda_graphs=True: the step returns other names for some batches of a window; return the same for all"
            )


# ------------------------------------------------------------------------------------- what a recording has built in


def _form(value: Any, device: str) -> Any:
    """All of a batch but the numbers in its tensors on the device."""
    if isinstance(value, Tensor) and value.layout is torch.strided:
        content = None if value.device.type == device else tuple(value.flatten().tolist())  # the host may read it
        return value.shape, value.stride(), value.dtype, value.device, content
    if isinstance(value, _PLAIN):
        return type(value), value
    if type(value) is dict:
        return dict, *((key, _form(part, device)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *(_form(part, device) for part in value)
    raise SettingError(
        f"cuda_graphs=True: a batch holds a {type(value).__qualname__}, and each batch is copied into one that was "
        "recorded: give dense tensors, numbers and texts in tuples, lists or dicts (map_batch can make them)"
    )


def _drawn(run: Run) -> dict[str, Any]:
    """The states of the generators that a replay does not draw from: the global ones, and those on modules."""
    states = {name: read() for name, read in rng.READ.items()}
    return states | streams_of({"task": run.task}).get_found()


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


def _detached(value: Any) -> Any:
    return with_tensors(value, Tensor.detach)


def _copied(value: Any) -> Any:
    """A copy that the next replay leaves alone."""
    return with_tensors(value, lambda tensor: tensor.detach().clone())
