"""The page: everything that drives training, top to bottom.

``train`` walks the stages, ``train_epoch`` the windows of an epoch, ``train_step`` is one optimizer step; ``evaluate``
and ``predict`` read a model and change nothing. A *window* is the 1..accumulate batches of one optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from loopwright.data import move
from loopwright.delivery import log_values
from loopwright.errors import DataError, SkipStep, StopEpoch
from loopwright.events import add_place, end_early, fire, fold, hook_name
from loopwright.history import Series
from loopwright.out_of_memory import add_memory
from loopwright.parallel import whole
from loopwright.records import log_epoch, log_late, log_train
from loopwright.stages import apply_changes, begin_stage, end_stage, inexact, is_over
from loopwright.state import OWED, Progress, Run, Source, Stage, StepResult
from loopwright.steps import (
    as_output,
    backward,
    closure_step,
    count_epoch,
    end_scaling,
    explain,
    mapped,
    nonfinite,
    noted,
    prepared,
    rescale,
    scalars,
    take_step,
    true_means,
    unscale,
    windows,
    zero_grad,
)  # fmt: skip
from loopwright.unseen import read, unseen


def train(run: Run) -> None:
    """Train ``run`` from where its progress stands to the end of its last stage, or until a stop is requested."""
    hooks = run.hooks
    with leaving(run):
        run.began = time.perf_counter() - run.progress.seconds
        fire(hooks.on_fit_start, run)
        if run.restore is not None:
            run.restore()  # after the hooks, which may have drawn numbers or changed a model, as they did then
        if run.team is not None:
            run.team.begin(run)
        for saver in run.savers:
            saver.start(run)  # what cannot be saved is an error now, not at the first checkpoint
        while (stage := run.stage) is not None and (run.stop_reason is None or run.owes_epoch_end):
            fresh = begin_stage(run, stage)  # False in the middle of it, after a resume
            if fresh:
                fire(hooks.on_stage_start, run, stage)
            if run.validated_at == OWED and not run.interrupted:
                run.validated_at = -1
                look(run, stage, validates=bool(stage.valid))
            while (not is_over(run) and run.stop_reason is None) or run.owes_epoch_end:
                (stage.loop or train_epoch)(run, stage)
            if not is_over(run):
                break  # asked to stop inside this stage
            if stage.valid and run.validated_at != run.progress.step:
                evaluate(run, stage.valid, run.validation_step, stage.weight)
                if run.validated_at != run.progress.step:
                    break  # a signal cut it short: it is made after a resume
            log_train(run)
            fire(hooks.on_stage_end, run, stage)
            end_stage(run)
        if not run.interrupted:  # else these steps are in the next record after a resume, as if nothing had happened
            log_train(run)
        run.window, run.ended = (), not run.interrupted
        for saver in run.savers:
            if saver.at_end:
                save(run, saver)
            saver.end(run)
        fire(hooks.on_fit_end, run)


@contextmanager
def leaving(run: Run) -> Iterator[None]:
    """An exception that leaves the loop is told to the callbacks, and says where training stood."""
    try:
        yield
    except BaseException as error:
        if run.stages:  # else nothing is trained
            add_place(error, run)
        add_memory(error, run)
        for hook in run.hooks.on_exception:
            try:
                fire((hook,), run, error)
            except Exception as second:
                error.add_note(f"[loopwright] {hook_name(hook, run)} failed as well: {second!r}")
        raise


def train_epoch(run: Run, stage: Stage) -> None:
    """Go through an epoch's data, or what is left of it after a resume, one optimizer step a window."""
    hooks, source, began = run.hooks, stage.source, run.progress
    if run.progress.batch == 0:
        fire(hooks.on_epoch_start, run)
        fire(hooks.on_loader_start, run, "train", "")
    at = source.at if run.team is None else run.team.begin_epoch(source)
    batches = at(run.progress.epoch, run.progress.batch)
    if run.schema is None:
        batches = noted(run, batches)
    step = train_step if run.graphs is None else run.graphs
    ended = stopped = False
    try:
        for window, planned in windows(run, stage, batches):
            try:
                result = step(run, stage, window, planned)
            except SkipStep:
                result = None
            except StopEpoch:  # before the window had anything to step
                ended = stopped = True
                break
            if result is None:
                for _ in window:  # a step that was dropped uses up its batches as well
                    pass
            count(run, result, len(planned) if planned else 1)
            if result is not None:
                ended = after_step(run, stage, result) or result.ends_epoch
                result = None  # an output held during the next step would raise its peak of memory
            if ended or run.stop_reason is not None or is_over(run):
                break
        else:
            ended = True
    finally:
        close = getattr(batches, "close", None)  # no worker may outlive an error
        if close is not None:
            close()
    if (ended or run.progress.batch == source.batches) and run.validated_at != OWED:
        if run.progress.batch == 0 and not stopped:
            raise DataError(
                f"epoch {run.progress.epoch + 1} of stage {stage.name!r} had no batch to train on. If the data is an "
                "iterator, it is used up: pass a list, a DataLoader or a generator function instead"
            )
        if began.batch == 0:  # else a resumed one, which may have had its steps before
            count_epoch(run, stage, stepped=run.progress.step > began.step, asked=stopped)
        end_epoch(run, stage)


