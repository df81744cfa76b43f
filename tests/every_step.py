"""A run resumed from each of its steps, by new objects and other seeds, ends with the bits of the run that was not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import loopwright as lw
from loopwright.checkpoint import list_checkpoints
from tiny import bits, same, seed_all


@dataclass
class Experiment:
    """All that a run needs, made anew for each."""

    task: Any
    train: Any
    valid: Any = None
    stages: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    weight: Any = None

    def run(self, folder: Path | None, *, checkpoint: Any = False, resume: Any = None) -> lw.Run:
        trainer = lw.Trainer(folder=folder, progress=False, checkpoint=checkpoint, log_every=1, **self.settings)
        return trainer.fit(self.task, self.train, self.valid, stages=self.stages, weight=self.weight, resume=resume)


def left(run: lw.Run) -> list[Any]:
    """Everything that a run leaves behind, but for its times."""
    told = [{k: v for k, v in record.items() if k != "seconds"} for record in run.history]
    states = [*bits(*run.models.values(), *run.optimizers.values()), [c.state_dict() for c in run.callbacks]]
    losses = {name: list(values) for name, values in run.history.losses.items()}
    return [*states, run.progress._replace(seconds=0.0), told, losses, dict(run.metrics), run.status]


def resumed_at_every_step(make: Callable[[], Experiment], folder: Path) -> lw.Run:
    """The run that nothing has stopped; fails where one that was resumed ends otherwise."""
    seed_all(3)
    saver = lw.Checkpoint("1 steps", keep=10**6, at_end=False)
    whole = make().run(folder / "whole", checkpoint=saver)
    expected = left(whole)
    assert whole.exact is True
    assert whole.folder is not None
    places = list_checkpoints(whole.folder / "checkpoints")
    assert len(places) == whole.progress.step
    for i, place in enumerate(places):
        seed_all(1000 + i)
        run = make().run(folder / "resumed", resume=lw.Resume(place))
        assert same(left(run), expected), f"resumed after step {i + 1}"
    return whole
