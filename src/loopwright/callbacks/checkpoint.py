"""When to write a checkpoint, and which to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from loopwright.checkpoint import Packed, delete, list_checkpoints, read, snapshot, sweep, write_index
from loopwright.checkpoint.background import Copies, in_background
from loopwright.checkpoint.manifest import NAME
from loopwright.checkpoint.objects import matched
from loopwright.checkpoint.places import Place, Remote, as_place
from loopwright.checkpoint.shelf import monitored
from loopwright.checkpoint.together import write_together
from loopwright.errors import CheckpointError, SettingError, choose, elsewhere
from loopwright.events import fire
from loopwright.every import Every
from loopwright.given import check_flag, named
from loopwright.monitor import direction
from loopwright.progress import Duration
from loopwright.state import Run
from loopwright.written import warn

__all__ = ["Checkpoint"]


class Checkpoint:
    """Writes checkpoints ``step-00001200`` into ``<run folder>/checkpoints`` at an interval, keeping ``keep`` of them.

    ``every``: a duration ("5 min", "500 steps", "1 epoch"; an int counts steps), or several, as in
    ``Trainer(log_every=)``: "5 min | at 10 epochs". Without ``monitor`` the newest ``keep`` stay. With
    ``monitor="valid/loss"`` one is also written after each validation that is among the ``keep`` best so far, and
    these stay besides the last one; a checkpoint without a validation at its step is never the best, nor is one whose
    value is NaN. ``mode`` "min" or "max" says which way is better; None takes it from the name (loss and error fall,
    accuracy, f1 and other scores rise) and refuses a name that does not tell. ``at_end``: one more when training ends
    or is stopped. ``on_error="warn"`` lets training go on when a checkpoint cannot be written; "raise" does not. An
    older checkpoint is deleted only after the new one is on disk. ``folder``: write there instead, a path or a URL
    that fsspec knows ("s3://bucket/run"); one folder holds the checkpoints of one run.

    ``async_save=True`` stops training for one copy of the tensors into memory of the CPU, and writes in a thread. One
    checkpoint is written at a time: the next one, and the end of the run, wait for it. What goes wrong is raised, and
    ``on_checkpoint`` fires, at the first boundary between two steps after the write has ended.

    ``restore="best"`` puts the weights of the best checkpoint into the models once training has ended, after the last
    checkpoint: the one thing by which this changes a model. Where it was averages (``EMA``) that the validation saw, it
    puts those of that step.

    Reads: everything that a resume needs. ``best``, ``last``: places of what is on disk, or None;
    ``best_value``. Raises SettingError for arguments that cannot be used, CheckpointError when writing fails,
    and when nothing named ``monitor`` is known after a validation.

    >>> Checkpoint("10 min", monitor="valid/accuracy", keep=3).mode
    'max'
    """

    @elsewhere(save_top_k="keep", every_n_epochs="every", every_n_train_steps="every", dirpath="folder")
    def __init__(
        self,
        every: Duration | int | str = "5 min",
        *,
        monitor: str | None = None,
        mode: str | None = None,
        keep: int = 2,
        async_save: bool = False,
        at_end: bool = True,
        on_error: str = "raise",
        folder: Path | str | None = None,
        restore: str | None = None,
    ) -> None:
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise SettingError(f"keep={keep!r}: expected the number of checkpoints to keep, from 1")
        check_flag("async_save", async_save)
        check_flag("at_end", at_end)
        if folder is not None and not isinstance(folder, (str, Path, Remote)):
            raise SettingError(
                f"folder={folder!r}: expected a path or a URL, such as folder='s3://bucket/run', or None for the run "
                "folder"
            )
        if on_error not in ("raise", "warn"):
            raise SettingError(f"on_error={on_error!r} is unknown; use on_error='raise' or on_error='warn'")
        if restore not in (None, "best") or (restore and monitor is None):
            raise SettingError(
                f"restore={restore!r}: expected None, or 'best' together with a value to judge by, such as "
                "Checkpoint(monitor='valid/loss', restore='best')"
            )
        if monitor is None and mode is not None:
            raise SettingError(f"mode={mode!r} needs a value to watch: add monitor='valid/loss', or leave mode out")
        self.every, self.monitor, self.keep = every, monitor, keep
        self.async_save, self.at_end, self.on_error, self.folder = async_save, at_end, on_error, folder
        self.restore = restore
        self.mode = direction(monitor, mode) if monitor is not None else None
        self.best: Place | None = None
        self.last: Place | None = None
        self.best_value: float | None = None
        with named("every", every, where="Checkpoint: "):
            self._every, self._stage = Every(every), 0
        self._ranks: dict[Place, float | None] = {}  # in the order of writing; smaller is better
        self._saved: Any = None
        self._validated = False
        self._copies = Copies()
        self._writing: tuple[Place, float | None, Future[None]] | None = None

    def start(self, run: Run) -> None:
        """Begin at the run's progress, knowing what its folder holds already; leftovers of killed writes go.

        Raises CheckpointError, before the first step, naming what could not be saved.
        """
        if run.folder is None and self.folder is None:
            raise SettingError("Checkpoint needs a folder to write to: Trainer(folder='runs')")
        if self.async_save and snapshot.shared_out(run):
            raise SettingError(
                "Checkpoint(async_save=True) cannot be used with FSDP, where all ranks write together; leave it out. "
                "Each rank writes its part, which takes a part of the time"
            )
        snapshot.check(run)
        self._every.begin(run)
        self._stage = run.progress.stage
        self._saved, self._validated = None, False
        if run.comm.rank:
            return  # rank 0 writes
        folder = self._folder(run)
        sweep(folder)
        found = list_checkpoints(folder)
        if found and self.folder is not None and run.progress.step == 0:
            raise SettingError(
                f"Checkpoint(folder={str(self.folder)!r}) holds the checkpoints of another run, such as {found[-1]}. "
                f"Go on with that run: fit(..., resume={str(self.folder)!r}), or name another folder"
            )
        found = [path for path in found if _step(path) <= run.progress.step]
        self._ranks = {path: monitored(path, self.monitor) if self.monitor else None for path in found}
        self._look()

    def _folder(self, run: Run) -> Place:
        if self.folder is not None:
            return as_place(self.folder)
        assert run.folder is not None
        return run.folder / "checkpoints"

    def due(self, run: Run, *, validated: bool) -> bool:
        """True when the interval is over, or when there is a new monitored value. Costs one comparison otherwise.

        Raises CheckpointError for a checkpoint that could not be written in the background.
        """
        if self._writing is not None and self._writing[2].done():
            self.finish(run)
        self._validated = validated
        if run.progress.stage != self._stage and self._every.of_stage:
            self._every.begin(run, run.stage_start)
        self._stage = run.progress.stage
        if validated and self.monitor is not None:
            due, rank = self._every.due(run.progress), self._rank(run)
            ranks = [value for value in self._known().values() if value is not None]
            kept = sorted(ranks)[: self.keep]
            due = due or (rank is not None and (len(kept) < self.keep or rank < kept[-1]))
            return bool(run.comm.broadcast(due))  # rank 0 knows what is on disk
        return self._every.due(run.progress)

    def _known(self) -> dict[Place, float | None]:
        """What is on disk or on its way there: no decision depends on how fast the disk is."""
        return self._ranks if self._writing is None else {**self._ranks, self._writing[0]: self._writing[1]}

    def save(self, run: Run) -> Place | None:
        """Write a checkpoint and return its folder; None if it could not be written and ``on_error`` is "warn".

        Where nothing has happened since the last one, that one is returned. With ``async_save`` None is returned, and
        the writing has begun.
        """
        ranks = run.comm.gather(snapshot.own(run))[1:] if run.comm.world_size > 1 else []
        if run.comm.rank and not snapshot.shared_out(run):  # rank 0 writes; if it cannot, it ends the run
            return None if self.async_save else self._folder(run) / f"step-{run.progress.step:08d}"
        if snapshot.shared_out(run):
            return self._save_together(run, ranks)
        state = (run.progress._replace(seconds=0.0), dict(run.metrics), len(run.history), run.validated_at)
        if state == self._saved and self._writing is not None:
            return None
        folder = self._folder(run)
        savers = self._savers(run, folder)
        for saver in savers:
            saver.finish(run)  # one at a time
        if state == self._saved and self.last is not None:
            return self.last
        path = folder / f"step-{run.progress.step:08d}"
        step = run.progress.step
        try:
            rank = self._rank_here(run, path)
            written = any(s._saved == state for s in savers if s is not self)
            if written and (rank is None or monitored(path, self.monitor) is not None):
                self._landed(path, rank, savers)  # another one has written it
            else:
                monitors = [saver._monitors(run, path) for saver in savers if saver.monitor is not None]
                about = snapshot.info(run)
                about |= (monitors[0] if monitors else {}) | ({"others": monitors[1:]} if monitors[1:] else {})
                packed = Packed.of(*snapshot.take(run, ranks), about)
                if self.async_save:
                    packed = self._copies.of(packed)
                    future = in_background(lambda: self._write(packed, path, rank, savers))
                    self._writing, self._saved = (path, rank, future), state
                    return None
                self._write(packed, path, rank, savers)
        except (CheckpointError, OSError) as error:
            self._failed(step, error)
            return None
        finally:
            self._validated = False
        self._saved = state
        return path

    def _save_together(self, run: Run, ranks: list[Any]) -> Place | None:
        """Every rank writes what it holds; rank 0 says whether there is anything to write, and knows what is kept."""
        folder, rank = self._folder(run), run.comm.rank
        path = folder / f"step-{run.progress.step:08d}"
        state = (run.progress._replace(seconds=0.0), dict(run.metrics), len(run.history), run.validated_at)
        savers = self._savers(run, folder)
        value, about, written = None, dict[str, Any](), False
        if not rank:
            value = self._rank_here(run, path)
            written = any(s._saved == state for s in savers if s is not self) and (
                value is None or monitored(path, self.monitor) is not None
            )
            monitors = [saver._monitors(run, path) for saver in savers if saver.monitor is not None]
            about = snapshot.info(run)
            about |= (monitors[0] if monitors else {}) | ({"others": monitors[1:]} if monitors[1:] else {})
        old = run.comm.broadcast((state == self._saved and self.last, written))
        if old[0]:
            return old[0]  # type: ignore[no-any-return]
        try:
            if not old[1]:
                packed = Packed.of(*snapshot.take(run, ranks), about, shards=True)
                write_together(packed, path, run.comm)
            if not rank:
                self._landed(path, value, savers)
        except (CheckpointError, OSError) as error:
            self._failed(run.progress.step, error)
            return None
        finally:
            self._validated = False
        self._saved = state
        return path

    def end(self, run: Run) -> None:
        """Wait for what is being written; with ``restore="best"`` put the best weights into the models."""
        self.finish(run)
        if self.restore and not run.interrupted:
            ranks = {path: monitored(path, self.monitor) for path in list_checkpoints(self._folder(run))}
            known = {path: rank for path, rank in ranks.items() if rank is not None}
            best = run.comm.broadcast(min(known, key=lambda path: known[path]) if known else None)
            shares = snapshot.shared_out(run)
            if best is None and not run.comm.rank:
                warn(
                    f"Checkpoint(restore='best') has restored nothing: no checkpoint was judged by {self.monitor!r}, "
                    f"which was {run.metrics.get(str(self.monitor), 'never measured')}. The weights are the last ones"
                )
            if best is not None and (shares or not run.comm.rank):
                data = read(best, run.team.sharing(run.device) if shares else None)
                snapshot.restore_models(run, data)
                for callback, state in matched(run.callbacks, data.state["callbacks"]):
                    if str(self.monitor).startswith("valid/") and hasattr(callback, "_put_as_validated"):
                        callback._put_as_validated(state, data.info["step"])
            if run.team is not None:
                run.team.follow(run, parameters=True)

    def finish(self, run: Run) -> None:
        """Wait for what is being written in the background, if anything is; what went wrong is raised here.

        ``on_checkpoint`` fires for what is on disk now.
        """
        if self._writing is None:
            return
        path, _, future = self._writing
        error = future.exception()  # waits
        self._writing = None
        if error is None:
            fire(run.hooks.on_checkpoint, run, path)
        else:
            self._saved = None
            self._failed(_step(path), error)

    def _failed(self, step: int, error: BaseException) -> None:
        if self.on_error == "raise" or not isinstance(error, (CheckpointError, OSError)):
            raise error
        warn(f"no checkpoint at step {step}: {error}")

    def _savers(self, run: Run, folder: Place) -> list[Checkpoint]:
        """Those that write to ``folder``, this one among them, in the order in which they were given."""
        found = [s for s in run.savers if isinstance(s, Checkpoint) and s._folder(run) == folder]
        return found if self in found else [self, *found]

    def _write(self, packed: Packed, path: Place, rank: float | None, savers: Sequence[Checkpoint]) -> None:
        packed.write(path)
        self._landed(path, rank, savers)

    def _landed(self, path: Place, rank: float | None, savers: Sequence[Checkpoint]) -> None:
        """The checkpoint is on disk: only now may older ones go, those that no saver of this folder wants."""
        self._ranks = {**{p: r for p, r in self._ranks.items() if p != path}, path: rank}
        self._look()
        judge = next((saver for saver in savers if saver.monitor is not None), self)  # whoever writes, one says best
        write_index(path.parent, last=self.last, best=judge.best)
        wanted = {p for saver in savers for p in saver._wanted()}
        for old in [p for p in self._ranks if p not in wanted]:
            if (old / NAME).is_file():
                delete(old)
            self._ranks = {p: r for p, r in self._ranks.items() if p != old}

    def _monitors(self, run: Run, path: Place) -> dict[str, Any]:
        """What the manifest says of the value that this one watches."""
        rank = self._rank_here(run, path)
        value = {} if rank is None else {"value": -rank if self.mode == "max" else rank}
        return {"monitor": self.monitor, "mode": self.mode, **value}

    def _rank_here(self, run: Run, path: Place) -> float | None:
        """The rank of the weights as they are; those of a step that was saved before are the same."""
        fresh = self._validated or (run.validated_at == run.progress.step and self.monitor in run.metrics)
        return self._rank(run) if self.monitor is not None and fresh else self._known().get(path)

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

    def _best_first(self) -> list[Place]:
        """Those with a value, the earliest of equals first."""
        return sorted((p for p, rank in self._ranks.items() if rank is not None), key=lambda p: self._ranks[p] or 0.0)

    def _look(self) -> None:
        ranked = self._best_first()
        self.last = next(reversed(self._ranks), None)
        self.best = ranked[0] if ranked else None
        rank = self._ranks[ranked[0]] if ranked else None
        self.best_value = -rank if rank is not None and self.mode == "max" else rank

    def _wanted(self) -> list[Place]:
        newest_first = list(reversed(self._ranks))
        if self.monitor is None:
            return newest_first[: self.keep]
        return [*self._best_first()[: self.keep], *newest_first[:1]]


def _step(path: Place) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0
