"""What a whole run will cost, from a rehearsal of its first batches: time, steps, memory, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from loopwright.callbacks import Checkpoint
from loopwright.debug import Debug
from loopwright.events import Callback
from loopwright.every import Every
from loopwright.out_of_memory import peak_memory
from loopwright.state import Duration, Run, Stage, StepResult
from loopwright.text import format_bytes, format_spent

__all__ = ["Cost", "Meter", "Rehearsal", "cost_of"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run will take, as ``trainer.plan(..., measure=20)`` has found out. ``print(cost)`` says it in words.

    ``seconds`` and ``steps`` of the whole run, None where the data does not tell how long an epoch is; what may stop a
    run early makes it shorter. ``memory_bytes``: on CUDA the most that tensors took, else the most that this process
    has ever taken. ``checkpoint_bytes``: of the last checkpoint; ``disk_bytes``: the most that checkpoints take at one
    time, one that is being written besides those that are kept. ``parts``: seconds by what they are spent on.

    >>> print(Cost(90.0, 1200, 3 * 10**8, 2 * 10**6, 6 * 10**6, {"training": 80.0, "validation": 10.0}))
    1,200 steps in about 1:30 (training 1:20, validation 0:10); memory up to 300 MB; checkpoints of 2 MB, 6 MB at most
    """

    seconds: float | None
    steps: int | None
    memory_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    parts: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        spent = ", ".join(f"{name} {format_spent(value)}" for name, value in self.parts.items() if value)
        if self.seconds is None or self.steps is None:
            whole = f"how long it takes is not known, since its data has no length ({spent})"
        else:
            whole = f"{self.steps:,} steps in about {format_spent(self.seconds)} ({spent})"
        kept = f"checkpoints of {format_bytes(self.checkpoint_bytes)}, {format_bytes(self.disk_bytes)} at most"
        memory = [f"memory up to {format_bytes(self.memory_bytes)}"] if self.memory_bytes else []
        return "; ".join([whole, *memory, kept if self.checkpoint_bytes else "no checkpoints"])


class Rehearsal(Debug):
    """``dev_run`` of two epochs: the second one is without all that happens only once."""

    __slots__ = ()

    def narrow(self, run: Run, stages: Sequence[Stage]) -> None:
        super().narrow(run, stages)
        for stage in stages:
            stage.until = [Duration(2.0, "epochs")]


