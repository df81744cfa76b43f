"""When to write a checkpoint, and which to keep."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from loopwright.checkpoint import delete, list_checkpoints, snapshot, sweep, write, write_index
from loopwright.checkpoint.shelf import monitored
from loopwright.errors import CheckpointError, LoopwrightWarning, SettingError, choose
from loopwright.monitor import direction
from loopwright.progress import Duration, Every
from loopwright.state import Run

__all__ = ["Checkpoint"]


class Checkpoint:
    """Writes checkpoints to ``<run folder>/checkpoints/step-00001200`` at an interval, keeping ``keep`` of them.

    ``every``: a duration ("5 min", "500 steps", "1 epoch"; an int counts steps). Without ``monitor`` the
    newest ``keep`` stay. With ``monitor="valid/loss"`` one is also written after each validation that is among the
    ``keep`` best so far, and these stay besides the last one; a checkpoint without a validation at its step is never
    the best, nor is one whose value is NaN. ``mode`` "min" or "max" says which way is better; None takes it from the
    name (loss and error fall, accuracy, f1 and other scores rise) and refuses a name that does not tell.
    ``at_end``: one more when training ends or is stopped. ``on_error="warn"`` lets training go on when a
    checkpoint cannot be written; "raise" does not. An older checkpoint is deleted only after the new one is
    on disk.

    Reads: everything that a resume needs. Changes: nothing. ``best``, ``last``: paths or None;
    ``best_value``. Raises SettingError for arguments that cannot be used, CheckpointError when writing fails,
    and when nothing named ``monitor`` is known after a validation.

    >>> Checkpoint("10 min", monitor="valid/accuracy", keep=3).mode
    'max'
    """

    def __init__(
        self,
        every: Duration | int | str = "5 min",
        *,
        monitor: str | None = None,
        mode: str | None = None,
        keep: int = 2,
        at_end: bool = True,
        on_error: str = "raise",
    ) -> None:
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise SettingError(f"keep={keep!r}: expected the number of checkpoints to keep, from 1")
        if on_error not in ("raise", "warn"):
            raise SettingError(f"on_error={on_error!r} is unknown; use on_error='raise' or on_error='warn'")
        if monitor is None and mode is not None:
            raise SettingError(f"mode={mode!r} needs a value to watch: add monitor='valid/loss', or leave mode out")
        self.every, self.monitor, self.keep = every, monitor, keep
        self.at_end, self.on_error = at_end, on_error
        self.mode = direction(monitor, mode) if monitor is not None else None
        self.best: Path | None = None
        self.last: Path | None = None
        self.best_value: float | None = None
        self._every = Every(every)
        self._ranks: dict[Path, float | None] = {}  # in the order of writing; smaller is better
        self._saved: Any = None
        self._validated = False

    def start(self, run: Run) -> None:
        """Begin at the run's progress, knowing what its folder holds already; leftovers of killed writes go.

        Raises CheckpointError, before the first step, naming what could not be saved.
        """
        if run.folder is None:
            raise SettingError("Checkpoint needs a folder to write to: Trainer(folder='runs')")
        snapshot.check(run)
        self._every.start(run.progress, run.stage.source.batches if run.stage is not None else None)
        self._saved, self._validated = None, False
        folder = run.folder / "checkpoints"
        sweep(folder)
        found = [p for p in list_checkpoints(folder) if _step(p) <= run.progress.step]
        self._ranks = {path: monitored(path, self.monitor) if self.monitor else None for path in found}
        self._look()

    def due(self, run: Run, *, validated: bool) -> bool:
        """True when the interval is over, or when there is a new monitored value. Costs one comparison otherwise."""
        if validated and self.monitor is not None:
            self._validated = True
            due, rank = self._every.due(run.progress), self._rank(run)
            kept = [self._ranks[path] for path in self._best_first()[: self.keep]]
            return due or (rank is not None and (len(kept) < self.keep or rank < (kept[-1] or 0.0)))
        return self._every.due(run.progress)

    def save(self, run: Run) -> Path | None:
        """Write a checkpoint and return its folder; None if it could not be written and ``on_error`` is "warn".

        Where nothing has happened since the last one, that one is returned.
        """
        state = (run.progress._replace(seconds=0.0), dict(run.metrics), len(run.history))
        if self.last is not None and state == self._saved:
            return self.last
        try:
            path = self._write(run)
        except (CheckpointError, OSError) as error:
            if self.on_error == "raise":
                raise
            warnings.warn(f"no checkpoint at step {run.progress.step}: {error}", LoopwrightWarning, stacklevel=2)
            return None
        finally:
            self._validated = False
        self._saved = state
        return path

    def _write(self, run: Run) -> Path:
        assert run.folder is not None
        folder = run.folder / "checkpoints"
        path = folder / f"step-{run.progress.step:08d}"
        about = snapshot.info(run)
        rank = self._ranks.get(path)  # the same step: the same weights
        if self.monitor is not None:
            about |= {"monitor": self.monitor, "mode": self.mode}
            if self._validated:
                rank = self._rank(run)
            if rank is not None:
                about["value"] = -rank if self.mode == "max" else rank
        files, state = snapshot.take(run)
        write(path, files, state, about)
        self._ranks.pop(path, None)
        self._ranks[path] = rank
        self._look()
        write_index(folder, last=self.last, best=self.best)
        for old in self._surplus():
            del self._ranks[old]
            delete(old)
        return path

    def _rank(self, run: Run) -> float | None:
        assert self.monitor is not None
        if self.monitor not in run.metrics:
            raise CheckpointError(
                f"Checkpoint monitors {self.monitor!r}, which this validation did not produce. "
                f"{choose(self.monitor, run.metrics)}"
            )
        value = float(run.metrics[self.monitor])
        if math.isnan(value):
            return None
        return -value if self.mode == "max" else value

    def _best_first(self) -> list[Path]:
        """Those with a value, the earliest of equals first."""
        return sorted((p for p, rank in self._ranks.items() if rank is not None), key=lambda p: self._ranks[p] or 0.0)

    def _look(self) -> None:
        ranked = self._best_first()
        self.last = next(reversed(self._ranks), None)
        self.best = ranked[0] if ranked else None
        rank = self._ranks[ranked[0]] if ranked else None
        self.best_value = -rank if rank is not None and self.mode == "max" else rank

    def _surplus(self) -> list[Path]:
        newest_first = list(reversed(self._ranks))
        kept = (
            newest_first[: self.keep] if self.monitor is None else [*self._best_first()[: self.keep], newest_first[0]]
        )
        return [path for path in self._ranks if path not in kept]


def _step(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0
