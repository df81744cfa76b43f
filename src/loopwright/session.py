"""What surrounds the loop of a fit, and how a task that was fitted before goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from loopwright import rng
from loopwright.checkpoint import snapshot
from loopwright.data import fingerprint
from loopwright.data.plan import seed_from
from loopwright.data.trained_on import TrainedOn
from loopwright.delivery import close_loggers, start_loggers
from loopwright.doubles import add_nonfinite
from loopwright.errors import LoopwrightError, NonFiniteError
from loopwright.folder import about, close_folder, hold, open_folder, reopen_folder
from loopwright.history import Series
from loopwright.optim import set_trainable
from loopwright.parallel import readers, watched
from loopwright.repeated import identity, note_finished, same_as_before, say_if_repeated
from loopwright.resolved import resolved
from loopwright.stages import chooses_parameters, nothing_left, reopen
from loopwright.state import Progress, Run, has_state
from loopwright.written import warn

__all__ = ["closing_all", "go_on", "session"]


@contextmanager
def session(run: Run, *, seed: int | None, root: str | Path | None, label: str, deterministic: bool) -> Iterator[None]:
    """What surrounds the loop: seeds, flags, folder, loggers, signals; everything is closed and put back."""
    _say_what_is_odd(run)
    first, rank = run.comm.first, run.comm.rank
    if seed is not None and run.progress.step == 0:
        rng.seed(seed)
    if (part := readers(run).rank) and run.resumed_from is None:  # dropout and the like must differ by what is seen
        rng.seed(seed_from(run.settings["key"], "rank", part, run.progress.step))
    resumed = {} if run.resumed_from is None else {"resumed_from": str(run.resumed_from)}
    goes_on = run.folder is not None
    settings, data = partial(resolved, run), partial(_fingerprint, run)  # for the folder and for loggers
    if root is not None and not goes_on:
        run.folder = first(lambda: _open(run, root, label, settings() | resumed, data(), seed))
    lock = hold(run.folder) if run.folder is not None and not rank else None
    if goes_on and run.folder is not None and not rank:
        who = same_as_before(run.folder, identity(run, settings(), data(), seed=seed), resumed=bool(resumed))
        reopen_folder(run.folder, settings=settings(), step=run.progress.step, **resumed, identity=who)
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic:  # only then: torch's own function imports its compiler, which takes a second
        torch.use_deterministic_algorithms(True)
    error: BaseException | None = None
    snapshot.note_attributes(run)
    run.status = "running"
    run.task.__dict__["_run"] = run
    TrainedOn.forget((run.task, *run.models.values()))
    try:
        for handler in run.handlers:
            handler.start(run)
        wanted = any(hasattr(logger, "log_config") for logger in run.loggers)
        start_loggers(run, about(label, settings(), seed=seed, data=data()) if wanted else None)
        sources = [s for stage in run.stages for s in (stage.source, *stage.valid.values())]
        with closing_all(sources), watched(run, partial(_abandon, run)):
            yield
        if run.interrupted:  # a signal that came after the last step has nothing to interrupt
            run.status = "done" if run.stage is None else "interrupted"
        else:
            run.status = "stopped" if run.stop_reason else "done"
    except BaseException as caught:
        error = caught
        run.status = "interrupted" if isinstance(caught, KeyboardInterrupt) else "failed"
        if isinstance(caught, NonFiniteError) and isinstance(run.window, (list, tuple)):
            add_nonfinite(caught, run.window)
        raise
    finally:
        TrainedOn.leave(run)
        if deterministic:
            torch.use_deterministic_algorithms(was[0], warn_only=was[1])
        if run.team is not None:
            run.team.end(run, failed=error is not None)
        if chooses_parameters(run):
            set_trainable(run.task, run.trainable)
        if any(stage.loss is not None for stage in run.stages):
            run.task.replace("loss", run.own_loss)
        try:
            _close(run, error)
        finally:
            if lock is not None:
                lock.close()


def _open(run: Run, root: Path | str, label: str, settings: Any, data: Any, seed: int | None) -> Path:
    """The folder of a run that begins; it is said if the same one has been done before."""
    who = identity(run, settings, data, seed=seed) if run.resumed_from is None and run.progress.step == 0 else None
    say_if_repeated(root, label, who)
    return open_folder(root, label, settings=settings, seed=seed, data=data, identity=who)


def _fingerprint(run: Run) -> dict[str, Any] | None:
    if run.fingerprint is None and run.data is not None:
        run.fingerprint = fingerprint(run.data)  # checkpoints keep it as well
    return run.fingerprint


def _abandon(run: Run, told: str) -> None:
    """Close the folder of a run whose process is about to be ended, since another rank has failed."""
    if run.folder is not None and not run.comm.rank:
        close_folder(run.folder, "failed", error=LoopwrightError(told), metrics=run.metrics)


@contextmanager
def closing_all(sources: Iterable[Any]) -> Iterator[None]:
    """Close what can be closed afterwards: persistent workers end with the work that they were started for."""
    try:
        yield
    finally:
        for source in sources:
            if hasattr(source, "close"):
                source.close()


def _close(run: Run, error: BaseException | None) -> None:
    """Close savers, loggers and the folder, whatever happens to one of them; the first error is the one to raise."""
    if run.compiler is not None:
        run.compiler.close()
    first, status = error, run.status if run.status != "created" else "failed"
    for saver in run.savers:
        try:
            saver.finish(run)
        except Exception as another:
            if first is None:
                first, status = another, "failed"
            else:
                first.add_note(f"[loopwright] {type(saver).__name__}.finish failed as well: {another!r}")
    run.status = status
    try:
        close_loggers(run)
    finally:  # where warnings are errors
        if run.folder is not None and not run.comm.rank:
            progress = run.progress._asdict() | {"waited": run.waited}
            progress |= {} if run.compiler is None else {"graphs": run.compiler.graphs}
            progress |= {} if run.graphs is None else {"recorded": run.graphs.recorded}
            ranks = {} if run.team is None else {"ranks": run.team.needs}
            close_folder(
                run.folder, status, error=first, metrics=run.metrics, progress=progress, exact=run.exact, **ranks
            )
            if status in ("done", "stopped"):
                note_finished(run.folder)
        for close in run.closing:
            close(run)
    if first is not None and first is not error:
        raise first


def go_on(run: Run, previous: Run) -> None:
    """Let ``run`` continue where ``previous``, of the same task, stands: towards its own, larger total.

    Stages with other names than those of ``previous`` come after them. The folder is that of ``previous`` where the
    settings ask for the same one and it still exists.
    """
    run.progress, run.history, run.series, run.metrics = (
        previous.progress, previous.history, previous.series, previous.metrics.copy(),
    )  # fmt: skip
    run.series.shared = run.team is not None
    run.latest, run.attributes = previous.latest.copy(), previous.attributes
    run.stage_start, run.replaced, run.schema = previous.stage_start, previous.replaced, previous.schema
    run.trainable, run.validated_at = previous.trainable or run.trainable, previous.validated_at
    run.folder = previous.folder if _keeps_folder(run, previous) else None
    scaled, before = cast(Any, run.precision), cast(Any, previous.precision)
    if has_state(scaled) and type(scaled) is type(before):  # the scale of the gradients
        scaled.load_state_dict(before.state_dict())
    inside = run.progress.batch > 0
    closes = False  # the open epoch ends here
    if [stage.name for stage in run.stages] != [stage.name for stage in previous.stages]:
        closes = inside
        for scheduled in (one for stage in previous.stages for one in stage.scheduled):
            scheduled.put_back()
        run.progress = run.progress._replace(stage=0, stage_step=0, epoch=run.progress.epoch + inside, batch=0)
        run.stage_start = run.progress
    else:
        reopen(run)
    stage = run.stages[run.progress.stage] if run.progress.stage < len(run.stages) else None
    if stage is not None and run.progress.batch:
        open_stage, p = previous.stages[run.progress.stage], run.progress
        state: dict[str, Any] = open_stage.source.state_dict() if run.data is previous.data else {"batch": None}
        closes = state.get("batch", p.batch) != p.batch
        if not closes:
            stage.source.load_state_dict(state)
            for phase, old in zip(stage.phases, open_stage.phases, strict=False):
                phase.meters = old.meters
        elif run.data is previous.data:
            _say_what_is_lost(p, state["batch"])
        if closes:
            run.progress = p._replace(epoch=p.epoch + 1, batch=0)
    if closes:  # what its steps have measured is not of the next epoch; a copy, for ``previous`` may go on otherwise
        run.series = Series(run.history.losses, shared=run.team is not None)
        run.series.load_state_dict({**previous.series.state_dict(), "epoch": {}})


def _keeps_folder(run: Run, previous: Run) -> bool:
    (root, name), (old_root, old_name) = ((r.settings.get("folder"), r.settings.get("name")) for r in (run, previous))
    wanted = root is not None and old_root is not None and (Path(root), name) == (Path(old_root), old_name)
    return wanted and previous.folder is not None and previous.folder.exists()


def _say_what_is_lost(progress: Progress, given: int) -> None:
    warn(
        f"the last fit ended inside a step: {progress.batch} batches of epoch {progress.epoch + 1} were trained on, "
        f"but its data had already given {given}, and cannot go back. This fit goes on with epoch "
        f"{progress.epoch + 2}; ask the Trainer for one more epoch to make up for it"
    )


def _say_what_is_odd(run: Run) -> None:
    if isinstance(run.task, nn.Module):
        for name, model in run.models.items():
            if not model.training:
                model.train()
                warn(f"{name} was in eval mode; it has been set to train mode")
    if run.progress.step > 0 and run.resumed_from is None and nothing_left(run):
        warn(
            f"this task has already been trained for {run.progress.epoch} epochs ({run.progress.step} steps): nothing "
            "to do. Ask the Trainer for more, or make a new task to start anew"
        )