@dataclass(slots=True)
class Timed:
    """Of a stage in a rehearsal: seconds of each epoch by what they were spent on, and how much of it there was."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    batches: int = 0  # of the last validation
    per_batch: float = 0.0  # seconds of one of them after the first
    samples: float = 0.0  # of a step
    save: float = 0.0  # seconds of the last checkpoint


class Meter(Callback):
    """Notes in a rehearsal when what begins and ends. Changes nothing; waits for the device twice an epoch."""

    def __init__(self) -> None:
        self.stages: dict[str, Timed] = {}
        self.memory = self.checkpoint = self.record = 0
        self._marks: list[float] = []  # the ends of the steps of the open epoch
        self._looks: list[float] = []  # the ends of the batches of the open validation
        self._last = self._began = 0.0

    def _now(self, run: Run) -> float:
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        return perf_counter()

    def on_fit_start(self, run: Run) -> None:
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)

    def on_stage_start(self, run: Run, stage: Stage) -> None:
        self.stages[stage.name] = Timed()

    def on_epoch_start(self, run: Run) -> None:
        assert run.stage is not None
        self._began, self._marks = self._now(run), []
        self.stages[run.stage.name].epochs.append({})

    def on_step_end(self, run: Run, result: StepResult) -> None:
        assert run.stage is not None
        self._marks.append(self._now(run) if not self._marks else perf_counter())
        self._last = self._marks[-1]
        self.stages[run.stage.name].samples = result.weight

    def on_validation_start(self, run: Run) -> None:
        self._end_training(run)
        self._looks = [self._now(run)]

    def on_eval_batch_end(self, run: Run, output: Any, batch: Any) -> None:
        self._looks.append(perf_counter())

    def on_validation_end(self, run: Run, values: Mapping[str, float]) -> None:
        timed, end = self._timed(run), self._now(run)
        looks, timed.batches = self._looks, len(self._looks) - 1
        timed.epochs[-1]["validation"] = end - looks[0]
        timed.per_batch = (looks[-1] - looks[1]) / (len(looks) - 2) if len(looks) > 2 else end - looks[0]
        self._last = end

    def on_epoch_end(self, run: Run) -> None:
        self._end_training(run)
        self._timed(run).epochs[-1]["end"] = max(0.0, self._now(run) - self._last)
        self._last = self._now(run)

    def on_stage_end(self, run: Run, stage: Stage) -> None:
        self._last = self._now(run)

    def on_checkpoint(self, run: Run, path: Any) -> None:
        """The last one is that of the end, right after which nothing else happens."""
        now = self._now(run)
        for timed in self.stages.values():
            timed.save = max(timed.save, now - self._last)  # nothing is written where nothing has happened since
        self.checkpoint = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
        self.checkpoint -= 4 * sum(map(len, run.history.losses.values()))  # these grow with the run
        self._last = now

    def on_fit_end(self, run: Run) -> None:
        peaks = peak_memory(run.device)
        self.memory = peaks.get("device_memory", peaks.get("memory", 0))
        self.record = len(json.dumps(run.history[-1])) if len(run.history) else 0

    def _timed(self, run: Run) -> Timed:
        return list(self.stages.values())[-1]

    def _end_training(self, run: Run) -> None:
        """Note the steps of the epoch: the first apart, which waits for workers to start."""
        epoch = self._timed(run).epochs[-1]
        if self._marks and "step" not in epoch:
            self._last = self._marks[-1] = self._now(run)
            n = len(self._marks)
            epoch["first"] = self._marks[0] - self._began
            epoch["step"] = (self._marks[-1] - self._marks[0]) / (n - 1) if n > 1 else epoch["first"]


def cost_of(run: Run, meter: Meter) -> Cost:
    """What ``run``, which has been prepared and not begun, will take, by what ``meter`` has seen of a rehearsal."""
    parts = dict.fromkeys(("starting", "training", "validation", "checkpoints"), 0.0)
    counts = dict.fromkeys(("steps", "epochs", "samples", "tokens", "batches", "looks", "losses"), 0.0)
    known = True
    for i, stage in enumerate(run.stages[run.progress.stage :]):
        timed = meter.stages[stage.name]
        one, two = timed.epochs[0], timed.epochs[-1]
        parts["starting"] += max(0.0, sum(one.values()) - sum(two.values()))
        steps = _steps(stage, timed)
        if steps is None:
            known = False
            continue
        steps = max(0.0, steps - (run.progress.stage_step if i == 0 else 0))
        epochs = steps / stage.epoch_steps if stage.epoch_steps else 1.0
        seconds = steps * two["step"] + epochs * max(0.0, two["first"] - two["step"] + two["end"])
        here = {
            "steps": steps, "epochs": epochs, "samples": steps * timed.samples, "tokens": steps * timed.samples,
            "batches": epochs * (stage.source.batches or 0), "seconds": seconds, "percent": 100.0,
        }  # fmt: skip
        looks = max(1.0, stage.validate_every.times(here)) if stage.valid else 0.0
        parts["training"] += seconds
        parts["validation"] += looks * _validation(stage, timed)
        here |= {"looks": looks, "losses": len(stage.phases) * steps}
        counts = {name: total + here[name] for name, total in counts.items()}
    whole = counts | {"seconds": sum(parts.values()), "percent": 100.0}
    written, kept = zip(*(_written(saver, whole) for saver in run.savers), strict=True) if run.savers else ((), ())
    each = max((timed.save for timed in meter.stages.values()), default=0.0)
    parts["checkpoints"] = sum(written) * each
    size = round(meter.checkpoint + 4 * counts["losses"] + meter.record * counts["epochs"]) if run.savers else 0
    return Cost(
        sum(parts.values()) if known else None, round(counts["steps"]) if known else None, meter.memory, size,
        size * sum(kept), parts,
    )  # fmt: skip


def _steps(stage: Stage, timed: Timed) -> float | None:
    """Steps of a whole stage; None where the data does not tell."""
    each, step = stage.epoch_steps, timed.epochs[-1]["step"]
    per_unit = {"steps": 1.0, "epochs": each, "samples": 1 / timed.samples, "seconds": 1 / step}
    known = [math.ceil(end.value * rate - 1e-9) for end in stage.until if (rate := per_unit[end.unit]) is not None]
    return min(known, default=None)


def _validation(stage: Stage, timed: Timed) -> float:
    """Seconds of one validation over all of its data."""
    seconds = next((epoch["validation"] for epoch in reversed(timed.epochs) if "validation" in epoch), 0.0)
    batches = [source.batches for source in stage.valid.values()]
    more = sum(timed.batches if n is None else n for n in batches) - timed.batches
    return seconds + max(0, more) * timed.per_batch


def _written(saver: Any, whole: Mapping[str, float]) -> tuple[float, int]:
    """How often a saver writes at most, and how many of these are on disk at one time, the one being written too."""
    if not isinstance(saver, Checkpoint):
        return 1.0, 1
    count = Every(saver.every).times(whole) + saver.at_end + (whole["looks"] if saver.monitor else 0)
    return count, int(min(count, saver.keep + 1 + (saver.monitor is not None)))
