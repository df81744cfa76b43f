"""Torch's own profiler over a few steps: a trace of every operator, to be looked at in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loopwright.errors import SettingError
from loopwright.events import Callback
from loopwright.state import Run, StepResult

__all__ = ["TorchProfiler"]


class TorchProfiler(Callback):
    """Writes ``<run folder>/traces/step-00000005.json`` for some steps: open it at https://ui.perfetto.dev.

    ``wait`` steps are left alone, ``warmup`` steps are profiled and dropped, ``active`` steps are kept, and all that
    ``repeat`` times: as in ``torch.profiler.schedule``, counted from where this process begins. The name of a trace
    is the last step in it. ``shapes``, ``memory`` and ``stacks`` add shapes of inputs, allocations, and lines of
    source. On CUDA the device's own work is in it. ``folder`` is another place than the run folder.

    Reads: what torch does. Changes: nothing. Stops: no. Raises SettingError for counts that are none, and before
    step 0 where there is no folder, and where a run that counts steps ends before the first trace does.

    >>> TorchProfiler(wait=10, active=2).last_step
    13
    """

    def __init__(
        self,
        *,
        wait: int = 5,
        warmup: int = 1,
        active: int = 3,
        repeat: int = 1,
        shapes: bool = False,
        memory: bool = False,
        stacks: bool = False,
        folder: Path | str | None = None,
    ) -> None:
        for name, value, least in (
            ("wait", wait, 0),
            ("warmup", warmup, 0),
            ("active", active, 1),
            ("repeat", repeat, 1),
        ):
            if type(value) is not int or value < least:
                raise SettingError(f"TorchProfiler({name}={value!r}): expected a whole number of at least {least}")
        self.wait, self.warmup, self.active, self.repeat = wait, warmup, active, repeat
        self.shapes, self.memory, self.stacks, self.folder = shapes, memory, stacks, folder
        self.last_step = wait + warmup + active  # of the first trace
        self.traces: list[Path] = []
        self._profile: Any = None
        self._waited = 0

    def problems(self, run: Run) -> Iterator[str]:
        if self.folder is None and run.settings.get("folder", "runs") is None:
            yield "TorchProfiler needs a folder for its traces: Trainer(folder='runs'), or TorchProfiler(folder=...)"
        steps = [until.value for stage in run.stages for until in stage.until if until.unit == "steps"]
        if len(steps) == len(run.stages) and sum(steps) - run.progress.step < self.last_step:
            yield (
                f"TorchProfiler(wait={self.wait}, warmup={self.warmup}, active={self.active}) needs {self.last_step} "
                f"steps, but {sum(steps) - run.progress.step:g} are taken; lower them"
            )

    def on_fit_start(self, run: Run) -> None:
        self.traces, self._waited = [], 0
        self._begin(run)

    def _begin(self, run: Run) -> None:
        """Start the profiler when its time has come; until then, and after the last trace, a step costs nothing."""
        if self._waited < self.wait or len(self.traces) == self.repeat:
            return
        from torch import profiler  # takes a moment, and only here

        first = run.progress.step
        actions = profiler.schedule(wait=0, warmup=self.warmup, active=self.active, repeat=1)
        kinds = [profiler.ProfilerActivity.CPU]
        kinds += [profiler.ProfilerActivity.CUDA] if run.device.type == "cuda" else []
        self._profile = profiler.profile(
            activities=kinds,
            schedule=lambda step: actions(max(0, step - first)),
            on_trace_ready=lambda profile: self._write(run, profile),
            record_shapes=self.shapes,
            profile_memory=self.memory,
            with_stack=self.stacks,
        )
        self._profile.step_num = first  # the trace counts as the run does
        self._profile.start()

    def _write(self, run: Run, profile: Any) -> None:
        root = Path(self.folder) if self.folder is not None else run.folder
        assert root is not None
        rank = f"-rank{run.comm.rank}" if run.comm.rank else ""
        path = root / "traces" / f"step-{run.progress.step:08d}{rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        self.traces.append(path)

    def on_step_end(self, run: Run, result: StepResult) -> None:
        if self._profile is None:
            self._waited += 1
            self._begin(run)
            return
        known = len(self.traces)
        profile, self._profile = self._profile, None  # one that fails must not be stopped: torch would crash
        profile.step()
        self._profile = profile
        if len(self.traces) > known:
            self._stop()
            self._waited = 0
            self._begin(run)

    def on_fit_end(self, run: Run) -> None:
        self._stop()

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        """What has been recorded of an unfinished trace is written as well."""
        if self._profile is not None:
            profile, self._profile = self._profile, None
            profile.stop()