def train_step(run: Run, stage: Stage, window: Iterable[Any], planned: list[float] | None) -> StepResult | None:
    """One optimizer step: every phase goes over the window and moves its optimizers. None if nothing was moved.

    ``planned`` holds the weights (samples, tokens) of the window's batches; None for a single batch. Each batch counts
    by its share of what is really accumulated, so that a short last window is a true mean as well.
    """
    hooks, phases, weigh, plain, team = run.hooks, stage.phases, stage.weight, run.precision.plain, run.team
    scaler, checks = run.precision.scaler, run.nonfinite is not None or run.precision.scaler is not None
    values: dict[str, Any] = {}
    run.window, run.open_step = window, (planned, values)
    for scheduled in stage.scheduled:
        scheduled.set(stage.whole.fraction(run.progress, run.stage_start))
    if hooks.on_step_start:
        fire(hooks.on_step_start, run)
    ranks = 1 if team is None else team.comm.world_size
    total = (sum(planned) or None) if planned is not None and (ranks > 1 or len(planned) > 1) else None
    if run.moves_batches or hooks.on_batch_start or hooks.map_batch:
        window = prepared(run, window)
    shares: dict[str, float] = {}  # of the window, for each value: some batches may not give it
    moved: tuple[str, ...] = ()
    may_skip = run.nonfinite == "skip"
    seen, ran, output, batch, norm, ends_epoch = 0.0, False, None, None, None, False
    if len(phases) > 1:
        window, ends_epoch = held(window)
    for phase in phases:
        if phase.every != 1 and not phase.is_due(run):
            continue
        for optimizer in phase.moved:
            zero_grad(optimizer)
        ran, seen, prefix, meters, unmeasured, skips = True, 0.0, phase.prefix, phase.meters, [], False
        try:
            for batch in window if team is None else team.marked(run, window, phase):
                weight, output = weigh(batch), None  # the last batch's output is not held during the next forward
                if phase.closure:
                    output = closure_step(run, phase, batch)
                else:
                    if plain:
                        output = phase.step(batch)
                    else:
                        with run.precision.autocast(run.device):
                            output = phase.step(batch)
                    if type(output) is not dict or "loss" not in output:
                        output = as_output(output, phase)
                    if hooks.map_output:
                        output = mapped(run, output, batch, phase)
                    if phase.moved:
                        if hooks.map_loss:
                            output["loss"] = fold(hooks.map_loss, run, output["loss"], output, batch, phase)
                        loss = output["loss"] if scaler is None else scaler.scale(output["loss"])
                        if total is None:
                            backward(loss)
                        else:  # the same bits as (loss * (weight / total)).backward(), for less
                            loss = loss if loss.dim() == 0 else loss.reshape(())
                            backward(loss, loss.new_full((), weight * ranks / total))
                scalars(output, values, prefix, None if total is None else weight / total, shares)
                if meters is not None:
                    if may_skip:
                        unmeasured.append((output, batch))
                    else:
                        meters.feed(output, batch)
                seen += weight
                if hooks.on_backward_end and phase.moved and not phase.closure:
                    fire(hooks.on_backward_end, run, output["loss"], output, batch, phase)
                batch = None
        except StopEpoch:
            ends_epoch = True
        except SkipStep:
            skips = True
        except BaseException as error:
            explain(error, run, phase, output, batch)
            raise
        if team is not None:
            seen, skips, ends_epoch = team.join(run, phase, seen, skips, ends_epoch)
        if skips:
            break
        if not seen:
            continue  # every batch of the window was skipped
        if scaler is not None:
            unscale(scaler, phase)
        if total is not None and seen != total:  # batches were skipped or changed: the mean is over what is left
            rescale(phase, total / seen)
        if phase.clip_norm is not None:
            norm = whole(clip_grad_norm_(phase.parameters(), phase.clip_norm))
        try:
            if hooks.on_grads_ready and not phase.closure:
                fire(hooks.on_grads_ready, run, phase, norm)
        except StopEpoch:
            ends_epoch = True
        except SkipStep:
            break
        checked = checks and not phase.closure
        if checked and nonfinite(run, phase, values.get(prefix + "loss"), norm if phase.clip_norm else None):
            break
        if not phase.closure:
            for optimizer in phase.moved:
                take_step(optimizer)
        for one in unmeasured:
            meters.feed(*one)
        moved += (phase.name,)
    if scaler is not None:
        end_scaling(scaler)
    if ran and not moved:
        if ends_epoch:
            raise StopEpoch
        return None
    if moved and phase.name not in moved:  # what a phase has measured is dropped with its step
        values = {name: value for name, value in values.items() if not name.startswith(phase.prefix)}
    if not ran:  # no phase was due at this step
        seen = sum(weigh(batch) for batch in window) if team is None else team.weight
    if shares:
        true_means(values, shares)
    return StepResult(values, output, seen, norm, moved, ends_epoch)


