"""Where the time of a run goes: data, forward, backward, optimizer, validation, checkpoints, each callback's hooks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from loopwright._compat import at_end_of_backward
from loopwright.errors import SettingError
from loopwright.events import Callback, hook_name
from loopwright.state import Phase, Run

__all__ = ["Profiler"]

# what the time before a hook was spent on; with "rest" for those that are not named
_BEFORE = {
    "on_step_start": "data",
    "on_batch_start": "move",
    "on_backward_end": "metrics",
    "on_grads_ready": "clip and check",
    "on_step_end": "record",
    "on_validation_start": "validation",
    "on_eval_batch_start": "validation",
    "on_eval_batch_end": "validation",
    "on_loader_end": "validation",
    "on_validation_end": "validation",
    "on_checkpoint": "checkpoint",
    "on_epoch_end": "record",
}
_PARTS = {
    "data": "waiting for batches, between two steps or inside of a window",
    "move": "batches to the device, gradients set to None",
    "forward": "the step of a phase, its loss included",
    "backward": "loss.backward()",
    "metrics": "values and metrics of a batch",
    "clip and check": "unscaling, clipping, the check for values that are not finite",
    "optimizer": "optimizer.step()",
    "record": "counting, records, loggers, schedules",
    "validation": "evaluating the validation data",
    "checkpoint": "saving",
    "rest": "what is left of the loop",
}
_MARKS = ("on_step_start", "on_backward_end", "on_step_end", "on_validation_start", "on_validation_end", "on_epoch_end",
          "on_checkpoint")  # fmt: skip


class Profiler(Callback):
    """A table of where the time goes, printed at the end and kept in the run folder as ``profile.json``.

    Every moment from ``on_fit_start`` to the end is charged to one line: each hook of each callback and handler to its
    own; the others as ``times`` names them. Time is taken where the loop passes from one to the next: by wrapping the
    hooks and steps of this run, and by torch's own hooks at the end of a backward and around ``optimizer.step``, which
    cost some tens of us a step (torch's own profiler range comes back into each optimizer step). No bit changes.

    On CUDA work is queued, so that times are those of queueing it, and of whoever waits first; ``sync=True`` waits
    for the device at each passage, which gives true times and a slower run. ``show=False`` prints nothing.

    ``Trainer(debug=lw.Debug(profile=True))`` is the same as adding it. Reads: the clock. Changes: nothing. Stops: no.

    >>> Profiler(show=False).times
    {}
    """

    def __init__(self, *, sync: bool = False, show: bool = True) -> None:
        for name, value in (("sync", sync), ("show", show)):
            if not isinstance(value, bool):
                raise SettingError(f"Profiler({name}={value!r}): expected True or False")
        self.sync, self.show = sync, show
        self._spent: dict[str, list[float]] = {}
        self._handles: list[Any] = []
        self._phases: list[tuple[Any, tuple[Any, ...]]] = []
        self.steps, self._depth, self._open, self._at = 0, 0, False, 0.0
        self._known: set[str] = set()

    def problems(self, run: Run) -> Iterator[str]:
        if self.sync and run.device.type != "cuda":
            yield f"Profiler(sync=True) has nothing to wait for on {run.device}; leave it out"

    @property
    def times(self) -> dict[str, tuple[float, int]]:
        """Seconds and number of passages by line: "data", "forward", ..., "EarlyStopping.on_validation_end"."""
        return {name: (seconds, int(calls)) for name, (seconds, calls) in self._spent.items() if calls}

    # ---------------------------------------------------------------------------------------------------- the clock

    def _lap(self, name: str) -> None:
        """Charge the time since the last lap to ``name``."""
        if not self._open:
            return
        if self.sync:
            torch.cuda.synchronize()
        now = perf_counter()
        spent = self._spent[name]
        spent[0] += now - self._at
        spent[1] += 1
        self._at = now

    def on_fit_start(self, run: Run) -> None:
        self._close()
        self._spent = {name: [0.0, 0] for name in _PARTS}
        self._began = run.progress.step
        closures = any(phase.closure for stage in run.stages for phase in stage.phases)
        lazily = run.moves_batches or any(stage.accumulate > 1 for stage in run.stages)
        for hook in (*_MARKS, *(() if closures else ("on_grads_ready",)), *(("on_batch_start",) if lazily else ())):
            setattr(run.hooks, hook, (*getattr(run.hooks, hook), self._mark))
        run.hooks.map_loss = (*run.hooks.map_loss, self._begin_backward)
        self._known.clear()
        run.hooks.wrap(lambda hook, function: self._timed(hook, function, run))
        self._at, self._depth, self._open = perf_counter(), 0, True

    def _timed(self, hook: str, function: Callable[..., Any], run: Run) -> Callable[..., Any]:
        before = "rest" if hook in self._known else _BEFORE.get(hook, "rest")  # only the first is called from the loop
        fetches = before == "move"
        self._known.add(hook)
        follows = hook == "on_step_start" and function == self._mark
        name = "Profiler" if getattr(function, "__self__", None) is self else hook_name(function, run)
        self._spent.setdefault(name, [0.0, 0])
        lap = self._lap

        def call(run: Run, *args: Any) -> Any:
            lap("data" if fetches and run.open_step[0] is not None else before)  # fetched within its window
            try:
                return function(run, *args)
            finally:
                if follows:
                    self._follow(run)
                lap(name)

        return call

    def _mark(self, run: Run, *args: Any) -> None:
        """A place to take the time where no other callback has a hook."""

    # --------------------------------------------------------------------------------- what is no hook of a callback

    def _follow(self, run: Run) -> None:
        """Time the steps and optimizers of the open stage; both may have been replaced since the last step."""
        stage, self._depth = run.stage, 0
        if stage is None or [(p.step, p.moved) for p in stage.phases] == self._phases:
            return
        self._release()
        for phase in stage.phases:
            self._time_phase(phase)
        self._phases = [(p.step, p.moved) for p in stage.phases]

    def _time_phase(self, phase: Phase) -> None:
        step, lap = getattr(phase.step, "profiled", phase.step), self._lap

        def timed(batch: Any) -> Any:
            lap("rest")
            output = step(batch)
            lap("forward")
            return output

        timed.profiled = step  # type: ignore[attr-defined]
        timed.__qualname__ = getattr(step, "__qualname__", "step")
        phase.step = timed
        for optimizer in phase.moved:
            self._handles.append(optimizer.register_step_pre_hook(self._begin_optimizer))
            self._handles.append(optimizer.register_step_post_hook(self._end_optimizer))

    # a step that calls the one of its base class is told of twice
    def _begin_optimizer(self, *_: Any) -> None:
        if not self._depth:
            self._lap("clip and check")
        self._depth += 1

    def _end_optimizer(self, *_: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self._lap("optimizer")

    def _begin_backward(self, run: Run, loss: Tensor, output: Any, batch: Any, phase: Phase) -> Tensor:
        if loss.requires_grad:  # else the loop tells what is wrong
            loss.register_hook(self._in_backward)
        return loss

    def _in_backward(self, grad: Tensor) -> None:
        at_end_of_backward(self._backward_ended)

    def _backward_ended(self) -> None:
        self._lap("backward")

    # ------------------------------------------------------------------------------------------------------ the end

    def on_fit_end(self, run: Run) -> None:
        self._end(run)

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._end(run)

    def _end(self, run: Run) -> None:
        if not self._open:
            return
        self._lap("rest")
        self._close()
        self.steps = run.progress.step - self._began
        if run.folder is not None and not run.comm.rank:
            (run.folder / "profile.json").write_text(json.dumps(self.as_dict(), indent=1), encoding="utf-8")
        if self.show and not run.comm.rank:
            print(self)

    def _release(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _close(self) -> None:
        self._release()
        self._phases, self._open = [], False

    def as_dict(self) -> dict[str, Any]:
        """What ``profile.json`` holds: ``steps``, ``seconds``, ``synchronised`` and ``lines``."""
        lines = {name: {"seconds": seconds, "calls": calls} for name, (seconds, calls) in self.times.items()}
        total = sum(line["seconds"] for line in lines.values())
        return {"steps": self.steps, "seconds": total, "synchronised": self.sync, "lines": lines}

    def __str__(self) -> str:
        times = self.times
        total = sum(seconds for seconds, _ in times.values())
        if not total:
            return "Profile: nothing was run yet"
        waited = times.get("data", (0.0, 0))[0] / total
        compute = sum(times.get(name, (0.0, 0))[0] for name in ("forward", "backward", "optimizer")) / total
        steps = max(1, self.steps)
        lines = [
            f"Profile: {self.steps:,} steps in {total:.3g} s, {1e3 * total / steps:.3g} ms each; waiting for data "
            f"{waited:.0%}, forward, backward and optimizer {compute:.0%}",
            f"{'':<{_width(times)}}  seconds  share      calls   us each",
        ]
        parts = [(name, times[name]) for name in _PARTS if name in times]
        others = sorted(((n, t) for n, t in times.items() if n not in _PARTS), key=lambda one: -one[1][0])
        for name, (seconds, calls) in (*parts, *others):
            lines.append(
                f"{name:<{_width(times)}} {seconds:>8.3f} {seconds / total:>6.1%} {calls:>10,} "
                f"{1e6 * seconds / calls:>9,.1f}"
            )
        return "\n".join(lines)


def _width(names: Any) -> int:
    return min(48, max(map(len, names), default=0))
