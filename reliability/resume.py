"""R1: a run is resumed after every one of its optimizer steps, and ends as the run did that was never stopped."""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loopwright as lw
from loopwright.checkpoint import list_checkpoints
from reliability.trial import NAME, Interrupt, Stopped, audit, differences, memory, observe, train
from reliability.variants import STEPS, VARIANTS, Make, Parts

SEED = 3


@dataclass
class Whole:
    """A run that was never stopped: what it ended with, its batches, and a checkpoint after each of its steps."""

    make: Make
    parts: Parts
    folder: Path
    expected: dict[str, Any]
    batches: list[list[int]]
    consumed: dict[int, int]  # batches by the time of each step


class Consumed(lw.Callback):
    """How many batches had been trained on when each step was over. The harness's own: it has no state."""

    def __init__(self, ledger_of: dict[int, int]) -> None:
        self.by_step, self.total = ledger_of, 0

    def on_backward_end(self, run: lw.Run, loss: Any, output: Any, batch: Any, phase: Any) -> None:
        first = run.stage is not None and phase is run.stage.phases[0]
        self.total += first and not phase.closure  # a closure is called more than once a step

    def on_step_end(self, run: lw.Run, result: lw.StepResult) -> None:
        self.total += run.stage is not None and run.stage.phases[0].closure
        self.by_step[run.progress.step] = self.total


def whole(make: Make, root: Path) -> Whole:
    """Train without a stop. It is done twice, once without checkpoints and counting, so that these are seen to change
    nothing.
    """
    alone, plan, ledger = train(make, root / "alone", seed=SEED)
    without = observe(alone)
    consumed: dict[int, int] = {}
    saver = lw.Checkpoint("1 steps", keep=10**6, at_end=False)
    watch = [] if isinstance(plan.task, tuple) else [Consumed(consumed)]
    run, parts, watched = train(make, root / "whole", seed=SEED, checkpoint=saver, callbacks=watch)
    expected = observe(run)
    expected["callbacks"] = [c for c in expected["callbacks"] if c != {}]
    without["callbacks"] = [c for c in without["callbacks"] if c != {}]
    assert run.progress.step == STEPS, run.progress
    assert run.exact is True, run.exact
    odd = differences(without, expected) + audit(watched.batches, ledger.batches, parts.batches, once=parts.once)
    assert not odd, f"checkpoints change the run: {odd}"
    if not watch:
        consumed = {step: step for step in range(STEPS + 1)}
    assert run.folder is not None
    assert len(list_checkpoints(run.folder / "checkpoints")) == STEPS
    return Whole(make, parts, run.folder, expected, watched.batches, consumed)


def cut(run: Path, step: int, root: Path, *, torn: bool = False) -> Path:
    """A copy of a run folder as a kill after ``step`` would have left it: later checkpoints do not exist, the log goes
    on a little, and with ``torn`` it ends within a line.
    """
    folder = root / NAME / run.name
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "run.json", folder)
    shutil.copy(run / "metrics.jsonl", folder)
    if torn:
        with open(folder / "metrics.jsonl", "ab") as file:
            file.write(b'{"kind": "train", "st')
    place = f"checkpoints/step-{step:08d}"
    shutil.copytree(run / place, folder / place, copy_function=os.link)
    return folder


def resume(known: Whole, step: int, *, inside: bool = False) -> list[str]:
    """What differs after a resume from ``step``: nothing, if all is well.

    ``inside``: resumed from the step before, and stopped inside the window of the step after ``step``.
    """
    with memory() as place:
        root = Path(place)
        if inside and step > 1:
            cut(known.folder, step - 1, root, torn=step % 2 == 0)
        elif not inside:
            cut(known.folder, step, root, torn=step % 2 == 0)
        try:
            if inside:
                _stop_inside(known, step, root)
            run, parts, ledger = train(known.make, root, seed=7000 + step, resume="auto")
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = next(
                (f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames) if "loopwright" in f.filename), ""
            )
            return [f"{type(error).__name__} at {where}: {error}"]
        if run.resumed_from is None or not run.resumed_from.name.endswith(f"-{step:08d}"):
            return [f"resumed from {run.resumed_from}"]
        found = observe(run)
    found["callbacks"] = [c for c in found["callbacks"] if c != {}]
    seen = known.batches[: known.consumed[step]] + ledger.batches
    return differences(known.expected, found) + audit(seen, known.batches, parts.batches, once=parts.once)


def _stop_inside(known: Whole, step: int, root: Path) -> None:
    """From ``step`` - 1 (or the beginning) into the window of the step after ``step``, 1 to 3 batches deep."""
    before = known.consumed.get(step - 1, 0)
    depth = min(1 + step % 3, known.consumed[step + 1] - known.consumed[step])
    try:
        train(
            known.make, root, seed=SEED if step == 1 else 5000 + step, resume="auto",
            checkpoint=lw.Checkpoint("1 steps", keep=2),
            callbacks=[Interrupt(known.consumed[step] - before + depth)],
        )  # fmt: skip
    except Stopped:
        return
    raise AssertionError(f"the run was not stopped inside the window after step {step}")


def every_step(
    variants: Mapping[str, Make] = VARIANTS, steps: Iterable[int] = range(1, STEPS), *, say: Any = None
) -> list[dict[str, Any]]:
    """A row for each variant: how many resumes, which failed, and how."""
    rows = []
    for name, make in variants.items():
        began, failures, count = time.perf_counter(), {}, 0
        with memory() as place:
            try:
                known = whole(make, Path(place))
            except Exception as error:
                failures[0] = [f"the whole run: {type(error).__name__}: {error}"]
                known = None
            for step in steps if known else ():
                count += 1
                if odd := resume(known, step, inside="inside a window" in name):
                    failures[step] = odd
        rows.append(
            {"variant": name, "count": count, "failures": failures, "seconds": round(time.perf_counter() - began, 1)}
        )
        if say is not None:
            say(rows[-1])
    return rows