def held(window: Iterable[Any]) -> tuple[list[Any], bool]:
    """All batches of a window, for several phases; True if a hook asked to end the epoch before its last one."""
    batches: list[Any] = []
    try:
        for batch in window:
            batches.append(batch)  # noqa: PERF402 - those before a StopEpoch are kept
    except StopEpoch:
        return batches, True
    return batches, False


def count(run: Run, result: StepResult | None, batches: int) -> None:
    """Add a step to the progress; if nothing was moved, only the batches that it used up."""
    p, team = run.progress, run.team
    seconds = time.perf_counter() - run.began if team is None else team.pulse.beat(run)
    if result is None:
        run.progress = p._replace(batch=p.batch + batches, seconds=seconds)
        return
    steps = p.phase_steps.copy()
    for name in result.moved:
        steps[name] = steps.get(name, 0) + 1
    run.progress = Progress(
        p.stage,
        p.epoch,
        p.batch + batches,
        p.step + 1,
        p.stage_step + 1,
        p.samples + int(result.weight),
        steps,
        seconds,
    )


def after_step(run: Run, stage: Stage, result: StepResult) -> bool:
    """Between two optimizer steps: log, schedule, look. True if a hook asked to end the epoch."""
    hooks, ended = run.hooks, False
    run.series.add(result.values, result.weight if run.team is None else run.team.local)
    run.latest.update(result.values)
    if run.log_every.due(run.progress):
        log_train(run)
    for phase in stage.phases:
        for scheduler in phase.step_schedulers:
            if phase.name in result.moved:
                scheduler.step(run.metrics)
    if hooks.on_step_end:
        try:
            fire(hooks.on_step_end, run, result)
        except StopEpoch:
            ended = True
    look(run, stage, validates=run.validates_within and stage.validate_every.due(run.progress))
    return ended


def look(run: Run, stage: Stage, *, validates: bool) -> None:
    """Validate and save, if due, within an epoch; then change what ``run.replace`` asked for."""
    if validates:
        evaluate(run, stage.valid, run.validation_step, stage.weight)
        validates = run.validated_at == run.progress.step
        if not validates:
            run.validated_at = OWED
    for saver in run.savers:
        if saver.due(run, validated=validates):
            save(run, saver)
    if run.changes:
        apply_changes(run)


def end_epoch(run: Run, stage: Stage) -> None:
    """Count the epoch, validate if due, keep its record, step what is scheduled by epochs, save if due."""
    fire(run.hooks.on_loader_end, run, "train", "", {})
    open_epoch = run.progress
    run.progress = run.progress._replace(epoch=run.progress.epoch + 1, batch=0)
    due = bool(stage.valid) and not run.validates_within and stage.validate_every.due(run.progress)
    validates = due or (bool(stage.valid) and is_over(run) and run.validated_at != run.progress.step)
    if validates:
        evaluate(run, stage.valid, run.validation_step, stage.weight)
        if run.validated_at != run.progress.step:
            run.progress = open_epoch  # a signal cut it short: the end of the epoch is made after a resume
            return
    if run.log_every.due(run.progress) or is_over(run):
        log_train(run)  # at the end the last steps, so that the record of the epoch is the last one
    log_epoch(run, stage)
    for phase in stage.phases:
        for scheduler in phase.epoch_schedulers:
            scheduler.step(run.metrics, run.validated_at)
    fire(run.hooks.on_epoch_end, run)
    log_late(run)
    for saver in run.savers:  # a mean over the epoch is a new value to judge by, as a validation is
        if saver.due(run, validated=validates or (saver.monitor or "").startswith("train/")):
            save(run, saver)
    if run.changes:
        apply_changes(run)
    if run.team is not None and run.stop_reason is None and not is_over(run):
        run.team.tell_ahead()


def save(run: Run, saver: Any) -> None:
    """Write a checkpoint; training stands between two steps."""
    run.exact = inexact(run) or True  # a sampler may show only while it runs that it cannot be resumed exactly
    path = saver.save(run)
    if path is not None:
        fire(run.hooks.on_checkpoint, run, path)


def evaluate(
    run: Run,
    sources: Mapping[str, Source],
    step: Callable[[Any], Any],
    weigh: Callable[[Any], float],
    *,
    kind: str = "valid",
) -> dict[str, float]:
    """Means of what ``step`` returns and all metrics over ``sources``, as ``<kind>/<name>``, weighted by samples.

    Nothing of the training changes: random generators and train/eval flags are put back, no gradient is recorded.
    A signal ends it at the next batch: its values are dropped, and ``run.validated_at`` stays what it was.
    """
    hooks, values, team = run.hooks, dict[str, float](), run.team
    meters = run.meters.get(kind)
    if run.interrupted:
        return {}
    if team is not None:
        team.follow(run)
    with unseen(run):
        fire(hooks.on_test_start if kind == "test" else hooks.on_validation_start, run)
        for name, source in sources.items():
            series, mine = Series(), []
            fire(hooks.on_loader_start, run, kind, name)
            for batch in read(run, source, kind):
                if run.interrupted:
                    end_early(hooks.on_loader_end, run, kind, name)
                    end_early(hooks.on_validation_end, run)
                    return {}
                if hooks.on_eval_batch_start:
                    fire(hooks.on_eval_batch_start, run, batch)
                with run.precision.autocast(run.device):
                    output = as_output(step(batch), None)
                found: dict[str, Any] = {}
                scalars(output, found, "", None, {})
                if meters is not None:
                    meters.feed(output, batch)
                if team is None:
                    series.add(found, weigh(batch))
                else:
                    mine.append((team.batch, (found, weigh(batch), meters and meters.cut())))
                if hooks.on_eval_batch_end:
                    fire(hooks.on_eval_batch_end, run, output, batch)
            if team is not None:
                team.keep_up(run, step)
            for found, weight, state in team.in_order(mine) if team is not None else ():
                series.add(found, weight)
                if meters is not None:
                    meters.join([state])
            measured = series.take_epoch()
            if meters is not None:
                measured |= meters.compute()
                meters.reset()
            fire(hooks.on_loader_end, run, kind, name, measured)
            values |= {f"{kind}/{name}/{k}" if name else f"{kind}/{k}": v for k, v in measured.items()}
        log_values(run, values, kind)
        if kind == "test":
            fire(hooks.on_test_end, run, values)
        else:
            run.validated_at = run.progress.step
            fire(hooks.on_validation_end, run, values)
        if team is not None:
            team.pulse.settle(run)
    return values


def predict(run: Run, source: Source, step: Callable[[Any], Any]) -> list[Any]:
    """What ``step`` returns for each batch, in order, on the CPU."""
    hooks, outputs = run.hooks, []
    with unseen(run):
        fire(hooks.on_predict_start, run)
        fire(hooks.on_loader_start, run, "predict", "")
        for batch in read(run, source, "predict"):
            if hooks.on_predict_batch_start:
                fire(hooks.on_predict_batch_start, run, batch)
            with run.precision.autocast(run.device):
                output = step(batch)
            if hooks.on_predict_batch_end:
                fire(hooks.on_predict_batch_end, run, output, batch)
            outputs.append(move(output, torch.device("cpu")))
            if run.team is not None:
                outputs[-1] = run.team.batch, outputs[-1]
        if run.team is not None:
            run.team.keep_up(run, step)
        fire(hooks.on_loader_end, run, "predict", "", {})
        fire(hooks.on_predict_end, run)
    return outputs if run.team is None else run.team.in_order(outputs)
